"""The benchmark of simulations: bars from known rows, what counts as what, and every way on a small federation."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from pfed_benchmarks.contract import Outcome, Report, Row
from pfed_benchmarks.simulation import WAYS, Setting, bars, digits, measure
from pfed_benchmarks.simulation_parts import PARTS, part_of, watching
from pfed_benchmarks.tables import table_of

from pfed_cli.simulation import SimulatedClient
from pfed_server.sql_store import SqlStore
from pfedsecure.plan import Plan

ROWS: list[Row] = [
    {"way": "pfed simulate", "seconds": 450.0},
    {"way": "one by one", "seconds": 1.0, "training": 30.0},
    {"way": "side by side", "seconds": 1.0, "training": 31.0},
    {"way": "batched", "seconds": 1.0, "training": 20.0},
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Three clients of a few digits."""
    made = digits(3, 2, tmp_path_factory.mktemp("cache"))
    plan = made.plan.model_copy(update={"training": made.plan.training.model_copy(update={"local_epochs": 1})})
    clients = [
        SimulatedClient(c.name, c.train.subset(np.arange(40)), c.test.subset(np.arange(40))) for c in made.clients
    ]
    return Setting(plan, clients, made.backbone, made.arguments, made.feature_seconds)


def test_the_limit_is_for_a_hundred_clients() -> None:
    found = bars(ROWS, 100)
    assert {name: (bar.value, bar.limit, bar.ok) for name, bar in found.items()} == {
        "seconds_100_clients": (450.0, 600.0, True),
        "batched_training_speedup": (1.5, None, True),
    }
    assert not bars([{"way": "pfed simulate", "seconds": 601.0}, *ROWS[1:]], 100)["seconds_100_clients"].ok
    assert bars(ROWS, 6)["seconds_6_clients"].limit is None


def test_the_table_has_the_ways_and_the_whole_command() -> None:
    parts: Row = {"training": 30.0, "matching": 4.0, "aggregation": 3.0, "store": 2.0, "other": 1.0}
    ways: list[Row] = [{"way": way, "seconds": 61.0, "later_round_seconds": 20.0, **parts} for way in WAYS]
    whole: Row = {"way": "pfed simulate", "rounds": 10, "seconds": 450.0, "mean_accuracy": 0.9}
    params = {
        "load": 0.5,
        "clients": 100,
        "classes": 100,
        "images": 3300,
        "backbone": "tiny-clip",
        "compared_rounds": 3,
    }
    rows = [whole, *ways]
    table = table_of(Report.of("simulation", Outcome(params=params, rows=rows, bars=bars(rows, 100))))

    assert "The whole command, 10 rounds: 450 s, mean accuracy 90.0 %." in table
    assert "| batched | 61 | 20 | 30 | 4 | 3 | 2 | 1 |" in table
    assert "`seconds_100_clients`: 450 (<= 600: ok)" in table


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_measured_by_part(way: str, setting: Setting) -> None:
    row = measure(way, setting, 2)

    spent = {part: float(str(row[part])) for part in PARTS}
    assert sum(spent.values()) == pytest.approx(float(str(row["cpu_seconds"])), abs=0.1)
    assert all(spent[part] > 0 for part in ("training", "matching", "aggregation", "store"))
    assert float(str(row["later_round_seconds"])) > 0


@pytest.mark.slow
def test_what_is_computed_in_a_thread_counts_as_its_part(setting: Setting) -> None:
    def busy() -> None:
        until = time.thread_time() + 0.2
        while time.thread_time() < until:
            pass

    with watching() as parts, ThreadPoolExecutor(1, thread_name_prefix="training") as pool:
        pool.submit(busy).result()
    assert parts["training"] == pytest.approx(0.2, abs=0.1)
    assert ThreadPoolExecutor.submit.__module__ == "concurrent.futures.thread"  # as it was

    store = SqlStore.in_memory(setting.plan)
    try:
        assert part_of("asyncio", store.pool) == "store"
        assert part_of("asyncio", partial(store.global_prompt, 1)) == "store"
        assert part_of("asyncio", Plan.digest) is None
        assert part_of("encrypted matching", print) == "matching"
    finally:
        store.close()

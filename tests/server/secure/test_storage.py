"""What a server writes down of a round, looked for byte by byte in the files of its state."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from pfed_server.database import DATABASE_FILE, empty_log
from pfed_server.sql_store import SqlStore
from pfedsecure.aggregation.secure import parameters
from pfedsecure.plan import Plan
from pfedsecure.secagg import Encoding, Update
from pfedsecure.seeds import derive_seed
from pfedsecure.wire.v1.secagg_pb2 import MaskedInput, Shares, Unmasking

MakePlan = Callable[..., Plan]
SHAPE = (2, 3)
FOUR = ("anna", "bert", "cleo", "dora")
PLAIN = {"aggregation": "plain", "experts": "plain", "matching": "plain"}
SEALED = {"aggregation": "secure", "experts": "sealed", "matching": "random"}


def written(folder: Path) -> bytes:
    """The database with its write-ahead log."""
    files = sorted(path for path in folder.iterdir() if path.name.startswith(DATABASE_FILE))
    assert any(path.name.endswith("-wal") for path in files), "the server is at work"
    return b"".join(path.read_bytes() for path in files)


def prompts_of(cohort: Any) -> dict[str, bytes]:
    """All forms in which a client's prompt could stand there: as trained, times its weight, and as numbers to mask."""
    forms = {}
    for name, one in cohort.contributions.items():
        weighted = (one.context.astype(np.float64) * one.weight).astype(np.float32)
        forms[f"{name}'s prompt"] = one.context.astype("<f4").tobytes()
        forms[f"{name}'s weighted prompt"] = weighted.astype("<f4").tobytes()
        forms[f"{name}'s prompt in float64"] = one.context.astype("<f8").tobytes()
        if cohort.plan.protection.aggregation == "secure":
            encoding = Encoding.of(parameters(cohort.plan, SHAPE), len(cohort.names))
            seed = derive_seed(cohort.plan.seed, name, "secure aggregation rounding", 1)
            update = Update(one.context.reshape(-1), one.weight)
            encoded = encoding.encode(update, np.random.default_rng(seed).bytes)[: one.context.size]
            forms[f"{name}'s encoded prompt"] = encoded.astype(encoding.dtype.newbyteorder("<")).tobytes()
    return forms


def found(folder: Path, needles: Mapping[str, bytes]) -> set[str]:
    content = written(folder)
    return {what for what, needle in needles.items() if needle in content}


async def test_plain_averaging_shows_that_a_prompt_is_found_where_it_is(
    make_plan: MakePlan, drive: Any, cohort_of: Any, tmp_path: Path
) -> None:
    """Nothing is protected here, but for what is written: it ends with the round."""
    plan = make_plan(minimum_cohort=3, start_clients=4, deadline_seconds=5, protection=PLAIN)
    cohort = cohort_of(plan, FOUR)
    with closing(SqlStore.open(tmp_path, plan)) as store:
        async with drive(plan, store) as driver:
            await driver.join(*FOUR)
            await cohort.opened(driver, 1, 1)
            for name in FOUR[:3]:
                await driver.submit(name, 1, cohort.contributions[name].context, cohort.contributions[name].weight)
            forms = prompts_of(cohort)
            assert found(tmp_path, forms) == {f"{name}'s weighted prompt" for name in FOUR[:3]}
            await driver.publish("anna", 1, cohort.contributions["anna"].context)
            assert "anna's prompt" in found(tmp_path, forms)
            driver.clock.advance(5)
            await cohort.opened(driver, 2, 1)
            # What was published stays, in the pool.
            assert found(tmp_path, forms) == {"anna's prompt"}


async def test_an_abandoned_round_leaves_nothing(
    make_plan: MakePlan, drive: Any, cohort_of: Any, tmp_path: Path
) -> None:
    plan = make_plan(minimum_cohort=3, start_clients=4, deadline_seconds=5, protection=PLAIN)
    cohort = cohort_of(plan, FOUR)
    with closing(SqlStore.open(tmp_path, plan)) as store:
        async with drive(plan, store) as driver:
            await driver.join(*FOUR)
            await cohort.opened(driver, 1, 1)
            await driver.work("anna", 1, cohort.contributions["anna"].context, cohort.contributions["anna"].weight)
            forms = prompts_of(cohort)
            assert found(tmp_path, forms) == {"anna's weighted prompt", "anna's prompt"}
            driver.clock.advance(5)
            await cohort.opened(driver, 2, 1)
            assert found(tmp_path, forms) == set()


async def test_no_prompt_is_ever_written_and_no_message_outlives_its_round(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, tmp_path: Path
) -> None:
    plan = secure_plan(clients=4, experts=2, protection=SEALED)
    cohort = cohort_of(plan, FOUR)
    sent: dict[str, bytes] = {}
    with closing(SqlStore.open(tmp_path, plan)) as store:
        async with drive(plan, store) as driver:
            await driver.join(*FOUR)
            await cohort.opened(driver, 1, 1)
            await cohort.enter(driver, 1)
            forms = prompts_of(cohort)
            for name in FOUR:
                await driver.publish_sealed(name, 1, cohort.contributions[name].context)
            for step in range(1, 6):
                await cohort.opened(driver, 1, step)
                for name in FOUR:
                    await cohort.send(driver, 1, step, name)
                    message = cohort.clients[name].message
                    if step == 2:
                        sent[f"{name}'s shares"] = Shares.FromString(message).sealed[:64]
                    elif step == 3:
                        sent[f"{name}'s masked vector"] = MaskedInput.FromString(message).vector
                    elif step == 5:
                        sent[f"{name}'s unmasking"] = Unmasking.FromString(message).shares[:64]
                    if not (step == 5 and name == "dora"):  # with that the round closes
                        assert found(tmp_path, sent) == set(sent)
                    assert found(tmp_path, forms) == set()
            await cohort.opened(driver, 2, 1)
            assert len(sent) == 12
            assert found(tmp_path, sent) == set()
            assert found(tmp_path, forms) == set()
            mean = await driver.global_prompt("anna", 2)
            assert found(tmp_path, {"mean": mean.astype("<f4").tobytes()}) == {"mean"}
    assert not any(needle in (tmp_path / DATABASE_FILE).read_bytes() for needle in [*sent.values(), *forms.values()])


async def test_what_a_server_could_not_wipe_before_it_was_killed_goes_when_it_comes_back(
    secure_plan: MakePlan, drive: Any, cohort_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = secure_plan(clients=4)
    cohort = cohort_of(plan, FOUR)
    monkeypatch.setattr("pfed_server.sql_store.empty_log", lambda engine: None)
    with closing(SqlStore.open(tmp_path / "state", plan)) as store:
        async with drive(plan, store) as driver:
            await driver.join(*FOUR)
            await cohort.opened(driver, 1, 1)
            await cohort.play(driver, 1, until=3)
            vector = {"vector": MaskedInput.FromString(cohort.clients["anna"].message).vector}
            for step in (4, 5):
                await cohort.opened(driver, 1, step)
                await cohort.send(driver, 1, step)
            await cohort.opened(driver, 2, 1)
            assert found(tmp_path / "state", vector) == {"vector"}, "the round is closed, and the log still has it"
            (tmp_path / "killed").mkdir()
            for path in (tmp_path / "state").glob(f"{DATABASE_FILE}*"):
                (tmp_path / "killed" / path.name).write_bytes(path.read_bytes())
    with closing(SqlStore.open(tmp_path / "killed", plan)) as store:
        assert store.load().rounds_completed == 1
        files = [path.read_bytes() for path in (tmp_path / "killed").iterdir()]
        assert not any(vector["vector"] in content for content in files)


def test_a_log_that_cannot_be_emptied_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    """The round is closed by then: an error would have it closed again, without its messages."""
    empty_log(Mock(raw_connection=Mock(side_effect=sqlite3.OperationalError("disk I/O error"))))
    assert "the log of the database cannot be emptied" in caplog.text

"""The secure aggregation benchmark: its bars from known rows, and whole rounds of tiny cohorts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from pfed_benchmarks import secagg
from pfed_benchmarks.contract import Report, Row
from pfed_benchmarks.secagg import bars, ckks, command, flower, ours
from pfed_benchmarks.secagg_round import Consortium

from pfedsecure.errors import BenchError


def row(way: str, clients: int = 100, **numbers: float) -> Row:
    return {"way": way, "clients": clients, "values": 8192, "dropout": 0.1, **numbers}


def test_bars_compare_the_reference_case() -> None:
    rows = [
        row("pfedsecure", client_ms=40.0, server_ms=80.0, expansion=1.002, error_over_bound=0.2, server_mib=70.0),
        row("flower", client_ms=2000.0, server_ms=4000.0, expansion=2.0),
        row("pfedsecure", 1000, client_ms=1.0, server_ms=1.0, expansion=1.0, error_over_bound=0.7, server_mib=300.0),
    ]
    found = bars(rows)
    assert {name: (bar.value, bar.ok) for name, bar in found.items()} == {
        "client_ms_100": (40.0, True),
        "client_ratio_flower_100": (50.0, True),
        "server_ms_100": (80.0, True),
        "server_ratio_flower_100": (50.0, False),
        "expansion_100": (1.002, True),
        "sum_error_over_bound": (0.7, True),
        "server_mib_1000": (300.0, True),
    }
    assert set(bars(rows[:1])) == {"client_ms_100", "server_ms_100", "expansion_100", "sum_error_over_bound"}


@pytest.fixture(scope="module")
def consortium() -> Consortium:
    return Consortium.of(5)


def test_a_whole_round_is_measured(consortium: Consortium) -> None:
    found = ours(consortium, 5, 64, 0.2)
    assert found["graph"] == "complete"
    assert 0 < found["error_over_bound"] <= 1
    assert 0 < found["client_ms"] < found["client_first_ms"]
    assert found["server_ms"] > 0
    assert found["server_relay_ms"] > 0
    assert found["bytes_up"] > 4 * 64
    assert 1 < found["expansion"] < 1.5
    assert 10 < found["server_mib"] < 1024


def test_ckks_gives_the_sum_too() -> None:
    found = ckks(4, 64, 0.25)
    assert found["sum_error"] < 1e-3
    assert found["client_ms"] > 0
    assert found["bytes_up"] > found["expansion"]


def test_the_command_leaves_flower_out_where_it_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(secagg, "QUICK_CASES", ((3, 16, 0.0),))
    monkeypatch.setattr(secagg.importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "report.json"
    result = CliRunner().invoke(command, ["--quick", "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = Report.read(file)
    assert report.bench == "secagg"
    assert [found["way"] for found in report.rows] == ["pfedsecure", "ckks"]
    assert report.params["flwr"] is None


def test_a_python_without_flower_is_said_so(tmp_path: Path) -> None:
    pretended = tmp_path / "python"
    pretended.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    pretended.chmod(0o755)
    arguments = ["--quick", "--json", str(tmp_path / "x"), "--flower-python", str(pretended)]
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, BenchError)
    assert f"{pretended} has no flwr; install it there" in str(result.exception)
    with pytest.raises(BenchError, match=r"secagg_flower.py failed under .*No module named"):
        flower(pretended, 10, 16, 0.0)


def test_a_size_that_is_not_measured_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--clients", "7", "--json", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "--clients takes one of 10, 50, 100, 500, 1000" in result.output

"""The JSON of `pfed bench`, and what is refused as such."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from pfed_benchmarks import contract
from pfed_benchmarks.contract import Bar, Outcome, Report, benchmark, this_machine
from pydantic import ValidationError

import pfedsecure
from pfedsecure.errors import BenchError

ROWS: list[contract.Row] = [{"size": 1, "seconds": 0.5}, {"size": 2, "seconds": None}]


@benchmark
@click.option("--size", type=int, default=3)
def command(*, quick: bool, size: int) -> Outcome:
    """How long it takes."""
    bars = {"speed": Bar.of(2.0, 1.5, "<="), "seen": Bar.of(-1.0, None, ">=", deviation=0.5)}
    return Outcome(params={"quick": quick, "size": size}, rows=ROWS, bars=bars)


def test_a_benchmark_is_a_command_with_its_own_options(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "out.json"
    result = CliRunner().invoke(command, ["--quick", "--size", "4", "--json", str(file)])

    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text()) == {
        "bench": __name__.rpartition(".")[2].replace("_", "-"),
        "version": pfedsecure.__version__,
        "machine": this_machine().model_dump(),
        "params": {"quick": True, "size": 4},
        "rows": ROWS,
        "bars": {
            "speed": {"value": 2.0, "limit": 1.5, "sense": "<=", "ok": False, "deviation": None},
            "seen": {"value": -1.0, "limit": None, "sense": ">=", "ok": True, "deviation": 0.5},
        },
    }
    assert result.output.splitlines() == [
        "speed: 2 (<= 1.5: MISSED)",
        "seen: -1 ± 0.5 (no limit)",
        f"2 rows in {file}",
    ]
    assert Report.read(file).rows == ROWS


def test_help_tells_the_question_and_the_options() -> None:
    output = CliRunner().invoke(command, ["--help"]).output

    assert "How long it takes." in output
    assert all(option in output for option in ("--quick", "--json", "--size"))


def test_the_report_must_go_somewhere(tmp_path: Path) -> None:
    assert CliRunner().invoke(command, []).exit_code == 2
    (tmp_path / "file").touch()
    result = CliRunner().invoke(command, ["--json", str(tmp_path / "file" / "out.json")])
    assert isinstance(result.exception, BenchError)
    assert "cannot be written" in str(result.exception)


@pytest.mark.parametrize(
    ("value", "limit", "sense", "ok"),
    [
        (1.0, 1.0, "<=", True),
        (1.1, 1.0, "<=", False),
        (1.0, 1.0, ">=", True),
        (0.9, 1.0, ">=", False),
        (0.0, None, "<=", True),
    ],
)
def test_a_bar_judges_by_its_limit(value: float, limit: float | None, sense: contract.Sense, ok: bool) -> None:
    assert Bar.of(value, limit, sense).ok is ok
    with pytest.raises(ValidationError, match=f"ok is {not ok}"):
        Bar(value=value, limit=limit, sense=sense, ok=not ok)


def test_a_bar_has_a_finite_value() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Bar.of(float("nan"), 1.0, "<=")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not the JSON of `pfed bench`"),
        ("{}", "bench is missing"),
        ('{"bench": "x", "extra": 1}', "not the JSON of `pfed bench`"),
    ],
)
def test_another_file_is_refused(content: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)

    with pytest.raises(BenchError, match=problem):
        Report.read(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"none\.json: cannot be read"):
        Report.read(tmp_path / "none.json")


def test_the_machine_is_described() -> None:
    machine = this_machine("a GPU")

    assert machine.cores >= 1
    assert machine.cpu
    assert machine.gpu == "a GPU"
    assert {"python", "torch", "numpy"} <= set(machine.versions)

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from pfed_benchmarks import BENCHMARKS, module_of
from pfed_benchmarks.cli import bench

from pfed_cli.main import main
from pfedsecure.errors import BenchError


def test_the_list_has_every_benchmark() -> None:
    assert CliRunner().invoke(bench, ["--list"]).output.split() == list(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_a_command(name: str) -> None:
    command = import_module(module_of(name)).command

    assert isinstance(command, click.Command)
    assert command.name == name
    assert {"--json", "--quick"} <= {option for parameter in command.params for option in parameter.opts}


def test_a_name_is_needed() -> None:
    result = CliRunner().invoke(bench, [])

    assert result.exit_code == 2
    assert "give a benchmark's name; --list prints them" in result.output


def test_an_unknown_name_is_a_usage_error() -> None:
    result = CliRunner().invoke(bench, ["nothing", "--json", "x"])

    assert result.exit_code == 2
    assert "No such command 'nothing'" in result.output


@pytest.mark.parametrize("command", [["bench-table"], ["bench-plot", "--into", "x.png"]])
@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), ("{}", "not the JSON of `pfed bench`")])
def test_a_file_that_is_no_report_ends_with_one_line_and_a_code_of_its_own(
    command: list[str], content: str | None, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    if content is not None:
        file.write_text(content)
    result = CliRunner().invoke(main, [*command, str(file)])

    assert result.exit_code == BenchError.exit_code
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"pfed: error: {file}: {said}")

from __future__ import annotations

from importlib import import_module

import click
import pytest
from click.testing import CliRunner

from pfed_benchmarks import BENCHMARKS, module_of
from pfed_benchmarks.cli import bench


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

"""The command as its users meet it: in a process of its own where that matters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pfed_cli.lazy import LazyCommand, LazyGroup
from pfed_cli.main import COMMANDS, main
from pfedsecure.errors import DataError


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pfed_cli.main", *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_help_lists_every_command_and_loads_none() -> None:
    script = (
        "import sys\nfrom pfed_cli.main import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'grpc', 'cryptography', 'numpy', 'sqlalchemy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

    assert result.stdout.splitlines()[-1] == "[]"
    for name, command in COMMANDS.items():
        assert name in result.stdout
        assert command.summary in " ".join(result.stdout.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])

    assert result.exit_code == 0, result.output
    assert f" {name} " in result.output.splitlines()[0]


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["nothing"])

    assert result.exit_code == 2
    assert "No such command 'nothing'" in result.output


def test_a_mistake_is_one_line_with_its_own_status(tmp_path: Path) -> None:
    result = run("pki", "show", "nowhere", folder=tmp_path)

    assert result.returncode == 40
    (line,) = result.stderr.splitlines()
    assert line.startswith("pfed: error: nowhere holds no authority, identity or request")


@click.command()
def raises_data_error() -> None:
    raise DataError("no images\nin here")


@click.command()
def is_interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "status", "line"),
    [
        ("raises_data_error", 20, "pfed: error: no images in here"),
        ("is_interrupted", 130, "pfed: interrupted"),
    ],
)
def test_how_a_command_ends(command: str, status: int, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_module_of_this_test", sys.modules[__name__])
    group = LazyGroup({"it": LazyCommand("a_module_of_this_test", command, "")}, name="pfed")
    result = CliRunner().invoke(group, ["it"])

    assert (result.exit_code, result.output) == (status, line + "\n")

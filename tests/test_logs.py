"""Logs as JSON: every line can be read, whatever is in it, and says what it is about."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pfed_client.json_watcher import JsonWatcher
from pfed_client.metrics import RoundRecord
from pfedsecure.logs import JsonFormatter
from pfedsecure.plan import Plan

PLAN = Plan.model_validate({"class_names": ["cat", "dog"], "name": "hospitals"})


def test_a_line_says_what_it_is_about_and_nobody_can_forge_another() -> None:
    formatter = JsonFormatter()
    formatter.federation = "hospitals"
    record = logging.LogRecord("pfed_server", logging.INFO, "x", 1, "%s joined", ('a"\n{"level": "error"}\x1b',), None)
    record.peer, record.round = "anna", 3
    line = formatter.format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "info",
        "logger": "pfed_server",
        "message": 'a"\n{"level": "error"}\x1b joined',
        "federation": "hospitals",
        "round": 3,
        "peer": "anna",
    }


def test_a_traceback_is_in_its_line() -> None:
    try:
        raise ValueError("deep\ninside")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x", 1, "failed", (), sys.exc_info())
    found = json.loads(JsonFormatter().format(record))
    assert found["traceback"].endswith("ValueError: deep\ninside")


def test_a_client_logs_nothing_of_its_images(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pfed_client"):
        watcher = JsonWatcher()
        watcher.features(4321, 4321)
        watcher.joined(PLAN)
        watcher.step(1, 2, 3, 0.8765)
        watcher.round_done(RoundRecord(1, 0.8765, 0.7654, 4321, 3, 10, 10, 1.5))
        watcher.finished(0.7654)
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert [json.loads(line)["message"] for line in lines] == [
        "joined, 10 rounds are planned",
        "work of this round is sent, 3 experts borrowed",
        "finished",
    ]
    assert json.loads(lines[1])["round"] == 1
    assert not any(number in line for number in ("8765", "7654", "76.5", "4321") for line in lines)


@pytest.mark.parametrize("module", ["pfed_server", "pfed_client"])
def test_a_mistake_is_a_line_of_the_log(module: str, tmp_path: Path) -> None:
    where = ["--tls"] if module == "pfed_server" else []
    command = [sys.executable, "-m", module, *where, "--log-format", "json", "--plan", "nowhere.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 10
    (line,) = done.stderr.splitlines()
    found = json.loads(line)
    assert (found["level"], found["logger"]) == ("error", module.replace("_", "-"))
    assert found["message"].startswith("error: nowhere.toml: cannot read the plan")


def test_there_are_two_forms() -> None:
    from pfed_server.cli import main

    result = CliRunner().invoke(main, ["--tls", "--log-format", "xml"])
    assert result.exit_code == 2
    assert "'xml' is not one of 'text', 'json'" in result.stderr


def test_what_is_private_stays_on_the_terminal() -> None:
    """How many images there are, or what a file is called, is nobody's business where logs are collected."""
    record = logging.LogRecord("pfedsecure.data", logging.WARNING, "x", 1, "%s (left out)", ("ward 3/doe.png",), None)
    record.private = True
    assert "doe" not in JsonFormatter().format(record)
    assert record.getMessage() == "ward 3/doe.png (left out)"

"""`pfed audit` as an operator meets it."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from click.testing import CliRunner, Result

from pfed_cli.main import main
from pfed_server.audit import AUDIT_FILE, AuditLog
from pfed_server.events import joined, left, refused
from pfedsecure.errors import AuditError


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["audit", *arguments])


def log(folder: Path) -> Path:
    with closing(AuditLog.open(folder)) as written:
        written.record(joined("anna", "f" * 64))
        written.record(refused("/x/Join", "NameTaken", "no\x1b[2J\nway", "anna", "e" * 64, "192.0.2.1"))
        written.record(left("anna"))
    return folder / AUDIT_FILE


def test_a_log_that_holds(tmp_path: Path) -> None:
    path = log(tmp_path)
    lines = run("verify", str(path)).output.splitlines()
    assert lines[0] == f"{path}: 3 lines, the chain holds"
    assert "nobody can see from this that lines are missing at the end" in lines[1]
    head = lines[-1].split()[1]
    log(tmp_path)
    assert "the head that was noted is in it, 3 lines follow" in run("verify", str(path), "--head", head).output
    found = json.loads(run("verify", str(path), "--head", head, "--json").output)
    assert (found["lines"], found["after_noted"], found["cut_short_before"]) == (6, 3, [])


def test_a_log_that_does_not(tmp_path: Path) -> None:
    path = log(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"event":"joined","peer":"anna"', b'"event":"joined","peer":"anne"'))
    result = run("verify", str(path))
    assert result.exit_code == AuditError.exit_code
    assert result.stderr.startswith(f"pfed: error: {path}: line 2 does not follow the line before it")
    shown = run("show", str(path))
    assert shown.exit_code == AuditError.exit_code
    assert len(shown.stdout.splitlines()) == 1


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    result = run("verify", str(tmp_path / "nowhere"))
    assert result.exit_code == AuditError.exit_code
    assert "cannot be read (No such file or directory)" in result.stderr
    short = run("verify", str(log(tmp_path)), "--head", "abc")
    assert short.exit_code == 2
    assert "a head is 64 hexadecimal digits" in short.stderr


def test_show_tells_a_line_an_event_and_nobody_can_steer_the_terminal(tmp_path: Path) -> None:
    path = log(tmp_path)
    lines = run("show", str(path)).output.splitlines()
    assert [line.split()[3:5] for line in lines] == [["joined", "anna"], ["refused", "anna"], ["left", "anna"]]
    assert "\x1b" not in lines[1]
    assert 'reason="NameTaken"' in lines[1]
    assert len(run("show", str(path), "--event", "left").output.splitlines()) == 1
    assert run("show", str(path), "--peer", "bert").output == ""

"""Connections and file descriptors: the limit that may be raised is raised, and what cannot be had is said."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pfed_server.descriptors import SPARE, limits, make_room, most_connections
from pfedsecure.wire.options import MOST_CONNECTIONS

Limit = Callable[[int, int], list[tuple[int, int]]]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Have the system answer with these limits; gives the ones that are set, which change them."""

    def answer(soft: int, hard: int) -> list[tuple[int, int]]:
        changed: list[tuple[int, int]] = []

        def get(kind: int) -> tuple[int, int]:
            assert kind == resource.RLIMIT_NOFILE
            return changed[-1] if changed else (soft, hard)

        monkeypatch.setattr(resource, "getrlimit", get)
        monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: changed.append(pair))
        return changed

    return answer


def test_the_soft_limit_is_raised_as_far_as_it_is_needed(limit: Limit) -> None:
    changed = limit(1024, 65536)
    assert make_room(2000) == 2000
    assert changed == [(2000 + SPARE, 65536)]
    assert make_room(500) == 500
    assert len(changed) == 1  # there is room for fewer: nothing is lowered


def test_no_more_connections_than_the_hard_limit_carries(limit: Limit) -> None:
    changed = limit(256, 1024)
    assert make_room(2000) == 1024 - SPARE == most_connections()
    assert changed == [(1024, 1024)]


def test_a_limit_that_is_none(limit: Limit) -> None:
    changed = limit(1024, resource.RLIM_INFINITY)
    assert limits() == (1024, sys.maxsize)
    assert make_room(5000) == 5000
    assert changed == [(5000 + SPARE, resource.RLIM_INFINITY)]


def started_with(hard: int, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A server in a process that may have so many files; it ends because its plan is not there, if not before."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({hard // 2}, {hard}))\n"
        "from pfed_server.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "--tls", "--plan", "nowhere.toml", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_server_says_how_many_it_can_take_and_refuses_what_it_cannot(tmp_path: Path) -> None:
    room = 600 - SPARE
    needed = f"{MOST_CONNECTIONS} connections take {MOST_CONNECTIONS + SPARE} file descriptors"
    warned, last = started_with(600, tmp_path).stderr.splitlines()
    assert f"only {room} callers can be connected at once: {needed}, and this process may have 600; raise" in warned
    assert "nowhere.toml: cannot read the plan" in last
    refused = started_with(600, tmp_path, "--connections", str(room + 1))
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith(f"or ask for {room} or fewer")
    assert "Traceback" not in refused.stderr
    (last,) = started_with(600, tmp_path, "--connections", str(room)).stderr.splitlines()
    assert "nowhere.toml: cannot read the plan" in last
    hopeless = started_with(SPARE, tmp_path)
    assert hopeless.returncode == 2
    assert hopeless.stderr.splitlines()[-1].endswith("ulimit -Hn)")

"""The fuzzer reaches every call with all kinds of messages, and finds a server that breaks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pfed_benchmarks.chaos import fuzz as fuzzing
from pfed_benchmarks.chaos.fuzz import Messages, fuzz, methods
from pfed_benchmarks.server_process import ServerProcess


def test_every_call_gets_messages_that_can_be_read_and_such_that_cannot() -> None:
    messages, found = Messages(1), Counter[tuple[str, bool]]()
    for method in methods():
        for _ in range(300):
            content = messages.message(method)
            try:
                method.input_type._concrete_class.FromString(content)
                found[method.name, True] += 1
            except Exception:
                found[method.name, False] += 1
    assert {name for name, _ in found} == {method.name for method in methods()}
    assert len(methods()) >= 16
    assert all(found[method.name, True] > 30 for method in methods())


BROKEN = """
import sys
if any(argument == "pfed_server" for argument in sys.orig_argv):
    from pfed_server.coordinator import Coordinator
    import os
    async def heartbeat(self, peer, request):
        {action}
    Coordinator.heartbeat = heartbeat
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "found_as"),
    [
        ("raise RuntimeError('broken')", "pfedsecure.v1.Federation.Heartbeat was answered with"),
        ("raise OSError('full')", "pfedsecure.v1.Federation.Heartbeat was answered with"),
        ("os._exit(3)", "no answer"),
    ],
)
def test_a_server_that_fails_inside_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, action: str, found_as: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN.format(action=action))
    monkeypatch.setattr(fuzzing, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = fuzz(3000, seed=2)
    assert found.problem is not None
    assert found.problem.startswith(found_as)


@pytest.mark.parametrize("said", ["failed", "failed for now"])
def test_what_failed_in_the_server_is_found_in_its_log(tmp_path: Path, said: str) -> None:
    """Where the transport lost the answer."""
    server = ServerProcess(tmp_path, [])
    (tmp_path / "log").write_text("20:15:48 fuzz joined, version failed\n")
    assert server.failures() == []
    with (tmp_path / "log").open("a") as log:
        log.write(f"20:15:49 /pfedsecure.v1.Round/SubmitStep {said}\nTraceback (most recent call last):\n")
    assert server.failures() == ["/pfedsecure.v1.Round/SubmitStep"]


@pytest.mark.slow
def test_a_server_answers_whatever_it_is_sent() -> None:
    found = fuzz(3000, seed=2)
    assert (found.problem, found.answered) == (None, 3000)
    assert {"INVALID_ARGUMENT", "OK", "PERMISSION_DENIED"} <= found.codes.keys()

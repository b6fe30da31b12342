from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from pfed_cli.demo.processes import Children, ProcessFailed

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)",
]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_until_done(children: Children) -> None:
    until = time.monotonic() + 30
    while children.check():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_children_run_in_the_folder_with_one_thread_and_write_to_their_logs(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        children.start("one", python("import os; print(os.getcwd(), os.environ['OMP_NUM_THREADS'])"), tmp_path / "log")
        wait_until_done(children)

    assert (tmp_path / "log").read_text() == f"{tmp_path} 1\n"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; print('first'); print('bad\\x1b[0m data'); sys.exit(20)", 20, "bad [0m data"),
        ("import os; os.kill(os.getpid(), 9)", 137, "it said nothing"),
    ],
)
def test_one_that_fails_is_named_and_ends_the_others(code: str, status: int, said: str, tmp_path: Path) -> None:
    log = tmp_path / "client-2.log"

    def run() -> None:
        with children:
            children.start("server", SLEEP, tmp_path / "server.log")
            children.start("client-2", python(code), log)
            wait_until_done(children)

    children = Children(tmp_path)
    with pytest.raises(ProcessFailed) as caught:
        run()
    assert caught.value.exit_code == status
    assert caught.value.message == f"client-2 ended with status {status}: {said} (its log: {log})"
    assert children.check() == set()


def test_whatever_happens_no_child_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfed_cli.demo.processes.STOP_SECONDS", 0.5)
    log = tmp_path / "deaf.log"
    processes = []

    def run() -> None:
        with Children(tmp_path) as children:
            children.start("asleep", SLEEP, tmp_path / "asleep.log")
            children.start("deaf", DEAF, log)
            processes.extend(process for process, _ in children._running.values())
            while not log.read_text():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [process.poll() for process in processes] == [-15, -9]

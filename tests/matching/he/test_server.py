"""The server's pool of encrypted sketches: whatever happened to it, answers are those of a search in clear."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedsecure.errors import MessageRejected, ServerUnreachable
from pfedsecure.matching.he import pool as pools
from pfedsecure.matching.he.client import HeClientMatching
from pfedsecure.matching.he.encryption import quantised
from pfedsecure.matching.he.parameters import Layout
from pfedsecure.matching.he.server import HeServerMatching
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.sketch import Sketcher
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.wire.v1.matching_pb2 import EncryptedAnswer

M = 1000  # blocks of eight
SHAPE = (4, 32)
SKETCHER = Sketcher(np.zeros(SHAPE, np.float32), M, 2.0, 7)
ONE = CohortSecrets.of({1: b"\x01" * 32})


def context_of(seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).normal(size=SHAPE)).astype(np.float32)


@pytest.fixture
def client(new_kept: Any) -> HeClientMatching:
    return HeClientMatching(SKETCHER, lambda: ONE, new_kept(), None)


@pytest.fixture
def server(executor: Executor, keys_of: Any) -> Any:
    made = HeServerMatching(M, executor)
    made.install(1, keys_of(M))
    yield made
    made.close()


def entry(client: HeClientMatching, name: str, seed: int) -> PoolEntry:
    sketch = client.sketch(context_of(seed), 1)
    return PoolEntry(name, f"id-{name}", sketch, f"{name}-{seed}".encode())


def in_clear(pool: dict[str, int], asker: str, seed: int) -> list[tuple[str, float]]:
    """Names and squared distances, nearest first, by sorting."""
    query = quantised(SKETCHER.sketch(context_of(seed)), 2.0)
    found = []
    for name, other in pool.items():
        if name != asker:
            theirs = quantised(SKETCHER.sketch(context_of(other)), 2.0)
            found.append((float(((query - theirs) ** 2).sum()), f"id-{name}"))
    return [(expert_id, squared) for squared, expert_id in sorted(found)]


def answered(
    server: Any, client: HeClientMatching, entries: list[PoolEntry], asker: str, seed: int, k: int = 99
) -> Any:
    query = client.query(context_of(seed), 1, seed + 10)
    ranked = client.rank(server.index(entries).answer(query, k, asker, 2), k)
    return [(candidate.expert_id, candidate.distance) for candidate in ranked]


@pytest.mark.slow
def test_after_any_history_it_answers_like_a_search_in_clear(server: Any, client: HeClientMatching) -> None:
    """Members come, change, leave; lanes get free and are used again; blocks empty and fill."""
    rng = np.random.default_rng(0)
    members: dict[str, int] = {}
    entries: dict[str, PoolEntry] = {}
    for step in range(7):
        for name in [f"c{number:02d}" for number in range(20)]:
            draw = rng.random()
            if name in members and draw < 0.25:
                del members[name], entries[name]
            elif draw < 0.45 or step == 0:
                members[name] = int(rng.integers(10**6))
                entries[name] = entry(client, name, members[name])
        if step == 4:
            members, entries = {}, {}
        asker = sorted(members)[0] if members else "nobody"
        assert answered(server, client, list(entries.values()), asker, step) == in_clear(members, asker, step)


@pytest.mark.slow
def test_a_block_is_made_anew_before_its_noise_adds_up(
    server: Any, client: HeClientMatching, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    update = pools.work.update
    monkeypatch.setattr(pools.work, "update", lambda old, *rest: (calls.append(old is None), update(old, *rest)))
    fixed = {f"c{number}": number for number in range(6)}
    entries = {name: entry(client, name, seed) for name, seed in fixed.items()}
    server.index(list(entries.values()))
    for seed in range(100, 100 + 8 * 8):
        entries["c0"] = entry(client, "c0", seed)
        server.index(list(entries.values()))
    assert calls[0]
    assert 1 <= sum(calls[1:]) <= 2
    assert answered(server, client, list(entries.values()), "x", 5) == in_clear(fixed | {"c0": 163}, "x", 5)


def test_nothing_is_computed_for_a_pool_that_stays(
    server: Any, client: HeClientMatching, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [entry(client, f"c{number}", number) for number in range(3)]
    server.index(entries)
    monkeypatch.setattr(pools.work, "update", lambda *_: pytest.fail("updated"))
    server.index(entries)


def test_files_of_rounds_long_over_are_gone(server: Any, client: HeClientMatching) -> None:
    for seed in range(5):
        server.index([entry(client, "c0", seed)])
    assert len(list(server._folder.glob("block-*"))) == 2  # of this round, and of the last: answers may be under way
    folder = server._folder
    server.close()
    assert not folder.exists()


def test_what_a_killed_server_left_behind_is_gone(executor: Executor, keys_of: Any, tmp_path: Path) -> None:
    """In a folder that it is given: nobody else may read it, and nothing in it is taken for what it was."""
    HeServerMatching(M, executor, tmp_path / "scratch").install(1, keys_of(M))
    (left,) = (tmp_path / "scratch").iterdir()
    server = HeServerMatching(M, executor, tmp_path / "scratch")
    assert not left.exists()
    assert (tmp_path / "scratch").stat().st_mode & 0o777 == 0o700
    server.close()
    assert not (tmp_path / "scratch").exists()


def test_an_epoch_that_is_forgotten_leaves_nothing(server: Any, client: HeClientMatching) -> None:
    index, query = server.index([entry(client, "c0", 1)]), client.query(context_of(1), 1, 2)
    server.forget(1)
    assert not list(server._folder.iterdir())
    with pytest.raises(MessageRejected, match="the round of this query is over"):
        index.answer(query, 1, "x", 2)
    assert server.index([entry(client, "c0", 1)]).lacks_setup(query) == 1


def test_without_keys_a_member_is_asked_for_them(executor: Executor, client: HeClientMatching, keys_of: Any) -> None:
    server = HeServerMatching(M, executor)
    query = client.query(context_of(1), 1, 2)
    assert server.index([]).lacks_setup(query) == 0  # nothing to compare with
    assert client.rank(server.index([]).answer(query, 1, "x", 2), 1) == []
    index = server.index([entry(client, "c0", 1)])
    assert index.lacks_setup(query) == 1
    assert client.asks_for_setup(index.asking_for_setup(1))
    server.install(1, client.setup())
    index = server.index([entry(client, "c0", 1)])
    assert index.lacks_setup(query) == 0
    answer = index.answer(query, 1, "x", 2)
    assert not client.asks_for_setup(answer)
    assert [candidate.expert_id for candidate in client.rank(answer, 1)] == ["id-c0"]
    server.close()


@pytest.mark.parametrize(
    ("epoch", "setup", "message"),
    [
        (2, "good", "of epoch 1 have come for epoch 2"),
        (1, b"\xff", "no EvaluationKeys"),
        (1, "other", "other rotations"),
    ],
)
def test_keys_that_cannot_be_used_are_refused(
    executor: Executor, keys_of: Any, epoch: int, setup: Any, message: str
) -> None:
    server = HeServerMatching(M, executor)
    content = {"good": keys_of(M), "other": keys_of(64)}.get(setup, setup)
    with pytest.raises(MessageRejected, match=message):
        server.install(epoch, content)
    assert server._epochs == {}
    server.close()


def test_a_sketch_must_be_of_the_epoch_of_its_expert(server: Any, client: HeClientMatching) -> None:
    sketch = client.sketch(context_of(1), 1)
    server.check_sketch(sketch, 1)
    with pytest.raises(MessageRejected, match="the sketch is of epoch 1, the expert beside it of epoch 2"):
        server.check_sketch(sketch, 2)
    with pytest.raises(MessageRejected, match="the sketch is not"):
        server.check_sketch(sketch[:-1], 1)
    assert len(sketch) <= server.max_sketch_bytes


def test_the_answer_names_no_author_and_nobody_in_free_lanes(server: Any, client: HeClientMatching) -> None:
    entries = [entry(client, f"c{number}", number) for number in range(3)]
    answer = EncryptedAnswer.FromString(server.index(entries).answer(client.query(context_of(1), 1, 2), 3, "c1", 2))
    (block,) = answer.blocks
    assert sorted(filter(None, block.expert_ids)) == ["id-c0", "id-c1", "id-c2"]
    assert block.expert_ids[answer.own.lane] == "id-c1"
    assert len(block.expert_ids) == Layout(M).stride == 8


def test_processes_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    """It has no chance to end them, and nobody else knows of them."""
    script = tmp_path / "server.py"
    script.write_text(
        "import os, signal\n"
        "from pfedsecure.matching.he.server import HeServerMatching\n"
        "if __name__ == '__main__':\n"
        "    executor = HeServerMatching(64)._executor\n"
        "    print(executor.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=60)
    worker = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 20
    while worker.exists() and "Z" not in (worker / "stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline, "the process outlives its server"
        time.sleep(0.05)


@pytest.mark.slow
def test_real_processes_compute_and_their_death_is_survived(client: HeClientMatching, keys_of: Any) -> None:
    server = HeServerMatching(M)
    try:
        server.install(1, keys_of(M))
        entries = [entry(client, f"c{number}", number) for number in range(10)]
        members = {f"c{number}": number for number in range(10)}
        assert answered(server, client, entries, "c3", 1) == in_clear(members, "c3", 1)
        index, query = server.index(entries), client.query(context_of(1), 1, 11)
        for process in list(server._made._processes.values()):
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.2)
        with pytest.raises(ServerUnreachable, match="interrupted; try again"):
            index.answer(query, 1, "c3", 2)
        assert client.rank(index.answer(query, 99, "c3", 2), 99)  # new processes, the same files
    finally:
        server.close()

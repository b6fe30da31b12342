"""Kills writers of a feature cache at one boundary after another, or lets several processes use one at once.

    python cache_processes.py kill FOLDER [--unprotected]
    python cache_processes.py share FOLDER

A boundary is before and after each system call that changes the cache, and the middle of each write. After each kill
what is found must be right, and what was added before must be found; then a process that goes on must get all done.
`--unprotected` writes segments in their place and believes them, to see that it would be noticed. Prints what it found,
as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import traceback
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pfedsecure.clip import feature_cache, feature_segment
from pfedsecure.clip.feature_cache import FeatureCache
from pfedsecure.clip.feature_segment import keys_of

TABLE = sha256(b"a backbone").hexdigest()
WIDTH = 8
ADDITIONS, EACH = 12, 3
PROCESSES, TURNS = 3, 150

# Small enough for merging, and for segments that are full.
feature_cache.SEGMENT_BYTES = 1000
feature_cache._MERGED = 4


def keys(numbers: list[int]) -> Any:
    return keys_of([sha256(b"%d" % number).digest() for number in numbers])


def features(numbers: list[int]) -> Any:
    return np.array([[number + place / 8 for place in range(WIDTH)] for number in numbers], np.float32)


def wrong(cache: FeatureCache, numbers: list[int]) -> str | None:
    """What of `numbers` is missing or not as it should be."""
    rows, found = cache.find(TABLE, keys(numbers))
    present = [numbers[row] for row in rows]
    if len(rows) and not np.array_equal(found, features(present)):
        return "wrong features"
    missing = set(numbers) - set(present)
    return f"lost {sorted(missing)}" if missing else None


class Killer:
    """Ends this process at the `kill_at`-th boundary; 0: never."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at
        self.count = 0

    def boundary(self) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Any) -> Any:
        def watched(*args: Any, **more: Any) -> Any:
            self.boundary()
            result = function(*args, **more)
            self.boundary()
            return result

        return watched

    def fdopen(self, descriptor: int, mode: str) -> HalfWritten:
        return HalfWritten(os.fdopen(descriptor, mode, buffering=0), self)


class HalfWritten:
    """A file whose `write` has a boundary in its middle."""

    def __init__(self, file: Any, killer: Killer) -> None:
        self._file = file
        self._killer = killer

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> None:
        for part in (content[: len(content) // 2], content[len(content) // 2 :]):
            self._killer.boundary()
            self._file.write(part)
        self._killer.boundary()


def watch(killer: Killer) -> None:
    watched_os = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)})
    watched_os.open = killer.around(os.open)
    watched_os.utime = killer.around(os.utime)
    watched_os.fdopen = killer.fdopen
    feature_cache.os = watched_os  # type: ignore[attr-defined]
    for name in ("mkdir", "replace", "unlink"):
        setattr(Path, name, killer.around(getattr(Path, name)))


def unprotect() -> None:
    def in_place(self: Any, table: str, content: bytes) -> Path:
        path = self._folder / table / feature_segment.file_name(content)
        with feature_cache.os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
        return Path(path)

    def believing(content: Any, path: Path, table: str) -> feature_segment.Segment:
        _, _, n, width = feature_segment._HEADER.unpack_from(bytes(content[:72]).ljust(72, b"\0"))
        rest = bytes(content[72:]).ljust(n * (32 + 4 * width), b"\0")
        stored = np.frombuffer(rest, "<f4", count=n * width, offset=32 * n).reshape(n, width)
        return feature_segment.Segment(np.frombuffer(rest, "S32", count=n), stored)

    FeatureCache._write_file = in_place  # type: ignore[method-assign]
    feature_segment._parse = believing


def add_all(home: Path, killer: Killer) -> None:
    watch(killer)
    cache = FeatureCache(home / "cache")
    for number in range(ADDITIONS):
        numbers = list(range(EACH * number, EACH * (number + 1)))
        cache.add(TABLE, keys(numbers), features(numbers))
        with (home / "added").open("a") as file:
            file.write(f"{number}\n")
        cache.find(TABLE, keys(numbers))


def in_child(work: Any, *args: Any) -> int:
    """Exit status of a process; negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(folder: Path) -> dict[str, object]:
    complaints, kill_at = [], 1
    everything = list(range(EACH * ADDITIONS))
    while True:
        home = folder / f"{kill_at}"
        home.mkdir()
        status = in_child(add_all, home, Killer(kill_at))
        if status == 0:
            break
        if status != -signal.SIGKILL:
            raise SystemExit(f"boundary {kill_at}: ended with {status}")
        done = len((home / "added").read_text().split()) if (home / "added").exists() else 0
        if found := wrong(FeatureCache(home / "cache"), everything[: EACH * done]):
            complaints.append(f"boundary {kill_at}: {found}")
        more = wrong(FeatureCache(home / "cache"), everything)
        if more == "wrong features":
            complaints.append(f"boundary {kill_at}: {more}")
        if in_child(add_all, home, Killer(0)) or (found := wrong(FeatureCache(home / "cache"), everything)):
            complaints.append(f"boundary {kill_at}, gone on: {found}")
        shutil.rmtree(home)
        kill_at += 1
    return {"boundaries": kill_at - 1, "complaints": complaints}


def take_turns(folder: Path, seed: int) -> None:
    """Add and read, some numbers of one's own and some that others add as well; what was added stays there."""
    draw = random.Random(seed)
    mine: set[int] = set()
    for _ in range(TURNS):
        numbers = [draw.randrange(300) for _ in range(draw.randrange(1, 6))]
        FeatureCache(folder / "cache").add(TABLE, keys(numbers), features(numbers))
        mine.update(numbers)
        asked = [*draw.sample(sorted(mine), min(len(mine), 50))]
        if found := wrong(FeatureCache(folder / "cache"), asked):
            with (folder / "complaints").open("a") as file:
                file.write(f"process {seed}: {found}\n")


def share(folder: Path) -> dict[str, object]:
    children = []
    for seed in range(PROCESSES):
        child = os.fork()
        if child == 0:
            try:
                take_turns(folder, seed)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    complaints = folder / "complaints"
    return {"statuses": statuses, "complaints": complaints.read_text().splitlines() if complaints.exists() else []}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["kill", "share"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unprotected", action="store_true")
    options = parser.parse_args()
    if options.unprotected:
        unprotect()
    print(json.dumps(kill(options.folder) if options.what == "kill" else share(options.folder)))


if __name__ == "__main__":
    main()

"""The server's side of encrypted matching: which sketch is in which lane of which block, and whose turn it is.

It has no key that opens anything; `client` says what is guaranteed. One epoch of the cohort's secret never meets
another: sketches and queries are compared with those of their own epoch alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from google.protobuf.message import DecodeError

from pfedsecure.console import one_line
from pfedsecure.errors import MessageRejected, ServerUnreachable
from pfedsecure.matching.he import work
from pfedsecure.matching.he.encryption import BODY_BYTES, SEED_BYTES, read_encrypted
from pfedsecure.matching.he.parameters import Layout
from pfedsecure.matching.he.pool import EpochPool, Part
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.wire.v1.matching_pb2 import EncryptedAnswer, EncryptedSketch, EvaluationKeys

MAX_SETUP_BYTES = 16 * 1024 * 1024
CHECK_SECONDS = 60.0
"""Honest keys take a tenth of a second."""
_FRAMING_BYTES = 64

_logger = logging.getLogger(__name__)


_Submit = Callable[[bytes, Sequence[work.BlockFile], Path], list[tuple[bytes, bytes]]]


class HeServerMatching:
    """The server's side for sketches of `dimension` numbers. `executor` runs what takes long; by default processes.

    `scratch` is a folder of its own for blocks and keys, whose content is made anew; by default a temporary one, which
    stays behind when the server is killed.
    """

    one_query = True
    max_sketch_bytes = SEED_BYTES + BODY_BYTES + _FRAMING_BYTES
    max_setup_bytes = MAX_SETUP_BYTES

    def __init__(self, dimension: int, executor: Executor | None = None, scratch: Path | None = None) -> None:
        self._layout = Layout(dimension)
        self._given = executor
        self._made: ProcessPoolExecutor | None = None
        self._folder = _emptied(scratch) if scratch else Path(tempfile.mkdtemp(prefix="pfed-matching-"))
        self._epochs: dict[int, EpochPool] = {}
        self._last: HeMatchIndex | None = None
        self._lock = threading.Lock()

    def check_sketch(self, sketch: bytes, epoch: int) -> None:
        """Raise MessageRejected unless it has the form of a ciphertext of `epoch`; what it encrypts cannot be seen."""
        found, _ = read_encrypted(sketch, "the sketch")
        if found != epoch:
            raise MessageRejected(f"the sketch is of epoch {found}, the expert beside it of epoch {epoch}")

    def install(self, epoch: int, setup: bytes) -> None:
        """Check evaluation keys in a process of their own, for at most CHECK_SECONDS, and keep them in a file.

        Raises MessageRejected for keys of another epoch, and for bytes that crash or stop whoever loads them.
        """
        message = _read_setup(setup)
        if message.epoch != epoch:
            raise MessageRejected(f"evaluation keys of epoch {message.epoch} have come for epoch {epoch}")
        try:
            self._executor.submit(work.check_keys, setup, self._layout).result(CHECK_SECONDS)
        except (BrokenProcessPool, TimeoutError):
            self._abandon_processes()
            raise MessageRejected("these are no evaluation keys: they crash or stop whoever uses them") from None
        # Never a name again that there was: processes remember by name what they read.
        path = self._folder / f"keys-{epoch}-{secrets.token_hex(8)}"
        path.write_bytes(setup)
        with self._lock:
            self._epochs[epoch] = EpochPool(epoch, path, self._layout, self._folder)

    def index(self, pool: Sequence[PoolEntry]) -> HeMatchIndex:
        """Blocks of the pool by epoch, built anew where sketches changed; an epoch that fails leaves the others as they
        are.

        What members complained of about the last index is heeded here: blocks are split, keys that spoil everything let
        go.
        """
        with self._lock:
            distrusted = self._heeding()
            by_epoch: dict[int, list[PoolEntry]] = {epoch: [] for epoch in self._epochs}
            for entry in pool:
                by_epoch.setdefault(EncryptedSketch.FromString(entry.sketch).epoch, []).append(entry)
            lacking = by_epoch.keys() - self._epochs.keys()
            parts = {}
            for number, held in self._epochs.items():
                try:
                    parts[number] = held.hold(by_epoch[number], self._executor)
                except BrokenProcessPool:
                    self._abandon_processes()
                    _logger.warning("matching in epoch %d was interrupted; this round goes without", number)
                except (RuntimeError, ValueError, OSError) as error:  # SEAL's, and files': no other epoch's concern
                    _logger.warning("matching in epoch %d failed: %s", number, one_line(str(error)))
            self._last = HeMatchIndex(parts, lacking, distrusted, self._layout, self._submit)
            return self._last

    def _heeding(self) -> list[int]:
        """Split what members of the last index found spoilt; the epochs whose keys are to blame, which are let go."""
        if self._last is None:
            return []
        distrusted = [
            number
            for number, held in self._epochs.items()
            if held.heed(self._last.complaining[number], self._last.asked[number])
        ]
        for number in distrusted:
            del self._epochs[number]
        self._last = None
        return distrusted

    def forget(self, epoch: int) -> None:
        """Delete keys and blocks of `epoch`; a query that still needs them is refused."""
        with self._lock:
            self._epochs.pop(epoch, None)
        for path in (*self._folder.glob(f"keys-{epoch}-*"), *self._folder.glob(f"block-{epoch}-*")):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Wait for the processes to end, and delete the scratch folder."""
        if self._made is not None:
            self._made.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _executor(self) -> Executor:
        if self._given is not None:
            return self._given
        if self._made is None:
            spawn = get_context("spawn")  # a fork would copy locks that threads hold
            self._made = ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn, initializer=work.prepare)
        return self._made

    def _submit(self, query: bytes, blocks: Sequence[work.BlockFile], keys: Path) -> list[tuple[bytes, bytes]]:
        size = max(1, -(-len(blocks) // (os.cpu_count() or 1)))
        parts = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        try:
            futures = [self._executor.submit(work.answer, query, part, keys, self._layout) for part in parts]
            return [answer for future in futures for answer in future.result()]
        except BrokenProcessPool:
            self._abandon_processes()
            raise ServerUnreachable("the server's matching was interrupted; try again") from None
        except FileNotFoundError:
            raise MessageRejected("the round of this query is over; ask where the federation stands") from None
        except RuntimeError as error:
            raise MessageRejected(f"this query cannot be answered ({one_line(str(error))})") from None

    def _abandon_processes(self) -> None:
        if self._made is not None:
            self._made.shutdown(wait=False, cancel_futures=True)
            self._made = None


class HeMatchIndex:
    """The pool of one round, by epoch; `lacking`: epochs of experts that there are no keys for."""

    def __init__(
        self,
        parts: dict[int, Part],
        lacking: Collection[int],
        distrusted: Collection[int],
        layout: Layout,
        submit: _Submit,
    ) -> None:
        self.distrusted = distrusted
        self.asked: defaultdict[int, set[str]] = defaultdict(set)
        """By epoch: who has had an answer with the distance to itself."""
        self.complaining: defaultdict[int, set[str]] = defaultdict(set)
        """Whoever of these said that it was wrong."""
        self._parts = parts
        self._lacking = lacking
        self._layout = layout
        self._submit = submit

    def lacks_setup(self, query: bytes) -> int:
        """The query's epoch when there are experts but no keys of it, else 0. Raises MessageRejected."""
        epoch, _ = read_encrypted(query, "the query")
        return epoch if epoch in self._lacking else 0

    def asking_for_setup(self, epoch: int) -> bytes:
        """An answer without distances, whose `keys_wanted` asks one member for `ClientMatching.setup`."""
        return EncryptedAnswer(epoch=epoch, keys_wanted=True).SerializeToString()

    def answer(self, query: bytes, k: int, asker: str, round_number: int) -> bytes:
        """Encrypted distances of the query to every sketch of its epoch, whatever `k`: the client ranks, the server
        cannot.

        Seconds for thousands of experts, in processes. Raises MessageRejected, or ServerUnreachable when a process
        died.
        """
        epoch, _ = read_encrypted(query, "the query")
        part = self._parts.get(epoch)
        reply = EncryptedAnswer(epoch=epoch)
        if part is None:
            return reply.SerializeToString(deterministic=True)
        files = []
        for number, (path, lanes) in enumerate(part.blocks):
            files.append(work.BlockFile(path, tuple(sorted(lanes))))
            ids = {lane: entry.expert_id for lane, entry in lanes.items()}
            reply.blocks.add(expert_ids=[ids.get(lane, "") for lane in range(self._layout.stride)])
            for lane, entry in lanes.items():
                if entry.owner == asker:
                    digest = hashlib.sha256(entry.sketch).digest()
                    reply.own.CopyFrom(EncryptedAnswer.Own(block=number, lane=lane, sketch_sha256=digest))
        for block, (bodies, shared) in zip(reply.blocks, self._submit(query, files, part.keys), strict=True):
            block.bodies, block.shared = bodies, shared
        if reply.HasField("own"):
            self.asked[epoch].add(asker)
        return reply.SerializeToString(deterministic=True)

    def complain(self, asker: str) -> None:
        """Note that `asker` found its own distance wrong. Raises MessageRejected for who had no such answer."""
        epochs = [epoch for epoch, asked in self.asked.items() if asker in asked]
        if not epochs:
            raise MessageRejected(f"{asker} has had no answer that could be wrong about itself")
        for epoch in epochs:
            self.complaining[epoch].add(asker)


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    return folder


def _read_setup(setup: bytes) -> EvaluationKeys:
    try:
        return EvaluationKeys.FromString(setup)
    except DecodeError:
        raise MessageRejected("these are no EvaluationKeys") from None

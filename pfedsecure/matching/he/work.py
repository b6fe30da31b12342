"""What takes long on the server, as functions on files and bytes: run by processes of their own.

SEAL's Python binding holds the interpreter's lock while it computes, so threads would neither run side by side nor let
the server answer its other callers. A process that SEAL's parser might crash takes nothing with it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.he.answers import packed
from pfedsecure.matching.he.encryption import SEED_BYTES, read_encrypted, stretch
from pfedsecure.matching.he.evaluation import Block, EvaluationKeys, Projected
from pfedsecure.matching.he.parameters import Layout
from pfedsecure.matching.he.seal_objects import ciphertext


@dataclass(frozen=True)
class Change:
    """What a lane of a block held and holds: uploads, None for an empty lane."""

    lane: int
    before: bytes | None
    after: bytes | None


@dataclass(frozen=True)
class BlockFile:
    """A block that `update` wrote, and the lanes of it that may be told of."""

    path: Path
    lanes: tuple[int, ...]


def prepare() -> None:
    """To be run first in a process, which is to end when its parent does, and not before.

    Ctrl-C is the parent's to handle. One that is killed handles nothing: nobody would end its processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "this is a process of its own"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def check_keys(content: bytes, layout: Layout) -> None:
    """Raises MessageRejected unless `content` are evaluation keys of this layout that can be computed with.

    Keys of the right form can still fail, or crash, what uses them: so all of it is tried, on random ciphertexts.
    """
    keys, block = EvaluationKeys(content, layout), Block()
    try:
        for lane in (0, layout.stride - 1):
            uniform = np.stack([stretch(os.urandom(SEED_BYTES)), stretch(os.urandom(SEED_BYTES))])
            block.put(Projected(uniform, layout, keys), lane)
        first, second = (block.answer(ciphertext(uniform), [0], layout, keys)[1] for _ in range(2))
    except RuntimeError as error:
        raise MessageRejected(f"these evaluation keys cannot be computed with ({error})") from None
    if (first == second).mean() > 0.5:
        raise MessageRejected("these evaluation keys do not make answers new")


def update(old: Path | None, changes: Sequence[Change], new: Path, keys: Path, layout: Layout) -> None:
    """Write the block `new`: the block `old`, or an empty one, with some lanes changed."""
    block = Block() if old is None else Block.read(old)
    for change in changes:
        if change.before is not None:
            block.put(_projected(change.before, keys, layout), change.lane, sign=-1)
        if change.after is not None:
            block.put(_projected(change.after, keys, layout), change.lane)
    unfinished = new.with_suffix(f".{os.getpid()}")
    block.write(unfinished)
    unfinished.replace(new)


def answer(query: bytes, blocks: Sequence[BlockFile], keys: Path, layout: Layout) -> list[tuple[bytes, bytes]]:
    """Bodies and shared polynomial, for the wire, of each block's answer to an EncryptedSketch."""
    _, polynomials = read_encrypted(query, "the query")
    encrypted = ciphertext(polynomials)
    answers = []
    for file in blocks:
        bodies, shared = _block(file.path).answer(encrypted, file.lanes, layout, _keys(keys, layout))
        answers.append((packed(bodies), packed(shared)))
    return answers


def _projected(upload: bytes, keys: Path, layout: Layout) -> Projected:
    _, polynomials = read_encrypted(upload, "the sketch")
    return Projected(polynomials, layout, _keys(keys, layout))


@lru_cache(maxsize=4)
def _keys(path: Path, layout: Layout) -> EvaluationKeys:
    return EvaluationKeys(path.read_bytes(), layout)


@lru_cache(maxsize=128)
def _block(path: Path) -> Block:
    return Block.read(path)

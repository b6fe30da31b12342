"""A pool of encrypted sketches in one process, with the very functions that the server's processes run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pfedsecure.matching.he import work
from pfedsecure.matching.he.answers import unpacked
from pfedsecure.matching.he.encryption import encrypt, read_encrypted, sketch_polynomial
from pfedsecure.matching.he.evaluation import EvaluationKeys, Projected
from pfedsecure.matching.he.parameters import PLAIN_MODULUS, Layout
from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.wire.v1.matching_pb2 import EncryptedAnswer, EncryptedSketch

from .secagg_round import cpu

ID_CHARACTERS = 32


class EncryptedPool:
    """Sketches `numbers`, each `(m,)`, encrypted under `key`, in blocks on disk. To be used in a `with` statement."""

    def __init__(self, key: SecretKey, layout: Layout, numbers: Sequence[NDArray[np.int64]]) -> None:
        self.numbers = np.stack(numbers)
        self._key, self._layout = key, layout
        self._folder = TemporaryDirectory()
        folder = Path(self._folder.name)
        self._keys = folder / "keys"
        self._keys.write_bytes(key.evaluation_keys(layout))
        uploads = [encrypt(sketch_polynomial(row, layout), key) for row in self.numbers]
        self.upload = uploads[0]
        self.project_ms = self._projecting(uploads[:5])
        self._blocks = []
        for start in range(0, len(uploads), layout.stride):
            changes = [work.Change(lane, None, up) for lane, up in enumerate(uploads[start : start + layout.stride])]
            path = folder / f"block-{start}"
            work.update(None, changes, path, self._keys, layout)
            self._blocks.append(work.BlockFile(path, tuple(range(len(changes)))))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def answer(self, query: bytes, leave_out: int | None = None) -> bytes:
        """What a server sends, with everything it does for it."""
        reply = EncryptedAnswer(epoch=EncryptedSketch.FromString(query).epoch)
        for number, (bodies, shared) in enumerate(work.answer(query, self._blocks, self._keys, self._layout)):
            first = number * self._layout.stride
            last = min(first + self._layout.stride, len(self.numbers))
            ids = [f"{row:0{ID_CHARACTERS}x}" if row != leave_out else "" for row in range(first, last)]
            ids += [""] * (self._layout.stride - len(ids))
            reply.blocks.add(expert_ids=ids, bodies=bodies, shared=shared)
        return reply.SerializeToString(deterministic=True)

    def nearest(self, answer: bytes, numbers: NDArray[np.int64], k: int) -> list[int]:
        """Rows of the `k` nearest, as a client finds them."""
        message = EncryptedAnswer.FromString(answer)
        bodies = np.stack([unpacked(block.bodies) for block in message.blocks])
        shared = np.stack([unpacked(block.shared) for block in message.blocks])
        scaled = self._key.decrypt(bodies, shared, self._layout)
        squared = (scaled * pow(self._layout.stride, -1, PLAIN_MODULUS) + int(numbers @ numbers)) % PLAIN_MODULUS
        ids = [expert_id for block in message.blocks for expert_id in block.expert_ids]
        found = sorted((int(value), int(i, 16)) for value, i in zip(squared.ravel(), ids, strict=True) if i)
        return [row for _, row in found[:k]]

    def _projecting(self, uploads: Sequence[bytes]) -> float:
        keys = EvaluationKeys(self._keys.read_bytes(), self._layout)

        def project(upload: bytes) -> Projected:
            return Projected(read_encrypted(upload, "the sketch")[1], self._layout, keys)

        return median(cpu(partial(project, upload))[1] for upload in uploads)


def nearest(
    sketches: NDArray[np.int64] | NDArray[np.float64],
    query: NDArray[np.int64] | NDArray[np.float64],
    k: int,
    leave_out: int | None = None,
) -> list[int]:
    """Rows of the `k` nearest by sorting all distances; of equal ones the first."""
    squared = ((sketches - query) ** 2).sum(axis=1)
    order = np.argsort(squared, kind="stable")
    return [int(row) for row in order if row != leave_out][:k]

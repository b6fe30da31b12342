"""A segment of the feature cache: a file of features that is never changed, and that cannot be wrong unnoticed.

    magic (24 bytes) | table (32) | n, width: two little-endian 64-bit numbers | n keys of 32 bytes, ascending |
    features (n, width), little-endian float32

Its name is the SHA-256 of all of that: whatever happened to the file, it is its name that tells. That it was written by
this user the name cannot tell; so a file that others can write, or own, is not believed.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pfedsecure.ownership import others_can_write

Keys = NDArray[np.bytes_]
"""SHA-256 digests `(N,)` of dtype S32. NumPy takes trailing zero bytes for padding; all have the same length, so
comparing them is right all the same."""
Rows = NDArray[np.int64]
Features = NDArray[np.float32]

SUFFIX = ".features"
KEY_BYTES = 32
_HEADER = struct.Struct("<24s32sQQ")
_MAGIC = b"pfedsecure features 1".ljust(24)


class DamagedSegment(Exception):
    """A file that is not what its name says, or not certainly ours. Says in a few words what it is."""

    def __init__(self, what: str = "is damaged") -> None:
        super().__init__(what)


def keys_of(digests: list[bytes]) -> Keys:
    """32-byte digests as an array."""
    return np.frombuffer(b"".join(digests), dtype=f"S{KEY_BYTES}")


@dataclass(frozen=True)
class Segment:
    """Features `(n, width)` of the images `keys (n,)`, which are ascending and all different."""

    keys: Keys
    features: Features

    @classmethod
    def of(cls, keys: Keys, features: Features) -> Segment:
        """From keys in any order; of a key that comes twice the first counts."""
        distinct, first = np.unique(keys, return_index=True)
        return cls(distinct, features[first])

    def to_bytes(self, table: str) -> bytes:
        """The file, for the table whose name `table` is 64 hexadecimal digits."""
        header = _HEADER.pack(_MAGIC, bytes.fromhex(table), len(self.keys), self.features.shape[1])
        return header + self.keys.tobytes() + self.features.astype("<f4").tobytes()


def file_name(content: bytes) -> str:
    """What a segment with this content is called."""
    return hashlib.sha256(content).hexdigest() + SUFFIX


def read(path: Path, table: str) -> Segment:
    """The whole segment, in memory. Raises DamagedSegment, and FileNotFoundError or another OSError."""
    with _opened(path) as file:
        return _parse(file.read(), path, table)


def find(path: Path, table: str, wanted: Keys) -> tuple[Rows, Features]:
    """Which of `wanted`, ascending and all different, are in the segment at `path`, and their features.

    The file is mapped, not read into memory, and what is found is copied out. Raises as `read` does.
    """
    with _opened(path) as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            raise DamagedSegment from None
    with mapped:
        return _find(_parse(mapped, path, table), wanted)


def _opened(path: Path) -> BinaryIO:
    """The file, which nobody but this user, and root, can have written."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedSegment("is a link") from None
        raise
    file = os.fdopen(descriptor, "rb")
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or others_can_write(status):
        file.close()
        raise DamagedSegment("is no file that this user alone can write")
    return file


def _find(segment: Segment, wanted: Keys) -> tuple[Rows, Features]:
    # The segment's keys are looked for among the wanted ones: over many segments that is each key once.
    rows = np.searchsorted(wanted, segment.keys)
    here = np.flatnonzero(wanted[np.minimum(rows, len(wanted) - 1)] == segment.keys)
    return rows[here].astype(np.int64), segment.features[here]


def _parse(content: bytes | mmap.mmap, path: Path, table: str) -> Segment:
    """A segment whose features lie in `content`."""
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise DamagedSegment
    if len(content) < _HEADER.size:
        raise DamagedSegment
    magic, of_table, n, width = _HEADER.unpack_from(content)
    size = _HEADER.size + n * (KEY_BYTES + 4 * width)
    if magic != _MAGIC or of_table != bytes.fromhex(table) or not n or not width or len(content) != size:
        raise DamagedSegment
    at = _HEADER.size + KEY_BYTES * n
    keys = np.frombuffer(content[_HEADER.size : at], dtype=f"S{KEY_BYTES}")  # a copy: what is mapped must be let go
    if not (keys[:-1] < keys[1:]).all():
        raise DamagedSegment
    features = np.frombuffer(content, dtype="<f4", count=n * width, offset=at)
    return Segment(keys, features.reshape(n, width))

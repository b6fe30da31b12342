"""Arrays into SEAL's objects and back. SEAL reads and writes files; these are in memory where the system has such.

What comes from others is never read by SEAL: ciphertexts travel as arrays of numbers, whose range is checked, and get
SEAL's uncompressed form here. Evaluation keys are the exception; see `evaluation.EvaluationKeys`.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from pfedsecure.matching.he.parameters import PLAIN_MODULUS, PRIMES, RING, context

_HEADER = struct.Struct("<HBBBBHQ")  # magic, its own size, version, minor version, compression, reserved, bytes in all


class Saveable(Protocol):
    """A SEAL object."""

    def save(self, path: str) -> None:
        """Write it to the file `path`."""


class Loadable(Protocol):
    """A SEAL object."""

    def load(self, context: seal.SEALContext, path: str) -> None:
        """Take over what the file `path` holds. Raises RuntimeError or ValueError for what is of another `context`."""


def saved(what: Saveable) -> bytes:
    """In SEAL's own form."""
    with _file() as (path, descriptor):
        what.save(path)
        os.lseek(descriptor, 0, os.SEEK_SET)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read()


def load(what: Loadable, content: bytes) -> None:
    """Fills `what`. Raises ValueError or RuntimeError for bytes that are no such object of `context()`."""
    with _file() as (path, descriptor):
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        what.load(context(), path)


def ciphertext(polynomials: NDArray[np.uint64]) -> seal.Ciphertext:
    """From coefficients `(2, primes, N)`, each below its prime."""
    parms_id, magic, size, version, minor = _form()
    data = np.ascontiguousarray(polynomials, "<u8").tobytes()
    array = _HEADER.pack(magic, size, version, minor, 0, 0, _HEADER.size + 8 + len(data))
    array += struct.pack("<Q", polynomials.size) + data
    body = struct.pack("<4Q?QQQdQ", *parms_id, False, 2, RING, len(PRIMES), 1.0, 1) + array
    made = seal.Ciphertext()
    load(made, _HEADER.pack(magic, size, version, minor, 0, 0, _HEADER.size + len(body)) + body)
    return made


def coefficients(encrypted: seal.Ciphertext, polynomial: int, prime: int, count: int = RING) -> NDArray[np.uint64]:
    """The first `count` coefficients of one polynomial of a ciphertext modulo one of its primes."""
    first = (polynomial * encrypted.coeff_modulus_size() + prime) * RING
    read = encrypted.dyn_array().at
    return np.fromiter((read(row) for row in range(first, first + count)), np.uint64, count)


def plaintext(numbers: NDArray[np.int64]) -> seal.Plaintext:
    """The polynomial with coefficients `(N,)` between -t/2 and t/2, not all zero."""
    terms = [f"{int(numbers[row]) % PLAIN_MODULUS:X}x^{row}" for row in np.flatnonzero(numbers)[::-1]]
    return seal.Plaintext(" + ".join(terms))


def monomial(exponent: int) -> seal.Plaintext:
    """x^exponent, below N. With coefficient 1 a product with it is a shift and adds no noise; with -1 it would."""
    return seal.Plaintext(f"1x^{exponent}")


@cache
def _form() -> tuple[list[int], int, int, int, int]:
    """What the form of a ciphertext begins with in this version of SEAL."""
    parms_id: list[int] = list(context().first_parms_id())
    magic, size, version, minor, *_ = _HEADER.unpack_from(saved(seal.Plaintext("1")))
    return parms_id, magic, size, version, minor


@contextmanager
def _file() -> Iterator[tuple[str, int]]:
    """A file that nobody else can open, by path and by descriptor; it is gone afterwards."""
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        descriptor = os.memfd_create("seal")
        path = f"/proc/self/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp()
    try:
        yield path, descriptor
    finally:
        os.close(descriptor)
        if not path.startswith("/proc/"):
            os.unlink(path)

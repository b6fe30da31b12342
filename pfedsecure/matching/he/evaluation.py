"""What the server computes, on ciphertexts alone.

An answer is (c_j for the lanes j, a) of a ciphertext whose phase is q/t times a squared distance at each lane, after

- a fresh encryption of zero was added, which makes `a` new;
- a uniform number in [-F, F], F = 7q / 16t, was added to the phase at each lane, which floods what arithmetic and the
  noise of honest inputs left there: less than 2^-32 of F, as measured (docs/matching.md). As F nearly fills the room
  that rounding leaves, an answer carries less than log2(t) + 1 bits for each expert, whatever query was sent;
- everything was rounded to the modulus 2^40, and the coefficients of c away from the lanes were dropped. Without c_k
  nobody can tell the phase at k: the partial sums there are hidden perfectly, noise included.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.he.parameters import ANSWER_BYTES, PLAIN_MODULUS, PRIMES, RING, Layout, context
from pfedsecure.matching.he.seal_objects import ciphertext, coefficients, load, monomial, saved
from pfedsecure.wire.v1 import matching_pb2

_MODULUS = math.prod(PRIMES)
FLOOD = 7 * _MODULUS // (16 * PLAIN_MODULUS)
_ANSWER_MODULUS = np.uint64(256**ANSWER_BYTES)
_EXTRA_BITS = 64  # of randomness beyond the size of a range, so that reducing modulo it is uniform but for 2^-64


class EvaluationKeys:
    """Public key, relinearisation key and the Galois keys of a layout, as a client made them."""

    def __init__(self, content: bytes, layout: Layout) -> None:
        """From a serialised EvaluationKeys. Raises MessageRejected unless they are exactly those that are in use.

        SEAL parses them. Whoever handles keys of strangers does this in a process of its own.
        """
        try:
            message = matching_pb2.EvaluationKeys.FromString(content)
            self.epoch = message.epoch
            self.public, self.relinearisation, self.galois = seal.PublicKey(), seal.RelinKeys(), seal.GaloisKeys()
            load(self.public, message.public_key)
            load(self.relinearisation, message.relinearisation_keys)
            load(self.galois, message.galois_keys)
        except Exception as error:
            raise MessageRejected(f"these are no evaluation keys of this version's parameters ({error})") from None
        wanted = layout.galois_elements
        if self.galois.size() != len(wanted) or not all(map(self.galois.has_key, wanted)):
            raise MessageRejected("the evaluation keys carry other rotations than are in use")
        if self.relinearisation.size() != 1 or not self.relinearisation.has_key(2):
            raise MessageRejected("the evaluation keys carry other relinearisation keys than are in use")


class Projected:
    """An upload confined to lane 0: a sketch, and its squared norm, whatever other plaintext its author put in.

    Both are multiplied by the stride. What is no encryption of anything is confined too, until it is multiplied with a
    query: it can then add to the noise of a whole block, and make that of no use.
    """

    def __init__(self, upload: NDArray[np.uint64], layout: Layout, keys: EvaluationKeys) -> None:
        evaluator = seal.Evaluator(context())
        current = ciphertext(upload)
        *first, last = layout.galois_elements
        for element in first:
            image = seal.Ciphertext()
            evaluator.apply_galois(current, element, keys.galois, image)
            evaluator.add_inplace(current, image)
        image = seal.Ciphertext()
        evaluator.apply_galois(current, last, keys.galois, image)
        self.sketch, self.norm = seal.Ciphertext(), seal.Ciphertext()
        evaluator.add(current, image, self.sketch)
        evaluator.sub(image, current, self.norm)  # negated, as x^-k is -x^(N - k)
        evaluator.multiply_plain_inplace(self.norm, monomial(RING - layout.norm_exponent))


class Block:
    """The experts of one ciphertext: sketches and norms, each in its lane."""

    def __init__(self) -> None:
        self._sketches: seal.Ciphertext | None = None
        self._norms: seal.Ciphertext | None = None

    def put(self, projected: Projected, lane: int, sign: int = 1) -> None:
        """Add an expert to a lane that has none; with `sign` -1 take out what was put there."""
        self._sketches = _added(self._sketches, projected.sketch, lane, sign)
        self._norms = _added(self._norms, projected.norm, lane, sign)

    def write(self, path: Path) -> None:
        """As `read` takes it; there must have been an expert."""
        assert self._sketches is not None
        assert self._norms is not None
        parts = saved(self._sketches), saved(self._norms)
        path.write_bytes(len(parts[0]).to_bytes(8, "little") + parts[0] + parts[1])

    @classmethod
    def read(cls, path: Path) -> Block:
        """A block that `write` wrote."""
        content, block = path.read_bytes(), cls()
        size = int.from_bytes(content[:8], "little")
        block._sketches, block._norms = seal.Ciphertext(), seal.Ciphertext()
        load(block._sketches, content[8 : 8 + size])
        load(block._norms, content[8 + size :])
        return block

    def answer(
        self, query: seal.Ciphertext, lanes: Sequence[int], layout: Layout, keys: EvaluationKeys
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """`bodies (stride,)` and `shared (N,)`, below 2^40; the bodies of lanes that are not in `lanes` are random."""
        evaluator = seal.Evaluator(context())
        result = seal.Ciphertext()
        evaluator.multiply(query, self._sketches, result)
        evaluator.relinearize_inplace(result, keys.relinearisation)
        evaluator.add_inplace(result, self._norms)
        fresh = seal.Ciphertext()
        seal.Encryptor(context(), keys.public).encrypt_zero(result.parms_id(), fresh)
        evaluator.add_inplace(result, fresh)
        evaluator.add_inplace(result, _flood(layout.stride))
        evaluator.mod_switch_to_next_inplace(result)
        bodies = np.frombuffer(os.urandom(8 * layout.stride), "<u8") % _ANSWER_MODULUS
        kept = np.array(lanes, np.intp)
        bodies[kept] = _rounded(coefficients(result, 0, 0, layout.stride))[kept]
        return bodies, _rounded(coefficients(result, 1, 0))


def _added(total: seal.Ciphertext | None, one: seal.Ciphertext, lane: int, sign: int) -> seal.Ciphertext:
    evaluator = seal.Evaluator(context())
    shifted = seal.Ciphertext()
    evaluator.multiply_plain(one, monomial(lane), shifted)
    if sign < 0:
        evaluator.negate_inplace(shifted)
    if total is not None:
        evaluator.add_inplace(shifted, total)
    return shifted


def _flood(lanes: int) -> seal.Ciphertext:
    """(f, 0) with f uniform in [-F, F] at the first `lanes` coefficients and 0 elsewhere."""
    span = 2 * FLOOD + 1
    width = (span.bit_length() + _EXTRA_BITS + 7) // 8
    drawn = os.urandom(width * lanes)
    numbers = [int.from_bytes(drawn[width * row : width * (row + 1)], "little") % span - FLOOD for row in range(lanes)]
    polynomials = np.zeros((2, len(PRIMES), RING), np.uint64)
    for row, prime in enumerate(PRIMES):
        polynomials[0, row, :lanes] = [number % prime for number in numbers]
    return ciphertext(polynomials)


def _rounded(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """From the first prime as modulus to 2^40. float64 is off by 2^-11 of a unit at most."""
    scaled = np.rint(numbers.astype(np.float64) * (float(_ANSWER_MODULUS) / PRIMES[0]))
    return scaled.astype(np.uint64) % _ANSWER_MODULUS

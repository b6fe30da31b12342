"""The parameters of encrypted matching. Both sides have them from here; none of them travels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import tenseal.sealapi as seal

RING = 8192
"""N. With a modulus of 180 bits and ternary secrets well above 128 bits of security: the standard of
homomorphicencryption.org (2018) allows 218 bits."""

PRIMES = (1152921504606683137, 1152921504606748673)
"""Of ciphertexts, q = their product; each is 1 modulo 2N and has 60 bits."""

SPECIAL_PRIME = 1152921504606830593
"""For evaluation keys alone."""

PLAIN_MODULUS = (1 << 28) - 57
"""t: odd, so that the factor that projection brings can be divided out, and above every distance. Larger, and sketches
could be finer; each bit more costs two of the room that arithmetic leaves for flooding."""

ANSWER_BYTES = 5
"""Of a number in an answer, which is rounded to a modulus of 2^40."""

LARGEST = math.isqrt((PLAIN_MODULUS - 1) // 4)
"""R: norm of the longest quantised sketch. Squared distances, up to 4 R^2, stay below t."""

LARGEST_DIMENSION = 1024


@dataclass(frozen=True)
class Layout:
    """Where the numbers of a sketch of dimension m lie in a polynomial."""

    dimension: int

    @property
    def stride(self) -> int:
        """Distance of two numbers of one sketch, and the number of experts in one ciphertext."""
        return RING >> (self.dimension - 1).bit_length()

    @property
    def norm_exponent(self) -> int:
        """Where an upload has the squared norm of its sketch."""
        return self.stride // 2

    @property
    def galois_elements(self) -> tuple[int, ...]:
        """x -> x^g for these g, one after the other, leave the multiples of `stride`; the last also splits off those
        of `stride / 2`."""
        return tuple((RING >> step) + 1 for step in range(self.stride.bit_length() - 1))


@cache
def context() -> seal.SEALContext:
    """The context of both sides."""
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    parameters.set_poly_modulus_degree(RING)
    parameters.set_coeff_modulus([seal.Modulus(prime) for prime in (*PRIMES, SPECIAL_PRIME)])
    parameters.set_plain_modulus(seal.Modulus(PLAIN_MODULUS))
    made = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    assert made.parameters_set(), made.parameters_error_message()
    return made

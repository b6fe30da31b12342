"""Ciphertexts made here, opened by SEAL; and forms that are no ciphertexts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfedsecure.errors import IdentityError, MessageRejected
from pfedsecure.matching.he import encryption
from pfedsecure.matching.he.answers import packed, unpacked
from pfedsecure.matching.he.encryption import (
    encrypt,
    quantised,
    query_polynomial,
    read_encrypted,
    shortened,
    sketch_polynomial,
    stretch,
)
from pfedsecure.matching.he.parameters import LARGEST, PLAIN_MODULUS, PRIMES, RING, Layout
from pfedsecure.matching.he.seal_objects import ciphertext
from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.wire.v1.matching_pb2 import EncryptedSketch


def test_what_is_encrypted_here_is_decrypted_by_seal(key: SecretKey, opened: Any) -> None:
    rng = np.random.default_rng(0)
    for polynomial in (
        rng.integers(-PLAIN_MODULUS // 2 + 1, PLAIN_MODULUS // 2, RING),
        np.eye(1, RING, 5, dtype=np.int64)[0] * -7,
    ):
        epoch, polynomials = read_encrypted(encrypt(polynomial, key), "it")
        encrypted = ciphertext(polynomials)
        np.testing.assert_array_equal(opened.plaintext(encrypted), polynomial)
        assert epoch == 1
        assert opened.noise_budget(encrypted) > 80


def test_the_noise_is_that_of_the_distribution(key: SecretKey, opened: Any) -> None:
    """The phase of an encryption of 0 but for one number: variance 21/2, nothing beyond 21."""
    phase = opened.phase(ciphertext(read_encrypted(encrypt(np.zeros(RING, np.int64), key), "it")[1]))
    noise = np.array(phase, dtype=np.float64)
    assert np.abs(noise).max() <= 21
    assert noise.var() == pytest.approx(10.5, rel=0.1)
    assert abs(noise.mean()) < 5 * np.sqrt(10.5 / RING)


def test_no_two_ciphertexts_are_the_same(key: SecretKey) -> None:
    polynomial = np.zeros(RING, np.int64)
    first, second = encrypt(polynomial, key), encrypt(polynomial, key)
    assert EncryptedSketch.FromString(first).seed != EncryptedSketch.FromString(second).seed
    assert first != second


def test_keys_are_ternary_uniform_and_of_their_epoch(secrets: Any, key: SecretKey) -> None:
    counts = np.unique_counts(key.coefficients).counts
    assert len(counts) == 3
    assert np.abs(counts - RING / 3).max() < 5 * np.sqrt(RING * 2 / 9)
    np.testing.assert_array_equal(SecretKey(secrets, 1).coefficients, key.coefficients)
    assert (SecretKey(secrets, 2).coefficients != key.coefficients).any()
    with pytest.raises(IdentityError, match="no cohort secret of epoch 3"):
        SecretKey(secrets, 3)


def test_stretched_seeds_are_uniform_below_each_prime() -> None:
    rows = stretch(b"\x07" * 32)
    assert rows.shape == (2, RING)
    for row, prime in zip(rows, PRIMES, strict=True):
        assert int(row.max()) < prime
        assert np.mean(row.astype(np.float64) / prime) == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(rows, stretch(b"\x07" * 32))
    assert (rows != stretch(b"\x08" * 32)).any()


@given(seed=st.integers(0, 2**32 - 1), dimension=st.integers(1, 200), clip=st.floats(1e-3, 1e3))
def test_quantised_sketches_are_within_the_radius_and_close(seed: int, dimension: int, clip: float) -> None:
    vector = np.random.default_rng(seed).normal(size=dimension)
    vector *= clip / np.linalg.norm(vector)
    numbers = quantised(vector, clip)
    assert int(numbers @ numbers) <= LARGEST**2
    assert np.abs(numbers - vector * (LARGEST / clip)).max() <= 0.5 + np.sqrt(dimension) / 2 + 1
    assert 4 * LARGEST**2 < PLAIN_MODULUS


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=64))
def test_noise_that_is_too_long_is_shortened(values: list[int]) -> None:
    numbers = np.array(values)
    short = shortened(numbers)
    assert int(short @ short) <= LARGEST**2
    if int(numbers @ numbers) <= LARGEST**2:
        np.testing.assert_array_equal(short, numbers)


@pytest.mark.parametrize("dimension", [1, 3, 64, 65, 1024])
def test_the_product_of_the_polynomials_has_the_inner_product_in_front(dimension: int, numbers_of: Any) -> None:
    layout = Layout(dimension)
    p, q = numbers_of(1, dimension), numbers_of(2, dimension)
    sketch, query = sketch_polynomial(p, layout), query_polynomial(q, layout)
    assert sketch[layout.norm_exponent] == p @ p
    sketch[layout.norm_exponent] = 0
    # The constant coefficient of a product in Z[x] / (x^N + 1): x^i times x^(N - i) is -1.
    constant = sketch[0] * query[0] - sketch[1:] @ query[:0:-1]
    assert constant == -2 * (p @ q)
    assert layout.stride * dimension <= RING < 2 * layout.stride * max(dimension, 1) * 1.0001 + RING


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_packing_loses_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    body = rng.integers(0, 2**60, (2, RING), dtype=np.uint64)
    np.testing.assert_array_equal(encryption._unpacked(encryption._packed(body)), body)
    numbers = rng.integers(0, 2**40, 100, dtype=np.uint64)
    np.testing.assert_array_equal(unpacked(packed(numbers)), numbers)
    assert len(packed(numbers)) == 500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": b"x" * 31}, "not of the form"),
        ({"body": b""}, "not of the form"),
        ({"body": bytes(encryption.BODY_BYTES + 15)}, "not of the form"),
        ({"epoch": 0}, "not of the form"),
        ({"body": b"\xff" * encryption.BODY_BYTES}, "beyond its modulus"),
    ],
)
def test_what_is_no_ciphertext_of_these_parameters_is_refused(
    key: SecretKey, change: dict[str, Any], message: str
) -> None:
    content = EncryptedSketch.FromString(encrypt(np.zeros(RING, np.int64), key))
    for field, value in change.items():
        setattr(content, field, value)
    with pytest.raises(MessageRejected, match=message):
        read_encrypted(content.SerializeToString(), "the sketch")


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MessageRejected):
        read_encrypted(data, "the sketch")


@pytest.mark.parametrize("dimension", [3, 64, 512])
def test_answers_are_decrypted_as_the_definition_says(key: SecretKey, dimension: int) -> None:
    layout, rng = Layout(dimension), np.random.default_rng(dimension)
    shared = rng.integers(0, 2**40, RING, dtype=np.uint64)
    expected = rng.integers(0, PLAIN_MODULUS, layout.stride)
    bodies = np.zeros(layout.stride, np.uint64)
    for lane in range(0, layout.stride, max(1, layout.stride // 16)):
        product = sum(
            int(shared[row]) * int(key.coefficients[(lane - row) % RING]) * (1 if row <= lane else -1)
            for row in range(RING)
        )
        bodies[lane] = (round(int(expected[lane]) * 2**40 / PLAIN_MODULUS) - product) % 2**40
    found = key.decrypt(bodies[None], shared[None], layout)[0]
    lanes = slice(0, None, max(1, layout.stride // 16))
    np.testing.assert_array_equal(found[lanes], expected[lanes])

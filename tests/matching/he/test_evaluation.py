"""Distances computed on ciphertexts are those computed in clear, and how much room the arithmetic leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.he.encryption import encrypt, query_polynomial, read_encrypted, sketch_polynomial
from pfedsecure.matching.he.evaluation import FLOOD, Block, EvaluationKeys, Projected
from pfedsecure.matching.he.parameters import LARGEST, PLAIN_MODULUS, PRIMES, Layout, context
from pfedsecure.matching.he.seal_objects import ciphertext
from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.wire.v1 import matching_pb2

MODULUS = PRIMES[0] * PRIMES[1]


def encrypted(polynomial: np.ndarray, key: SecretKey) -> np.ndarray:
    return read_encrypted(encrypt(polynomial, key), "it")[1]


def distances(block: Block, query: np.ndarray, lanes: Any, layout: Layout, keys: Any, key: SecretKey) -> np.ndarray:
    """As a client reads them, at all lanes."""
    asked = ciphertext(encrypted(query_polynomial(query, layout), key))
    bodies, shared = block.answer(asked, lanes, layout, keys)
    scaled = key.decrypt(bodies[None], shared[None], layout)[0]
    return (scaled * pow(layout.stride, -1, PLAIN_MODULUS) + int(query @ query)) % PLAIN_MODULUS


@pytest.mark.parametrize("dimension", [3, 64, 100, 1000])
def test_distances_are_exact(dimension: int, key: SecretKey, loaded: Any, numbers_of: Any) -> None:
    """Of sketches as long as they may be, in the first, a middle and the last lane; the query opposite to one."""
    layout, keys = Layout(dimension), loaded(dimension)
    lanes = sorted({0, layout.stride // 3, layout.stride - 1})
    sketches = {lane: numbers_of(lane, dimension, LARGEST) for lane in lanes}
    block = Block()
    for lane, numbers in sketches.items():
        block.put(Projected(encrypted(sketch_polynomial(numbers, layout), key), layout, keys), lane)
    for query in (-sketches[lanes[-1]], numbers_of(99, dimension, 10), np.zeros(dimension, np.int64)):
        found = distances(block, query, lanes, layout, keys, key)
        for lane, numbers in sketches.items():
            assert found[lane] == ((numbers - query) ** 2).sum()


def test_an_expert_that_is_taken_out_leaves_its_lane_to_another(key: SecretKey, loaded: Any, numbers_of: Any) -> None:
    layout, keys = Layout(64), loaded(64)
    first, second, other = (numbers_of(seed, 64) for seed in range(3))
    projected = [Projected(encrypted(sketch_polynomial(n, layout), key), layout, keys) for n in (first, second, other)]
    block = Block()
    block.put(projected[0], 5)
    block.put(projected[2], 6)
    block.put(projected[0], 5, sign=-1)
    block.put(projected[1], 5)
    query = numbers_of(9, 64)
    found = distances(block, query, [5, 6], layout, keys, key)
    assert [found[5], found[6]] == [((second - query) ** 2).sum(), ((other - query) ** 2).sum()]


def test_what_arithmetic_leaves_is_far_below_the_flood(
    key: SecretKey, loaded: Any, numbers_of: Any, opened: Any
) -> None:
    """A full block of longest sketches. Noise is below q / 2t over 2^budget: less than 2^-32 of the flood."""
    layout, keys, evaluator = Layout(64), loaded(64), seal.Evaluator(context())
    block = Block()
    one = Projected(encrypted(sketch_polynomial(numbers_of(1, 64, LARGEST), layout), key), layout, keys)
    for lane in range(layout.stride):  # one upload in all lanes: noise that adds up without cancelling
        block.put(one, lane)
    asked = ciphertext(encrypted(query_polynomial(numbers_of(1, 64, LARGEST), layout), key))
    result = seal.Ciphertext()
    evaluator.multiply(asked, block._sketches, result)
    evaluator.relinearize_inplace(result, keys.relinearisation)
    evaluator.add_inplace(result, block._norms)
    noise = MODULUS / (2 * PLAIN_MODULUS) / 2 ** opened.noise_budget(result)
    assert noise < FLOOD / 2**32
    # And a flooded answer is still rounded to the right number, with room for the rounding of the answer itself.
    assert FLOOD + noise < MODULUS / (2 * PLAIN_MODULUS) * (1 - 1 / 16)


def test_answers_to_one_query_have_nothing_in_common(key: SecretKey, loaded: Any, numbers_of: Any) -> None:
    layout, keys = Layout(64), loaded(64)
    block = Block()
    block.put(Projected(encrypted(sketch_polynomial(numbers_of(1, 64), layout), key), layout, keys), 0)
    asked = ciphertext(encrypted(query_polynomial(numbers_of(2, 64), layout), key))
    answers = [block.answer(asked, [0], layout, keys) for _ in range(2)]
    for one, other in zip(*answers, strict=True):
        assert (one == other).mean() < 0.01
        assert one.max() < 2**40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"galois_keys": b""}, "no evaluation keys"),
        ({"public_key": b"\x5e\xa1" + bytes(100)}, "no evaluation keys"),
        ({"relinearisation_keys": b"garbage" * 10}, "no evaluation keys"),
    ],
)
def test_keys_that_are_none_are_refused(keys_of: Any, change: dict[str, bytes], message: str) -> None:
    content = matching_pb2.EvaluationKeys.FromString(keys_of(64))
    for field, value in change.items():
        setattr(content, field, value)
    with pytest.raises(MessageRejected, match=message):
        EvaluationKeys(content.SerializeToString(), Layout(64))


def test_keys_with_other_rotations_are_refused(keys_of: Any) -> None:
    """More of them would be more than the server needs; fewer, and uploads could not be confined."""
    for dimension, layout in ((64, Layout(32)), (32, Layout(64))):
        with pytest.raises(MessageRejected, match="other rotations than are in use"):
            EvaluationKeys(keys_of(dimension), layout)


def test_a_block_survives_its_file(tmp_path: Any, key: SecretKey, loaded: Any, numbers_of: Any) -> None:
    layout, keys = Layout(64), loaded(64)
    block = Block()
    sketch, query = numbers_of(1, 64), numbers_of(2, 64)
    block.put(Projected(encrypted(sketch_polynomial(sketch, layout), key), layout, keys), 7)
    block.write(tmp_path / "block")
    found = distances(Block.read(tmp_path / "block"), query, [7], layout, keys, key)
    assert found[7] == ((sketch - query) ** 2).sum()

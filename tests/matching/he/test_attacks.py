"""What clients and server can try. Each attack is also shown to succeed where the protection is left out."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.candidates import Candidate
from pfedsecure.matching.he.answers import unpacked
from pfedsecure.matching.he.client import HeClientMatching
from pfedsecure.matching.he.encryption import (
    _packed,
    encrypt,
    quantised,
    query_polynomial,
    read_encrypted,
    sketch_polynomial,
    stretch,
)
from pfedsecure.matching.he.evaluation import Block, Projected
from pfedsecure.matching.he.parameters import PLAIN_MODULUS, PRIMES, RING, Layout, context
from pfedsecure.matching.he.seal_objects import ciphertext, coefficients, monomial, plaintext
from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.matching.he.server import HeServerMatching
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.release import Release
from pfedsecure.matching.sketch import Sketcher
from pfedsecure.wire.v1.matching_pb2 import EncryptedAnswer, EncryptedSketch

M = 64
LAYOUT = Layout(M)
SHAPE = (4, 32)
CENTRE = np.zeros(SHAPE, np.float32)
DELTA = PRIMES[0] * PRIMES[1] // PLAIN_MODULUS


def encrypted(polynomial: np.ndarray, key: SecretKey) -> seal.Ciphertext:
    return ciphertext(read_encrypted(encrypt(polynomial, key), "it")[1])


def block_of(sketches: dict[int, np.ndarray], key: SecretKey, keys: Any) -> Block:
    block = Block()
    for lane, numbers in sketches.items():
        block.put(
            Projected(read_encrypted(encrypt(sketch_polynomial(numbers, LAYOUT), key), "it")[1], LAYOUT, keys), lane
        )
    return block


def unhidden(block: Block, query: seal.Ciphertext, keys: Any) -> seal.Ciphertext:
    """An answer of a server that hides nothing."""
    evaluator, result = seal.Evaluator(context()), seal.Ciphertext()
    evaluator.multiply(query, block._sketches, result)
    evaluator.relinearize_inplace(result, keys.relinearisation)
    evaluator.add_inplace(result, block._norms)
    return result


def first_number(key: SecretKey) -> seal.Ciphertext:
    """A query for the first number of each sketch: x^0."""
    return encrypted(np.eye(1, RING, 0, dtype=np.int64)[0], key)


def centred(value: int, modulus: int) -> int:
    """Modulo `modulus`, between -modulus / 2 and modulus / 2."""
    return (value + modulus // 2) % modulus - modulus // 2


def sketch_in(lane: int, product: np.ndarray) -> np.ndarray:
    """The sketch in a lane, read off the product of all sketches with x^0."""
    inverse = pow(LAYOUT.stride, -1, PLAIN_MODULUS)
    found = product[lane :: LAYOUT.stride] * inverse % PLAIN_MODULUS
    return np.where(found > PLAIN_MODULUS // 2, found - PLAIN_MODULUS, found)


def test_partial_sums_give_whole_sketches_away(key: SecretKey, loaded: Any, numbers_of: Any, opened: Any) -> None:
    """A member asks for one product and would get all numbers of every peer's sketch in the other coefficients."""
    keys = loaded(M)
    sketches = {lane: numbers_of(lane, M) for lane in (0, 17, 127)}
    block = block_of(sketches, key, keys)
    product = opened.plaintext(unhidden(block, first_number(key), keys))
    for lane, numbers in sketches.items():
        np.testing.assert_array_equal(sketch_in(lane, product)[1:], numbers[1:])
    # What the server sends has a number for each lane, and of all other coefficients nothing.
    bodies, shared = block.answer(first_number(key), list(sketches), LAYOUT, keys)
    assert (len(bodies), len(shared)) == (LAYOUT.stride, RING)


def test_random_plaintexts_would_not_hide_them(key: SecretKey, loaded: Any, numbers_of: Any, opened: Any) -> None:
    """The usual mask, a random plaintext, hides multiples of q / t. A query that is no encryption of anything, a phase
    of 2^50 at x^0, brings sketches far below that: they stand in what decryption takes for noise.
    """
    keys = loaded(M)
    numbers = numbers_of(3, M)
    block = block_of({0: numbers}, key, keys)
    seed = os.urandom(32)
    uniform = stretch(seed)
    product = seal.Ciphertext()
    seal.Evaluator(context()).multiply_plain(ciphertext(np.stack([uniform, uniform])), key.plaintext, product)
    body = np.stack(
        [
            (prime - coefficients(product, 0, row).astype(np.uint64)) % np.uint64(prime)
            for row, prime in enumerate(PRIMES)
        ]
    )
    body[:, 0] = [(int(body[row, 0]) + 2**50) % prime for row, prime in enumerate(PRIMES)]
    crafted = EncryptedSketch(epoch=1, seed=seed, body=_packed(body)).SerializeToString()
    query = ciphertext(read_encrypted(crafted, "the query")[1])  # a server cannot tell it from an honest one

    masked = unhidden(block, query, keys)
    mask = np.random.default_rng(0).integers(1, PLAIN_MODULUS, RING)
    seal.Evaluator(context()).add_plain_inplace(masked, plaintext(mask))
    # Modulo q / t the mask is gone; modulo t 2^50, what BFV's multiplication adds to such a phase.
    coarse = (centred(value, DELTA) for value in opened.phase(masked)[LAYOUT.stride :: LAYOUT.stride])
    fine = (centred(value, PLAIN_MODULUS << 50) for value in coarse)
    leaked = np.array([round(value / (LAYOUT.stride << 50)) for value in fine])
    assert np.abs(leaked - numbers[1:]).max() < np.abs(numbers).max() / 50
    # The answer keeps none of these coefficients; what it has at the lane is flooded almost to q / 2t.
    bodies, shared = block.answer(query, [0], LAYOUT, keys)
    answers = [int(block.answer(query, [0], LAYOUT, keys)[0][0]) for _ in range(3)]
    assert len(bodies) == LAYOUT.stride
    assert len(shared) == RING
    assert len(set(answers)) == 3


def test_the_flood_covers_what_a_crafted_query_puts_below_the_plaintext(
    key: SecretKey, loaded: Any, numbers_of: Any
) -> None:
    """At its lane that query would bring p_0 times 2^60: in units of the answer, drowned in +-7/16 of 2^12."""
    keys = loaded(M)
    seed = os.urandom(32)
    uniform = stretch(seed)
    product = seal.Ciphertext()
    seal.Evaluator(context()).multiply_plain(ciphertext(np.stack([uniform, uniform])), key.plaintext, product)
    body = np.stack([(prime - coefficients(product, 0, row)) % np.uint64(prime) for row, prime in enumerate(PRIMES)])
    # Two sketches that differ in the first number as much as two can, with the same norm.
    small, large = numbers_of(1, M), numbers_of(1, M)
    small[0], large[0] = -3000, 3000
    body[:, 0] = [(int(body[row, 0]) + 2**66) % prime for row, prime in enumerate(PRIMES)]
    query = ciphertext(np.stack([body, uniform]))
    means = []
    for numbers in (small, large):
        block = block_of({0: numbers}, key, keys)
        residues = []
        for _ in range(40):
            bodies, shared = block.answer(query, [0], LAYOUT, keys)
            matrix = key._to_lanes(LAYOUT)[:, :1]
            phase = int((float(bodies[0]) + (shared.astype(np.float64) @ matrix)[0]) % 2.0**40)
            plaintexts = phase * PLAIN_MODULUS / 2**40
            residues.append((plaintexts - round(plaintexts)) * 2**12)
        means.append(np.array(residues))
    spread = np.concatenate(means)
    assert spread.std() == pytest.approx(7 / 8 * 2**12 / np.sqrt(12), rel=0.2)  # uniform, as without any sketch
    assert abs(means[0].mean() - means[1].mean()) < 4 * spread.std() * np.sqrt(2 / 40)


def test_an_upload_stays_in_its_lane_whatever_its_author_put_in(
    key: SecretKey, loaded: Any, numbers_of: Any, opened: Any
) -> None:
    """An author fills all coefficients, so that it would move everybody's sketch in the block."""
    keys, evaluator = loaded(M), seal.Evaluator(context())
    victim, query = numbers_of(1, M), numbers_of(2, M)
    hostile = np.random.default_rng(3).integers(-(10**6), 10**6, RING)
    upload = read_encrypted(encrypt(hostile, key), "it")[1]

    def found(block: Block) -> int:
        asked = encrypted(query_polynomial(query, LAYOUT), key)
        bodies, shared = block.answer(asked, [9], LAYOUT, keys)
        scaled = int(key.decrypt(bodies[None], shared[None], LAYOUT)[0, 9])
        return (scaled * pow(LAYOUT.stride, -1, PLAIN_MODULUS) + int(query @ query)) % PLAIN_MODULUS

    expected = int(((victim - query) ** 2).sum())
    block = block_of({9: victim}, key, keys)
    block.put(Projected(upload, LAYOUT, keys), 4)
    assert found(block) == expected
    # Added as it came, shifted to its lane, it changes the other's distance.
    careless, shifted = block_of({9: victim}, key, keys), seal.Ciphertext()
    evaluator.multiply_plain(ciphertext(upload), monomial(4), shifted)
    evaluator.add_inplace(careless._sketches, shifted)
    assert found(careless) != expected


class Scene:
    """A server with keys, and clients."""

    def __init__(self, secrets: Any, executor: Any, keys: bytes, new_kept: Any) -> None:
        self.server = HeServerMatching(M, executor)
        self.server.install(1, keys)
        self._secrets, self._new_kept = secrets, new_kept

    def client(self) -> HeClientMatching:
        return HeClientMatching(Sketcher(CENTRE, M, 2.0, 7), lambda: self._secrets, self._new_kept(), None)

    def entry(self, name: str, sketch: bytes) -> PoolEntry:
        return PoolEntry(name, f"id-{name}", sketch, sketch[:64])


@pytest.fixture
def scene(keys_of: Any, secrets: Any, executor: Any, new_kept: Any) -> Any:
    only_one = type(secrets).of({1: b"\x01" * 32})
    made = Scene(only_one, executor, keys_of(M), new_kept)
    yield made
    made.server.close()


def context_of(seed: int, norm: float = 1.0) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=SHAPE)
    return (made * (norm / np.linalg.norm(made))).astype(np.float32)


def near_everybody(key: SecretKey) -> bytes:
    """The sketch of a prompt that never left the start: among prompts that went apart it is nearest to each."""
    return encrypt(np.zeros(RING, np.int64), key)


def beyond_the_clip(key: SecretKey, numbers: np.ndarray) -> bytes:
    return encrypt(sketch_polynomial(numbers * 100, LAYOUT) % PLAIN_MODULUS - PLAIN_MODULUS // 2, key)


@pytest.mark.parametrize("kind", ["near everybody", "beyond the clip", "another's", "an older one"])
def test_a_sketch_that_is_not_that_of_the_prompt_is_found_out_by_whoever_borrows_it(
    scene: Scene, key: SecretKey, numbers_of: Any, kind: str
) -> None:
    """The server cannot see what it is. But a borrower opens the prompt, and knows where it must be."""
    asker, honest = scene.client(), scene.client()
    prompt, other = context_of(1), context_of(2)
    hostile = {
        "near everybody": near_everybody(key),
        "beyond the clip": beyond_the_clip(key, numbers_of(5, M, 4000)),
        "another's": scene.client().sketch(other, 1),
        "an older one": scene.client().sketch(context_of(3), 1),
    }[kind]
    pool = [scene.entry("honest", honest.sketch(other, 2)), scene.entry("hostile", hostile)]
    answer = scene.server.index(pool).answer(asker.query(context_of(4), 2, 3), 2, "asker", 3)
    candidates = {candidate.expert_id: candidate for candidate in asker.rank(answer, 2)}
    asker.check(candidates["id-honest"], other)
    with pytest.raises(MessageRejected, match="its sketch is not that of its prompt"):
        asker.check(candidates["id-hostile"], prompt)
    if kind == "near everybody":
        assert asker.rank(answer, 1)[0].expert_id == "id-hostile"  # so without the check everybody would borrow it


def test_nothing_that_was_decrypted_goes_to_the_server(scene: Scene) -> None:
    """A client sends its sketch, its query and ids; the first two are the same whatever it decrypted."""
    asker = scene.client()
    pool = [scene.entry(str(row), scene.client().sketch(context_of(row), 1)) for row in range(3)]
    query = asker.query(context_of(9), 1, 2)
    first = asker.rank(scene.server.index(pool).answer(query, 3, "asker", 2), 2)
    assert asker.query(context_of(9), 1, 2) == query
    assert all(isinstance(candidate.expert_id, str) for candidate in first)


def test_a_second_epoch_does_not_open_the_first(scene: Scene, secrets: Any, new_kept: Any, keys_of: Any) -> None:
    """After a rotation sketches of the old epoch are compared with nobody else's, and are not opened by the new key."""
    old, newer = scene.client(), type(secrets).of({2: b"\x02" * 32})
    scene.server.install(2, keys_of(M, 2))
    new = HeClientMatching(Sketcher(CENTRE, M, 2.0, 7), lambda: newer, new_kept(), None)
    pool = [scene.entry("old", old.sketch(context_of(1), 1)), scene.entry("new", new.sketch(context_of(2), 1))]
    index = scene.server.index(pool)
    for client, expected in ((old, "id-old"), (new, "id-new")):
        ranked = client.rank(index.answer(client.query(context_of(3), 1, 2), 5, "asker", 2), 5)
        assert [candidate.expert_id for candidate in ranked] == [expected]
    # An old answer played to the new client is not taken for one.
    assert new.rank(index.answer(old.query(context_of(3), 1, 2), 5, "asker", 2), 5) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda block: block.expert_ids.pop(),
        lambda block: setattr(block, "bodies", block.bodies[:-5]),
        lambda block: setattr(block, "shared", block.shared + b"12345"),
        lambda block: setattr(block, "shared", b""),
    ],
)
def test_answers_of_another_form_are_refused(scene: Scene, damage: Any) -> None:
    asker = scene.client()
    pool = [scene.entry("other", scene.client().sketch(context_of(1), 1))]
    answer = EncryptedAnswer.FromString(
        scene.server.index(pool).answer(asker.query(context_of(2), 1, 2), 1, "asker", 2)
    )
    damage(answer.blocks[0])
    with pytest.raises(MessageRejected, match="not of the form of this plan"):
        asker.rank(answer.SerializeToString(), 1)
    with pytest.raises(MessageRejected, match="not an EncryptedAnswer"):
        asker.rank(b"\xff\xff", 1)


def test_a_server_that_makes_an_answer_up_is_found_out(scene: Scene) -> None:
    """It wants to know whether a client is near to something, and says that an expert is."""
    asker, honest = scene.client(), scene.client()
    pool = [scene.entry("far", honest.sketch(context_of(1), 1))]
    answer = EncryptedAnswer.FromString(
        scene.server.index(pool).answer(asker.query(context_of(2), 1, 2), 1, "asker", 2)
    )
    answer.blocks[0].bodies = bytes(len(answer.blocks[0].bodies))
    (candidate,) = asker.rank(answer.SerializeToString(), 1)
    with pytest.raises(MessageRejected, match="its sketch is not that of its prompt"):
        asker.check(candidate, context_of(1))
    assert unpacked(answer.blocks[0].shared).max() > 0


def test_candidates_carry_exact_whole_distances(scene: Scene) -> None:
    asker = scene.client()
    pool = [scene.entry("other", scene.client().sketch(context_of(1), 1))]
    (candidate,) = asker.rank(scene.server.index(pool).answer(asker.query(context_of(2), 1, 2), 1, "asker", 2), 1)
    assert isinstance(candidate, Candidate)
    asker.check(candidate, context_of(1))
    with pytest.raises(MessageRejected):
        asker.check(Candidate(candidate.expert_id, (candidate.distance or 0) + 1), context_of(1))


@pytest.mark.parametrize("epsilon", [None, 8.0])
def test_a_server_and_a_client_together_open_sketches_but_not_what_noise_hides(
    scene: Scene, opened: Any, new_kept: Any, secrets: Any, epsilon: float | None
) -> None:
    """Any client has the key. What they see is the sketch, or with matching.epsilon the one release of it."""
    kept, prompt = new_kept(), context_of(1)
    release = None if epsilon is None else Release(epsilon, 1e-5, kept, lambda _event: None)
    sketcher = Sketcher(CENTRE, M, 2.0, 7)
    only_one = type(secrets).of({1: b"\x01" * 32})
    victim = HeClientMatching(sketcher, lambda: only_one, kept, release)
    upload = ciphertext(read_encrypted(victim.sketch(prompt, 1), "it")[1])
    found = opened.plaintext(upload)[:: LAYOUT.stride][:M]
    exact = quantised(sketcher.sketch(prompt), 2.0)
    if release is None:
        np.testing.assert_array_equal(found, exact)
    else:
        np.testing.assert_array_equal(found, victim._numbers(prompt, 1))
        cosine = found @ exact / np.linalg.norm(found) / np.linalg.norm(exact)
        assert abs(cosine) < 0.5  # 64 numbers of pure noise are below that but for one time in 50,000

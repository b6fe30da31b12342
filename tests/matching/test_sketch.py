"""Sketches against sums in exact arithmetic, and what they leave of distances between prompts really trained."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfedsecure.matching.sketch import Sketcher, random_signs

PROMPTS = Path(__file__).with_name("demo_prompts.npz")
SEED = 1


def exact_projection(context: np.ndarray, centre: np.ndarray, signs: np.ndarray) -> list[float]:
    """The projection with the rational numbers that the floats are, one sum after the other."""
    difference = [Fraction(float(c)) - Fraction(float(z)) for c, z in zip(context.flat, centre.flat, strict=True)]
    return [
        float(sum((int(sign) * d for sign, d in zip(row, difference, strict=True)), Fraction(0)))
        / math.sqrt(len(signs))
        for row in signs
    ]


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 30)),
    dimension=st.integers(1, 20),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30]),
)
def test_the_projection_is_the_exact_one(seed: int, shape: tuple[int, int], dimension: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    centre = (scale * generator.normal(size=shape)).astype(np.float32)
    context = (scale * generator.normal(size=shape)).astype(np.float32)
    found = Sketcher(centre, dimension, 1e38, seed).sketch(context)
    exact = exact_projection(context, centre, random_signs(dimension, centre.size, seed))
    # Fixed point is off by half a unit in each of N numbers, a unit being less than 2**-40 of the largest.
    largest = np.abs(context.astype(np.float64) - centre).max()
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=largest * centre.size * 2.0**-40)


def test_the_bits_are_the_same_everywhere() -> None:
    """Computed once; a machine, a NumPy or a BLAS that gives others must not be used for sketches that are compared."""
    index = np.arange(2 * 96, dtype=np.int64)
    context = (((index * 7919) % 1009 - 504) / 512).astype(np.float32).reshape(2, 96)
    for clip, digest in CANONICAL.items():
        sketch = Sketcher(context[::-1] / np.float32(3), 64, clip, 7).sketch(context)
        assert hashlib.sha256(sketch.astype("<f8").tobytes()).hexdigest()[:16] == digest


CANONICAL = {4.0: "e9adf9f1928a1805", 1e6: "52e60dc4a7b917f6"}


def test_signs_are_fair_independent_bits() -> None:
    signs = random_signs(64, 4096, 3)
    assert signs.shape == (64, 4096)
    assert set(np.unique(signs).tolist()) == {-1, 1}
    assert abs(signs.sum()) < 5 * math.sqrt(signs.size)
    assert np.abs((signs @ signs.T)[~np.eye(64, dtype=bool)]).max() < 6 * math.sqrt(4096)
    assert not np.array_equal(signs, random_signs(64, 4096, 4))


def test_distances_keep_to_the_lemma() -> None:
    """The share of distances off by more than h is under the bound, and the mean square is unbiased."""
    generator = np.random.default_rng(0)
    shape, m = (8, 64), 64
    centre = generator.normal(size=shape).astype(np.float32)
    ratios = []
    for seed in range(40):
        sketcher = Sketcher(centre, m, 1e9, seed)
        contexts = (centre + generator.standard_t(3, size=(12, *shape))).astype(np.float32)
        sketches = [sketcher.sketch(context) for context in contexts]
        for i in range(12):
            for j in range(i):
                squared = float(((contexts[i].astype(np.float64) - contexts[j]) ** 2).sum())
                ratios.append(float(((sketches[i] - sketches[j]) ** 2).sum()) / squared)
    off = np.abs(np.array(ratios) - 1)
    for h in (0.3, 0.5, 0.75):
        assert (off >= h).mean() <= min(2 * math.exp(-m * (h**2 / 4 - h**3 / 6)), 1)
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)
    assert np.var(ratios) <= 1.1 * 2 / m


@given(seed=st.integers(0, 2**32 - 1), clip=st.floats(1e-3, 10), size=st.floats(0, 1e6))
def test_no_sketch_is_beyond_the_clip(seed: int, clip: float, size: float) -> None:
    generator = np.random.default_rng(seed)
    centre = np.zeros((2, 8), np.float32)
    context = (size * generator.normal(size=(2, 8))).astype(np.float32)
    sketch = Sketcher(centre, 16, clip, 5).sketch(context)
    assert math.sqrt(math.fsum((sketch * sketch).tolist())) <= clip
    free = Sketcher(centre, 16, 1e30, 5).sketch(context)
    norm = float(np.linalg.norm(free))
    np.testing.assert_allclose(sketch, free if norm <= clip else free * (clip / norm), rtol=1e-12)


def test_the_centre_is_nowhere() -> None:
    centre = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    assert not Sketcher(centre, 8, 1.0, 1).sketch(centre).any()


def recall(found: np.ndarray, exact: np.ndarray, k: int) -> float:
    """Mean share of the k nearest others by `exact (N, .)` that are among those by `found (N, .)`."""
    shares = []
    for row in range(len(exact)):
        nearest = []
        for vectors in (found, exact):
            distances = ((vectors - vectors[row]) ** 2).sum(axis=1)
            distances[row] = np.inf
            nearest.append(set(np.argsort(distances, kind="stable")[:k].tolist()))
        shares.append(len(nearest[0] & nearest[1]) / k)
    return float(np.mean(shares))


@pytest.mark.parametrize(("which", "least"), [("first", 0.87), ("later", 0.75)])
def test_the_nearest_of_real_prompts_stay_the_nearest(which: str, least: float) -> None:
    with np.load(PROMPTS) as prompts:
        contexts, centre = prompts[which], prompts["centre"]
    exact = contexts.reshape(len(contexts), -1).astype(np.float64)
    recalls = []
    for seed in range(3):
        sketcher = Sketcher(centre, 64, 4.0, seed)
        recalls.append(recall(np.stack([sketcher.sketch(context) for context in contexts]), exact, 9))
    chance = 9 / (len(contexts) - 1)
    assert np.mean(recalls) > least > 4 * chance


@pytest.mark.parametrize("context", [np.zeros((2, 3), np.float32), np.full((3, 5), np.nan, np.float32)])
def test_what_cannot_be_sketched_is_refused(context: np.ndarray) -> None:
    with pytest.raises(ValueError, match="cannot be sketched"):
        Sketcher(np.zeros((3, 5), np.float32), 8, 1.0, 1).sketch(context)


@pytest.mark.parametrize(
    ("centre", "dimension", "clip"),
    [
        (np.zeros(4, np.float32), 8, 1.0),
        (np.zeros((0, 4), np.float32), 8, 1.0),
        (np.full((1, 4), np.inf, np.float32), 8, 1.0),
        (np.zeros((1, 4), np.float32), 0, 1.0),
        (np.zeros((1, 4), np.float32), 8, 0.0),
        (np.zeros((1, 4), np.float32), 8, math.nan),
        (np.zeros((1, 4), np.float32), 8, math.inf),
    ],
)
def test_parameters_that_make_no_sense_are_refused(centre: np.ndarray, dimension: int, clip: float) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - one of several sentences
        Sketcher(centre, dimension, clip, 1)

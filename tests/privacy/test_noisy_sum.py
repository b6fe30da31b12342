"""The sum that a step of DP-SGD releases: its sensitivity in exact arithmetic, its noise, and what its floats tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from pfedsecure.privacy.noisy_sum import NoisySum

Streams = Callable[[int], Callable[[int], bytes]]


def two_parameters(batch: int, seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(batch, *shape, generator=generator) for shape in ((3, 4), (5,))]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@given(
    st.integers(0, 40),
    st.floats(1e-3, 300),
    st.floats(1e-4, 50),
    st.sampled_from([1e-8, 0.1, 1.0, 1e3, 1e30]),
    st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_one_example_changes_the_sum_by_the_clip_at_most(
    others: int, clip: float, multiplier: float, scale: float, seed: int
) -> None:
    """In integers: the standard deviation of the noise, 2**13, is at least `multiplier` times the change."""
    summed = NoisySum(clip, multiplier)
    vectors = two_parameters(others + 1, seed, scale)
    everybody = flat(summed.clipped(vectors, others + 1))
    one_less = flat(summed.clipped([vector[1:] for vector in vectors], others))
    change = sum(int(number) ** 2 for number in (everybody - one_less).tolist())
    assert change <= (Fraction(2**13) / Fraction(multiplier)) ** 2


def test_the_sensitivity_is_used_up() -> None:
    """One example far over the clip moves the sum by the clip, whatever the others do: nobody is protected for free."""
    summed = NoisySum(2.0, 1.0)
    far = [torch.tensor([[1e6, 0.0]]), torch.tensor([[0.0]])]
    moved = flat(summed.clipped(far, 1)).double() * summed.unit
    assert float(moved.norm()) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_sum_is_that_of_jointly_clipped_vectors(scale: float) -> None:
    vectors = two_parameters(9, 1, scale)
    rows = torch.cat([vector.reshape(9, -1) for vector in vectors], dim=1).double()
    expected = (rows * (1.5 / rows.norm(dim=1, keepdim=True)).clamp(max=1)).sum(dim=0)
    summed = NoisySum(1.5, 0.01)
    found = flat(summed.clipped(vectors, 9)).double() * summed.unit
    # Every example is rounded towards zero, by less than a unit a number.
    assert float((found - expected).abs().max()) <= 9 * summed.unit
    clipped_apart = sum(
        (vector.reshape(9, -1) * (1.5 / vector.reshape(9, -1).norm(dim=1, keepdim=True)).clamp(max=1)).sum(dim=0).norm()
        for vector in vectors
    )
    if scale > 1:
        assert float(found.norm()) < float(clipped_apart)


def test_order_and_company_do_not_matter() -> None:
    vectors = two_parameters(30, 2, 3.0)
    summed = NoisySum(1.0, 1.0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    together = flat(summed.clipped(vectors, 30))
    assert torch.equal(together, flat(summed.clipped([vector[order] for vector in vectors], 30)))
    alone = sum(flat(summed.clipped([vector[i : i + 1] for vector in vectors], 1)) for i in range(30))
    assert torch.equal(together, alone)


def test_the_noise_is_that_of_the_multiplier_and_the_clip(stream: Streams) -> None:
    summed = NoisySum(0.3, 1.7, unsafe_entropy=stream(4))
    zeros = [torch.zeros(6, 100, 300), torch.zeros(6, 20_000)]
    noise = flat(summed(zeros, 6)).double().numpy() / (1.7 * 0.3)
    assert stats.kstest(noise, "norm").pvalue > 1e-4
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / len(noise))
    assert abs((noise[1:] * noise[:-1]).mean()) < 5 / math.sqrt(len(noise))
    # Those of the two parameters, and of two steps, are different draws.
    again = flat(summed(zeros, 6)).double().numpy() / (1.7 * 0.3)
    assert abs((noise * again).mean()) < 5 / math.sqrt(len(noise))
    assert abs((noise[:20_000] * noise[-20_000:]).mean()) < 5 / math.sqrt(20_000)


def test_an_empty_batch_gets_noise_like_any_other() -> None:
    noise = flat(NoisySum(1.0, 2.0)([torch.zeros(0, 50, 40), torch.zeros(0, 500)], 0)).double().numpy()
    assert noise.shape == (2500,)
    assert stats.kstest(noise / 2.0, "norm").pvalue > 1e-6


def test_what_is_released_lies_on_a_grid_that_knows_nothing_of_the_data(stream: Streams) -> None:
    """Floats plus float noise land on floats that depend on both. Here, whatever was summed, on multiples of a unit."""
    for seed, scale in ((5, 1e-6), (6, 1.0), (7, 1e6)):
        summed = NoisySum(0.7, 1.3, unsafe_entropy=stream(seed))
        released = flat(summed(two_parameters(11, seed, scale), 11)).double() / summed.unit
        assert float((released - released.round()).abs().max()) < 0.01
        assert 2**12 < float(released.abs().max()) < 2**17


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_for_nothing(bad: float) -> None:
    vectors = two_parameters(4, 8)
    summed = NoisySum(1.0, 1.0)
    without = flat(summed.clipped([vector[1:] for vector in vectors], 3))
    vectors[0][0, 1, 1] = bad
    assert torch.equal(flat(summed.clipped(vectors, 4)), without)


def test_gradients_by_class_are_refused() -> None:
    """Hooks on a prompt, whose batch is classes, give gradients `(C, ...)`; they train and protect nobody."""
    summed = NoisySum(1.0, 1.0)
    with pytest.raises(ValueError, match=r"of shape \(10, 5\) is not one by example: the batch has 32"):
        summed.clipped([torch.zeros(32, 3), torch.zeros(10, 5)], 32)
    with pytest.raises(ValueError, match="not one by example"):
        summed.clipped([torch.tensor(1.0)], 1)


def test_the_operating_system_is_the_default() -> None:
    summed = NoisySum(1.0, 1.0)
    zeros = [torch.zeros(1, 64)]
    assert not np.array_equal(summed(zeros, 1)[0], summed(zeros, 1)[0])


@pytest.mark.parametrize(
    ("clip", "multiplier"), [(0.0, 1.0), (math.inf, 1.0), (math.nan, 1.0), (1.0, 0.0), (1.0, 1e-5), (1.0, math.nan)]
)
def test_nonsense_is_refused(clip: float, multiplier: float) -> None:
    with pytest.raises(ValueError, match="no sense"):
        NoisySum(clip, multiplier)

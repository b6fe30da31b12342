"""Opacus' optimiser with our sum: the same steps as its own, and refusals where its own goes on."""

from __future__ import annotations

import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from pfedsecure.privacy.noisy_sum import NoisySum
from pfedsecure.privacy.optimizer import ExactNoiseOptimizer


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((3, 4), (5,))]


def gradients(step: int, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    return [torch.randn(batch, *shape, generator=generator) for shape in ((3, 4), (5,))]


def sgd(of: list[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": of[:1], "lr": 0.3}, {"params": of[1:], "lr": 0.1}], momentum=0.9)


def give(of: list[nn.Parameter], by_example: list[Tensor]) -> None:
    for parameter, gradient in zip(of, by_example, strict=True):
        parameter.grad_sample = gradient  # type: ignore[attr-defined]


def test_with_next_to_no_noise_it_takes_the_steps_of_opacus() -> None:
    ours, theirs = parameters(), parameters()
    exact = ExactNoiseOptimizer(sgd(ours), NoisySum(0.8, 1e-4), expected_batch_size=6)
    plain = DPOptimizer(sgd(theirs), noise_multiplier=0.0, max_grad_norm=0.8, expected_batch_size=6)
    for step, batch in enumerate([6, 0, 1, 9]):
        give(ours, gradients(step, batch))
        give(theirs, gradients(step, batch))
        exact.expect(batch)
        exact.step()
        plain.step()
        exact.zero_grad()
        plain.zero_grad()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-4)


def test_the_expected_batch_divides_not_the_drawn_one() -> None:
    """The size of the drawn batch is data: dividing by it would release it."""
    found = []
    for batch in (1, 4):
        of = parameters()
        optimizer = ExactNoiseOptimizer(sgd(of), NoisySum(1.0, 1e-4), expected_batch_size=8)
        give(of, [gradient.expand(batch, *gradient.shape[1:]) for gradient in gradients(0, 1)])
        optimizer.expect(batch)
        assert optimizer.pre_step()
        found.append(torch.cat([parameter.grad.flatten() for parameter in of]))
    # Their difference is noise of standard deviation 5e-5, anew in every run.
    assert found[1].norm() > 0.1
    torch.testing.assert_close(4 * found[0], found[1], atol=1e-3, rtol=0)


def test_an_empty_batch_is_a_step_of_noise() -> None:
    of = parameters()
    optimizer = ExactNoiseOptimizer(sgd(of), NoisySum(1.0, 2.0), expected_batch_size=4)
    give(of, gradients(0, 0))
    optimizer.expect(0)
    optimizer.step()
    assert all(float(parameter.grad.abs().min()) > 0 for parameter in of)


def test_gradients_by_class_are_refused_before_anything_is_drawn() -> None:
    of, classes, images = parameters(), 3, 8
    optimizer = ExactNoiseOptimizer(sgd(of), NoisySum(1.0, 1.0), expected_batch_size=images)
    before = [parameter.detach().clone() for parameter in of]
    give(of, [gradients(0, classes)[0], gradients(0, images)[1]])
    optimizer.expect(images)
    with pytest.raises(ValueError, match="not one by example: the batch has 8"):
        optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(of, before, strict=True))
    assert all(parameter.grad is None for parameter in of)


def test_what_was_summed_once_is_not_summed_again() -> None:
    of = parameters()
    optimizer = ExactNoiseOptimizer(sgd(of), NoisySum(1.0, 1.0), expected_batch_size=4)
    give(of, gradients(0, 4))
    with pytest.raises(ValueError, match="nobody announced"):
        optimizer.step()
    optimizer.expect(4)
    optimizer.step()
    optimizer.expect(4)
    with pytest.raises(ValueError, match="haven't been cleared"):
        optimizer.step()
    optimizer.zero_grad()
    give(of, gradients(1, 4))
    with pytest.raises(ValueError, match="nobody announced"):
        optimizer.step()

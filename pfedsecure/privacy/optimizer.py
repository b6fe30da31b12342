"""Opacus' DPOptimizer, with noise that is worth its name, and a check that what it sums are examples.

Formal guarantee: that of `pfedsecure.privacy.noisy_sum` for each `pre_step` or `step`, over all parameters of the
optimiser jointly. What comes after the noise (the division by the expected batch size, momentum, weight decay, learning
rates) is a function of what is released.

Differences from Opacus: gradients are clipped and summed as integers and the noise is drawn for integers from the
operating system's generator, where Opacus adds floats of a seeded generator (its `secure_mode` takes an extension that
no longer builds); the batch has to be announced with `expect` before every step, and a `grad_sample` with another first
axis is refused, which Opacus would take; a batch may be empty.
"""

from __future__ import annotations

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

from pfedsecure.privacy.noisy_sum import NoisySum


class ExactNoiseOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """`optimizer` on noised sums of per-example gradients, divided by the public `expected_batch_size`."""

    def __init__(self, optimizer: torch.optim.Optimizer, noisy_sum: NoisySum, expected_batch_size: float) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noisy_sum.noise_multiplier,
            max_grad_norm=noisy_sum.clip,
            expected_batch_size=expected_batch_size,
        )
        self._noisy_sum = noisy_sum
        self._expected: int | None = None

    def expect(self, batch: int) -> None:
        """Announce how many examples the next step's batch really has; 0 is as good as any."""
        self._expected = batch

    def clip_and_accumulate(self) -> None:
        """Exact sums, in integers, into `summed_grad`. Raises ValueError for gradients that are not by example."""
        batch, self._expected = self._expected, None
        if batch is None:
            raise ValueError("nobody announced the batch of this step with `expect`")
        gradients = []
        for parameter in self.params:
            _check_processed_flag(parameter.grad_sample)
            gradients.append(self._get_flat_grad_sample(parameter))
        sums = self._noisy_sum.clipped(gradients, batch)
        for parameter, total in zip(self.params, sums, strict=True):
            parameter.summed_grad = total if parameter.summed_grad is None else parameter.summed_grad + total
            _mark_as_processed(parameter.grad_sample)

    def add_noise(self) -> None:
        """Noised sums into `grad`."""
        for parameter in self.params:
            _check_processed_flag(parameter.summed_grad)
        noised = self._noisy_sum.noised([parameter.summed_grad for parameter in self.params])
        for parameter, total in zip(self.params, noised, strict=True):
            parameter.grad = total.view_as(parameter)
            _mark_as_processed(parameter.summed_grad)

"""The paper's way to privacy, with an epsilon that holds: training without noise, which is put on what is uploaded.

What a client sends in a round is its trained context. Nothing bounds how far training moves that, so by itself no noise
gives it any epsilon; here the move away from the round's start is clipped to a norm S before noise is added.

Formal guarantee. What is sent in round t is start + clip(context - start) + N(0, (2 S z)^2 I). The clipped move depends
on the images and on the client's gate, which depends on the images; but whatever these are, it lies in a ball of radius
S. So if the images are replaced by any others, all of them, it moves by at most 2 S: one use of the Gaussian mechanism
with noise multiplier z, given what was sent before. All rounds together are the composition of as many. The gate needs
no noise for that: it stays at home, and how it shapes the prompt is inside of what is clipped.

So this epsilon is of *everything that a client has* against anything else, which is more than the epsilon of one image
that DP-SGD gives. It says nothing of what stays at home: the client predicts with a prompt and a gate that were trained
without noise, and whoever sees these, or enough of their predictions, is told about images. Every client counts the
same in the mean, so that nothing is told by weights.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch

from pfed_client.local_model import Array, LocalModel
from pfed_client.trainer import RoundReport, StepCallback, Trainer
from pfedsecure.clip.backbone import Backbone
from pfedsecure.clip.features import FeatureSet
from pfedsecure.plan import Plan
from pfedsecure.privacy.calibration import analytic_sigma
from pfedsecure.privacy.events import GaussianRelease
from pfedsecure.privacy.noisy_sum import NoisySum
from pfedsecure.secagg.entropy import Entropy

DELTA = 1e-5
UPLOAD = "prompt"
"""What the events are of."""
_MARGIN = 1e-6
"""More than the accountant rounds an epsilon up by."""


def upload_noise(epsilon: float, rounds: int) -> float:
    """z: the noise multiplier of each of `rounds` uploads that together are (`epsilon`, `DELTA`)-private."""
    return analytic_sigma(epsilon * (1 - _MARGIN), DELTA, 1.0) * math.sqrt(rounds)


class NoisedUploadTrainer(Trainer):
    """A `Trainer` whose models have a noised context, while it predicts with the one that it trained.

    `clip`: S. `unsafe_entropy` other than the default makes the noise reproducible: for tests alone.
    """

    def __init__(
        self,
        plan: Plan,
        backbone: Backbone,
        train: FeatureSet,
        test: FeatureSet,
        *,
        name: str,
        epsilon: float,
        clip: float,
        unsafe_entropy: Entropy = os.urandom,
    ) -> None:
        super().__init__(plan, backbone, train, test, name=name)
        self.noise_multiplier = upload_noise(epsilon, plan.rounds.count)
        # Of the ball's radius, as `NoisySum` counts: its diameter is the sensitivity.
        self._upload = NoisySum(clip, 2 * self.noise_multiplier, unsafe_entropy=unsafe_entropy)
        self._at_home: LocalModel | None = None

    def event(self, round_number: int) -> GaussianRelease:
        """What an upload releases."""
        return GaussianRelease(UPLOAD, round_number, self.noise_multiplier)

    def train_round(
        self,
        model: LocalModel,
        start: Array,
        experts: Array,
        round_number: int,
        on_step: StepCallback | None = None,
    ) -> tuple[LocalModel, RoundReport]:
        """As `Trainer.train_round`, but the context of the model, which is sent, is clipped and noised."""
        trained, report = super().train_round(model, start, experts, round_number, on_step)
        self._at_home = trained
        (move,) = self._upload([torch.from_numpy(trained.context - start)[None]], 1)
        context = (start + move.numpy()).astype(np.float32)
        return LocalModel(context, trained.gate, experts, round_number, n_train=1), report

    def evaluate(self, model: LocalModel) -> float:
        """Accuracy in [0, 1] of the model that stayed at home, where `model` is what was sent of it."""
        home = self._at_home
        is_newest = home is not None and home.trained_round == model.trained_round
        return super().evaluate(home if home is not None and is_newest else model)

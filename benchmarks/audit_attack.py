"""The attack of an audit: one client, whose published prompts an adversary reads who knows everything but who is in.

The adversary is the server and all peers. It has each round start from the plan's own prompt, lends no experts, so that
no gate takes a share of the clip, and knows the client's other images and every canary. The guarantee holds for any
image features and labels: it plants those that its own view makes out best, whose gradients lie in what the prompt
shows of the release, and hardly in each other's direction.

Where a round is one step, its move shows, with J the text tower's Jacobian at the start:

| what is released | what can be seen of it |
|---|---|
| noised sums by the text features (`feature-space`) | their part in the column space of J |
| noised sums by the prompt (`per-sample`) | all |
| nothing: training without privacy | the sum of gradients by the prompt |

`FromMoves` computes from that how much likelier it is with each canary than without, other canaries and draws taken for
normally distributed. The scale of a move is estimated, by maximum likelihood: clients shorten moves when noise is loud.
Where a round has many steps its move is no such sum, and `FromLosses` asks how well the new prompt knows each canary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pfed_client.local_model import LocalModel
from pfed_client.private_trainer import PrivateTrainer
from pfed_client.promise import Promise
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone
from pfedsecure.clip.features import FeatureSet
from pfedsecure.moe.per_sample import context_gradients, gain, tangential
from pfedsecure.plan import Plan
from pfedsecure.seeds import derive_seed

NAME = "audited"
_FAINTEST = 3e-4
"""Directions that the tower shrinks to less than this of its strongest are left out: floats round them away."""
_NO_NOISE = 1e-3
"""Assumed without privacy, of a gradient's length: rounding."""
_ASCENTS, _RATE = 300, 0.03
_DESIGN_NOISE = 0.5
"""Over the clip, that canaries are designed for; about what epsilon 8 takes of one release."""


@dataclass(frozen=True)
class Target:
    """What is audited: `plan` with a client that holds `own` images. `promise` None: without differential privacy."""

    plan: Plan
    backbone: Backbone
    own: FeatureSet
    promise: Promise | None


class View:
    """What the prompt's move from the plan's start shows of the gradients of images, in `k <= n d` coordinates."""

    def __init__(self, target: Target) -> None:
        self._clip = target.plan.privacy.clip
        trainer = trainer_of(target, target.own)
        network = trainer.network(trainer.new_model())
        text_features = network.text_features()
        self._text_features = text_features.detach().double()
        self._logit_scale = target.backbone.logit_scale
        self._jacobian = _jacobian(text_features, network.ctx)
        self._weight = gain(text_features, network.ctx)
        self._at_features = target.promise is not None and target.plan.privacy.mechanism == "feature-space"
        left, strengths, right = torch.linalg.svd(self._jacobian, full_matrices=False)
        kept = strengths > _FAINTEST * strengths[0]
        self._basis = left[:, kept]
        self._reading = right[kept].T / strengths[kept] if self._at_features else torch.eye(len(right)).double()

    def read(self, move: Tensor) -> Tensor:
        """The visible part `(k,)` of the release behind a `move (n, d)` of the prompt, up to a factor."""
        release: Tensor = move.double().flatten() @ self._reading
        return release

    def pulls(self, features: Tensor, labels: Tensor, *, clipped: bool) -> Tensor:
        """The visible part `(N, k)` of what images `(N, D)`, `(N,)` add to a release, in clips; differentiable.

        The norm that counts for the clip is that of all of it. Not `clipped`: as it is.
        """
        features = features.double()
        classes = len(self._text_features)
        errors = (self._logit_scale * features @ self._text_features.T).softmax(dim=1) - F.one_hot(labels, classes)
        by_features = self._logit_scale * errors[:, :, None] * features[:, None, :]
        if self._at_features:
            whole = self._weight * tangential(by_features, self._text_features).flatten(1)
            visible: Tensor = whole @ self._basis
        else:
            whole = visible = by_features.flatten(1) @ self._jacobian
        if not clipped:
            return visible
        in_clips: Tensor = visible / whole.norm(dim=1, keepdim=True).clamp(min=self._clip)
        return in_clips

    def canaries(self, count: int, seed: int) -> FeatureSet:
        """Unit vectors `(count, D)` with labels that are told apart best: the most information about their coins."""
        classes, width = self._text_features.shape
        generator = torch.Generator().manual_seed(derive_seed(seed, "canaries"))
        labels = torch.arange(count) % classes
        free = torch.randn(count, width, generator=generator, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=_RATE)
        for _ in range(_ASCENTS):
            pulls = self.pulls(F.normalize(free, dim=1), labels, clipped=True)
            signal = torch.eye(count, dtype=torch.float64) + pulls @ pulls.T / (4 * _DESIGN_NOISE**2)
            optimizer.zero_grad()
            (-torch.logdet(signal)).backward()
            optimizer.step()
        return FeatureSet(F.normalize(free.detach(), dim=1).float(), labels)


class Attack:
    """Trains the target with some of the `planted` canaries, and scores from its prompts how much each seems in."""

    def __init__(self, target: Target, planted: FeatureSet) -> None:
        self.target = target
        """What is trained; a test puts another here than the one that the attack was made for."""
        self._planted = planted

    def scores(self, included: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Of each canary, `(M,)`, after a training in which those `included` were: the sum over rounds."""
        own, some = self.target.own, self._planted.subset(np.flatnonzero(included))
        together = FeatureSet(torch.cat([own.features, some.features]), torch.cat([own.labels, some.labels]))
        trainer = trainer_of(self.target, together)
        model, start = trainer.new_model(), trainer.initial_context()
        total = np.zeros(len(self._planted))
        for number in range(1, self.target.plan.rounds.count + 1):
            model, _ = trainer.train_round(model, start, model.experts, number)
            total += self._of_round(trainer, model)
        return total

    def _of_round(self, trainer: Trainer, model: LocalModel) -> NDArray[np.float64]:
        """`(M,)`, of what a round made of the plan's start."""
        raise NotImplementedError


class FromMoves(Attack):
    """Log-likelihood ratios, for rounds of one step."""

    def __init__(self, target: Target, planted: FeatureSet, view: View) -> None:
        super().__init__(target, planted)
        self._view = view
        private = target.promise is not None
        by_canary = view.pulls(planted.features, planted.labels, clipped=private)
        by_own = view.pulls(target.own.features, target.own.labels, clipped=private)
        self._rate = 1.0 if target.promise is None else target.promise.sample_rate
        noise = _NO_NOISE * float(by_canary.norm()) if target.promise is None else target.promise.noise_multiplier
        share = self._rate / 2  # of rounds with a canary in the sum: its coin, and the draw
        self._expected = share * by_canary.sum(dim=0) + self._rate * by_own.sum(dim=0)
        covariance = share * (1 - share) * by_canary.T @ by_canary + self._rate * (1 - self._rate) * by_own.T @ by_own
        covariance += noise**2 * torch.eye(len(covariance), dtype=torch.float64)
        self._inverse = torch.linalg.inv(covariance)
        # One canary against all the rest: its own part of covariance and mean is taken out (Sherman and Morrison).
        squares = ((by_canary @ self._inverse) * by_canary).sum(dim=1)
        self._readers = (by_canary @ self._inverse) / (1 - share * (1 - share) * squares)[:, None]
        self._halfway = (0.5 - share) * (self._readers * by_canary).sum(dim=1)

    def _of_round(self, trainer: Trainer, model: LocalModel) -> NDArray[np.float64]:
        move = torch.from_numpy(trainer.initial_context()).double() - torch.from_numpy(model.context)
        release = self._scaled(self._view.read(move))
        in_sum = self._readers @ (release - self._expected) - self._halfway
        ratios: NDArray[np.float64] = in_sum.numpy()
        if self._rate < 1:
            ratios = np.logaddexp(math.log(self._rate) + ratios, math.log1p(-self._rate))
        return ratios

    def _scaled(self, release: Tensor) -> Tensor:
        """`release (k,)` times the factor x that makes it likeliest: of k log x - |x release - expected|^2 / 2."""
        square = float(release @ self._inverse @ release)
        along = float(release @ self._inverse @ self._expected)
        return release * (along + math.sqrt(along**2 + 4 * square * len(release))) / (2 * square)


class FromLosses(Attack):
    """Minus the canaries' losses with the new prompt."""

    @torch.no_grad()
    def _of_round(self, trainer: Trainer, model: LocalModel) -> NDArray[np.float64]:
        logits = trainer.network(model)(self._planted.features)
        losses: NDArray[np.float64] = F.cross_entropy(logits, self._planted.labels, reduction="none").double().numpy()
        return -losses


def trainer_of(target: Target, train: FeatureSet) -> Trainer:
    """The client's own trainer, on `train`."""
    if target.promise is None:
        return Trainer(target.plan, target.backbone, train, target.own, name=NAME)
    return PrivateTrainer(target.plan, target.backbone, train, target.own, name=NAME, promise=target.promise)


def _jacobian(text_features: Tensor, context: Tensor) -> Tensor:
    """Of `text_features (C, D)` by `context (n, d)`: `(C D, n d)`, float64."""
    each = torch.eye(text_features.numel()).reshape(-1, *text_features.shape)
    return context_gradients(text_features, context, each).flatten(1).double()

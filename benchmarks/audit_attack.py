"""The attack of an audit: one client, whose published prompts an adversary reads who knows everything but who is in.

The adversary is the server and all peers: it chooses what rounds start from (this client's own last prompt, which tells
most), it knows the client's other images, the plan, the seed of the gate's start, and every canary. Canaries are image
features in random directions with random labels: nothing else in the data pulls the prompt where they do.

In each round the prompt moved by some sum of gradients, and with privacy by noise, which is louder in some directions
than in others: it came through the text tower. The adversary knows that tower, turns everything so that noise is alike
in all directions, and finds by ridge regression how much of every canary's gradient, at the round's start, is in the
move. A canary's score is the mean over rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pfed_client.private_trainer import PrivateTrainer
from pfed_client.promise import Promise
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone
from pfedsecure.clip.features import FeatureSet
from pfedsecure.moe.per_sample import context_gradients, feature_gradients, gain, tangential
from pfedsecure.plan import Plan
from pfedsecure.seeds import derive_seed

NAME = "audited"
_RIDGE = 1e-4
_PROBES = 512
_FAINTEST = 1e-3


@dataclass(frozen=True)
class Target:
    """What is audited: `plan` with a client that holds `own` images. `promise` None: without differential privacy."""

    plan: Plan
    backbone: Backbone
    own: FeatureSet
    promise: Promise | None


def canaries(count: int, width: int, classes: int, seed: int) -> FeatureSet:
    """Unit vectors `(count, width)` in random directions, with random labels."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "canaries"))
    features = F.normalize(torch.randn(count, width, generator=generator), dim=-1)
    return FeatureSet(features, torch.randint(classes, (count,), generator=generator))


def scores(target: Target, planted: FeatureSet, included: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How much each canary of `planted` seems to have been in, `(M,)`, when those that are `included` were."""
    trainer = _trainer(target, _together(target.own, planted.subset(np.flatnonzero(included))))
    total = np.zeros(len(planted))
    for start, end in _published(trainer, target.plan.rounds.count):
        by_canary, by_own = (_pulls(trainer, target, start, images) for images in (planted, target.own))
        decay = torch.from_numpy(start).double().flatten()
        pulls = torch.cat([by_canary, by_own.sum(dim=0, keepdim=True), decay[None]])
        move = torch.from_numpy(start - end).double().flatten()
        if target.promise is not None:
            whitening = _whitening(trainer, start)
            pulls, move = pulls @ whitening, move @ whitening
        total += _shares(pulls, move)[: len(planted)]
    return total / target.plan.rounds.count


def _trainer(target: Target, train: FeatureSet) -> Trainer:
    if target.promise is None:
        return Trainer(target.plan, target.backbone, train, target.own, name=NAME)
    return PrivateTrainer(target.plan, target.backbone, train, target.own, name=NAME, promise=target.promise)


def _published(trainer: Trainer, rounds: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The prompts before and after each round."""
    model = trainer.new_model()
    for number in range(1, rounds + 1):
        start = model.context
        model, _ = trainer.train_round(model, start, model.experts, number)
        yield start, model.context


def _pulls(trainer: Trainer, target: Target, context: NDArray[np.float32], images: FeatureSet) -> Tensor:
    """What each image adds to the sum that moves the context, `(N, n d)`, float64: with privacy its clipped gradient.

    With the gate as it was at the very start: that comes from the plan's seed, and later ones stay with the client.
    """
    network = trainer.network(replace(trainer.new_model(), context=context))
    text_features = network.text_features()
    found = feature_gradients(network, text_features, images.features, images.labels)
    pulls = context_gradients(text_features, network.ctx, found.text_features).flatten(1).double()
    if target.promise is not None:
        settings = target.plan.privacy
        parts = [pulls]
        if settings.mechanism == "feature-space":
            at_features = tangential(found.text_features, text_features.detach())
            parts = [gain(text_features, network.ctx) * at_features.flatten(1).double()]
        parts += [part.flatten(1).double() for part in found.gate.values()]
        pulls = pulls * (settings.clip / torch.cat(parts, dim=1).norm(dim=1, keepdim=True)).clamp(max=1.0)
    return pulls


def _whitening(trainer: Trainer, context: NDArray[np.float32]) -> Tensor:
    """`(n d, n d)`, float64: times this, noise that comes to the context through the text tower is alike everywhere."""
    network = trainer.network(replace(trainer.new_model(), context=context))
    text_features = network.text_features()
    probes = torch.randn(_PROBES, *text_features.shape, generator=torch.Generator().manual_seed(1))
    probes = tangential(probes, text_features.detach())
    noise = context_gradients(text_features, network.ctx, probes).flatten(1).double()
    variances, directions = torch.linalg.eigh(noise.T @ noise / _PROBES)
    variances = variances.clamp(min=float(variances.max()) * _FAINTEST)
    whitening: Tensor = directions @ torch.diag(variances**-0.5) @ directions.T
    return whitening


def _shares(pulls: Tensor, move: Tensor) -> NDArray[np.float64]:
    """How much of each of `pulls (M, n d)` is in the `move (n d,)`, up to a factor that all have in common."""
    norms, move = pulls.norm(dim=1), F.normalize(move, dim=0)
    unit = pulls / norms[:, None]
    gram = unit @ unit.T + _RIDGE * torch.eye(len(unit), dtype=torch.float64)
    found: NDArray[np.float64] = (torch.linalg.solve(gram, unit @ move) * norms.mean() / norms).numpy()
    return found


def _together(one: FeatureSet, other: FeatureSet) -> FeatureSet:
    return FeatureSet(torch.cat([one.features, other.features]), torch.cat([one.labels, other.labels]))

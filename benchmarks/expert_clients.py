"""The federations in which experts are compared: data, shares, plans, and the three scores of a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from pfed_client.local_model import LocalModel
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone
from pfedsecure.clip.features import FeatureSet
from pfedsecure.data import ImageSet, few_shot
from pfedsecure.data.digits import CLASS_NAMES, CONDITIONS, digit_images, digit_labels
from pfedsecure.data.images import ImagePixels
from pfedsecure.data.seeding import generator
from pfedsecure.plan import BackbonePlan, MixturePlan, Plan, PromptPlan, ProtectionPlan, RoundsPlan, TrainingPlan

from .photo_clients import Share, by_domain_and_class

DIGITS = "digits"
CLIENTS = 20
NOBODY_PROTECTED = ProtectionPlan(aggregation="plain", experts="plain", matching="plain")
"""All parties are one process."""


@dataclass(frozen=True)
class Data:
    """A data set with the features of all its images."""

    images: ImageSet
    features: FeatureSet
    backbone: Backbone


@cache
def digits() -> ImageSet:
    """All scans, each in one of the five writings, which are the domains."""
    labels = digit_labels()
    writing = generator(0, "expert benchmark").permutation(np.arange(len(labels)) % len(CONDITIONS))
    domains = tuple(CONDITIONS[number] for number in writing)
    pixels = [np.asarray(digit_images(domain, [index])[0]) for index, domain in enumerate(domains)]
    return ImageSet(
        class_names=CLASS_NAMES,
        labels=labels,
        keys=tuple(f"{index:04d}" for index in range(len(labels))),
        images=tuple(ImagePixels(image) for image in pixels),
        domains=domains,
    )


def shares_of(images: ImageSet, seed: int, beta: float, shots: int | None) -> list[Share]:
    """Twenty clients, as many of each domain, labels skewed by Dirichlet(`beta`) inside it; half for training.

    Of these at most `shots` of a class. Test images are the same for any `shots`.
    """
    assert images.domains is not None
    per_domain = CLIENTS // len(set(images.domains))
    shares = by_domain_and_class(images, seed, beta=beta, clients_per_domain=per_domain)
    if shots is None:
        return shares
    kept = [share.train[few_shot(images.labels[share.train], shots, seed)] for share in shares]
    return [
        Share(share.name, share.domain, train=train, test=share.test) for share, train in zip(shares, kept, strict=True)
    ]


def plan_of_set(data_set: str, class_names: Sequence[str], seed: int, rounds: int, model: str) -> Plan:
    """The plan of a federation on digits, or on photographs as in `pfed bench federation`; `mixed` sets K and form."""
    if data_set == DIGITS:
        prompt = PromptPlan(context_length=5, context_init="a photo of the digit")
        backbone, gate_lr = BackbonePlan(), 0.02
    else:
        prompt = PromptPlan(context_length=8, context_init="a photo of a")
        backbone, gate_lr = BackbonePlan(model=model, pretrained=f"{model}.safetensors"), 0.01
    return Plan(
        name="bench",
        seed=seed,
        class_names=tuple(class_names),
        backbone=backbone,
        prompt=prompt,
        mixture=MixturePlan(gate_width=64),
        training=TrainingPlan(local_epochs=2, prompt_lr=0.02, gate_lr=gate_lr),
        rounds=RoundsPlan(count=rounds, minimum_cohort=CLIENTS),
        protection=NOBODY_PROTECTED,
    )


def mixed(plan: Plan, **changes: object) -> Plan:
    """`plan` with other fields of its section `mixture`."""
    return plan.model_copy(update={"mixture": plan.mixture.model_copy(update=changes)})


@dataclass(frozen=True)
class Accuracies:
    """Means over the clients, in [0, 1]. Each image set of a client's is scored over all classes of the plan.

    `own`: on its own test images. `balanced`: on the test images of all clients of its domain, every class counting the
    same. `unseen`: of these the classes that it has no training image of; None where every client has all.
    """

    own: float
    balanced: float
    unseen: float | None


def accuracies(
    data: Data, shares: Sequence[Share], trainers: Mapping[str, Trainer], models: Mapping[str, LocalModel]
) -> Accuracies:
    """The scores of the clients' models."""
    own, balanced, unseen = [], [], []
    for share in shares:
        test = np.concatenate([other.test for other in shares if other.domain == share.domain])
        features = data.features.features[torch.from_numpy(test)]
        predicted = trainers[share.name].predict(models[share.name], features).argmax(dim=1).numpy()
        right = predicted == data.images.labels[test]
        by_class = {label: float(right[at].mean()) for label, at in _members(data.images.labels[test]).items()}
        seen = set(data.images.labels[share.train].tolist())
        own.append(float(right[np.isin(test, share.test)].mean()))
        balanced.append(fmean(by_class.values()))
        if missing := [accuracy for label, accuracy in by_class.items() if label not in seen]:
            unseen.append(fmean(missing))
    return Accuracies(fmean(own), fmean(balanced), fmean(unseen) if unseen else None)


def _members(labels: NDArray[np.int64]) -> dict[int, NDArray[np.bool_]]:
    """Where each class is."""
    return {int(label): labels == label for label in np.unique(labels)}


@dataclass(frozen=True)
class Likeness:
    """Spearman's correlation, over all pairs of clients, of the distance of prompts with two others.

    `labels`: total variation between the histograms of training labels. `domains`: 0 for the same domain, 1 for
    another.
    """

    labels: float
    domains: float


def likeness(data: Data, shares: Sequence[Share], contexts: Mapping[str, NDArray[np.float32]]) -> Likeness:
    """Do similar prompts mean similar data?"""
    n_classes = len(data.images.class_names)
    histograms = [
        np.bincount(data.images.labels[share.train], minlength=n_classes) / len(share.train) for share in shares
    ]
    pairs = [(i, j) for i in range(len(shares)) for j in range(i)]
    prompts = [contexts[share.name].astype(np.float64) for share in shares]
    apart = [float(np.linalg.norm(prompts[i] - prompts[j])) for i, j in pairs]
    return Likeness(
        labels=spearman(apart, [float(np.abs(histograms[i] - histograms[j]).sum() / 2) for i, j in pairs]),
        domains=spearman(apart, [float(shares[i].domain != shares[j].domain) for i, j in pairs]),
    )


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; ties share the mean of their ranks. 0 where one of the two never changes."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last: NDArray[np.float64] = np.cumsum(counts).astype(np.float64)
    return (last - (counts - 1) / 2)[inverse]

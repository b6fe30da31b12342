"""What an audit attacks: the client's own training with a plan of the embedded demo, and how it is to fail where it is.

Learning rates, steps and rounds of a plan are public: whatever they are, what a client promises is to hold. So an audit
takes those with which a release is seen best, in all settings but the demo's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from pfed_cli.demo.layout import demo_clients, demo_plan
from pfed_client.participant import agreed_backbone
from pfed_client.promise import Promise, promise
from pfed_client.splitting import split
from pfed_client.state import Settings
from pfedsecure.clip.backbone import Backbone
from pfedsecure.clip.features import FeatureSet, image_features
from pfedsecure.data import open_images
from pfedsecure.plan import Plan, PrivacyPlan, RoundsPlan
from pfedsecure.privacy.budget import Budget, Reservation
from pfedsecure.privacy.events import Event

from .audit_attack import Target

DELTA = 1e-5
_EVERYBODY = 10_000
"""A batch that everybody is in, whatever the noised number of images is."""
_CLEAR_LR = 1.0
"""A move of the prompt so long that float32 rounds nothing of it away; with one step a round nothing comes of it."""
_IMAGES = 100


@dataclass(frozen=True)
class Setting:
    """A plan and a client: `own` images beside the canaries, and what differs from the demo's plan, by its section."""

    own: int
    canaries: int
    rounds: int
    privacy: Mapping[str, object] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)


_ONE_STEP = {"steps": 1, "prompt_lr": _CLEAR_LR}
_PLAIN = {"local_epochs": 1, "batch_size": _EVERYBODY, "weight_decay": 0.0}
SETTINGS = {
    "one step": Setting(8, 32, 1, {**_ONE_STEP, "batch_size": _EVERYBODY}, _PLAIN),
    "one step, per-sample": Setting(
        8, 32, 1, {**_ONE_STEP, "batch_size": _EVERYBODY, "mechanism": "per-sample"}, _PLAIN
    ),
    "thirty sampled steps": Setting(_IMAGES, 32, 30, {**_ONE_STEP, "batch_size": 12}, _PLAIN),
    "demo": Setting(_IMAGES, 16, 3),
}
"""One release that everybody is in; thirty rounds of one release each, of a sample; and three rounds as in the demo."""

_FAINTER = {"a tenth of the noise": 0.1, "seven tenths of the noise": 0.7}
FLAWS = (*_FAINTER, "clips at ten times the norm", "everybody in every step")
"""What a broken client may do while it promises what a sound one does: an audit that is worth anything finds it out."""


def audited(name: str, epsilon: float | None, canaries: int, flaw: str | None = None) -> Target:
    """A client alone in the setting `name`, whose promise is for its own images and half of so many canaries.

    Epsilon None: private from nobody. With a `flaw` it promises what it would without. Raises ValueError for a flaw
    that is none of `FLAWS`.
    """
    setting = SETTINGS[name]
    plan = demo_plan(rounds=setting.rounds, n_clients=5, seed=1)
    update = {
        "privacy": plan.privacy.model_copy(update=setting.privacy),
        "training": plan.training.model_copy(update=setting.training),
    }
    plan = plan.model_copy(update=update)
    backbone, images = _images()
    own = images.subset(np.arange(setting.own))
    if epsilon is None:
        return Target(plan, backbone, own, None)
    made = _promised(plan.rounds, plan.privacy, epsilon, setting.own + canaries // 2)
    if flaw in _FAINTER:
        made = made.model_copy(update={"noise_multiplier": made.noise_multiplier * _FAINTER[flaw]})
    elif flaw == "clips at ten times the norm":  # with the noise as it was
        made = made.model_copy(update={"noise_multiplier": made.noise_multiplier / 10})
        loose = plan.privacy.model_copy(update={"clip": 10 * plan.privacy.clip})
        plan = plan.model_copy(update={"privacy": loose})
    elif flaw == "everybody in every step":
        made = made.model_copy(update={"sample_rate": 1.0})
    elif flaw is not None:
        raise ValueError(f"{flaw!r} is none of {FLAWS}")
    return Target(plan, backbone, own, made)


@cache
def _promised(rounds: RoundsPlan, privacy: PrivacyPlan, epsilon: float, size: int) -> Promise:
    """Made once for all trainings alike: to solve for the noise takes longer than a training."""
    plan = Plan(class_names=("any", "other"), rounds=rounds, privacy=privacy)
    return promise(plan, epsilon, DELTA, size, lambda _epsilon, _delta: _Granted())


class _Granted(Budget, Reservation):
    """Audits are of public images: nothing is to be accounted for."""

    def reserve(self, event: Event) -> Reservation:
        return self

    def commit(self) -> None:
        return


@cache
def _images() -> tuple[Backbone, FeatureSet]:
    """The embedded model, and the features of some training images of the demo's first client."""
    plan, client = demo_plan(rounds=1, n_clients=5, seed=1), demo_clients(5, 1)[0]
    settings = Settings.of(client.data)
    images = open_images(client.data, strict=False, root=Path()).relabel(plan.class_names)
    backbone = agreed_backbone(plan, settings, "cpu")
    rows, _ = split(images, plan, client.name, settings.test_fraction)
    return backbone, image_features(backbone, images.subset(rows[:_IMAGES]))

"""From what a client was started with to what it trains with: images, their split, the backbone, the trainer.

Nothing here talks to the server, so that data or a backbone that do not fit the plan are found before anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pfed_client.privacy import Privacy
from pfed_client.splitting import Split, split
from pfed_client.state import Settings
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import FeatureSet, image_features
from pfedsecure.data import ImageSet
from pfedsecure.errors import CheckpointMismatch
from pfedsecure.plan import Plan


@dataclass(frozen=True)
class Participant:
    """A client ready to take part in a federation. `privacy`: what its trainer promised, where it did."""

    backbone: Backbone
    trainer: Trainer
    test: FeatureSet
    privacy: Privacy | None


def prepare(
    plan: Plan,
    name: str,
    settings: Settings,
    images: ImageSet,
    *,
    device: str,
    cache_dir: Path | None,
    trains: bool = True,
    rows: Split | None = None,
    privacy_of: Callable[[int], Privacy | None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Participant:
    """Client `name` of `plan` with its own `images`.

    `rows`: how the images are split, where that was settled before; else it is drawn. Without `trains` the trainer is
    for predictions alone, and the views that only training sees are not computed. `privacy_of(n_train)` is what a
    client with so many training images promises. `on_progress(done, total)` follows the computation of image features,
    which are kept in `cache_dir`. Raises ClassNamesMismatch, DataError, PlanError, BackboneError or CheckpointMismatch,
    and whatever `privacy_of` raises.
    """
    images = images.relabel(plan.class_names)
    train_rows, test_rows = rows or split(images, plan, name, settings.test_fraction)
    backbone = agreed_backbone(plan, settings, device)
    compute = partial(image_features, cache_dir=cache_dir, cache_bytes=settings.cache_bytes, on_progress=on_progress)
    features = compute(backbone, images)
    test = features.subset(test_rows)
    train = features.subset(train_rows)
    if trains and plan.training.views > 1:
        train = compute(backbone, images.subset(train_rows), views=plan.training.views)
    privacy = None if privacy_of is None else privacy_of(len(train))
    if privacy is None:
        return Participant(backbone, Trainer(plan, backbone, train, test, name=name), test, None)
    from pfed_client.private_trainer import PrivateTrainer  # Opacus takes seconds to load

    trainer = PrivateTrainer(plan, backbone, train, test, name=name, promise=privacy.promise)
    return Participant(backbone, trainer, test, privacy)


def agreed_backbone(plan: Plan, settings: Settings, device: str) -> Backbone:
    """The plan's frozen model, from where this client has it.

    Raises BackboneError when it cannot be had, CheckpointMismatch when it is not the one that the plan agrees on.
    """
    agreed = plan.backbone
    model, pretrained = settings.backbone(plan)
    if model != agreed.model and agreed.text_digest is None:
        raise CheckpointMismatch(
            f"--backbone {model} is not the plan's {agreed.model}, and the plan has no backbone.text_digest to tell "
            "whether the two are the same; leave --backbone off"
        )
    backbone = load_backbone(
        model,
        pretrained,
        config_dir=settings.backbone_dir,
        device=device,
        precision=settings.precision,
    )
    if agreed.text_digest not in (None, backbone.text_digest):
        raise CheckpointMismatch(
            f"the text tower of {model} has digest {backbone.text_digest[:12]}, the plan agrees on "
            f"{str(agreed.text_digest)[:12]}; give --pretrained the weights that the federation uses"
        )
    if agreed.text_width not in (None, backbone.tower.width):
        raise CheckpointMismatch(
            f"the text tower of {model} is {backbone.tower.width} wide, the plan agrees on {agreed.text_width}; "
            "give --backbone the model that the federation uses"
        )
    return backbone

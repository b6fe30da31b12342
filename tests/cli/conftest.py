"""Three clients with a few of the embedded digits each, and the embedded tiny CLIP: a federation takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pfed_cli.simulation import SimulatedClient
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import image_features
from pfedsecure.data import open_images, train_test_split
from pfedsecure.data.digits import CLASS_NAMES
from pfedsecure.plan import Plan

IMAGES = 48

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone("tiny-clip", "embedded")


@pytest.fixture(scope="session")
def clients(backbone: Backbone) -> list[SimulatedClient]:
    made = []
    for number in range(3):
        share = open_images(f"demo:{number}/3", strict=True)
        # every k-th image, and not as many for each client: the mean of prompts is a weighted one
        images = share.subset(range(0, len(share), len(share) // (IMAGES + 8 * number))).relabel(CLASS_NAMES)
        features = image_features(backbone, images)
        train, test = train_test_split(images.labels, 0.5, seed=number)
        made.append(SimulatedClient(f"client-{number + 1}", features.subset(train), features.subset(test)))
    return made


@pytest.fixture
def small_plan() -> Callable[..., Plan]:
    """A plan of three clients, two rounds and one expert; `rounds__count=1` changes a field of a section."""

    def make(**changes: Any) -> Plan:
        values: dict[str, Any] = {
            "class_names": CLASS_NAMES,
            "prompt": {"context_length": 3},
            "mixture": {"experts": 1, "gate_width": 16, "gate_heads": 2},
            "training": {"local_epochs": 2, "batch_size": 16, "prompt_lr": 0.05, "gate_lr": 0.05},
            "rounds": {"count": 2, "minimum_cohort": 3},
            "protection": {"matching": "plain"},
        }
        for key, value in changes.items():
            section, _, field = key.rpartition("__")
            (values[section] if section else values)[field] = value
        return Plan.model_validate(values)

    return make

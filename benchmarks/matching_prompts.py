"""Real prompts to measure recall on: of a federation of fifty clients with a few dozen handwritten digits each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import pfedsecure
from pfed_cli.simulation import SimulatedClient, simulate
from pfedsecure.clip.backbone import load_backbone
from pfedsecure.clip.features import image_features
from pfedsecure.data import open_images, train_test_split
from pfedsecure.plan import Plan

CLIENTS, QUICK_CLIENTS = 50, 12
ROUNDS, QUICK_ROUNDS = (1, 3), (1,)
TEST_FRACTION = 0.3

Prompts = tuple[NDArray[np.float32], NDArray[np.float32]]


def real_prompts(quick: bool) -> dict[str, Prompts]:
    """By name: the plan's start `(n, d)` and the contexts `(clients, n, d)` after some rounds."""
    torch.set_num_threads(1)
    backbone = load_backbone("tiny-clip", "embedded")
    number = QUICK_CLIENTS if quick else CLIENTS
    clients = []
    for share in range(number):
        plan = _plan(1, number)
        images = open_images(f"demo:{share}/{number}", strict=True).relabel(plan.class_names)
        features = image_features(backbone, images)
        train, test = train_test_split(images.labels, TEST_FRACTION, seed=share)
        clients.append(SimulatedClient(f"client-{share:02d}", features.subset(train), features.subset(test)))
    found = {}
    for rounds in QUICK_ROUNDS if quick else ROUNDS:
        plan = _plan(rounds, number)
        result = simulate(plan, clients, backbone)
        contexts = np.stack([result.clients[client.name].model.context for client in clients])
        found[f"digits, {number} clients, round {rounds}"] = backbone.initial_context(plan), contexts
    return found


def _plan(rounds: int, clients: int) -> Plan:
    """The demo's, unprotected: all parties are this process."""
    plan = Plan.from_toml(Path(pfedsecure.__file__).parent / "demo_plan.toml")
    values = plan.model_dump(by_alias=True)
    values["rounds"] |= {"count": rounds, "minimum_cohort": clients}
    values["protection"] |= {"aggregation": "plain", "experts": "plain", "matching": "plain"}
    return Plan.model_validate(values)

"""The clients of the benchmark of privacy against accuracy: the demo's five, and those of the photo benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pfed_cli.demo.layout import demo_clients, demo_plan
from pfed_cli.simulation import SimulatedClient
from pfed_client.splitting import split
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import image_features
from pfedsecure.data import few_shot, open_images
from pfedsecure.plan import Plan, ProtectionPlan

from .expert_clients import DIGITS, plan_of_set
from .photo_clients import by_domain_and_class, clients_of
from .photo_features import Sources, model_name, photo_backbone, photo_features

DIGIT_CLIENTS = 5
TEST_FRACTION = 0.5


@dataclass(frozen=True)
class Federation:
    """What one seed of a data set gives: plan, clients with all their training images, and the frozen model."""

    plan: Plan
    clients: Sequence[SimulatedClient]
    backbone: Backbone


@lru_cache(maxsize=4)
def federation_of(data_set: str, seed: int, rounds: int, sources: Sources) -> Federation:
    """Digits with the demo's plan and clients; of photographs those of `pfed bench experts`, K = 9.

    Raises DataError or BackboneError where `sources` does not have what it takes.
    """
    if data_set == DIGITS:
        plan = demo_plan(rounds=rounds, n_clients=DIGIT_CLIENTS, seed=seed)
        backbone = load_backbone(plan.backbone.model, plan.backbone.pretrained)
        return Federation(plan, _digit_clients(plan, backbone, sources.cache), backbone)
    images, features = photo_features(data_set, sources)
    plan = plan_of_set(data_set, images.class_names, seed, rounds, model_name(sources.backbone_dir))
    clients = clients_of(by_domain_and_class(images, seed), features)
    plan = plan.model_copy(update={"protection": ProtectionPlan()})
    return Federation(plan, clients, photo_backbone(sources.backbone_dir))


def _digit_clients(plan: Plan, backbone: Backbone, cache: Path) -> list[SimulatedClient]:
    """As the client processes of `pfed demo` split them."""
    clients = []
    for client in demo_clients(DIGIT_CLIENTS, plan.seed):
        images = open_images(client.data, strict=False, root=Path()).relabel(plan.class_names)
        features = image_features(backbone, images, cache_dir=cache / "features")
        train, test = split(images, plan, client.name, TEST_FRACTION)
        clients.append(SimulatedClient(client.name, train=features.subset(train), test=features.subset(test)))
    return clients


def with_shots(clients: Sequence[SimulatedClient], shots: int | None, seed: int) -> list[SimulatedClient]:
    """`clients` with at most so many training images of a class; test images stay. None: all."""
    if shots is None:
        return list(clients)
    return [
        SimulatedClient(c.name, c.train.subset(few_shot(c.train.labels.cpu().numpy(), shots, seed)), c.test)
        for c in clients
    ]

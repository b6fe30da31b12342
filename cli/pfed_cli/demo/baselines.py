"""What the demo's federation is compared with, computed in this process from the clients' own images and splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pfed_cli.demo.layout import DemoClient, Layout
from pfed_cli.methods import Method
from pfed_cli.scoring import score
from pfed_cli.simulation import SimulatedClient, SimulationResult, simulate
from pfed_client.saved import SavedClient
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import image_features
from pfedsecure.plan import Plan

BASELINES = (Method.ZERO_SHOT, Method.LOCAL, Method.PROMPTFL, Method.GATE_ONLY)

Weights = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """`accuracies[method][client]` in [0, 1], and the same federation once more in this process.

    `weights[client][lender]`: how much the expert of each lender weighed on the client's test images in the last
    round, averaged over images and classes; the client's own prompt stands under its own name. Rows sum to 1. Empty for
    a client that borrowed nothing.
    """

    accuracies: Mapping[Method, Mapping[str, float]]
    in_process: SimulationResult
    weights: Weights


def compare(layout: Layout, plan: Plan, clients: Sequence[DemoClient]) -> Comparison:
    """All of it, from the features that the clients left in their state directories."""
    backbone = load_backbone(plan.backbone.model, plan.backbone.pretrained)
    simulated = [_simulated(layout, plan, client, backbone) for client in clients]
    in_process = simulate(plan, simulated, backbone)
    return Comparison(
        accuracies={method: score(method, plan, simulated, backbone) for method in BASELINES},
        in_process=in_process,
        weights=_weights(plan, simulated, in_process, backbone),
    )


def _simulated(layout: Layout, plan: Plan, client: DemoClient, backbone: Backbone) -> SimulatedClient:
    saved = SavedClient.open(layout.client_state(client.name))
    images, (train, test) = saved.split()
    features = image_features(backbone, images, cache_dir=saved.folder / "features")
    return SimulatedClient(client.name, train=features.subset(train), test=features.subset(test))


def _weights(plan: Plan, clients: Sequence[SimulatedClient], result: SimulationResult, backbone: Backbone) -> Weights:
    weights: Weights = {}
    for client in clients:
        outcome = result.clients[client.name]
        lenders = outcome.borrowed.get(outcome.model.trained_round, ())
        trainer = Trainer(plan, backbone, client.train, client.test, name=client.name)
        explained = trainer.explain(outcome.model, client.test.features) if lenders else None
        mean = [] if explained is None else explained.mean(dim=(0, 1)).tolist()
        weights[client.name] = dict(zip((client.name, *lenders), mean, strict=True)) if mean else {}
    return weights

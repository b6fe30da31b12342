"""A cell of the benchmark of privacy against accuracy: trained by the real client and server code, and scored."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import fmean

from pfed_cli.methods import Method, plan_of
from pfed_cli.simulation import Prepare, SimulatedClient, simulate, train_alone, with_privacy
from pfed_client.privacy import Privacy
from pfed_client.state import ClientState
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone
from pfedsecure.plan import Plan

from .contract import Row
from .noised_uploads import DELTA, NoisedUploadTrainer
from .privacy_cells import Cell, Way
from .privacy_data import Federation, with_shots

UPLOAD_CLIP = 0.02
"""S of `noised_uploads`."""
SKETCH_EPSILON = 8.0
"""Of the noise on sketches with `dp` matching, for clients without privacy; that of private prompts is free."""


def measure(cell: Cell, federation: Federation) -> Row:
    """The row of `cell`.

    `accuracy`: unweighted mean over the clients of that on their own test images, in [0, 1]; `worst` is the least of
    them. `noise_multiplier`: mean over the clients; `delta`: the largest of theirs; both None without privacy.
    `images`: the least number of training images that a client has.
    """
    started = time.monotonic()
    plan, backbone = plan_of_cell(cell, federation.plan), federation.backbone
    clients = with_shots(federation.clients, cell.shots, cell.seed)
    promised: list[tuple[float, float]] = []
    prepare = _watched(_prepare(cell, plan, backbone), promised)
    accuracies: Mapping[str, float]
    if cell.way in (Way.LOCAL, Way.LOCAL_GATE):
        accuracies = train_alone(plan, clients, backbone, prepare)
    else:
        accuracies = simulate(plan, clients, backbone, prepare).accuracies
    return {
        "data_set": cell.data_set,
        "way": str(cell.way),
        "mechanism": cell.mechanism,
        "matching": cell.matching,
        "shots": cell.shots,
        "epsilon": cell.epsilon,
        "seed": cell.seed,
        "accuracy": fmean(accuracies.values()),
        "worst": min(accuracies.values()),
        "noise_multiplier": round(fmean(noise for noise, _ in promised), 4) if promised else None,
        "delta": max(delta for _, delta in promised) if promised else None,
        "clients": len(clients),
        "images": min(len(client.train) for client in clients),
        "seconds": round(time.monotonic() - started, 1),
    }


def plan_of_cell(cell: Cell, plan: Plan) -> Plan:
    """The plan of a cell's federation, or of as many steps of training alone."""
    if cell.mechanism is not None:
        plan = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"mechanism": cell.mechanism})})
    match cell.way:
        case Way.LOCAL | Way.PROMPTFL:
            return plan_of(Method.PROMPTFL, plan)
        case Way.LOCAL_GATE:
            return plan_of(Method.GATE_ONLY, plan)
        case Way.PFEDMOAP | Way.UPLOADS:
            if cell.matching == "dp":
                plan = plan.model_copy(
                    update={"matching": plan.matching.model_copy(update={"epsilon": SKETCH_EPSILON})}
                )
            return plan.with_matching(cell.matching)


def _prepare(cell: Cell, plan: Plan, backbone: Backbone) -> Prepare | None:
    epsilon = cell.epsilon
    if epsilon is None:
        return None
    if cell.way != Way.UPLOADS:
        return with_privacy(plan, backbone, epsilon)

    def prepare(client: SimulatedClient, state: ClientState) -> tuple[Trainer, Privacy | None]:
        trainer = NoisedUploadTrainer(
            plan, backbone, client.train, client.test, name=client.name, epsilon=epsilon, clip=UPLOAD_CLIP
        )
        return trainer, None

    return prepare


def _watched(prepare: Prepare | None, promised: list[tuple[float, float]]) -> Prepare | None:
    """`prepare`, which puts noise multiplier and delta of every client into `promised`."""
    if prepare is None:
        return None

    def watching(client: SimulatedClient, state: ClientState) -> tuple[Trainer, Privacy | None]:
        trainer, privacy = prepare(client, state)
        if privacy is not None:
            promised.append((privacy.promise.noise_multiplier, privacy.promise.delta))
        elif isinstance(trainer, NoisedUploadTrainer):
            promised.append((trainer.noise_multiplier, DELTA))
        return trainer, privacy

    return watching

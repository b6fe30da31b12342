"""The score of each method, computed in this process from one plan, the same splits and the same seed."""

from __future__ import annotations

from collections.abc import Sequence

from pfed_cli.methods import Method, plan_of
from pfed_cli.simulation import SimulatedClient, simulate, train_alone
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone
from pfedsecure.plan import Plan

ZERO_SHOT_WORDS = "a photo of a"
"""CLIP's own prompt (Radford et al. 2021)."""


def score(method: Method, plan: Plan, clients: Sequence[SimulatedClient], backbone: Backbone) -> dict[str, float]:
    """Accuracy in [0, 1] by client, of what the method gives each in the end, on its own test images.

    zero_shot: the words that the plan's prompt starts from, else "a photo of a". local: a prompt of one's own, trained
    as long as in the federation. promptfl: the shared prompt of the last round. Others: the client's own final model.
    """
    of_method = plan_of(method, plan)
    match method:
        case Method.ZERO_SHOT:
            words = plan.prompt.context_init or ZERO_SHOT_WORDS
            return {
                client.name: Trainer(of_method, backbone, client.train, client.test, name=client.name).zero_shot(words)
                for client in clients
            }
        case Method.LOCAL:
            return train_alone(of_method, clients, backbone)
        case _:
            return simulate(of_method, clients, backbone).accuracies

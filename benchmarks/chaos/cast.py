"""Who takes part: one plan for each kind of federation, and certificates that are made once and used in every world."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from pfed_client.local_model import Array, LocalModel
from pfedsecure.pki.development import enrol, ensure_development_pki
from pfedsecure.pki.identity import Identity
from pfedsecure.plan import Plan
from pfedsecure.wire.peer import Peer

Kind = Literal["plain", "secure"]
SHAPE = (2, 3)
"""n x d. Each member has a number of the context to itself."""
MEMBERS = ("anna", "ben", "cleo", "dora", "emil")
PRIVATE = "anna"
"""The one that trains with differential privacy."""
_PLAIN = {"aggregation": "plain", "experts": "plain", "matching": "plain"}
_SECURE = {"aggregation": "secure", "experts": "sealed", "matching": "random"}


def plan_of(kind: Kind, seed: int) -> Plan:
    """Three rounds of at least three members, two experts each; the shortest privacy that there is."""
    return Plan.model_validate(
        {
            "seed": seed,
            "class_names": ["cat", "dog"],
            "backbone": {"text_width": SHAPE[1]},
            "prompt": {"context_length": SHAPE[0]},
            "mixture": {"experts": 2},
            "rounds": {"count": 3, "minimum_cohort": 3, "heartbeat_seconds": 5, "deadline_seconds": 60},
            "privacy": {"steps": 1},
            "protection": _PLAIN if kind == "plain" else _SECURE,
        }
    )


def value_of(round_number: int) -> float:
    """What a member's own number is in a context that it trained in a round."""
    return 0.5 - 0.04 * (round_number % 8)


def weight_of(name: str) -> int:
    """Its number of training images."""
    return 20 + 7 * MEMBERS.index(name)


@dataclass(frozen=True)
class Report:
    """What training came to."""

    train_loss: float
    n_experts: int


@dataclass
class MarkingTrainer:
    """Makes contexts in which a member's own number alone is not zero: a sum of them tells who is in it.

    `trained` holds the round of every training there ever was.
    """

    name: str
    trained: list[int] = field(default_factory=list)

    @property
    def n_train(self) -> int:
        return weight_of(self.name)

    def initial_context(self) -> Array:
        return np.zeros(SHAPE, np.float32)

    def new_model(self) -> LocalModel:
        return LocalModel(self.initial_context(), {}, np.zeros((0, *SHAPE), np.float32), trained_round=0)

    def train_round(
        self,
        model: LocalModel,
        start: Array,
        experts: Array,
        round_number: int,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> tuple[LocalModel, Report]:
        if on_step is not None:
            on_step(1, 1, 0.5)
        self.trained.append(round_number)
        context = np.zeros(SHAPE, np.float32)
        context.flat[MEMBERS.index(self.name)] = value_of(round_number)
        return LocalModel(context, model.gate, experts, round_number, self.n_train), Report(0.5, len(experts))

    def lent(self, model: LocalModel) -> Array:
        return model.context

    def evaluate(self, _model: LocalModel) -> float:
        return 0.5


class Cast:
    """The server's and all members' certificates, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.server = ensure_development_pki(folder / "pki")
        self.identities: dict[str, Identity] = {
            name: enrol(folder / "pki", name, "client", folder / name) for name in MEMBERS
        }
        now = datetime.now(UTC)
        self.peers = {
            name: Peer.from_certificate(identity.certificate, identity.authority, now)
            for name, identity in self.identities.items()
        }


@cache
def the_cast() -> Cast:
    """The same in every world of this process: keys take a while to make."""
    folder = tempfile.TemporaryDirectory(prefix="pfed-cast-")
    cast = Cast(Path(folder.name))
    _folders.append(folder)
    return cast


_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when the process ends."""

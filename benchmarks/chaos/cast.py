"""Who takes part: one plan for each kind of federation, and certificates that are made once and used in every world."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from pfed_client.local_model import Array
from pfedsecure.pki.development import enrol, ensure_development_pki
from pfedsecure.pki.identity import Identity
from pfedsecure.plan import Plan
from pfedsecure.wire.peer import Peer

from ..stand_in import StandIn

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


class MarkingTrainer(StandIn):
    """Makes contexts in which a member's own number alone is not zero: a sum of them tells who is in it.

    `trained` holds the round of every training there ever was.
    """

    score = 0.5

    def __init__(self, name: str) -> None:
        super().__init__(SHAPE)
        self.name = name
        self.trained: list[int] = []

    @property
    def n_train(self) -> int:
        return weight_of(self.name)

    def prompt_after(self, start: Array, round_number: int) -> Array:
        self.trained.append(round_number)
        context = np.zeros(SHAPE, np.float32)
        context.flat[MEMBERS.index(self.name)] = value_of(round_number)
        return context


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

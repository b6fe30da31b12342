"""What all parties of one aggregation agree on beforehand: the parameters, given by the plan, and the round."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from functools import cached_property

from pfedsecure.secagg.transcript import digest

SMALLEST_COHORT = 3
"""With two, each would read the other's input off the sum."""
LARGEST_COHORT = 4096
"""Bounds what is read of a message before its content is known."""
LARGEST_WEIGHT = 2**29 - 1
"""A float32 times a weight is exact in float64 up to here."""

_HEX_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Assumptions:
    """What the sparse graph relies on; the complete graph needs fewer than a third of either and no luck.

    `corrupt`: share of the cohort that colludes with the server. `dropout`: share that goes missing, independently of
    the graph. The server learns more than one sum with probability at most 2**-security_bits a round; a round whose
    drop-outs stay within `dropout` is lost with probability at most 2**-correctness_bits.
    """

    corrupt: float = 0.2
    dropout: float = 0.3
    security_bits: int = 40
    correctness_bits: int = 20

    def __post_init__(self) -> None:
        if not (0 <= self.corrupt < 1 / 3 and 0 <= self.dropout < 1 / 3):
            raise ValueError("corrupt and dropout must be at least 0 and below 1/3: the quorum tolerates no more")
        if self.security_bits < 1 or self.correctness_bits < 1:
            raise ValueError("security_bits and correctness_bits must be at least 1")


@dataclass(frozen=True)
class Parameters:
    """Shape, range and precision of the inputs, and how the cohort is wired.

    `values`: length of a client's vector. `metrics`: names of numbers that may ride along, weighted by the same weight.
    Values and metrics are clipped to [-clip, clip]; weights are 1..max_weight; `precision`: the largest error that
    encoding may add to a weighted mean whose weights are 1 on average (with a mean weight w it is w times smaller).
    Up to `complete_up_to` clients the graph is complete; above, too, unless `bounds` finds a sparser one good enough.
    """

    values: int
    clip: float
    max_weight: int
    precision: float
    minimum_cohort: int = SMALLEST_COHORT
    metrics: tuple[str, ...] = ()
    complete_up_to: int = 64
    assumptions: Assumptions = Assumptions()

    def __post_init__(self) -> None:
        if self.values < 1:
            raise ValueError("values must be at least 1")
        if not (0 < self.clip < math.inf and 0 < self.precision < math.inf):
            raise ValueError("clip and precision must be positive numbers")
        if not 1 <= self.max_weight <= LARGEST_WEIGHT:
            raise ValueError(f"max_weight must be in 1..{LARGEST_WEIGHT}")
        if not SMALLEST_COHORT <= self.minimum_cohort <= LARGEST_COHORT:
            raise ValueError(f"minimum_cohort must be in {SMALLEST_COHORT}..{LARGEST_COHORT}")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("a metric stands twice")

    def digest(self) -> bytes:
        """SHA-256 of everything above."""
        assumed = self.assumptions
        reals = struct.pack(">4d", self.clip, self.precision, assumed.corrupt, assumed.dropout)
        names = digest("metrics", *(name.encode() for name in self.metrics))
        return digest(
            "parameters",
            self.values,
            self.max_weight,
            self.minimum_cohort,
            self.complete_up_to,
            assumed.security_bits,
            assumed.correctness_bits,
            reals,
            names,
        )


@dataclass(frozen=True)
class RoundSetting:
    """One round of one federation. Digests are SHA-256 in hexadecimal; `model_digest` is of what was trained from."""

    federation_id: str
    round: int
    plan_digest: str
    model_digest: str
    parameters: Parameters

    def __post_init__(self) -> None:
        for name in ("plan_digest", "model_digest"):
            if not _HEX_DIGEST.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} must be 64 hexadecimal digits")
        if not (1 <= self.round < 2**64 and 1 <= len(self.federation_id.encode()) <= 64):
            raise ValueError("round must be at least 1, and federation_id have 1 to 64 bytes")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the setting: part of everything that is hashed, derived or sealed in the round."""
        return digest(
            "setting",
            self.federation_id.encode(),
            self.round,
            bytes.fromhex(self.plan_digest),
            bytes.fromhex(self.model_digest),
            self.parameters.digest(),
        )

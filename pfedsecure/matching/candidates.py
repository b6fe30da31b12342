"""What an answer to a match query comes down to: experts by id, best first."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from pfedsecure.errors import MessageRejected
from pfedsecure.wire.v1.payload_pb2 import PlainMatchAnswer


@dataclass(frozen=True)
class Candidate:
    """An expert that may be borrowed; `distance` to what was asked with, None where experts are drawn by lot."""

    expert_id: str
    distance: float | None


def write_candidates(candidates: Iterable[Candidate]) -> bytes:
    """A PlainMatchAnswer of `candidates`, in their order."""
    answer = PlainMatchAnswer()
    for candidate in candidates:
        answer.candidates.add(expert_id=candidate.expert_id, distance=candidate.distance)
    return answer.SerializeToString(deterministic=True)


def read_candidates(answer: bytes) -> list[Candidate]:
    """The candidates of a PlainMatchAnswer, best first. Raises MessageRejected, also for distances that are none."""
    try:
        message = PlainMatchAnswer.FromString(answer)
    except DecodeError:
        raise MessageRejected("the server's match answer is not a PlainMatchAnswer") from None
    candidates = [
        Candidate(candidate.expert_id, candidate.distance if candidate.HasField("distance") else None)
        for candidate in message.candidates
    ]
    for candidate in candidates:
        if candidate.distance is not None and not (math.isfinite(candidate.distance) and candidate.distance >= 0):
            raise MessageRejected(f"the server's match answer has a distance of {candidate.distance!r}")
    return candidates

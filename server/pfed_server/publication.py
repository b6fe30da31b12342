"""What a client lends to its peers, checked when it arrives as far as a server can."""

from __future__ import annotations

import hashlib

from google.protobuf.message import DecodeError

from pfed_server.store import StoredPublication
from pfedsecure.errors import MessageRejected
from pfedsecure.experts.interface import ServerExperts
from pfedsecure.matching.interface import ServerMatching
from pfedsecure.wire.v1.payload_pb2 import Publication


def read_publication(
    data: bytes, experts: ServerExperts, matching: ServerMatching, expert_id: str, round_number: int
) -> StoredPublication:
    """A publication of a member with pseudonym `expert_id` for a round. Raises MessageRejected."""
    try:
        publication = Publication.FromString(data)
    except DecodeError:
        raise MessageRejected("the publication is not a Publication") from None
    epoch = experts.check(publication.expert, expert_id, round_number)
    matching.check_sketch(publication.sketch, epoch)
    return StoredPublication(publication.expert, publication.sketch, epoch, hashlib.sha256(data).digest())

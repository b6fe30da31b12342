"""What a client lends to its peers, checked when it arrives, so that nobody fetches an expert that cannot be used."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.interface import ServerMatching
from pfedsecure.wire.tensors import check_norm, from_tensor
from pfedsecure.wire.v1.payload_pb2 import PlainExpert, Publication


def read_publication(data: bytes, matching: ServerMatching, shape: tuple[int, int], max_norm: float) -> Publication:
    """A publication with a sketch that `matching` takes and an expert of `shape (n, d)` and norm up to `max_norm`.

    Raises MessageRejected.

    The expert is looked into because experts are not sealed yet: this server can read every one of them.
    """
    try:
        publication = Publication.FromString(data)
        expert = PlainExpert.FromString(publication.expert)
    except DecodeError:
        raise MessageRejected("the publication is not a Publication of a PlainExpert") from None
    check_norm(from_tensor(expert.context, shape, "the expert"), max_norm, "the expert")
    matching.check_sketch(publication.sketch)
    return publication

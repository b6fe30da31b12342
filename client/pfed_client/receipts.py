"""What a server says it has stored."""

from __future__ import annotations

import hashlib

from pfedsecure.errors import MessageRejected
from pfedsecure.wire.v1.round_pb2 import Receipt


def check_receipt(receipt: Receipt, content: bytes) -> None:
    """Raise MessageRejected unless `receipt` is for `content`."""
    if receipt.sha256 != hashlib.sha256(content).digest():
        raise MessageRejected("the server's receipt is for something else than was sent")

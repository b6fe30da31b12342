"""The server's memory of a client's ledger: asked before anything is paid, told before any noise is drawn.

    ask     what the server has must be in the ledger: otherwise this is an older copy, or another ledger
    (the reservation is written to the ledger)
    sign    the server takes the newest row in the place of what it had
    (its word is written to the ledger; from here on noise may be drawn)

So there is no noise whose reservation the server has not seen, and a copy of the ledger from before is refused for ever
after. What the server sees is a SHA-256 over random bytes: that there is another row, and nothing about it.

Claimed against accidents and against whoever puts files back, as long as the server keeps its own state: a client and a
server that are both put back to the same moment cannot be told from that moment.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from pfed_client.ledger.account import Account
from pfedsecure.errors import LedgerError
from pfedsecure.pki.countersignature import Countersignature, LedgerHead, verify_countersignature
from pfedsecure.wire.api import FederationApi
from pfedsecure.wire.v1 import federation_pb2 as fed

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Countersigner:
    """Of the client `member`, that has joined the federation. `authority` None: plain text, without signatures."""

    api: FederationApi
    account: Account
    federation_id: str
    member: str
    instance_id: str
    authority: x509.Certificate | None

    async def ask(self) -> bytes:
        """The head that the server has, which is in the ledger. Raises LedgerError."""
        reply = await self.api.countersign(fed.CountersignRequest(instance_id=self.instance_id))
        last = await asyncio.to_thread(self.account.server_has, reply.head.hex())
        if reply.number < last:
            _logger.warning(
                "the server countersigned this client's ledger %d times and remembers %d: an older copy of its state "
                "was put back; what was released stays counted here",
                last,
                reply.number,
            )
        return reply.head

    async def sign(self, known: bytes) -> None:
        """Have the server take what was paid last in the place of `known`, which `ask` gave.

        Raises LedgerError where somebody was faster, IdentityError for a signature that is not the server's.
        """
        head = bytes.fromhex(self.account.paid)
        request = fed.CountersignRequest(instance_id=self.instance_id, known_head=known, new_head=head)
        reply = await self.api.countersign(request)
        if not reply.countersigned or reply.head != head:
            raise LedgerError(
                f"the server was shown another ledger of {self.member} meanwhile; leave the name to one client, with "
                "one ledger"
            )
        made = Countersignature(b"", b"")  # in plain text nobody can say whose it is
        if self.authority is not None:
            signed = LedgerHead(self.federation_id, self.member, reply.number, head)
            made = Countersignature(reply.certificate, reply.signature)
            verify_countersignature(made, signed, self.authority, datetime.now(UTC))
        await asyncio.to_thread(self.account.countersigned, head.hex(), reply.number, made.certificate, made.signature)

"""What the server remembers of its members' privacy ledgers: one hash of each, which tells nothing but "another row".

A member with differential privacy shows its ledger's newest head before it draws noise. The server has the head before
that one, and takes a new one only from a member that names it. So whoever comes with an older copy of a ledger, or with
a new one, is told of a head that is not in it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from functools import partial

from pfed_server.federation import Federation
from pfed_server.store import LedgerRecord, Member
from pfedsecure.errors import MessageRejected
from pfedsecure.pki.countersignature import Countersignature, LedgerHead
from pfedsecure.wire.v1 import federation_pb2 as fed

Sign = Callable[[LedgerHead], Countersignature]

_HEAD_BYTES = hashlib.sha256().digest_size


class Countersigning:
    """For all members of one federation. `sign` None: heads are remembered, and not signed."""

    def __init__(self, federation: Federation, sign: Sign | None) -> None:
        self._federation = federation
        self._sign = sign

    async def countersign(self, member: Member, request: fed.CountersignRequest) -> fed.CountersignReply:
        """Raises MessageRejected for what is no head."""
        known, new = request.known_head, request.new_head
        if not all(len(head) in (0, _HEAD_BYTES) for head in (known, new)):
            raise MessageRejected(f"the head of a ledger is {_HEAD_BYTES} bytes long")
        if new and new == known:
            raise MessageRejected("a ledger that has a new row has a new head")
        advance = partial(self._federation.store.advance_ledger, member.name, known, new)
        record: LedgerRecord = await self._federation.exclusively(partial(asyncio.to_thread, advance))
        reply = fed.CountersignReply(head=record.head, number=record.number)
        reply.countersigned = bool(new) and record.head == new  # also when the answer to the same request was lost
        if reply.countersigned and self._sign is not None:
            head = LedgerHead(self._federation.state.federation_id, member.name, record.number, record.head)
            made = await asyncio.to_thread(self._sign, head)
            reply.certificate, reply.signature = made.certificate, made.signature
        return reply

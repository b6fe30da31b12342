"""The cohort as one of its clients sees it, and what this client demands of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import dealing, keys, messages
from pfedsecure.secagg.encoding import Encoding
from pfedsecure.secagg.messages import Members
from pfedsecure.secagg.roster import Roster
from pfedsecure.secagg.setting import RoundSetting
from pfedsecure.secagg.sharing import Sharing
from pfedsecure.wire.v1 import secagg_pb2 as wire

MAX_SIGNATURE_BYTES = 72
"""Of an ECDSA P-256 signature in DER."""

_INDEX_BYTES = 5
_FRAMING_BYTES = 64


class Cohort:
    """A verified roster with the place of this client in it."""

    def __init__(self, setting: RoundSetting, roster: Roster, own: int) -> None:
        self.roster = roster
        self.own = own
        self.sharing = Sharing.of(setting.parameters, len(roster))
        self.encoding = Encoding.of(setting.parameters, len(roster))
        self._fewest = max(self.sharing.quorum, setting.parameters.minimum_cohort)
        self._secrets: dict[int, bytes] = {}

    @property
    def largest_bitmap(self) -> int:
        """Bytes of a message with one bitmap."""
        return len(self.roster) // 8 + _FRAMING_BYTES

    @property
    def largest_inbox(self) -> int:
        """Bytes of an inbox with shares from everybody."""
        return self.largest_bitmap + len(self.roster) * (
            dealing.SEALED_BYTES + dealing.COMMITMENTS_BYTES + _INDEX_BYTES
        )

    @property
    def largest_confirmation(self) -> int:
        """Bytes of a confirmation with signatures from everybody."""
        return self.largest_bitmap + len(self.roster) * (MAX_SIGNATURE_BYTES + 2 * _INDEX_BYTES)

    def share_secret(self, agreement: keys.Agreement, peer: int) -> bytes:
        """What this client and `peer` seal shares with; agreed on once, used to seal and to unseal."""
        if peer not in self._secrets:
            member = self.roster.members[peer]
            self._secrets[peer] = agreement.secret(member.share_key, member.name)
        return self._secrets[peer]

    def forget_secrets(self) -> None:
        """Let go of what was agreed on with peers: nothing is sealed or opened any more once the input is masked."""
        self._secrets.clear()

    def require_quorum(self, bitmap: bytes, what: str) -> Members:
        """The set in `bitmap`.

        Raises MessageRejected unless it is a quorum, has the plan's minimum of clients and includes this one.
        """
        chosen = messages.from_bitmap(bitmap, len(self.roster), f"the bitmap of {what}")
        if not chosen[self.own]:
            raise MessageRejected(f"the {what} do not include this client, which is one of them; it leaves the round")
        if chosen.sum() < self._fewest:
            raise MessageRejected(
                f"{chosen.sum()} {what} of a cohort of {len(self.roster)} are too few to hide this client among, "
                f"{self._fewest} are needed"
            )
        return chosen

    def require_dealers(self, dealers: NDArray[np.int64], participants: Members) -> None:
        """Raises MessageRejected unless these may, and in a complete graph must, have dealt shares to this client."""
        dealt = messages.members(dealers.tolist(), len(self.roster))
        expected = participants.copy()
        expected[self.own] = False
        if (dealt & ~expected).any():
            raise MessageRejected("the inbox holds shares from clients that do not take part, or from this client")
        if self.sharing.complete and (expected & ~dealt).any():
            missing = self.roster.names[int(np.flatnonzero(expected & ~dealt)[0])]
            raise MessageRejected(f"the inbox lacks the share from {missing}")

    def require_signatures(self, message: wire.Confirmation, survivors: Members, statement: bytes) -> None:
        """Raises MessageRejected unless a quorum of distinct survivors signed `statement`."""
        signers = messages.ascending(message.signers, len(self.roster), "the signers of the confirmation")
        if len(message.signatures) != len(signers) or not survivors[signers].all():
            raise MessageRejected("the confirmation's signers and signatures do not match the survivors")
        if len(signers) < self.sharing.quorum:
            raise MessageRejected(
                f"{len(signers)} clients signed the survivors, {self.sharing.quorum} of {len(self.roster)} must"
            )
        for signer, signature in zip(signers.tolist(), message.signatures, strict=True):
            member = self.roster.members[signer]
            if not member.signer.signed(signature, statement):
                raise MessageRejected(f"{member.name} did not sign these survivors: clients were told different ones")

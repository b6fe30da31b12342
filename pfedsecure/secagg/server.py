"""The server's side of a round: nothing but functions of the messages that it has stored.

A `ServerRound` is made of the messages of the steps that are closed; it keeps nothing else, so a server that was killed
makes it anew from its store. While a step is open, each message that arrives goes through `check` and is stored when it
passes. A step may be closed when `ready` says so; there is nothing to wait for once everybody `expected` has sent. Then
`request` gives each client what its next step needs, and after UNMASK `result` gives the weighted mean. A step that is
not ready at its deadline ends the round: its messages may be deleted, and nothing was revealed.

    stored = {Step.ADVERTISE: {name: message, ...}}
    server = ServerRound(setting, certificates, stored)
    server.request(Step.SHARE, name)        # the roster
    server.check(Step.SHARE, name, message, now)

The checks here protect the round from faulty clients; no client relies on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pfedsecure.errors import IdentityError, MessageRejected
from pfedsecure.secagg import dealing, keys, messages
from pfedsecure.secagg.cohort import MAX_SIGNATURE_BYTES
from pfedsecure.secagg.credentials import Certificates
from pfedsecure.secagg.encoding import Encoding
from pfedsecure.secagg.masking import Ring
from pfedsecure.secagg.messages import Members
from pfedsecure.secagg.roster import (
    Advertisement,
    advertisement_digest,
    check_distinct,
    open_advertisement,
    parse_advertisement,
    read_advertisement,
    roster_digest,
    write_roster,
)
from pfedsecure.secagg.setting import LARGEST_COHORT, RoundSetting
from pfedsecure.secagg.shamir import SHARE_BYTES
from pfedsecure.secagg.sharing import Sharing
from pfedsecure.secagg.steps import Step, participants_digest, survivors_statement
from pfedsecure.wire.v1 import secagg_pb2 as wire

_DIGEST_BYTES = 32
_FRAMING_BYTES = 64

Stored = Mapping[Step, Mapping[str, bytes]]
"""By step and client's name: what the store holds. Mappings that read from the store on demand keep memory small."""


class ServerRound:
    """One round of which `stored` has the messages of every closed step, all of which passed `check`."""

    def __init__(self, setting: RoundSetting, certificates: Certificates, stored: Stored) -> None:
        self.setting = setting
        self._certificates = certificates
        self._stored = stored
        self._opened: dict[str, Advertisement] = {}

    def expected(self, step: Step) -> list[str]:
        """Who may send a message of `step`, sorted: whoever sent one of the step before. Not for ADVERTISE."""
        return sorted(self._stored[Step(step - 1)])

    def ready(self, step: Step) -> bool:
        """Whether the messages stored of `step` are enough to go on with."""
        arrived = len(self._stored.get(step, ()))
        if step is Step.ADVERTISE:
            return self.setting.parameters.minimum_cohort <= arrived <= LARGEST_COHORT
        # Clients go on with so many participants and survivors. Whoever drops out later is in the sum all the same.
        minimum = self.setting.parameters.minimum_cohort if step <= Step.MASK else 0
        if arrived < max(self.sharing.quorum, minimum):
            return False
        return step is not Step.UNMASK or bool(self.recoverable().all())

    def check(self, step: Step, name: str, message: bytes, now: datetime, over: datetime | None = None) -> None:
        """Raise MessageRejected for a message from `name` that must not be stored.

        `over`: when the round is at the latest. Whose certificate ends before that does not get in: clients judge the
        roster by their clocks, and all of them would refuse it because of one expired member.
        """
        if step is not Step.ADVERTISE and name not in self._stored[Step(step - 1)]:
            raise MessageRejected(f"{name} has no part in step {step.name} of round {self.setting.round}")
        match step:
            case Step.ADVERTISE:
                self._check_advertisement(name, message, now, over or now)
            case Step.SHARE:
                self._check_shares(name, message)
            case Step.MASK:
                self._check_masked(message)
            case Step.CONFIRM:
                self._check_signature(name, message)
            case Step.UNMASK:
                self._check_unmasking(name, message)

    def request(self, step: Step, name: str) -> bytes:
        """What `name` needs for `step`, SHARE to UNMASK. Raises MessageRejected for a client that has no part in it."""
        if name not in self._stored[Step(step - 1)]:
            raise MessageRejected(f"{name} has no part in step {step.name} of round {self.setting.round}")
        match step:
            case Step.SHARE:
                return self._roster
            case Step.MASK:
                return self._inbox(self.number[name])
            case Step.CONFIRM:
                return messages.serialised(wire.Survivors(survivors=messages.to_bitmap(self.survivors)))
            case _:
                return self._confirmation

    @cached_property
    def names(self) -> list[str]:
        """The roster's clients; their places are their numbers."""
        return sorted(self._stored[Step.ADVERTISE])

    @cached_property
    def number(self) -> dict[str, int]:
        """Each client's number in the roster, by name."""
        return {name: index for index, name in enumerate(self.names)}

    @cached_property
    def advertisements(self) -> list[wire.Advertisement]:
        """What each client advertised, in the order of numbers."""
        return [parse_advertisement(self._stored[Step.ADVERTISE][name]) for name in self.names]

    @cached_property
    def roster_digest(self) -> bytes:
        """SHA-256 of setting and advertisements: what every later signature is bound to."""
        return roster_digest(self.setting, [advertisement_digest(message) for message in self.advertisements])

    @cached_property
    def sharing(self) -> Sharing:
        """Who holds whose shares, and how many open one, for a roster of this size."""
        return Sharing.of(self.setting.parameters, len(self.names))

    @cached_property
    def encoding(self) -> Encoding:
        """Ring and scale for a roster of this size."""
        return Encoding.of(self.setting.parameters, len(self.names))

    @cached_property
    def participants(self) -> Members:
        """Who dealt shares, `(clients,)` bool."""
        return self._senders(Step.SHARE)

    @cached_property
    def survivors(self) -> Members:
        """Whose masked input is in the sum, `(clients,)` bool."""
        return self._senders(Step.MASK)

    @cached_property
    def participants_digest(self) -> bytes:
        """SHA-256 of the roster's digest and who dealt shares: what holders and maskers agree on."""
        return participants_digest(self.roster_digest, self.participants)

    @cached_property
    def dealt(self) -> dict[int, wire.Shares]:
        """By dealer."""
        return {
            self.number[name]: wire.Shares.FromString(self._stored[Step.SHARE][name])
            for name in sorted(self._stored[Step.SHARE])
        }

    @cached_property
    def place(self) -> NDArray[np.int16]:
        """`(dealer, holder)`: the place of a holder's record in its dealer's message, -1 where there is none."""
        place = np.full((len(self.names), len(self.names)), -1, np.int16)
        for dealer, shares in self.dealt.items():
            place[dealer, list(shares.holders)] = np.arange(len(shares.holders))
        return place

    @cached_property
    def holds(self) -> NDArray[np.bool_]:
        """`(dealer, holder)`: whether the holder, a participant, has shares of the dealer, another or itself."""
        holds = (self.place >= 0) & self.participants
        np.fill_diagonal(holds, self.participants)
        return holds

    def commitments(self, dealer: int, holder: int) -> bytes:
        """To the record that `holder` has from `dealer`."""
        if dealer == holder:
            return self.dealt[dealer].own_commitments
        start = int(self.place[dealer, holder]) * dealing.COMMITMENTS_BYTES
        return self.dealt[dealer].commitments[start : start + dealing.COMMITMENTS_BYTES]

    def masked_input(self, client: int) -> Ring:
        """The masked vector of a survivor."""
        message = wire.MaskedInput.FromString(self._stored[Step.MASK][self.names[client]])
        return np.frombuffer(message.vector, self.encoding.dtype.newbyteorder("<"))

    def unmasking(self, helper: int) -> bytes:
        """The shares that `helper` gave out: one for each participant whose shares it holds, ascending."""
        return wire.Unmasking.FromString(self._stored[Step.UNMASK][self.names[helper]]).shares

    @cached_property
    def helpers(self) -> Members:
        """The clients whose shares arrived."""
        return self._senders(Step.UNMASK)

    def recoverable(self) -> Members:
        """For each client of the roster: whether enough of its shares arrived, or it did not take part at all."""
        arrived: NDArray[np.int64] = (self.holds & self.helpers).sum(axis=1)
        return (arrived >= self.sharing.threshold) | ~self.participants

    def _senders(self, step: Step) -> Members:
        return messages.members((self.number[name] for name in self._stored.get(step, ())), len(self.names))

    @cached_property
    def _roster(self) -> bytes:
        return write_roster([self._stored[Step.ADVERTISE][name] for name in self.names])

    def _inbox(self, holder: int) -> bytes:
        dealers = np.flatnonzero(self.place[:, holder] >= 0)
        sealed = []
        for dealer in dealers.tolist():
            start = int(self.place[dealer, holder]) * dealing.SEALED_BYTES
            sealed.append(self.dealt[dealer].sealed[start : start + dealing.SEALED_BYTES])
        return messages.serialised(
            wire.Inbox(
                participants=messages.to_bitmap(self.participants),
                dealers=dealers.tolist(),
                sealed=b"".join(sealed),
                commitments=b"".join(self.commitments(dealer, holder) for dealer in dealers.tolist()),
            )
        )

    @cached_property
    def _confirmation(self) -> bytes:
        """A quorum of signatures; more would only cost everybody more to verify."""
        signatures = self._stored[Step.CONFIRM]
        signers = sorted(signatures)[: self.sharing.quorum]
        return messages.serialised(
            wire.Confirmation(
                survivors=messages.to_bitmap(self.survivors),
                signers=[self.number[name] for name in signers],
                signatures=[wire.SurvivorSignature.FromString(signatures[name]).signature for name in signers],
            )
        )

    def _check_advertisement(self, name: str, data: bytes, now: datetime, over: datetime) -> None:
        advertisement = read_advertisement(data, self.setting, self._certificates, now)
        if advertisement.name != name:
            raise MessageRejected(f"{name} sent an advertisement of {advertisement.name}")
        # Whoever deals with this client would leave the round, and a sum that it dropped out of could not be had.
        keys.require_public_key(advertisement.mask_key, name)
        keys.require_public_key(advertisement.share_key, name)
        if (until := advertisement.signer.until) < over:
            raise MessageRejected(
                f"the certificate of {name}, or its authority's, ends on {until:%Y-%m-%d %H:%M} UTC, before the round "
                "has to be over: request a new one"
            )
        others = [self._stored_advertisement(other) for other in sorted(self._stored.get(Step.ADVERTISE, {}))]
        check_distinct([*(other for other in others if other.name != name), advertisement])

    def _stored_advertisement(self, name: str) -> Advertisement:
        """Verified when it came. Read once: every later one is checked against it."""
        if name not in self._opened:
            self._opened[name] = open_advertisement(self._stored[Step.ADVERTISE][name], self._certificates, None)
        return self._opened[name]

    def _check_shares(self, name: str, data: bytes) -> None:
        holders, what = self.sharing.holders, f"the shares of {name}"
        record = dealing.SEALED_BYTES + dealing.COMMITMENTS_BYTES
        message = messages.parse(wire.Shares, data, (holders + 1) * (record + 5) + _FRAMING_BYTES, what)
        chosen = messages.ascending(message.holders, len(self.names), f"the holders in {what}")
        if len(chosen) != holders or self.number[name] in chosen:
            raise MessageRejected(f"{what} go to {len(chosen)} clients, they must go to {holders} others")
        messages.require_bytes(message.sealed, holders * dealing.SEALED_BYTES, what)
        messages.require_bytes(message.commitments, holders * dealing.COMMITMENTS_BYTES, f"the commitments of {name}")
        messages.require_bytes(message.own_commitments, dealing.COMMITMENTS_BYTES, f"the own commitments of {name}")

    def _check_masked(self, data: bytes) -> None:
        size = self.encoding.length * self.encoding.dtype.itemsize
        message = messages.parse(wire.MaskedInput, data, size + _DIGEST_BYTES + _FRAMING_BYTES, "the masked input")
        messages.require_bytes(message.vector, size, "the masked vector")
        if message.participants_digest != self.participants_digest:
            raise MessageRejected("the input is masked for another cohort or other participants than the round's")

    def _check_signature(self, name: str, data: bytes) -> None:
        what = f"the signature of {name}"
        message = messages.parse(wire.SurvivorSignature, data, MAX_SIGNATURE_BYTES + _FRAMING_BYTES, what)
        try:
            signer = self._certificates.signer(self.advertisements[self.number[name]].certificate, None)
        except IdentityError as error:
            raise MessageRejected(f"{what} cannot be accepted: {error}") from None
        if not signer.signed(message.signature, survivors_statement(self.participants_digest, self.survivors)):
            raise MessageRejected(f"{what} is not for the survivors of round {self.setting.round}")

    def _check_unmasking(self, name: str, data: bytes) -> None:
        what = f"the shares that {name} gives out"
        size = SHARE_BYTES * int(self.holds[:, self.number[name]].sum())
        message = messages.parse(wire.Unmasking, data, size + _FRAMING_BYTES, what)
        messages.require_bytes(message.shares, size, what)

"""A client's side of one round.

    client = ClientRound.begin(setting, credentials, certificates, save=save)
    client.reply                            # send: advertisement
    client.share(roster, now)               # send: shares, sealed
    client.mask(inbox, update)              # send: masked input
    client.confirm(survivors)               # send: signature
    client.unmask(confirmation)             # send: shares of survivors' seeds and of the others' mask keys

Every method takes what the server sent and returns what to send. It first hands the new state to `save`, which must
have it on the disk when it returns, and only then returns: so a client that was killed goes on with `restore`, and
what it said before stands. The same request gets the same reply; any other request for a step that was answered is
refused. A client without saved state simply counts as dropped out. `save` that forgets, or a state set back to an
older copy, voids the guarantee that a step is answered once.

What the client checks before it answers is all that protects its input; the server is not relied on for anything.
A request that is refused (MessageRejected) leaves the state as it was, and nothing was revealed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from datetime import datetime

import numpy as np
from google.protobuf.message import DecodeError

from pfedsecure.errors import MessageRejected, StateError
from pfedsecure.secagg import dealing, keys, messages
from pfedsecure.secagg.client_shares import deal, take_in
from pfedsecure.secagg.cohort import Cohort
from pfedsecure.secagg.credentials import Certificates, Credentials
from pfedsecure.secagg.encoding import Encoding, Update
from pfedsecure.secagg.entropy import Entropy
from pfedsecure.secagg.masking import Masks, pair_info, self_info
from pfedsecure.secagg.roster import Roster, read_roster, write_advertisement
from pfedsecure.secagg.setting import RoundSetting
from pfedsecure.secagg.steps import Step, participants_digest, survivors_statement
from pfedsecure.wire.v1 import secagg_pb2 as wire

FORMAT = 1

Save = Callable[[bytes], None]
"""Makes a client's state durable. The bytes are secret: they belong in a file that the client's user alone can read."""


class ClientRound:
    """One client in one round; make it with `begin` or `restore`. Not for use by several threads at once."""

    def __init__(
        self,
        state: wire.ClientRoundState,
        setting: RoundSetting,
        credentials: Credentials,
        certificates: Certificates,
        save: Save,
        entropy: Entropy,
    ) -> None:
        self._state = state
        self._setting = setting
        self._credentials = credentials
        self._certificates = certificates
        self._save = save
        self._entropy = entropy
        self._cohort: Cohort | None = None

    @classmethod
    def begin(
        cls,
        setting: RoundSetting,
        credentials: Credentials,
        certificates: Certificates,
        *,
        save: Save,
        entropy: Entropy = os.urandom,
    ) -> ClientRound:
        """Draw the round's keys and seed; `reply` is the advertisement to send."""
        mask_key, share_key, seed = (entropy(keys.KEY_BYTES) for _ in range(3))
        advertisement = write_advertisement(
            setting,
            credentials,
            keys.public_key(mask_key),
            keys.public_key(share_key),
            dealing.commit_seed(setting.digest, seed),
        )
        state = wire.ClientRoundState(
            format=FORMAT,
            setting_digest=setting.digest,
            step=Step.ADVERTISE,
            reply=advertisement,
            mask_key=mask_key,
            share_key=share_key,
            seed=seed,
            advertisement=advertisement,
        )
        save(messages.serialised(state))
        return cls(state, setting, credentials, certificates, save, entropy)

    @classmethod
    def restore(
        cls,
        saved: bytes,
        setting: RoundSetting,
        credentials: Credentials,
        certificates: Certificates,
        *,
        now: datetime,
        save: Save,
        entropy: Entropy = os.urandom,
    ) -> ClientRound:
        """Go on where `saved` was handed to `save`; send `reply` again, the server knows whether it has it.

        Raises StateError when the state is damaged or of another round, MessageRejected when a certificate of the
        cohort has expired meanwhile.
        """
        state = wire.ClientRoundState()
        try:
            state.ParseFromString(saved)
        except DecodeError:
            raise StateError("the state of a round is damaged; leave this round out") from None
        if (state.format, state.setting_digest) != (FORMAT, setting.digest) or state.step not in set(Step):
            raise StateError("the state of a round is of another round or version; leave this round out")
        client = cls(state, setting, credentials, certificates, save, entropy)
        if state.step >= Step.SHARE:
            client._cohort = client._join(state, read_roster(state.roster, setting, certificates, now))
        return client

    @property
    def step(self) -> Step:
        """The last step that was answered."""
        return Step(self._state.step)

    @property
    def reply(self) -> bytes:
        """What to send for it."""
        return self._state.reply

    @property
    def encoding(self) -> Encoding:
        """How inputs are encoded in this cohort; MessageRejected before the roster is known."""
        return self._require_cohort().encoding

    def share(self, roster: bytes, now: datetime) -> bytes:
        """Verify everybody's advertisement at `now` and deal the shares of this client's secrets.

        Raises MessageRejected as `read_roster` does, and when this client's own advertisement is missing or changed.
        """

        def answer(state: wire.ClientRoundState) -> bytes:
            cohort = self._join(state, read_roster(roster, self._setting, self._certificates, now))
            reply = deal(state, cohort, self._entropy)
            state.roster = roster
            self._cohort = cohort
            return reply

        return self._answer(Step.SHARE, roster, answer)

    def mask(self, inbox: bytes, update: Update, *, rounding: Entropy | None = None) -> bytes:
        """Take in the shares of others, encode `update` and mask it.

        `rounding` decides which way its numbers are rounded: it may be known to all, but must be uniform. Private keys
        and seed are forgotten; asked again, the client sends the same and does not look at `update`.
        Raises MessageRejected, naming the dealer of a share that is not what it committed to, and when fewer than the
        quorum or too few of this client's holders take part; ValueError for an update that `Encoding.encode` refuses.
        """
        entropy = rounding or self._entropy
        reply = self._answer(Step.MASK, inbox, lambda state: self._mask(state, inbox, update, entropy))
        self._require_cohort().forget_secrets()
        return reply

    def confirm(self, survivors: bytes) -> bytes:
        """Sign who survived. Raises MessageRejected unless they are a quorum of the participants and this is one."""
        return self._answer(Step.CONFIRM, survivors, lambda state: self._confirm(state, survivors))

    def unmask(self, confirmation: bytes) -> bytes:
        """For each participant whose shares this client holds give out one: survivor's seed, or other's mask key.

        The shares are forgotten. Raises MessageRejected unless a quorum signed the very survivors that this client did.
        """
        return self._answer(Step.UNMASK, confirmation, lambda state: self._unmask(state, confirmation))

    def _answer(self, step: Step, request: bytes, answer: Callable[[wire.ClientRoundState], bytes]) -> bytes:
        request_digest = hashlib.sha256(request).digest()
        if self._state.step == step:
            if self._state.request_digest != request_digest:
                raise MessageRejected(
                    f"step {step.name} of round {self._setting.round} was answered already, for another request: "
                    "a second answer could reveal this client's input"
                )
            return self._state.reply
        if self._state.step != step - 1:
            raise MessageRejected(
                f"step {step.name} of round {self._setting.round} does not follow {self.step.name}; "
                "the server's requests are out of order"
            )
        state = wire.ClientRoundState()
        state.CopyFrom(self._state)
        reply = answer(state)
        state.step, state.request_digest, state.reply = step, request_digest, reply
        self._save(messages.serialised(state))
        self._state = state
        return reply

    def _join(self, state: wire.ClientRoundState, roster: Roster) -> Cohort:
        own = next((i for i, member in enumerate(roster.members) if member.message == state.advertisement), None)
        if own is None:
            raise MessageRejected("the roster does not hold this client's own advertisement as it was sent")
        return Cohort(self._setting, roster, own)

    def _require_cohort(self) -> Cohort:
        if self._cohort is None:
            raise MessageRejected("the roster is not known yet")
        return self._cohort

    def _mask(self, state: wire.ClientRoundState, data: bytes, update: Update, rounding: Entropy) -> bytes:
        cohort = self._require_cohort()
        inbox = messages.parse(wire.Inbox, data, cohort.largest_inbox, "the inbox")
        participants = cohort.require_quorum(inbox.participants, "participants")
        dealers = messages.ascending(inbox.dealers, len(cohort.roster), "the dealers of the inbox")
        cohort.require_dealers(dealers, participants)
        holders = np.array(state.holders, np.int64)
        if participants[holders].sum() + 1 < cohort.sharing.threshold:
            raise MessageRejected("too few holders of this client's shares take part; it leaves the round")
        take_in(state, cohort, inbox, dealers)
        state.participants = inbox.participants
        digest = participants_digest(cohort.roster.digest, participants)
        vector = cohort.encoding.encode(update, rounding)
        masks = Masks(cohort.encoding.length, cohort.encoding.dtype)
        agreement = keys.Agreement(state.mask_key)
        for partner in np.union1d(dealers, holders[participants[holders]]).tolist():
            member = cohort.roster.members[partner]
            key = keys.derive(agreement.secret(member.mask_key, member.name), pair_info(digest, cohort.own, partner))
            (masks.add if cohort.own < partner else masks.subtract)(vector, key)
        masks.add(vector, keys.derive(state.seed, self_info(digest, cohort.own)))
        state.mask_key = state.share_key = state.seed = b""
        return messages.serialised(
            wire.MaskedInput(
                participants_digest=digest, vector=vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()
            )
        )

    def _confirm(self, state: wire.ClientRoundState, data: bytes) -> bytes:
        cohort = self._require_cohort()
        message = messages.parse(wire.Survivors, data, cohort.largest_bitmap, "the survivors")
        participants = messages.from_bitmap(state.participants, len(cohort.roster), "the participants")
        survivors = cohort.require_quorum(message.survivors, "survivors")
        if (survivors & ~participants).any():
            raise MessageRejected("the survivors include clients that did not share their secrets")
        state.survivors = message.survivors
        digest = participants_digest(cohort.roster.digest, participants)
        signature = self._credentials.sign(survivors_statement(digest, survivors))
        return messages.serialised(wire.SurvivorSignature(signature=signature))

    def _unmask(self, state: wire.ClientRoundState, data: bytes) -> bytes:
        cohort = self._require_cohort()
        message = messages.parse(wire.Confirmation, data, cohort.largest_confirmation, "the confirmation")
        if message.survivors != state.survivors:
            raise MessageRejected("the confirmation is for other survivors than this client signed")
        participants = messages.from_bitmap(state.participants, len(cohort.roster), "the participants")
        survivors = messages.from_bitmap(state.survivors, len(cohort.roster), "the survivors")
        digest = participants_digest(cohort.roster.digest, participants)
        cohort.require_signatures(message, survivors, survivors_statement(digest, survivors))
        records = messages.records(state.shares, dealing.RECORD_BYTES, len(state.dealers), "the saved shares")
        shares = [
            dealing.share_of(record, dealing.Kind.SEED if survivors[dealer] else dealing.Kind.MASK_KEY)
            for dealer, record in zip(state.dealers, records, strict=True)
        ]
        state.shares = b""
        return messages.serialised(wire.Unmasking(shares=b"".join(shares)))

"""Advertisements, and the roster of all of them: who takes part in a round, with which ephemeral keys.

Guaranteed by `read_roster`, against the server and everybody else but the certificate authority: every member holds
the private key of a distinct client certificate of this federation and signed, with it, these ephemeral keys for this
federation, this round, this plan and this very model. Not guaranteed: that the members do not collude, nor that the
server shows everybody the same roster. The latter is why the roster's digest goes into every key and signature of the
round: clients with different rosters have nothing in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pfedsecure.errors import IdentityError, MessageRejected
from pfedsecure.secagg import messages
from pfedsecure.secagg.credentials import Certificates, Credentials, Signer
from pfedsecure.secagg.keys import KEY_BYTES
from pfedsecure.secagg.setting import LARGEST_COHORT, RoundSetting
from pfedsecure.secagg.transcript import digest, transcript
from pfedsecure.wire.v1 import secagg_pb2 as wire

MAX_ADVERTISEMENT_BYTES = 4096
MAX_ROSTER_BYTES = LARGEST_COHORT * (MAX_ADVERTISEMENT_BYTES + 4)

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Advertisement:
    """What the client that `signer` stands for said; `message` as it came, `fields` are its content."""

    signer: Signer
    fields: wire.Advertisement
    message: bytes

    @property
    def name(self) -> str:
        """Who said it, by its certificate."""
        return self.signer.name

    @property
    def mask_key(self) -> bytes:
        """X25519 public key, 32 bytes, that pairwise masks are agreed on with."""
        return self.fields.mask_key

    @property
    def share_key(self) -> bytes:
        """X25519 public key, 32 bytes, that shares for this client are sealed to."""
        return self.fields.share_key


@dataclass(frozen=True)
class Roster:
    """The clients of a round, numbered by their place in `members`. `digest` covers setting and all of them."""

    members: tuple[Advertisement, ...]
    digest: bytes

    def __len__(self) -> int:
        return len(self.members)

    @property
    def names(self) -> list[str]:
        """The clients' names in the order of their numbers."""
        return [member.name for member in self.members]


def write_advertisement(
    setting: RoundSetting, credentials: Credentials, mask_key: bytes, share_key: bytes, seed_commitment: bytes
) -> bytes:
    """The signed advertisement of two ephemeral public keys and a commitment."""
    message = wire.Advertisement(
        federation_id=setting.federation_id,
        round=setting.round,
        plan_digest=bytes.fromhex(setting.plan_digest),
        model_digest=bytes.fromhex(setting.model_digest),
        certificate=credentials.certificate,
        mask_key=mask_key,
        share_key=share_key,
        seed_commitment=seed_commitment,
    )
    message.signature = credentials.sign(_signed(message))
    return messages.serialised(message)


def read_advertisement(data: bytes, setting: RoundSetting, certificates: Certificates, now: datetime) -> Advertisement:
    """A verified advertisement.

    Raises MessageRejected for one that is malformed, not signed by a client of the federation, or not for `setting`.
    """
    advertisement = open_advertisement(data, certificates, now)
    _check_signature(advertisement.signer, advertisement.fields)
    _check_setting(advertisement.name, advertisement.fields, setting)
    return advertisement


def open_advertisement(data: bytes, certificates: Certificates, now: datetime | None) -> Advertisement:
    """An advertisement whose certificate alone is verified, without the clock where `now` is None.

    For those that were verified before they were stored.
    """
    fields = parse_advertisement(data)
    try:
        signer = certificates.signer(fields.certificate, now)
    except IdentityError as error:
        raise MessageRejected(f"an advertisement cannot be accepted: {error}") from None
    return Advertisement(signer, fields, data)


def parse_advertisement(data: bytes) -> wire.Advertisement:
    """The fields of an advertisement, nothing about which is verified. Raises MessageRejected when it is malformed."""
    fields = messages.parse(wire.Advertisement, data, MAX_ADVERTISEMENT_BYTES, "an advertisement")
    messages.require_bytes(fields.mask_key, KEY_BYTES, "an advertised mask key")
    messages.require_bytes(fields.share_key, KEY_BYTES, "an advertised share key")
    messages.require_bytes(fields.seed_commitment, _DIGEST_BYTES, "an advertised seed commitment")
    return fields


def advertisement_digest(fields: wire.Advertisement) -> bytes:
    """SHA-256 of all fields, the signature included."""
    return digest("advertisement digest", _signed(fields), fields.signature)


def write_roster(advertisements: Sequence[bytes]) -> bytes:
    """What the server sends out; `advertisements` in the order of their clients' names."""
    return messages.serialised(wire.Roster(advertisements=advertisements))


def read_roster(data: bytes, setting: RoundSetting, certificates: Certificates, now: datetime) -> Roster:
    """The roster in `data`, every advertisement verified. Raises MessageRejected naming who or what is wrong."""
    message = messages.parse(wire.Roster, data, MAX_ROSTER_BYTES, "the roster")
    count, minimum = len(message.advertisements), setting.parameters.minimum_cohort
    if not minimum <= count <= LARGEST_COHORT:
        raise MessageRejected(
            f"the roster has {count} clients, this client takes part with {minimum} to {LARGEST_COHORT}"
        )
    roster = roster_of(setting, [read_advertisement(one, setting, certificates, now) for one in message.advertisements])
    check_distinct(roster.members)
    return roster


def roster_of(setting: RoundSetting, advertisements: Sequence[Advertisement]) -> Roster:
    """The roster of verified advertisements, in the order of their names."""
    members = tuple(sorted(advertisements, key=lambda member: member.name))
    return Roster(members, roster_digest(setting, [advertisement_digest(member.fields) for member in members]))


def roster_digest(setting: RoundSetting, digests: Sequence[bytes]) -> bytes:
    """SHA-256 of the round's setting and of every advertisement, in the roster's order."""
    return digest("roster", setting.digest, *digests)


def check_distinct(members: Sequence[Advertisement]) -> None:
    """Raises MessageRejected when two members share a name, a certified key, an ephemeral key or a commitment."""
    seen: dict[tuple[str, str | bytes], str] = {}
    for member in members:
        marks: list[tuple[str, str | bytes]] = [
            ("name", member.name),
            ("certified key", member.signer.fingerprint),
            ("X25519 key", member.mask_key),
            ("X25519 key", member.share_key),
            ("seed commitment", member.fields.seed_commitment),
        ]
        for mark in marks:
            if mark in seen:
                raise MessageRejected(
                    f"the {mark[0]} of {member.name} stands twice in the roster (also for {seen[mark]}): "
                    "one party poses as several"
                )
            seen[mark] = member.name


def _signed(message: wire.Advertisement) -> bytes:
    return transcript(
        "advertisement",
        message.federation_id.encode(),
        message.round,
        message.plan_digest,
        message.model_digest,
        message.certificate,
        message.mask_key,
        message.share_key,
        message.seed_commitment,
    )


def _check_signature(signer: Signer, message: wire.Advertisement) -> None:
    if not signer.signed(message.signature, _signed(message)):
        raise MessageRejected(
            f"the advertisement of {signer.name} is not signed by it: its keys may be somebody else's"
        )


def _check_setting(name: str, message: wire.Advertisement, setting: RoundSetting) -> None:
    """What a client signed must be what this party is in."""
    if message.federation_id != setting.federation_id:
        raise MessageRejected(f"the advertisement of {name} is for another federation ({message.federation_id[:16]!r})")
    if message.round != setting.round:
        raise MessageRejected(
            f"the advertisement of {name} is for round {message.round}, this is round {setting.round}: it was replayed"
        )
    plan, model = message.plan_digest.hex(), message.model_digest.hex()
    if plan != setting.plan_digest:
        raise MessageRejected(f"{name} follows plan {plan[:12]}, this client plan {setting.plan_digest[:12]}")
    _check_model(name, model, setting)


def _check_model(name: str, model: str, setting: RoundSetting) -> None:
    if model != setting.model_digest:
        raise MessageRejected(
            f"{name} was given model {model[:12]} for this round, this client {setting.model_digest[:12]}: "
            "the server shows clients different models; nothing was sent"
        )

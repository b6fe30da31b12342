"""Experts that the server keeps and gives out, and can neither open nor make.

Guaranteed, computationally, for authors and readers that hold the cohort's secret while the server does not:

- The server and the network learn of an expert who published it, when, and nothing else: all envelopes of a plan have
  the same length but for the digits of round and epoch. A member that was removed learns nothing from what is sealed
  with the secret of a later epoch.
- A reader uses an expert only when it was signed, as it is, by the author that was asked for, for this federation and
  plan and the round it claims; the author is a client that the authority approved, known by a pseudonym that is the
  hash of its key, so that not even another member can make an expert in its name.
- Of one author a reader never goes back to an expert of an older round than it has opened before.

Not guaranteed: any secrecy from members, who can open every envelope that the server lets them have, so that server
and one member together read all experts (what a prompt then tells about images is for differential privacy to bound);
that the server gives out the newest envelope to somebody who has seen none newer; that an author's numbers are good.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from cryptography import x509
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from pfedsecure.errors import IdentityError, MessageRejected
from pfedsecure.experts.claim import Claim, make_claim
from pfedsecure.experts.envelope import SALT_BYTES, TAG_BYTES, Label, seal, unseal
from pfedsecure.experts.interface import Seen
from pfedsecure.experts.plain import read_expert, write_expert
from pfedsecure.pki.author import Author, VerifiedAuthor, verify_author
from pfedsecure.pki.cohort import CohortSecrets, is_epoch
from pfedsecure.wire.v1.expert_pb2 import SealedExpert, SignedExpert

PADDED_OVERHEAD_BYTES = 2048
"""What signature, certificate and framing may take beside the numbers; the rest of it is padding."""
_PADDING_FRAMING_BYTES = 3
_HEADER_BYTES = 128


@dataclass(frozen=True)
class Belonging:
    """What every envelope of a federation is bound to. `plan_digest` in hexadecimal."""

    federation_id: str
    plan_digest: str
    authority: x509.Certificate


class SealedExperts:
    """The client's side for contexts of `shape (n, d)` and Euclidean norm up to `max_norm`.

    `secrets` is called for the cohort's secrets at every use: a newer kit may be installed while the client runs.
    `now` gives the time, timezone-aware, at which certificates are judged.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        max_norm: float,
        belonging: Belonging,
        author: Author,
        secrets: Callable[[], CohortSecrets],
        seen: Seen,
        now: Callable[[], datetime],
    ) -> None:
        self._shape = shape
        self._max_norm = max_norm
        self._belonging = belonging
        self._author = author
        self._secrets = secrets
        self._seen = seen
        self._now = now
        self._verified: dict[bytes, VerifiedAuthor] = {}

    @property
    def epoch(self) -> int:
        """Raises IdentityError when the cohort's secrets cannot be read."""
        return self._secrets().epoch

    def claim(self, caller: str) -> Claim:
        """A signature with the author key over the federation and the fingerprint `caller`.

        So nobody else can take this pseudonym. It tells the server which caller is behind it, and peers nothing.
        """
        return make_claim(self._author, self._belonging.federation_id, caller)

    def pack(self, context: NDArray[np.float32], round_number: int) -> bytes:
        """The context, signed under this client's pseudonym and sealed with the cohort's newest secret.

        Against the server and the network that hides everything but author, round, epoch and a length that is the same
        for all. Members of the cohort can open it. Raises IdentityError when the secrets cannot be read.
        """
        secrets = self._secrets()
        label = self._label(round_number, self._author.pseudonym, secrets.epoch)
        expert = write_expert(context)
        signed = SignedExpert(
            expert=expert,
            certificate=self._author.certificate,
            signature=self._author.sign(label.statement("expert signature", expert)),
        )
        room = padded_bytes(self._shape) - _PADDING_FRAMING_BYTES - signed.ByteSize()
        signed.padding = bytes(room)
        salt, ciphertext = seal(signed.SerializeToString(deterministic=True), label, secrets)
        return SealedExpert(
            epoch=label.epoch, round=label.round, author=label.author, salt=salt, ciphertext=ciphertext
        ).SerializeToString(deterministic=True)

    def unpack(self, content: bytes, expert_id: str, round_number: int) -> NDArray[np.float32]:
        """The context `(n, d)` of a peer's envelope.

        Guaranteed on return, against the server and other members: its author certified by the authority signed exactly
        this context for this federation, plan, round and epoch, in a round before `round_number`, and it is not older
        than what was opened of the same author before. Raises MessageRejected otherwise.
        """
        what = f"expert {expert_id[:8]}"
        sealed = read_envelope(content, self._shape, what)
        if sealed.author != expert_id:
            raise MessageRejected(f"{what}: the envelope is of another author than was asked for")
        if not sealed.round < round_number:
            raise MessageRejected(f"{what}: the envelope claims round {sealed.round}, which has not been closed yet")
        label = self._label(sealed.round, sealed.author, sealed.epoch)
        try:
            plaintext = unseal(sealed.salt, sealed.ciphertext, label, self._secrets())
        except IdentityError as error:
            raise MessageRejected(f"{what}: {error}") from None
        if plaintext is None:
            raise MessageRejected(f"{what}: the envelope was not sealed by this cohort for what it claims, or changed")
        signed = SignedExpert()
        try:
            signed.ParseFromString(plaintext)
            author = self._author_of(signed.certificate)
        except DecodeError:
            raise MessageRejected(f"{what}: the content of the envelope cannot be decoded") from None
        except IdentityError as error:
            raise MessageRejected(f"{what}: {error}") from None
        if author.pseudonym != expert_id or not author.signed(
            signed.signature, label.statement("expert signature", signed.expert)
        ):
            raise MessageRejected(f"{what}: not signed by its author; some other member made it")
        context = read_expert(signed.expert, self._shape, self._max_norm, what)
        if sealed.round < self._seen.newest(expert_id):
            raise MessageRejected(
                f"{what}: of round {sealed.round}, a newer one was here before; the server replays it"
            )
        self._seen.note(expert_id, sealed.round)
        return context

    def _label(self, round_number: int, author: str, epoch: int) -> Label:
        return Label(self._belonging.federation_id, self._belonging.plan_digest, round_number, author, epoch)

    def _author_of(self, certificate: bytes) -> VerifiedAuthor:
        """Verified once; later only the clock can change the verdict. Raises IdentityError."""
        now = self._now()
        known = self._verified.get(certificate)
        if known is None or now > known.not_after:
            known = verify_author(certificate, self._belonging.authority, now)
            self._verified[certificate] = known
        return known


class SealedServerExperts:
    """The server's side for contexts of `shape (n, d)`. It has no key, and looks at the outside of envelopes only."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self.max_bytes = padded_bytes(shape) + TAG_BYTES + _HEADER_BYTES

    def check(self, content: bytes, expert_id: str, round_number: int) -> int:
        """The epoch that an envelope says it was sealed in; nothing inside can be seen from here.

        Raises MessageRejected for another author or round than it is published for, or another length.
        """
        sealed = read_envelope(content, self._shape, "the expert")
        if sealed.author != expert_id:
            raise MessageRejected("the expert is under another pseudonym than its author joined with")
        if sealed.round != round_number:
            raise MessageRejected(f"the expert is sealed for round {sealed.round}, not for {round_number}")
        return sealed.epoch


def padded_bytes(shape: tuple[int, int]) -> int:
    """What is sealed has this length for contexts of `shape (n, d)`, whoever seals it."""
    return shape[0] * shape[1] * np.dtype(np.float32).itemsize + PADDED_OVERHEAD_BYTES


def read_envelope(content: bytes, shape: tuple[int, int], what: str) -> SealedExpert:
    """An envelope with everything of the length it must have. Raises MessageRejected; `what` names it."""
    length = padded_bytes(shape) + TAG_BYTES
    if len(content) > length + _HEADER_BYTES:
        raise MessageRejected(f"{what} has {len(content)} bytes, more than an envelope of this plan")
    try:
        sealed = SealedExpert.FromString(content)
    except DecodeError:
        raise MessageRejected(f"{what} is not a SealedExpert") from None
    if len(sealed.salt) != SALT_BYTES or len(sealed.ciphertext) != length or not is_epoch(sealed.epoch):
        raise MessageRejected(f"{what}: the envelope is not of the form of this plan")
    return sealed

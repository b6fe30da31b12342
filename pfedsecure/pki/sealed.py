"""A cohort secret on its way from the authority to one client, through hands that must neither read nor replace it."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import fingerprint
from pfedsecure.pki.cohort import SECRET_BYTES
from pfedsecure.pki.keys import require_p256
from pfedsecure.pki.statement import statement

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_ALGORITHM = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


@dataclass(frozen=True)
class SealedSecret:
    """The secret of `epoch` for the client whose identity key has the fingerprint `recipient`.

    HPKE (RFC 9180) to the client's sealing key, bound to authority, recipient and epoch. HPKE in its base mode says
    nothing about who sealed, and anybody could seal a secret of its own to a public key: hence the authority's
    signature over all of it.
    """

    epoch: int
    recipient: str
    ciphertext: bytes
    signature: bytes

    @classmethod
    def seal(
        cls, secret: bytes, epoch: int, recipient: str, sealing_key: X25519PublicKey, signer: ec.EllipticCurvePrivateKey
    ) -> SealedSecret:
        """`signer`: the authority's private key."""
        about = _about(fingerprint(signer.public_key()), recipient, epoch)
        ciphertext = _SUITE.encrypt(secret, sealing_key, about)
        return cls(epoch, recipient, ciphertext, signer.sign(_signed(about, ciphertext), _ALGORITHM))

    def open(self, sealing_key: X25519PrivateKey, recipient: str, authority: x509.Certificate) -> bytes:
        """The secret; proved to come from `authority`, for `recipient` and for `epoch`. Raises IdentityError."""
        if self.recipient != recipient:
            raise IdentityError("this kit is for another client's key: use the one that was made for this identity")
        about = _about(fingerprint(authority.public_key()), recipient, self.epoch)
        try:
            key = require_p256(authority.public_key(), "the authority certificate")
            key.verify(self.signature, _signed(about, self.ciphertext), _ALGORITHM)
        except InvalidSignature:
            raise IdentityError(
                "the cohort secret in this kit is not from the authority, or was changed: ask the authority for the kit"
            ) from None
        try:
            secret = _SUITE.decrypt(self.ciphertext, sealing_key, about)
        except (InvalidTag, ValueError):
            raise IdentityError(
                "the cohort secret in this kit is sealed to another sealing key: have this request approved again"
            ) from None
        if len(secret) != SECRET_BYTES:
            raise IdentityError("this kit holds no cohort secret: have the request approved again")
        return secret


def _about(authority: str, recipient: str, epoch: int) -> bytes:
    return statement("cohort secret", bytes.fromhex(authority), bytes.fromhex(recipient), epoch)


def _signed(about: bytes, ciphertext: bytes) -> bytes:
    return statement("sealed cohort secret", about, ciphertext)

"""The envelope of an expert: sealed to the cohort, bound to what it is for.

AES-256-GCM. Key and nonce are derived from the cohort's secret and a salt, and the salt is derived from the secret and
from everything that is sealed, as in SIV modes: the same expert gives the same envelope, so that a client that crashed
sends the same bytes again, and two different ones never share a key and nonce unless HMAC-SHA256 collides. Federation,
plan, round, author and epoch are authenticated with the ciphertext: an envelope opens for nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.statement import statement

SALT_BYTES = 32
TAG_BYTES = 16

_KEY_BYTES, _NONCE_BYTES = 32, 12


@dataclass(frozen=True)
class Label:
    """What an envelope is for. `plan_digest` in hexadecimal; `author`: a pseudonym."""

    federation_id: str
    plan_digest: str
    round: int
    author: str
    epoch: int

    def statement(self, purpose: str, *content: bytes) -> bytes:
        """Everything above and `content`, for one purpose; no two different ones have the same bytes."""
        fields = (self.federation_id.encode(), self.plan_digest.encode(), self.round, self.author.encode(), self.epoch)
        return statement(purpose, *fields, *content)


def seal(plaintext: bytes, label: Label, secrets: CohortSecrets) -> tuple[bytes, bytes]:
    """Salt and ciphertext for whoever has the cohort's secret of the label's epoch. Raises IdentityError without it."""
    salt_key = secrets.derive(label.epoch, "expert salt")
    salt = hmac.digest(salt_key, label.statement("expert salt", plaintext), hashlib.sha256)
    key, nonce = _key(label, salt, secrets)
    return salt, AESGCM(key).encrypt(nonce, plaintext, label.statement("expert envelope"))


def unseal(salt: bytes, ciphertext: bytes, label: Label, secrets: CohortSecrets) -> bytes | None:
    """The plaintext; None when it was sealed for another label or secret, or changed.

    Raises IdentityError without the cohort's secret of the label's epoch.
    """
    key, nonce = _key(label, salt, secrets)
    try:
        return AESGCM(key).decrypt(nonce, ciphertext, label.statement("expert envelope"))
    except InvalidTag:
        return None


def _key(label: Label, salt: bytes, secrets: CohortSecrets) -> tuple[bytes, bytes]:
    content_key = secrets.derive(label.epoch, "expert content key")
    derived = HKDF(hashes.SHA256(), _KEY_BYTES + _NONCE_BYTES, salt=salt, info=b"expert").derive(content_key)
    return derived[:_KEY_BYTES], derived[_KEY_BYTES:]

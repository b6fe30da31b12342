"""Key agreement, key derivation and sealing. The primitives are those of `cryptography`; here they get their labels."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg.entropy import Entropy

KEY_BYTES = 32
NONCE_BYTES = 12
SEAL_BYTES = NONCE_BYTES + 16
"""What sealing adds to a plaintext: nonce and tag."""


def public_key(private: bytes) -> bytes:
    """The X25519 public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def require_public_key(public: bytes, peer: str) -> None:
    """Raises MessageRejected, naming `peer`, for an X25519 key with which no `Agreement` has a secret."""
    Agreement(bytes(KEY_BYTES)).secret(public, peer)  # small order shows with every private key, also a known one


def derive(secret: bytes, info: bytes) -> bytes:
    """A 256-bit key: HKDF with SHA-256 and no salt. Keys for different `info` are independent."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


class Agreement:
    """One side's X25519 private key."""

    def __init__(self, private: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(private)

    def secret(self, peer_public: bytes, peer: str) -> bytes:
        """The 32 bytes shared with `peer`; use them through `derive` only.

        Raises MessageRejected, naming `peer`, for a public key of small order, with which nothing would be secret.
        """
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(peer_public))
        except ValueError:
            raise MessageRejected(
                f"the X25519 key of {peer} is of small order; its client does not follow the rules"
            ) from None


def seal(key: bytes, plaintext: bytes, context: bytes, entropy: Entropy) -> bytes:
    """AES-256-GCM: nonce, ciphertext, tag. `context` is authenticated and not sent.

    Every key here seals one message in one direction; the nonce is random all the same, so that even a client whose
    state was set back to an older copy does not use one twice.
    """
    nonce = entropy(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    """The plaintext; None when key or context differ from the sealer's or the bytes were changed."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)
    except InvalidTag:
        return None

"""Keys: ECDSA over P-256, the one kind of key that is certified, and X25519, to which secrets are sealed."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from pfedsecure.errors import IdentityError
from pfedsecure.pki.files import read_secret


def new_private_key() -> ec.EllipticCurvePrivateKey:
    """A fresh ECDSA P-256 key, from the operating system's generator."""
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey | X25519PrivateKey) -> bytes:
    """Unencrypted PKCS#8. The mode of its file is what protects it, because servers and clients start unattended."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in `path`; IdentityError when it is missing, open to other users or not such a key."""
    key = _read(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(f"{path} is not an ECDSA P-256 key: make one with `pfed pki request`")
    return key


def read_sealing_key(path: Path) -> X25519PrivateKey:
    """The X25519 key in `path`; IdentityError when it is missing, open to other users or not such a key."""
    key = _read(path)
    if not isinstance(key, X25519PrivateKey):
        raise IdentityError(f"{path} is not an X25519 key: make one with `pfed pki request`")
    return key


def p256_hex(key: ec.EllipticCurvePublicKey) -> str:
    """The compressed point, 66 hex digits; undone by `p256_from_hex`."""
    return key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint).hex()


def p256_from_hex(text: str) -> ec.EllipticCurvePublicKey:
    """The key that `p256_hex` wrote so; ValueError for any other text, so that a key has one spelling only."""
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bytes.fromhex(text))
    if p256_hex(key) != text:
        raise ValueError("not the one spelling of a key")
    return key


def sealing_hex(key: X25519PublicKey) -> str:
    """The raw key, 64 hex digits; undone by `sealing_from_hex`."""
    return key.public_bytes_raw().hex()


def sealing_from_hex(text: str) -> X25519PublicKey:
    """The key that `sealing_hex` wrote so; ValueError for any other text, and for a key of small order.

    What is sealed to a key of small order anybody can open.
    """
    key = X25519PublicKey.from_public_bytes(bytes.fromhex(text))
    if sealing_hex(key) != text:
        raise ValueError("not the one spelling of a key")
    X25519PrivateKey.generate().exchange(key)  # raises ValueError for the small orders
    return key


def require_p256(key: object, source: str) -> ec.EllipticCurvePublicKey:
    """`key` if it is ECDSA P-256, otherwise IdentityError naming `source`.

    No other kind is ever certified: `wire.tls` rules TLS 1.2 out by relying on there being no RSA certificate.
    """
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise IdentityError(f"{source} is not for an ECDSA P-256 key: make it with `pfed pki request`")


def _read(path: Path) -> object:
    try:
        return load_pem_private_key(read_secret(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise IdentityError(f"{path} is not an unencrypted PEM private key: restore it, or request a new one") from None

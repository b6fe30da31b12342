"""Private keys: ECDSA over P-256, the one kind of key in a federation."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from pfedsecure.errors import IdentityError
from pfedsecure.pki.files import read_secret


def new_private_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Unencrypted PKCS#8. The mode of its file is what protects it, because servers and clients start unattended."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in `path`; IdentityError when it is missing, open to other users or not such a key."""
    try:
        key = load_pem_private_key(read_secret(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise IdentityError(f"{path} is not an unencrypted PEM private key: restore it, or request a new one") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(f"{path} is not an ECDSA P-256 key: make one with `pfed pki request`")
    return key


def require_p256(key: object, source: str) -> ec.EllipticCurvePublicKey:
    """`key` if it is ECDSA P-256, otherwise IdentityError naming `source`.

    No other kind is ever certified: `wire.tls` rules TLS 1.2 out by relying on there being no RSA certificate.
    """
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise IdentityError(f"{source} is not for an ECDSA P-256 key: make it with `pfed pki request`")

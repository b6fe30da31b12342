"""Certificate signing requests: how a party asks for a certificate without its private key leaving its machine.

A client makes two keys more than its identity's, and its request carries both public halves, so that the fingerprint
that people compare vouches for them too: the one signs with the identity key, over all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import UNREADABLE, fingerprint
from pfedsecure.pki.files import exists, make_folder, write_public, write_secret
from pfedsecure.pki.keys import (
    new_private_key,
    p256_from_hex,
    p256_hex,
    private_pem,
    read_private_key,
    read_sealing_key,
    require_p256,
    sealing_from_hex,
    sealing_hex,
)
from pfedsecure.pki.names import ROLE_URI_PREFIX, Role, is_role, parse_host, validate_name
from pfedsecure.pki.statement import statement

KEY_FILE = "identity.key"
REQUEST_FILE = "identity.csr"
NEXT_KEY_FILE = "identity.next.key"
RENEWAL_FILE = "renewal.csr"
SEALING_KEY_FILE = "sealing.key"
AUTHOR_KEY_FILE = "author.key"

_SEALING_PREFIX = "urn:pfedsecure:sealing-key:"
_AUTHOR_PREFIX = "urn:pfedsecure:author-key:"
_PROOF_PREFIX = "urn:pfedsecure:author-proof:"
_RENEWS_PREFIX = "urn:pfedsecure:renews:"
_RENEWAL_PROOF_PREFIX = "urn:pfedsecure:renewal-proof:"
_ALGORITHM = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


@dataclass(frozen=True)
class ClientKeys:
    """The public keys of a client beside its identity's.

    Proved by the request: the requester holds the private key of `author`, so nobody can claim what another wrote. Not
    proved for `sealing`: who names another's key there cannot open its own kit.
    """

    sealing: X25519PublicKey
    author: ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class SigningRequest:
    """What a requester asks for.

    Proved: whoever made it holds the private key of `key`. Everything else is a wish that the approver judges.
    """

    name: str
    role: Role
    hosts: tuple[str, ...]
    key: ec.EllipticCurvePublicKey
    client_keys: ClientKeys | None
    """Clients alone have them, and not those whose request an older version made."""
    renews: str | None = None
    """Fingerprint of the key that this one is to follow. Proved: whoever made the request holds that one too."""

    @property
    def fingerprint(self) -> str:
        """Of the public key, as `certificates.fingerprint`: the same digits on both sides, and later in every log."""
        return fingerprint(self.key)

    @classmethod
    def parse(cls, pem: bytes, source: str) -> SigningRequest:
        """Reads a PEM request that `request` made; IdentityError naming `source` when damaged or no such thing."""
        try:
            csr = x509.load_pem_x509_csr(pem)
            key = csr.public_key()
            if not csr.is_signature_valid:
                raise IdentityError(f"{source} was changed after it was signed: ask for the request again")
            (name,) = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            wanted = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            mark, *others = wanted.get_values_for_type(x509.UniformResourceIdentifier)
            role = mark.removeprefix(ROLE_URI_PREFIX)
            if not is_role(role):
                raise IdentityError(f"{source} asks for an unknown role: make it again with `pfed pki request`")
            key = require_p256(key, source)
            renews, others = _read_renewal(others, key)
            client_keys = _read_client_keys(others, key) if role == "client" and others else None
            if others and client_keys is None:
                raise ValueError("keys that are for clients only")
        except (*UNREADABLE, InvalidSignature):
            raise IdentityError(f"{source} is not a request that `pfed pki request` made: make it again") from None
        addresses = (str(address) for address in wanted.get_values_for_type(x509.IPAddress))
        hosts = (*wanted.get_values_for_type(x509.DNSName), *addresses)
        alternative_hosts(role, hosts)  # refuses hosts that are none, before anybody reads them on a terminal
        return cls(validate_name(str(name.value)), role, hosts, key, client_keys, renews)


def request(folder: Path, name: str, role: Role, hosts: Sequence[str] = ()) -> Path:
    """Makes the private keys of a party and a signing request for them in `folder`; returns the path of the request.

    Each key has mode 0600 from its first instant, never overwrites another and never leaves the folder. If an earlier
    call died between the files, this one goes on with the keys that are there; a finished request is never
    replaced. `hosts`: names and addresses of a server, none for the other roles. Raises IdentityError.
    """
    mark = x509.UniformResourceIdentifier(ROLE_URI_PREFIX + role)
    alternatives = alternative_hosts(role, hosts)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, validate_name(name))])
    make_folder(folder)
    request_path = folder / REQUEST_FILE
    if exists(request_path):
        raise IdentityError(f"{request_path} exists: have it approved, or choose another folder for another identity")
    make_key(folder / KEY_FILE, new_private_key())
    key = read_private_key(folder / KEY_FILE)
    if role == "client":
        make_key(folder / SEALING_KEY_FILE, X25519PrivateKey.generate())
        make_key(folder / AUTHOR_KEY_FILE, new_private_key())
    keys = client_marks(folder, key.public_key()) if role == "client" else []
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.SubjectAlternativeName([mark, *keys, *alternatives]), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_public(request_path, csr.public_bytes(Encoding.PEM))
    return request_path


def make_key(path: Path, key: ec.EllipticCurvePrivateKey | X25519PrivateKey) -> None:
    """Writes a private key, open to its owner alone, unless one is there already."""
    with suppress(FileExistsError):  # left by a call that died before it wrote the request
        write_secret(path, private_pem(key))


def client_marks(folder: Path, identity: ec.EllipticCurvePublicKey) -> list[x509.UniformResourceIdentifier]:
    """What the request of `identity` says about the other keys of a client, undone by `_read_client_keys`."""
    author = read_private_key(folder / AUTHOR_KEY_FILE)
    texts = (
        _SEALING_PREFIX + sealing_hex(read_sealing_key(folder / SEALING_KEY_FILE).public_key()),
        _AUTHOR_PREFIX + p256_hex(author.public_key()),
        _PROOF_PREFIX + author.sign(_proof_statement(identity), _ALGORITHM).hex(),
    )
    return [x509.UniformResourceIdentifier(text) for text in texts]


def _read_client_keys(marks: Sequence[str], identity: ec.EllipticCurvePublicKey) -> ClientKeys:
    """ValueError or InvalidSignature when they are none, or not of whoever holds `identity`."""
    prefixes = (_SEALING_PREFIX, _AUTHOR_PREFIX, _PROOF_PREFIX)
    if len(marks) != len(prefixes) or not all(map(str.startswith, marks, prefixes)):
        raise ValueError("not the keys of a client")
    sealing, author, proof = (mark.removeprefix(prefix) for mark, prefix in zip(marks, prefixes, strict=True))
    keys = ClientKeys(sealing_from_hex(sealing), p256_from_hex(author))
    keys.author.verify(bytes.fromhex(proof), _proof_statement(identity), _ALGORITHM)
    return keys


def renewal_marks(
    old: ec.EllipticCurvePrivateKey, identity: ec.EllipticCurvePublicKey
) -> list[x509.UniformResourceIdentifier]:
    """What the request of `identity` says about the key `old` that it is to follow, undone by `_read_renewal`."""
    proof = old.sign(_renewal_statement(identity), _ALGORITHM).hex()
    texts = (_RENEWS_PREFIX + p256_hex(old.public_key()), _RENEWAL_PROOF_PREFIX + proof)
    return [x509.UniformResourceIdentifier(text) for text in texts]


def _read_renewal(marks: Sequence[str], identity: ec.EllipticCurvePublicKey) -> tuple[str | None, list[str]]:
    """The fingerprint of the key that `identity` is to follow, and the other marks.

    ValueError or InvalidSignature when whoever holds it did not agree to that.
    """
    prefixes = (_RENEWS_PREFIX, _RENEWAL_PROOF_PREFIX)
    ours, others = marks[-2:], list(marks[:-2])
    if not (len(ours) == len(prefixes) and all(map(str.startswith, ours, prefixes))):
        return None, list(marks)
    old = p256_from_hex(ours[0].removeprefix(_RENEWS_PREFIX))
    old.verify(bytes.fromhex(ours[1].removeprefix(_RENEWAL_PROOF_PREFIX)), _renewal_statement(identity), _ALGORITHM)
    return fingerprint(old), others


def _renewal_statement(identity: ec.EllipticCurvePublicKey) -> bytes:
    """What a key signs to say which one follows it."""
    return statement("renewal of an identity", bytes.fromhex(fingerprint(identity)))


def _proof_statement(identity: ec.EllipticCurvePublicKey) -> bytes:
    """What an author key signs to say that it belongs to an identity. Never leaves the request: it names both."""
    return statement("author key of an identity", bytes.fromhex(fingerprint(identity)))


def alternative_hosts(role: Role, hosts: Sequence[str]) -> list[x509.DNSName | x509.IPAddress]:
    """`hosts` as subject alternative names; IdentityError unless a server has some and nobody else has any."""
    if role == "server" and not hosts:
        raise IdentityError("a server needs a host: give the name or address that clients connect to")
    if role != "server" and hosts:
        raise IdentityError(f"hosts are for servers: a {role} has none, its certificate goes by its name")
    return [parse_host(host) for host in hosts]

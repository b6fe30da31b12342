"""Certificate signing requests: how a party asks for a certificate without its private key leaving its machine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import fingerprint
from pfedsecure.pki.files import exists, make_folder, write_public, write_secret
from pfedsecure.pki.keys import new_private_key, private_pem, read_private_key, require_p256
from pfedsecure.pki.names import ROLE_URI_PREFIX, Role, is_role, parse_host, validate_name

KEY_FILE = "identity.key"
REQUEST_FILE = "identity.csr"


@dataclass(frozen=True)
class SigningRequest:
    """What a requester asks for.

    Proved: whoever made it holds the private key of `key`. Everything else is a wish that the approver judges.
    """

    name: str
    role: Role
    hosts: tuple[str, ...]
    key: ec.EllipticCurvePublicKey

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
            (mark,) = wanted.get_values_for_type(x509.UniformResourceIdentifier)
        except (ValueError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension):
            raise IdentityError(f"{source} is not a request that `pfed pki request` made: make it again") from None
        role = mark.removeprefix(ROLE_URI_PREFIX)
        if not is_role(role):
            raise IdentityError(f"{source} asks for an unknown role: make it again with `pfed pki request`")
        addresses = (str(address) for address in wanted.get_values_for_type(x509.IPAddress))
        hosts = (*wanted.get_values_for_type(x509.DNSName), *addresses)
        alternative_hosts(role, hosts)  # refuses hosts that are none, before anybody reads them on a terminal
        return cls(validate_name(str(name.value)), role, hosts, require_p256(key, source))


def request(folder: Path, name: str, role: Role, hosts: Sequence[str] = ()) -> Path:
    """Makes a private key and a signing request for it in `folder`; returns the path of the request.

    The key has mode 0600 from its first instant, never overwrites another and never leaves the folder. If an earlier
    call died between the two files, this one goes on with the key that is there; a finished request is never
    replaced. `hosts`: names and addresses of a server, none for the other roles. Raises IdentityError.
    """
    wanted = [x509.UniformResourceIdentifier(ROLE_URI_PREFIX + role), *alternative_hosts(role, hosts)]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, validate_name(name))])
    make_folder(folder)
    key_path, request_path = folder / KEY_FILE, folder / REQUEST_FILE
    if exists(request_path):
        raise IdentityError(f"{request_path} exists: have it approved, or choose another folder for another identity")
    with suppress(FileExistsError):  # left by a call that died before it wrote the request
        write_secret(key_path, private_pem(new_private_key()))
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        .sign(read_private_key(key_path), hashes.SHA256())
    )
    write_public(request_path, csr.public_bytes(Encoding.PEM))
    return request_path


def alternative_hosts(role: Role, hosts: Sequence[str]) -> list[x509.DNSName | x509.IPAddress]:
    """`hosts` as subject alternative names; IdentityError unless a server has some and nobody else has any."""
    if role == "server" and not hosts:
        raise IdentityError("a server needs a host: give the name or address that clients connect to")
    if role != "server" and hosts:
        raise IdentityError(f"hosts are for servers: a {role} has none, its certificate goes by its name")
    return [parse_host(host) for host in hosts]

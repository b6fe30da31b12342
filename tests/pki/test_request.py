from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from pfedsecure.errors import IdentityError
from pfedsecure.pki.names import Role
from pfedsecure.pki.request import SigningRequest, request


def test_a_request_says_who_asks_and_proves_the_key(tmp_path: Path) -> None:
    path = request(tmp_path / "fl", "fl", "server", ("fl.example.org", "127.0.0.1", "::1"))
    asked = SigningRequest.parse(path.read_bytes(), "it")
    assert (asked.name, asked.role, asked.hosts) == ("fl", "server", ("fl.example.org", "127.0.0.1", "::1"))
    key_path = tmp_path / "fl" / "identity.key"
    assert stat.S_IMODE(key_path.stat().st_mode) == 0o600
    key = load_pem_private_key(key_path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert asked.key == key.public_key()
    assert b"PRIVATE" not in path.read_bytes()


def test_a_finished_request_is_never_replaced(tmp_path: Path) -> None:
    path = request(tmp_path, "alice", "client")
    before = path.read_bytes(), (tmp_path / "identity.key").read_bytes()
    with pytest.raises(IdentityError, match=r"identity.csr exists: have it approved, or choose another folder"):
        request(tmp_path, "alice", "client")
    assert (path.read_bytes(), (tmp_path / "identity.key").read_bytes()) == before


def test_a_call_that_died_between_key_and_request_is_continued(tmp_path: Path) -> None:
    request(tmp_path, "alice", "client").unlink()
    key = (tmp_path / "identity.key").read_bytes()
    path = request(tmp_path, "alice", "client")
    assert (tmp_path / "identity.key").read_bytes() == key
    loaded = load_pem_private_key(key, None)
    assert SigningRequest.parse(path.read_bytes(), "it").key == loaded.public_key()


@pytest.mark.parametrize(
    ("name", "role", "hosts", "message"),
    [
        ("a/b", "client", (), "is not allowed"),
        ("fl", "server", (), "a server needs a host: give the name or address"),
        ("alice", "client", ("a.org",), "hosts are for servers: a client has none"),
        ("fl", "server", ("a b",), "neither a host name nor an IP address"),
    ],
)
def test_a_bad_wish_leaves_no_file(tmp_path: Path, name: str, role: Role, hosts: tuple[str, ...], message: str) -> None:
    with pytest.raises(IdentityError, match=message):
        request(tmp_path / "new", name, role, hosts)
    assert not (tmp_path / "new").exists()


def test_a_changed_request_is_noticed(tmp_path: Path) -> None:
    csr = x509.load_pem_x509_csr(request(tmp_path, "alice", "client").read_bytes())
    changed = csr.public_bytes(Encoding.DER).replace(b"alice", b"mally")
    pem = x509.load_der_x509_csr(changed).public_bytes(Encoding.PEM)
    with pytest.raises(IdentityError, match="it was changed after it was signed: ask for the request again"):
        SigningRequest.parse(pem, "it")


def signed(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, *marks: str, name: str = "alice", host: str | None = None
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    )
    alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(mark) for mark in marks]
    if host is not None:
        alternatives.append(x509.DNSName(host))
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


ROLE = "urn:pfedsecure:role:"


def test_other_requests_are_refused() -> None:
    p256 = ec.generate_private_key(ec.SECP256R1())
    for pem, message in [
        (b"", "it is not a request that `pfed pki request` made"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "it is not a request"),
        (signed(p256), "it is not a request"),
        (signed(p256, ROLE + "client", ROLE + "operator"), "it is not a request"),
        (signed(p256, ROLE + "root"), "it asks for an unknown role"),
        (signed(p256, "https://example.org/"), "it asks for an unknown role"),
        (signed(p256, ROLE + "client", name="../x"), "is not allowed"),
        (signed(p256, ROLE + "server"), "a server needs a host"),
        (signed(p256, ROLE + "client", host="a.org"), "hosts are for servers"),
        (signed(p256, ROLE + "server", host="a.org\x1b[2J"), "neither a host name nor an IP address"),
        (signed(ec.generate_private_key(ec.SECP384R1()), ROLE + "client"), "it is not for an ECDSA P-256 key"),
        (signed(rsa.generate_private_key(65537, 2048), ROLE + "client"), "it is not for an ECDSA P-256 key"),
    ]:
        with pytest.raises(IdentityError, match=message):
            SigningRequest.parse(pem, "it")

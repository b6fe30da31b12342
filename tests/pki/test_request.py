from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from pfedsecure.errors import IdentityError
from pfedsecure.pki.keys import read_private_key, read_sealing_key
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


KEYS = ["identity.key", "sealing.key", "author.key"]


@pytest.mark.parametrize("made", [0, 1, 2, 3])
def test_a_call_that_died_between_the_files_is_continued(tmp_path: Path, made: int) -> None:
    request(tmp_path, "alice", "client").unlink()
    for name in KEYS[made:]:
        (tmp_path / name).unlink()
    before = [(tmp_path / name).read_bytes() for name in KEYS[:made]]
    asked = SigningRequest.parse(request(tmp_path, "alice", "client").read_bytes(), "it")
    assert [(tmp_path / name).read_bytes() for name in KEYS[:made]] == before
    assert asked.key == read_private_key(tmp_path / "identity.key").public_key()
    assert asked.client_keys is not None
    assert asked.client_keys.sealing == read_sealing_key(tmp_path / "sealing.key").public_key()
    assert asked.client_keys.author == read_private_key(tmp_path / "author.key").public_key()


def test_a_client_has_three_private_keys_and_nobody_else_has(tmp_path: Path) -> None:
    request(tmp_path / "a", "alice", "client")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {*KEYS, "identity.csr"}
    for name in KEYS:
        assert stat.S_IMODE((tmp_path / "a" / name).stat().st_mode) == 0o600
    for who, role, hosts in [("olga", "operator", ()), ("fl", "server", ("fl.example.org",))]:
        asked = SigningRequest.parse(request(tmp_path / who, who, role, hosts).read_bytes(), "it")  # type: ignore[arg-type]
        assert asked.client_keys is None
        assert {path.name for path in (tmp_path / who).iterdir()} == {"identity.key", "identity.csr"}


def test_a_request_of_an_older_version_can_be_read(tmp_path: Path) -> None:
    asked = SigningRequest.parse(signed(ec.generate_private_key(ec.SECP256R1()), ROLE + "client"), "it")
    assert (asked.role, asked.client_keys) == ("client", None)


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
        (signed(p256, ROLE + "author"), "it asks for an unknown role"),
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


def marks_of(folder: Path) -> list[str]:
    """What the request in `folder` says: role, sealing key, author key, proof."""
    csr = x509.load_pem_x509_csr((folder / "identity.csr").read_bytes())
    wanted = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return wanted.get_values_for_type(x509.UniformResourceIdentifier)


def refused(key: ec.EllipticCurvePrivateKey, marks: Iterable[str]) -> None:
    with pytest.raises(IdentityError, match="it is not a request that `pfed pki request` made: make it again"):
        SigningRequest.parse(signed(key, *marks), "it")


def test_the_forger_of_these_tests_can_also_make_a_genuine_request(tmp_path: Path) -> None:
    request(tmp_path, "alice", "client")
    pem = signed(read_private_key(tmp_path / "identity.key"), *marks_of(tmp_path))
    assert SigningRequest.parse(pem, "it").client_keys is not None


def test_nobody_can_claim_the_author_key_of_another(tmp_path: Path) -> None:
    """Else a client could pass for the author of what another wrote."""
    request(tmp_path / "alice", "alice", "client")
    request(tmp_path / "mallory", "mallory", "client")
    alice, mallory = marks_of(tmp_path / "alice"), marks_of(tmp_path / "mallory")
    key = read_private_key(tmp_path / "mallory" / "identity.key")
    refused(key, alice)
    refused(key, [*mallory[:2], alice[2], mallory[3]])
    refused(key, [*mallory[:2], *alice[2:]])


# Points of order 1, 2, 4 and 8, and 0 and 1 spelled with the field's prime added: Bernstein, https://cr.yp.to/ecdh.html
SMALL_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
]


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_a_sealing_key_that_seals_nothing_is_refused(tmp_path: Path, point: str) -> None:
    """With a key of small order everybody who sees the kit could open it, the server too."""
    request(tmp_path, "alice", "client")
    role, _sealing, *rest = marks_of(tmp_path)
    refused(read_private_key(tmp_path / "identity.key"), [role, "urn:pfedsecure:sealing-key:" + point, *rest])


def test_malformed_client_keys_are_refused(tmp_path: Path) -> None:
    request(tmp_path, "alice", "client")
    key = read_private_key(tmp_path / "identity.key")
    role, sealing, author, proof = marks_of(tmp_path)
    for others in (
        [sealing],
        [sealing, author],
        [author, proof],
        [author, sealing, proof],
        [sealing, sealing, author, proof],
        [sealing, author, proof, "https://example.org/"],
        [sealing.upper().replace("URN:PFEDSECURE:SEALING-KEY", "urn:pfedsecure:sealing-key"), author, proof],
        [sealing + "00", author, proof],
        [sealing[:-2], author, proof],
        [sealing, author[:-2], proof],
        [sealing, author, proof[:-2]],
        [sealing, author, "urn:pfedsecure:author-proof:"],
        [sealing, author, "urn:pfedsecure:author-proof:no"],
        [sealing, "urn:pfedsecure:author-key:", proof],
    ):
        refused(key, [role, *others])
    for privileged in ("server", "operator"):
        with pytest.raises(IdentityError, match="it is not a request"):
            SigningRequest.parse(
                signed(
                    key, ROLE + privileged, sealing, author, proof, host="a.org" if privileged == "server" else None
                ),
                "it",
            )

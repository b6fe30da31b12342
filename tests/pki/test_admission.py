"""What the authority gives a client beside its certificate, and what it gives nobody else."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.errors import IdentityError
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.request import request

Enrol = Callable[..., Identity]


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def csr_of(folder: Path, name: str = "alice") -> bytes:
    return request(folder, name, "client").read_bytes()


def old_csr(name: str) -> bytes:
    """A client's request as an older version made it."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:pfedsecure:role:client")]), critical=False
        )
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def secret_of(authority: Authority) -> bytes:
    return bytes.fromhex(json.loads((authority.folder / "epoch.json").read_bytes())["secret"])


def holds(folder: Path, secret: bytes) -> list[str]:
    """The files anywhere in `folder` in which `secret` stands, raw or in hexadecimal."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files
    return [
        path.name for path in files if secret in (data := path.read_bytes()) or secret.hex().encode() in data.lower()
    ]


@pytest.mark.usefixtures("open_umask")
def test_the_secret_is_made_when_the_first_client_is_approved_and_not_before(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    files = {"authority.key", "authority.crt", "issued.jsonl", ".lock"}
    enrolled(authority, "fl", "server", hosts=["localhost"])
    enrolled(authority, "olga", "operator")
    with pytest.raises(IdentityError, match="the authority itself ends on"):
        authority.admit(csr_of(tmp_path / "late"), name="alice", role="client", days=9999)
    with pytest.raises(IdentityError, match="name fl belongs to another key"):
        authority.admit(csr_of(tmp_path / "fl2", "fl"), name="fl", role="client", days=9)
    assert {path.name for path in authority.folder.iterdir()} <= files
    enrolled(authority, "alice")
    assert {path.name for path in authority.folder.iterdir()} - files == {"epoch.json"}
    assert stat.S_IMODE((authority.folder / "epoch.json").stat().st_mode) == 0o600
    first = secret_of(authority)
    enrolled(authority, "bob")
    assert secret_of(authority) == first


def test_the_secret_is_with_clients_and_authority_and_nowhere_else(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    server = enrolled(authority, "fl", "server", hosts=["localhost"])
    operator = enrolled(authority, "olga", "operator")
    alice = enrolled(authority, "alice")
    renewed = authority.admit(
        (server.folder / "identity.csr").read_bytes(), name="fl", role="server", days=3, hosts=["localhost"]
    )
    install_kit(server.folder, renewed)
    secret = secret_of(authority)
    assert holds(alice.folder, secret) == ["cohort.json"]
    assert holds(authority.folder, secret) == ["epoch.json"]
    for other in (server, operator):
        assert holds(other.folder, secret) == []
        assert {path.name for path in other.folder.iterdir()} <= {
            "identity.key",
            "identity.csr",
            "identity.crt",
            "authority.crt",
            ".lock",
        }
        with pytest.raises(IdentityError, match="holds no cohort secret"):
            CohortSecrets.load(other.folder)
    assert (renewed.author, renewed.sealed) == (None, None)


def test_of_many_first_approvals_at_once_all_get_one_secret(authority: Authority, tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(8)]
    requests = [(name, csr_of(tmp_path / name, name)) for name in names]

    def approve(name: str, csr: bytes) -> bytes:
        kit = Authority.load(authority.folder).admit(csr, name=name, role="client", days=9)
        install_kit(tmp_path / name, kit)
        return CohortSecrets.load(tmp_path / name).derive(1, "x")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda one: approve(*one), requests))) == 1


def test_a_client_whose_request_lacks_the_keys_gets_nothing(authority: Authority) -> None:
    with pytest.raises(IdentityError, match="the request lacks the keys that a client needs, an older version made it"):
        authority.admit(old_csr("alice"), name="alice", role="client", days=9)
    assert authority.issued() == []
    assert not (authority.folder / "epoch.json").exists()


def test_a_lost_secret_is_not_quietly_replaced(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    """Two secrets of one epoch would split the federation in two."""
    enrolled(authority, "alice")
    (authority.folder / "epoch.json").unlink()
    with pytest.raises(IdentityError, match=r"epoch.json is missing, but clients hold its secret: restore"):
        authority.admit(csr_of(tmp_path / "b", "bob"), name="bob", role="client", days=9)
    assert [record.name for record in authority.issued()] == ["alice"]
    authority.admit(
        request(tmp_path / "fl", "fl", "server", ["a.org"]).read_bytes(),
        name="fl",
        role="server",
        days=9,
        hosts=["a.org"],
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"epoch": 1, "reserved": 1, "secret": "00"}',
        b'{"epoch": 0, "reserved": 1, "secret": "%s"}' % (b"00" * 32),
        b'{"epoch": 1, "reserved": null, "secret": "%s"}' % (b"00" * 32),
    ],
)
def test_a_damaged_secret(authority: Authority, enrolled: Enrol, tmp_path: Path, content: bytes) -> None:
    enrolled(authority, "alice")
    (authority.folder / "epoch.json").write_bytes(content)
    with pytest.raises(IdentityError, match=r"epoch.json is damaged: restore it from its newest backup"):
        authority.admit(csr_of(tmp_path / "b", "bob"), name="bob", role="client", days=9)


def test_a_secret_open_to_others(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    enrolled(authority, "alice")
    (authority.folder / "epoch.json").chmod(0o644)
    with pytest.raises(IdentityError, match=r"epoch.json is open to other users \(mode 0644\): run chmod 600"):
        authority.admit(csr_of(tmp_path / "b", "bob"), name="bob", role="client", days=9)


def test_a_damaged_sealing_key_on_record(authority: Authority, enrolled: Enrol) -> None:
    enrolled(authority, "alice")
    path = authority.folder / "issued.jsonl"
    record = json.loads(path.read_bytes())
    for damage in ("00", "xy" * 32):
        path.write_text(json.dumps(record | {"sealing_key": damage}) + "\n")
        with pytest.raises(IdentityError, match=r"issued.jsonl line 1 is damaged"):
            authority.issued()

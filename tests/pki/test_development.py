from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.errors import IdentityError
from pfedsecure.pki.author import Author
from pfedsecure.pki.authority import Authority, federation_of
from pfedsecure.pki.certificates import hosts_of
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.development import enrol, ensure_development_pki
from pfedsecure.pki.identity import Identity, install
from pfedsecure.pki.keys import read_private_key
from pfedsecure.pki.request import request


def now() -> datetime:
    return datetime.now(UTC)


def test_the_first_call_makes_it_and_the_second_finds_it(tmp_path: Path) -> None:
    server = ensure_development_pki(tmp_path / "dev")
    assert hosts_of(server.certificate) == ["localhost", "127.0.0.1", "::1"]
    assert federation_of(server.authority) == "development-only"
    assert Identity.load(server.folder, role="server") == server
    assert ensure_development_pki(tmp_path / "dev") == server


def test_enrolment_makes_the_key_at_its_destination_and_keeps_it(tmp_path: Path) -> None:
    server = ensure_development_pki(tmp_path / "dev")
    client = enrol(tmp_path / "dev", "alice", "client", tmp_path / "state" / "alice")
    assert (client.subject.name, client.subject.role) == ("alice", "client")
    assert client.authority == server.authority
    assert client.key_path.parent == tmp_path / "state" / "alice"
    assert enrol(tmp_path / "dev", "alice", "client", tmp_path / "state" / "alice") == client


def test_without_an_authority_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"no development authority in .*dev: start `pfed-server --tls` here first"):
        enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice")
    assert list(tmp_path.iterdir()) == []


def test_expired_certificates_are_renewed_for_the_same_key(tmp_path: Path) -> None:
    past = now() - timedelta(days=400)
    old_server = ensure_development_pki(tmp_path / "dev", now=past)
    old_client = enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice", now=past)
    with pytest.raises(IdentityError, match="expired"):
        Identity.load(old_client.folder)
    server = ensure_development_pki(tmp_path / "dev")
    client = enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice")
    for new, old in ((server, old_server), (client, old_client)):
        assert new.subject.not_after > now()
        assert new.subject.fingerprint == old.subject.fingerprint


def test_the_server_certificate_follows_the_hosts(tmp_path: Path) -> None:
    first = ensure_development_pki(tmp_path / "dev", ["localhost", "0:0:0:0:0:0:0:1"])
    assert ensure_development_pki(tmp_path / "dev", ["::1"]) == first
    second = ensure_development_pki(tmp_path / "dev", ["lab7.example.org"])
    assert hosts_of(second.certificate) == ["lab7.example.org"]
    assert second.subject.fingerprint == first.subject.fingerprint


def test_a_request_that_a_crash_left_behind_is_completed(tmp_path: Path) -> None:
    ensure_development_pki(tmp_path / "dev")
    client = enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice")
    client.certificate_path.unlink()
    again = enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice")
    assert again.subject.fingerprint == client.subject.fingerprint


def test_clients_get_what_the_server_never_has(tmp_path: Path) -> None:
    ensure_development_pki(tmp_path / "dev")
    enrol(tmp_path / "dev", "olga", "operator", tmp_path / "olga")
    assert not list(tmp_path.rglob("epoch.json"))
    alice, bob = (enrol(tmp_path / "dev", name, "client", tmp_path / name) for name in ("alice", "bob"))
    ensure_development_pki(tmp_path / "dev", ["lab7.example.org"])  # renewed after there is a secret
    assert Author.load(alice.folder).pseudonym != Author.load(bob.folder).pseudonym
    keys = {CohortSecrets.load(client.folder).derive(1, "x") for client in (alice, bob)}
    assert len(keys) == 1
    for folder in (tmp_path / "dev" / "server", tmp_path / "olga"):
        assert not {path.name for path in folder.iterdir()} & {"cohort.json", "author.crt", "sealing.key", "author.key"}


@pytest.mark.parametrize("name", ["author.crt", "cohort.json"])
def test_what_a_client_lost_it_gets_again(tmp_path: Path, name: str) -> None:
    ensure_development_pki(tmp_path / "dev")
    client = enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice")
    pseudonym, key = Author.load(client.folder).pseudonym, CohortSecrets.load(client.folder).derive(1, "x")
    (client.folder / name).unlink()
    enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice")
    assert Author.load(client.folder).pseudonym == pseudonym
    assert CohortSecrets.load(client.folder).derive(1, "x") == key
    (client.folder / name).write_bytes(b"no")
    with pytest.raises(IdentityError, match=f"{name} is (damaged|not one PEM)"):
        enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice")


def test_a_folder_that_an_older_version_enrolled(tmp_path: Path) -> None:
    ensure_development_pki(tmp_path / "dev")
    csr = old_csr(tmp_path / "alice", "alice")
    message = r"alice was enrolled by an older version: delete it, and it is made anew"
    with pytest.raises(IdentityError, match=message):
        enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice")
    authority = Authority.load(tmp_path / "dev" / "authority")
    certificate = authority.approve(csr, name="alice", role="client", days=9)
    install(tmp_path / "alice", certificate, authority.certificate)
    with pytest.raises(IdentityError, match=message):
        enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice")
    shutil.rmtree(tmp_path / "alice")
    assert CohortSecrets.load(enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice").folder).epoch == 1


def old_csr(folder: Path, name: str) -> bytes:
    """A client's key and request in `folder`, as an older version made them; the request."""
    request(folder, name, "operator")
    key = read_private_key(folder / "identity.key")
    role = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:pfedsecure:role:client")])
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .add_extension(role, critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    (folder / "identity.csr").write_bytes(csr)
    return csr


def test_a_lost_state_may_take_its_name_again(tmp_path: Path) -> None:
    ensure_development_pki(tmp_path / "dev")
    first = enrol(tmp_path / "dev", "alice", "client", tmp_path / "a")
    second = enrol(tmp_path / "dev", "alice", "client", tmp_path / "b")
    assert first.subject.fingerprint != second.subject.fingerprint


@pytest.mark.parametrize(("name", "role"), [("bob", "client"), ("alice", "operator")])
def test_an_identity_is_not_turned_into_another(tmp_path: Path, name: str, role: str) -> None:
    ensure_development_pki(tmp_path / "dev")
    alice = enrol(tmp_path / "dev", "alice", "client", tmp_path / "alice")
    with pytest.raises(IdentityError, match=f"is the identity of client alice, not of {role} {name}: use another"):
        enrol(tmp_path / "dev", name, role, tmp_path / "alice")  # type: ignore[arg-type]
    Authority.create(tmp_path / "new" / "authority", "development-only")
    with pytest.raises(IdentityError, match=r"alice holds an identity of another authority than .*new: use another"):
        enrol(tmp_path / "new", "alice", "client", tmp_path / "alice")
    assert Identity.load(alice.folder) == alice


def test_processes_that_start_at_once_end_up_in_one_federation(tmp_path: Path) -> None:
    """Two servers and five clients, each a process, on a folder that is not there at first."""
    ensure = "from pfedsecure.pki.development import *; ensure_development_pki(Path(sys.argv[1]))"
    client = (
        "from pfedsecure.pki.development import *; ensure_development_pki(Path(sys.argv[1])); "
        "enrol(Path(sys.argv[1]), sys.argv[2], 'client', Path(sys.argv[1]).parent / sys.argv[2])"
    )
    names = [f"client-{i}" for i in range(5)]
    commands = [(ensure, "x"), (ensure, "x"), *((client, name) for name in names)]
    children = [
        subprocess.Popen([sys.executable, "-c", "import sys; " + code, tmp_path / "dev", name], stderr=subprocess.PIPE)
        for code, name in commands
    ]
    complaints = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0] * 7, complaints
    server = ensure_development_pki(tmp_path / "dev")
    clients = [Identity.load(tmp_path / name) for name in names]
    assert {client.authority for client in clients} == {server.authority}
    assert len({CohortSecrets.load(client.folder).derive(1, "x") for client in clients}) == 1
    assert len({Author.load(client.folder).pseudonym for client in clients}) == 5
    issued = Authority.load(tmp_path / "dev" / "authority").issued()
    assert sorted(record.name for record in issued) == [*names, "development-server"]


def test_processes_that_enrol_one_client_at_once_agree(tmp_path: Path) -> None:
    """As when the same command is started twice; one folder, one name."""
    ensure_development_pki(tmp_path / "dev")
    code = (
        "import sys; from pfedsecure.pki.development import *; "
        "enrol(Path(sys.argv[1]) / 'dev', 'alice', 'client', Path(sys.argv[1]) / 'alice')"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stderr=subprocess.PIPE) for _ in range(4)]
    complaints = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0] * 4, complaints
    issued = Authority.load(tmp_path / "dev" / "authority").issued()
    assert [record.name for record in issued] == ["development-server", "alice"]
    assert issued[1].pseudonym == Author.load(tmp_path / "alice").pseudonym

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pfedsecure.errors import IdentityError
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.identity import Identity, install
from pfedsecure.pki.request import request

Enrol = Callable[..., Identity]


def now() -> datetime:
    return datetime.now(UTC)


def test_what_was_installed_is_what_is_loaded(authority: Authority, enrolled: Enrol) -> None:
    installed = enrolled(authority, "alice")
    loaded = Identity.load(installed.folder, role="client")
    assert loaded == installed
    assert loaded.authority == authority.certificate
    assert loaded.private_key().public_key() == loaded.certificate.public_key()
    assert "PRIVATE" not in repr(loaded)


def test_an_incomplete_identity_says_what_is_next(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"a holds no identity: make one with `pfed pki request .*a --name NAME"):
        Identity.load(tmp_path / "a")
    request(tmp_path / "a", "alice", "client")
    with pytest.raises(IdentityError, match="a holds a request that is not approved yet: run `pfed pki install KIT"):
        Identity.load(tmp_path / "a")


def test_an_expired_identity(authority: Authority, enrolled: Enrol) -> None:
    identity = enrolled(authority, "alice", days=1)
    with pytest.raises(IdentityError, match=r"certificate of client alice expired on .*: request a new one"):
        Identity.load(identity.folder, now=now() + timedelta(days=2))


def test_a_wrong_role(authority: Authority, enrolled: Enrol) -> None:
    identity = enrolled(authority, "alice")
    with pytest.raises(IdentityError, match="alice is the identity of a client, a server is needed: use another"):
        Identity.load(identity.folder, role="server")


def test_a_key_that_others_may_read(authority: Authority, enrolled: Enrol) -> None:
    identity = enrolled(authority, "alice")
    identity.key_path.chmod(0o640)
    for use in (lambda: Identity.load(identity.folder), identity.private_key, identity.private_key_pem):
        with pytest.raises(IdentityError, match=r"is open to other users \(mode 0640\): run chmod 600"):
            use()


def test_the_key_of_another_certificate(authority: Authority, enrolled: Enrol) -> None:
    alice, bob = enrolled(authority, "alice"), enrolled(authority, "bob")
    bob.key_path.replace(alice.key_path)
    with pytest.raises(IdentityError, match=r"alice/identity.key is not the key of .*alice/identity.crt: install the"):
        Identity.load(alice.folder)


def test_the_authority_of_another_federation(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    alice = enrolled(authority, "alice")
    other = Authority.create(tmp_path / "other", "banks")
    (other.folder / "authority.crt").replace(alice.folder / "authority.crt")
    with pytest.raises(IdentityError, match="certificate of client alice was not issued by authority"):
        Identity.load(alice.folder)


@pytest.mark.parametrize("name", ["identity.crt", "authority.crt", "identity.key"])
def test_damaged_and_missing_files(authority: Authority, enrolled: Enrol, name: str) -> None:
    path = enrolled(authority, "alice").folder / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(IdentityError, match=f"{name} is not (one|an unencrypted) PEM"):
        Identity.load(path.parent)
    path.unlink()
    with pytest.raises(IdentityError, match=name.replace("identity.crt", "not approved yet")):
        Identity.load(path.parent)


@pytest.mark.parametrize("key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())])
def test_another_kind_of_key(
    authority: Authority, enrolled: Enrol, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
) -> None:
    identity = enrolled(authority, "alice")
    identity.key_path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(IdentityError, match=r"identity.key is not an ECDSA P-256 key"):
        Identity.load(identity.folder)


def test_install_checks_before_it_writes(authority: Authority, tmp_path: Path) -> None:
    csr = request(tmp_path / "a", "alice", "client").read_bytes()
    certificate = authority.approve(csr, name="alice", role="client", days=1)
    other = Authority.create(tmp_path / "other", "banks")
    request(tmp_path / "b", "bob", "client")
    for folder, trusted, moment, message in [
        (tmp_path / "none", authority, now(), "none holds no key: name the folder in which"),
        (tmp_path / "b", authority, now(), "this certificate is for alice with another key than .*b/identity.key"),
        (tmp_path / "a", other, now(), "was not issued by authority"),
        (tmp_path / "a", authority, now() + timedelta(days=2), "expired on"),
    ]:
        with pytest.raises(IdentityError, match=message):
            install(folder, certificate, trusted.certificate, now=moment)
        assert not list(tmp_path.glob("[ab]/*.crt"))
    assert install(tmp_path / "a", certificate, authority.certificate).subject.name == "alice"


def test_a_renewed_certificate_for_the_same_key_takes_the_place_of_the_old(
    authority: Authority, enrolled: Enrol
) -> None:
    old = enrolled(authority, "alice", days=1)
    csr = (old.folder / "identity.csr").read_bytes()
    new = install(old.folder, authority.approve(csr, name="alice", role="client", days=9), authority.certificate)
    assert new.subject.not_after > old.subject.not_after
    assert new.subject.fingerprint == old.subject.fingerprint

"""Renewing an identity: a new key under the old name, vouched for by the old key and by nobody else."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.errors import IdentityError
from pfedsecure.pki.author import Author
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.certificates import hosts_of
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.current import CurrentIdentity
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.keys import read_private_key
from pfedsecure.pki.kit import Kit
from pfedsecure.pki.renewal import renew
from pfedsecure.pki.request import SigningRequest, request
from pfedsecure.pki.revoking import revoke
from pfedsecure.pki.rotation import rotate

Enrol = Callable[..., Identity]


def approved(authority: Authority, identity: Identity, **options: object) -> Kit:
    subject = identity.subject
    csr = renew(identity.folder).read_bytes()
    hosts = hosts_of(identity.certificate)
    return authority.admit(csr, name=subject.name, role=subject.role, days=20, hosts=hosts, **options)  # type: ignore[arg-type]


def test_a_client_gets_a_new_key_and_stays_who_it_was(authority: Authority, enrolled: Enrol) -> None:
    old = enrolled(authority, "alice")
    author = Author.load(old.folder)
    kit = approved(authority, old)
    assert Identity.load(old.folder).subject == old.subject  # nothing has changed yet
    new = install_kit(old.folder, kit)
    assert new.subject.name == "alice"
    assert new.subject.fingerprint != old.subject.fingerprint
    assert new.subject.succeeds == {old.subject.fingerprint}
    assert new.private_key().public_key() == new.certificate.public_key()
    assert Author.load(old.folder).pseudonym == author.pseudonym
    assert CohortSecrets.load(old.folder).epoch == 1
    assert sorted(path.name for path in old.folder.iterdir() if "next" in path.name or "renewal" in path.name) == []
    assert old.key_path.stat().st_mode & 0o777 == 0o600


def test_who_uses_the_old_identity_meanwhile_keeps_its_key(authority: Authority, enrolled: Enrol) -> None:
    old = enrolled(authority, "alice")
    current = CurrentIdentity(old)
    assert current() is old
    new = install_kit(old.folder, approved(authority, old))
    assert old.private_key().public_key() == old.certificate.public_key()
    assert current().subject == new.subject
    assert current() is current()


def test_renewals_follow_each_other_and_rotations_reach_the_newest_key(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    identity = enrolled(authority, "alice")
    past: list[str] = []
    for _ in range(6):
        past.insert(0, identity.subject.fingerprint)
        identity = install_kit(identity.folder, approved(authority, identity))
        assert identity.subject.succeeds == set(past[:4])
    kit = rotate(authority, tmp_path / "kits").kits["alice"]
    install_kit(identity.folder, Kit.unpack(kit.read_bytes(), "kit"))
    assert CohortSecrets.load(identity.folder).epoch == 2


def test_a_server_renews_with_its_hosts(authority: Authority, enrolled: Enrol) -> None:
    server = enrolled(authority, "fl", "server", hosts=["fl.example.org", "::1"])
    assert hosts_of(install_kit(server.folder, approved(authority, server)).certificate) == ["fl.example.org", "::1"]


def test_asking_twice_gives_the_same_request(authority: Authority, enrolled: Enrol) -> None:
    alice = enrolled(authority, "alice")
    first = renew(alice.folder).read_bytes()
    assert renew(alice.folder).read_bytes() == first
    asked = SigningRequest.parse(first, "it")
    assert (asked.name, asked.renews) == ("alice", alice.subject.fingerprint)
    (alice.folder / "renewal.csr").unlink()  # died before it was written
    assert SigningRequest.parse(renew(alice.folder).read_bytes(), "it").fingerprint == asked.fingerprint


def test_installing_goes_on_where_it_died(authority: Authority, enrolled: Enrol) -> None:
    alice = enrolled(authority, "alice")
    kit = approved(authority, alice)
    (alice.folder / "identity.next.key").replace(alice.folder / "identity.key")  # and dies here
    with pytest.raises(IdentityError, match="is not the key of"):
        Identity.load(alice.folder)
    assert install_kit(alice.folder, kit).subject.succeeds == {alice.subject.fingerprint}


def test_only_the_holder_of_a_good_certificate_renews(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    alice, bob = enrolled(authority, "alice"), enrolled(authority, "bob")
    csr = renew(bob.folder).read_bytes()
    with pytest.raises(IdentityError, match="renews no certificate that client alice has"):
        authority.admit(csr, name="alice", role="client", days=10)
    later = datetime.now(UTC) + timedelta(days=11)
    with pytest.raises(IdentityError, match="renews no certificate that client bob has and that is still good"):
        authority.admit(csr, name="bob", role="client", days=10, now=later)
    revoke(authority, ["bob"])
    with pytest.raises(IdentityError, match="renews no certificate that client bob has and that is still good"):
        authority.admit(csr, name="bob", role="client", days=10, replace=True)
    with pytest.raises(IdentityError, match="expired on"):
        Identity.load(alice.folder, now=later)


def test_a_renewal_that_the_old_key_did_not_sign_is_refused(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    """A thief of the request alone, or somebody who would like to be alice, cannot make one."""
    alice, mallory = enrolled(authority, "alice"), enrolled(authority, "mallory")
    genuine, forged = renew(alice.folder), renew(mallory.folder)
    for csr in (genuine.read_bytes(), forged.read_bytes()):
        assert SigningRequest.parse(csr, "it").renews
    alices = x509.load_pem_x509_csr(genuine.read_bytes())
    names = list(alices.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    mine = x509.load_pem_x509_csr(forged.read_bytes())
    own = list(mine.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    stitched = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(alices.subject)
        .add_extension(x509.SubjectAlternativeName([*own[:-2], *names[-2:]]), critical=False)
        .sign(read_private_key(mallory.folder / "identity.next.key"), hashes.SHA256())
    )
    with pytest.raises(IdentityError, match="is not a request that `pfed pki request` made"):
        SigningRequest.parse(stitched.public_bytes(Encoding.PEM), "it")


def test_a_kit_for_somebody_else_is_not_installed_over_an_identity(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    alice = enrolled(authority, "alice")
    csr = renew(alice.folder).read_bytes()
    other = Authority.create(tmp_path / "other", "banks")
    kit = other.admit((alice.folder / "identity.csr").read_bytes(), name="alice", role="client", days=10)
    assert kit.certificate is not None
    with pytest.raises(IdentityError, match="renews no certificate"):
        other.admit(renew(alice.folder).read_bytes(), name="bob", role="client", days=10)
    renamed = other.admit(csr, name="alice", role="client", days=10)
    with pytest.raises(IdentityError, match="or is of another authority: nothing was done"):
        install_kit(alice.folder, renamed)
    assert Identity.load(alice.folder).subject == alice.subject


def test_who_replaces_a_lost_key_succeeds_it_only_if_the_approver_says_so(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    alice = enrolled(authority, "alice")
    csr = request(tmp_path / "new", "alice", "client").read_bytes()
    stranger = authority.admit(csr, name="alice", role="client", days=10, replace=True).certificate
    heir = authority.admit(csr, name="alice", role="client", days=10, replace=True, heir=True)
    assert stranger is not None
    assert install_kit(tmp_path / "new", heir).subject.succeeds == frozenset()  # of the same key as the stranger
    again = request(tmp_path / "newer", "alice", "client").read_bytes()
    kit = authority.admit(again, name="alice", role="client", days=10, replace=True, heir=True)
    succeeded = install_kit(tmp_path / "newer", kit).subject.succeeds
    assert alice.subject.fingerprint not in succeeded
    assert len(succeeded) == 1


def test_a_key_that_was_replaced_renews_nothing(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    """Whoever stole it would become the newest of that name: the next rotation's kit, and the name, would be its."""
    stolen = enrolled(authority, "bob")
    csr = request(tmp_path / "new", "bob", "client").read_bytes()
    kit = authority.admit(csr, name="bob", role="client", days=20, replace=True, heir=True)
    with pytest.raises(IdentityError, match="renews no certificate that client bob has and that is still good"):
        approved(authority, stolen)
    revoke(authority, ["bob"], keep_newest=True)
    assert approved(authority, install_kit(tmp_path / "new", kit))


def test_a_removed_member_does_not_come_back_by_a_renewal(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    """It would be given the secret that it was removed to be kept from."""
    bob = enrolled(authority, "bob")
    enrolled(authority, "alice")
    rotate(authority, tmp_path / "kits", ["bob"])
    with pytest.raises(IdentityError, match=r"bob was removed from the cohort on .*: approve with --replace"):
        approved(authority, bob)
    assert approved(authority, bob, replace=True)


def test_a_certificate_that_cannot_be_read_yet_is_taken_when_it_can(authority: Authority, enrolled: Enrol) -> None:
    """Mending a file's mode changes neither its time nor its number."""
    old = enrolled(authority, "alice")
    current = CurrentIdentity(old)
    new = install_kit(old.folder, approved(authority, old))
    new.key_path.chmod(0o640)
    assert current() is old
    new.key_path.chmod(0o600)
    current._files._try_again = 0.0
    assert current().subject == new.subject

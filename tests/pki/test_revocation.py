"""Revocation at the authority: what is on the list, which lists are believed, and who is a member afterwards."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.errors import IdentityError
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.keys import new_private_key, read_private_key
from pfedsecure.pki.request import request
from pfedsecure.pki.revocation import RevocationList
from pfedsecure.pki.revoking import AFTER_EXPIRY, revoke
from pfedsecure.pki.rotation import rotate

Enrol = Callable[..., Identity]
NOW = datetime.now(UTC)


def csr(identity: Identity) -> bytes:
    return (identity.folder / "identity.csr").read_bytes()


def test_all_certificates_of_a_name_are_on_the_list(authority: Authority, enrolled: Enrol) -> None:
    alice, mallory = enrolled(authority, "alice"), enrolled(authority, "mallory")
    again = authority.admit(csr(mallory), name="mallory", role="client", days=20).certificate
    assert again is not None
    done = revoke(authority, ["mallory"])
    assert done.list.serials == {mallory.subject.serial, again.serial_number}
    assert {record.name for record in done.revoked} == {"mallory"}
    assert alice.subject.serial not in done.list.serials
    once_more = revoke(authority, ["mallory"])
    assert once_more.revoked == ()
    assert once_more.list.serials == done.list.serials
    assert once_more.list.number > done.list.number


def test_a_second_name_of_a_revoked_key_goes_with_it(authority: Authority, enrolled: Enrol) -> None:
    mallory = enrolled(authority, "mallory")
    second = authority.admit(csr(mallory), name="second", role="client", days=10).certificate
    assert second is not None
    assert revoke(authority, ["mallory"]).list.serials == {mallory.subject.serial, second.serial_number}


def test_with_keep_newest_what_replaced_a_lost_key_stays_good(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    old = enrolled(authority, "alice")
    new = request(tmp_path / "new", "alice", "client").read_bytes()
    with pytest.raises(IdentityError, match="belongs to another key"):
        authority.admit(new, name="alice", role="client", days=10)
    authority.admit(new, name="alice", role="client", days=10, replace=True)
    done = revoke(authority, ["alice"], keep_newest=True)
    assert done.list.serials == {old.subject.serial}
    assert "alice" in rotate(authority, tmp_path / "kits").kits


def test_with_keep_newest_each_role_keeps_its_own(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    """Else the newest of one role, issued last, would take the good certificate of another role with it."""
    old = enrolled(authority, "alice")
    new = request(tmp_path / "new", "alice", "client").read_bytes()
    replaced = authority.admit(new, name="alice", role="client", days=10, replace=True).certificate
    other = request(tmp_path / "operator", "alice", "operator").read_bytes()
    operator = authority.admit(other, name="alice", role="operator", days=10, replace=True).certificate
    assert replaced is not None
    assert operator is not None
    done = revoke(authority, ["alice"], keep_newest=True)
    assert done.list.serials == {old.subject.serial}
    assert {(record.role, int(record.serial, 16)) for record in done.kept} == {
        ("client", replaced.serial_number),
        ("operator", operator.serial_number),
    }


def test_a_revoked_client_gets_no_secret_though_its_key_has_another_role_since(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    _, _, mallory = (enrolled(authority, name) for name in ("alice", "bob", "mallory"))
    authority.admit(csr(mallory), name="mallory", role="operator", days=10)
    revoke(authority, ["mallory"])
    assert set(rotate(authority, tmp_path / "kits").kits) == {"alice", "bob"}


def test_a_revoked_key_is_not_certified_again(authority: Authority, enrolled: Enrol) -> None:
    mallory = enrolled(authority, "mallory")
    revoke(authority, ["mallory"])
    for name in ("mallory", "innocent"):
        with pytest.raises(IdentityError, match="key of this request was revoked"):
            authority.admit(csr(mallory), name=name, role="client", days=10, replace=True)


def test_a_revoked_client_gets_no_further_secret(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    for name in ("alice", "bob", "mallory"):
        enrolled(authority, name)
    revoke(authority, ["mallory"])
    rotation = rotate(authority, tmp_path / "kits")
    assert set(rotation.kits) == {"alice", "bob"}
    assert [record.name for record in rotation.removed] == ["mallory"]


def test_a_name_without_certificates_is_refused_and_nothing_is_done(authority: Authority, enrolled: Enrol) -> None:
    enrolled(authority, "alice")
    with pytest.raises(IdentityError, match="bob has no certificate"):
        revoke(authority, ["alice", "bob"])
    assert authority.revoked() == []
    with pytest.raises(IdentityError, match="1 day or more"):
        revoke(authority, ["alice"], days=0)


def test_a_list_by_a_clock_that_is_ahead_does_not_bring_a_certificate_back(
    authority: Authority, enrolled: Enrol
) -> None:
    """A server whose clock is behind takes the certificate until it has expired there too."""
    mallory, late = enrolled(authority, "mallory"), enrolled(authority, "late")
    revoke(authority, ["mallory"])
    ahead = mallory.subject.not_after + timedelta(days=1)
    found = revoke(authority, ["late"], now=ahead).list
    assert found.serials == {mallory.subject.serial, late.subject.serial}


def test_expired_certificates_leave_the_list_and_stay_on_record(authority: Authority, enrolled: Enrol) -> None:
    mallory = enrolled(authority, "mallory")
    revoke(authority, ["mallory"])
    later = revoke(authority, [], now=mallory.subject.not_after + AFTER_EXPIRY + timedelta(hours=1))
    assert later.list.serials == frozenset()
    assert [record.name for record in authority.revoked()] == ["mallory"]


def test_numbers_grow_whatever_the_clock_and_the_backup_say(authority: Authority) -> None:
    numbers = [revoke(authority, [], now=NOW - timedelta(days=day)).list.number for day in range(3)]
    assert numbers == sorted(set(numbers))
    (authority.folder / "revocation.json").unlink()  # restored from a backup of before
    assert revoke(authority, [], now=NOW + timedelta(hours=1)).list.number > numbers[-1]
    (authority.folder / "revocation.json").write_text("{}")
    with pytest.raises(IdentityError, match=r"revocation\.json is damaged"):
        revoke(authority, [])


def test_a_damaged_record_is_refused(authority: Authority, enrolled: Enrol) -> None:
    enrolled(authority, "alice")
    revoke(authority, ["alice"])
    path = authority.folder / "revoked.jsonl"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(IdentityError, match=r"revoked.jsonl line 1 is damaged"):
        revoke(authority, ["alice"])


def test_openssl_reads_and_verifies_the_list(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    mallory = enrolled(authority, "mallory")
    path = tmp_path / "list.crl"
    path.write_bytes(revoke(authority, ["mallory"]).list.pem)
    command = [
        "openssl",
        "crl",
        "-in",
        str(path),
        "-noout",
        "-text",
        "-CAfile",
        str(authority.folder / "authority.crt"),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "verify OK" in shown.stderr
    assert f"{mallory.subject.serial:X}" in shown.stdout


def forged(authority: Authority, **changes: object) -> bytes:
    """A list by another key, or with something in it that ours never have, signed by the authority."""
    key = read_private_key(authority.folder / "authority.key") if "key" not in changes else new_private_key()
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(x509.Name([]) if "issuer" in changes else authority.certificate.subject)
        .last_update(NOW)
        .next_update(NOW + timedelta(days=1))
    )
    if "unnumbered" not in changes:
        builder = builder.add_extension(x509.CRLNumber(7), critical=False)
    if "delta" in changes:
        builder = builder.add_extension(x509.DeltaCRLIndicator(6), critical=True)
    entry = x509.RevokedCertificateBuilder().serial_number(5).revocation_date(NOW)
    if "conditions" in changes:
        entry = entry.add_extension(x509.CRLReason(x509.ReasonFlags.remove_from_crl), critical=False)
    return builder.add_revoked_certificate(entry.build()).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_only_a_whole_list_of_the_authority_is_believed(authority: Authority) -> None:
    assert RevocationList.read(forged(authority), authority.certificate, "it").serials == {5}
    for change, message in (
        ("key", "not signed by this federation's authority"),
        ("issuer", "not signed by this federation's authority"),
        ("unnumbered", "no revocation list"),
        ("delta", "no revocation list"),
        ("conditions", "no revocation list"),
    ):
        with pytest.raises(IdentityError, match=message):
            RevocationList.read(forged(authority, **{change: True}), authority.certificate, "it")
    good = bytearray(forged(authority))
    good[len(good) // 2] ^= 1
    for damaged in (bytes(good), b"", b"junk", good[:100]):
        with pytest.raises(IdentityError, match="it is n"):
            RevocationList.read(bytes(damaged), authority.certificate, "it")


def test_when_a_list_is_overdue(authority: Authority) -> None:
    made = revoke(authority, [], days=2).list
    assert not made.is_overdue()
    assert not made.is_overdue(NOW + timedelta(days=1))
    assert made.is_overdue(NOW + timedelta(days=3))


def test_a_replaced_identity_works_again(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    """The end of the drill: new keys in another folder, under the same name."""
    mallory = enrolled(authority, "mallory")
    revoke(authority, ["mallory"])
    new = request(tmp_path / "new", "mallory", "client").read_bytes()
    kit = authority.admit(new, name="mallory", role="client", days=10, replace=True)
    assert install_kit(tmp_path / "new", kit).subject.serial not in revoke(authority, []).list.serials
    assert mallory.subject.serial in revoke(authority, []).list.serials

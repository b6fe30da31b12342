from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from pfedsecure.errors import IdentityError
from pfedsecure.pki.authority import Authority, federation_of
from pfedsecure.pki.names import Role
from pfedsecure.pki.request import request


def now() -> datetime:
    return datetime.now(UTC)


def csr_of(folder: Path, name: str = "alice", role: Role = "client", hosts: tuple[str, ...] = ()) -> bytes:
    return request(folder, name, role, hosts).read_bytes()


def test_a_new_authority(authority: Authority) -> None:
    certificate = authority.certificate
    assert federation_of(certificate) == "hospitals"
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    assert stat.S_IMODE((authority.folder / "authority.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(authority.folder.stat().st_mode) == 0o700
    assert authority.issued() == []
    assert Authority.load(authority.folder) == authority


def test_nothing_that_exists_is_touched(authority: Authority, tmp_path: Path) -> None:
    before = (authority.folder / "authority.key").read_bytes()
    with pytest.raises(IdentityError, match="authority is not empty: choose another folder"):
        Authority.create(authority.folder, "hospitals")
    assert (authority.folder / "authority.key").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(IdentityError, match="choose another folder"):
        Authority.create(tmp_path / "file", "hospitals")
    assert sorted(os.listdir(tmp_path)) == ["authority", "file"]
    (tmp_path / "empty").mkdir()
    Authority.create(tmp_path / "empty", "hospitals")
    with pytest.raises(IdentityError, match="is not allowed"):
        Authority.create(tmp_path / "new", "two words")


def test_a_leaf_says_what_the_approver_said(authority: Authority, tmp_path: Path) -> None:
    csr = csr_of(tmp_path / "a", "root", "operator")
    moment = now()
    leaf = authority.approve(csr, name="fl", role="server", days=7, hosts=["fl.example.org"], now=moment)
    assert leaf.subject.rfc4514_string() == "CN=fl"
    extensions = {type(extension.value): extension for extension in leaf.extensions}
    assert extensions[x509.BasicConstraints].value == x509.BasicConstraints(ca=False, path_length=None)
    assert list(extensions[x509.ExtendedKeyUsage].value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert list(extensions[x509.SubjectAlternativeName].value) == [
        x509.UniformResourceIdentifier("urn:pfedsecure:role:server"),
        x509.DNSName("fl.example.org"),
    ]
    own = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert extensions[x509.AuthorityKeyIdentifier].value.key_identifier == own.digest
    assert abs(leaf.not_valid_after_utc - moment - timedelta(days=7)) < timedelta(seconds=1)
    assert abs(moment - leaf.not_valid_before_utc - timedelta(minutes=5)) < timedelta(seconds=1)


def test_serial_numbers_are_long_and_differ(authority: Authority, tmp_path: Path) -> None:
    csr = csr_of(tmp_path / "a")
    serials = [authority.approve(csr, name="alice", role="client", days=1).serial_number for _ in range(20)]
    assert len(set(serials)) == 20
    assert 150 < max(serials).bit_length() <= 159


def test_every_certificate_is_on_record(authority: Authority, tmp_path: Path) -> None:
    alice = authority.approve(csr_of(tmp_path / "a"), name="alice", role="client", days=1)
    authority.approve(csr_of(tmp_path / "b", "bob"), name="bob", role="operator", days=1)
    lines = (authority.folder / "issued.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["alice", "bob"]
    first = authority.issued()[0]
    assert (int(first.serial, 16), first.role) == (alice.serial_number, "client")
    assert datetime.fromisoformat(first.not_after) == alice.not_valid_after_utc


def test_a_live_name_belongs_to_its_key(authority: Authority, tmp_path: Path) -> None:
    first, second = csr_of(tmp_path / "a"), csr_of(tmp_path / "b")
    authority.approve(first, name="alice", role="client", days=1)
    with pytest.raises(IdentityError, match=r"name alice belongs to another key until .*--replace if its holder lost"):
        authority.approve(second, name="alice", role="operator", days=1)
    assert len(authority.issued()) == 1
    authority.approve(first, name="alice", role="client", days=2)
    authority.approve(second, name="alice", role="client", days=1, replace=True)
    assert len(authority.issued()) == 3


def test_an_expired_name_is_free(authority: Authority, tmp_path: Path) -> None:
    authority.approve(csr_of(tmp_path / "a"), name="alice", role="client", days=1)
    later = now() + timedelta(days=2)
    authority.approve(csr_of(tmp_path / "b"), name="alice", role="client", days=1, now=later)


def test_of_many_approvals_at_once_one_gets_the_name(authority: Authority, tmp_path: Path) -> None:
    requests = [csr_of(tmp_path / str(i)) for i in range(8)]

    def attempt(csr: bytes) -> bool:
        try:
            Authority.load(authority.folder).approve(csr, name="alice", role="client", days=1)
        except IdentityError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, requests)) == 1
    assert len(authority.issued()) == 1


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"name": "a b"}, "is not allowed"),
        ({"days": 0}, "0 days makes no sense: give 1 day or more"),
        ({"days": 3650}, "the authority itself ends on .*: approve for 3649 days or less"),
        ({"role": "server"}, "a server needs a host"),
        ({"hosts": ["a.org"]}, "hosts are for servers"),
    ],
)
def test_bad_wishes_are_refused_and_not_recorded(
    authority: Authority, tmp_path: Path, wish: dict[str, object], message: str
) -> None:
    csr = csr_of(tmp_path / "a")
    with pytest.raises(IdentityError, match=message):
        authority.approve(csr, **{"name": "alice", "role": "client", "days": 1, **wish})  # type: ignore[arg-type]
    assert authority.issued() == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, r"cannot read .*issued.jsonl: No such file"),
        (b"{}\n", "issued.jsonl line 1 is damaged: restore the file from its backup"),
        (b'{"serial": "1"', "line 1 is damaged"),
        (b"[]\n", "line 1 is damaged"),
        (
            b'{"serial":"1","name":"a","role":"client","fingerprint":"00","not_after":"2099-01-01T00:00:00+00:00"}',
            "line 1 is damaged",  # complete, but without its end of line: the next one would run into it
        ),
    ],
)
def test_without_its_record_an_authority_approves_nothing(
    authority: Authority, tmp_path: Path, damage: bytes | None, message: str
) -> None:
    path = authority.folder / "issued.jsonl"
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    csr = csr_of(tmp_path / "a")
    for replace in (False, True):
        with pytest.raises(IdentityError, match=message):
            authority.approve(csr, name="alice", role="client", days=1, replace=replace)


def test_loading_refuses_what_is_not_a_sound_authority(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="holds no authority: make one with `pfed pki init"):
        Authority.load(tmp_path / "none")
    with pytest.raises(IdentityError, match=r"authority in .* expired: make a new one"):
        Authority.load(authority.folder, now=now() + timedelta(days=3651))
    key = authority.folder / "authority.key"
    key.chmod(0o644)
    with pytest.raises(IdentityError, match=r"authority.key is open to other users"):
        Authority.load(authority.folder)
    other = Authority.create(tmp_path / "other", "hospitals")
    (other.folder / "authority.key").replace(key)
    with pytest.raises(IdentityError, match=r"authority.key is not the key of .*: restore both from one backup"):
        Authority.load(authority.folder)

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pfedsecure.errors import IdentityError
from pfedsecure.pki import epochs, registry
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.files import write_public
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.keys import read_sealing_key
from pfedsecure.pki.kit import Kit
from pfedsecure.pki.request import request
from pfedsecure.pki.rotation import Rotation, live_clients, rotate

Enrol = Callable[..., Identity]


@pytest.fixture
def members(authority: Authority, enrolled: Enrol) -> dict[str, Identity]:
    """Three clients, a server and an operator."""
    enrolled(authority, "fl", "server", hosts=["localhost"])
    enrolled(authority, "olga", "operator")
    return {name: enrolled(authority, name) for name in ("alice", "bob", "mallory")}


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    return tmp_path / "kits"


def install_all(rotation: Rotation, members: dict[str, Identity]) -> set[bytes]:
    """Installs every kit where it belongs; the keys that their owners then derive."""
    for name, path in rotation.kits.items():
        install_kit(members[name].folder, Kit.unpack(path.read_bytes(), str(path)))
    return {CohortSecrets.load(members[name].folder).derive(rotation.epoch, "x") for name in rotation.kits}


def again(authority: Authority, identity: Identity) -> Kit:
    """Another approval of the same request."""
    csr = (identity.folder / "identity.csr").read_bytes()
    return authority.admit(csr, name=identity.subject.name, role="client", days=10)


def test_all_clients_get_the_next_secret(authority: Authority, members: dict[str, Identity], kits: Path) -> None:
    before = CohortSecrets.load(members["alice"].folder).derive(1, "x")
    rotation = rotate(authority, kits)
    assert (rotation.epoch, rotation.removed) == (2, ())
    assert rotation.kits == {name: kits / f"{name}.kit.json" for name in ("alice", "bob", "mallory")}
    (key,) = install_all(rotation, members)
    assert key != before


def test_only_the_newest_secret_stays_with_the_authority(
    authority: Authority, members: dict[str, Identity], kits: Path
) -> None:
    first = json.loads((members["alice"].folder / "cohort.json").read_bytes())["secrets"]["1"]
    assert first in (authority.folder / "epoch.json").read_text()
    rotate(authority, kits)
    assert all(first not in path.read_text() for path in authority.folder.iterdir())
    assert (authority.folder / "epoch.json").stat().st_mode & 0o777 == 0o600


def test_a_removed_member_gets_nothing_from_this_rotation_and_from_later_ones(
    authority: Authority, members: dict[str, Identity], kits: Path
) -> None:
    mallory = members["mallory"].folder
    for number, without in enumerate((["mallory"], [], ["mallory"])):
        rotation = rotate(authority, kits / str(number), without)
        assert set(rotation.kits) == {"alice", "bob"}
        assert [record.name for record in rotation.removed] == ["mallory"]
        assert {path.name for path in (kits / str(number)).iterdir()} == {"alice.kit.json", "bob.kit.json"}
        for path in rotation.kits.values():
            with pytest.raises(IdentityError, match="this kit is for another client's key"):
                install_kit(mallory, Kit.unpack(path.read_bytes(), "it"))
        install_all(rotation, members)
        with pytest.raises(IdentityError, match=rf"no cohort secret of epoch {rotation.epoch} here, only of 1"):
            CohortSecrets.load(mallory).derive(rotation.epoch, "x")
    assert len(registry.read_removed(authority.folder / "removed.jsonl")) == 1


def test_a_removed_member_cannot_open_the_kits_of_others_with_its_own_keys(
    authority: Authority, members: dict[str, Identity], kits: Path
) -> None:
    """Nor with a client that checks nothing."""
    rotation = rotate(authority, kits, ["mallory"])
    sealed = Kit.unpack(rotation.kits["alice"].read_bytes(), "it").sealed
    assert sealed is not None
    own = read_sealing_key(members["mallory"].folder / "sealing.key")
    with pytest.raises(IdentityError, match="is sealed to another sealing key"):
        sealed.open(own, sealed.recipient, authority.certificate)


def test_who_is_approved_again_is_a_member_again(
    authority: Authority, members: dict[str, Identity], kits: Path
) -> None:
    rotate(authority, kits, ["mallory"])
    install_kit(members["mallory"].folder, again(authority, members["mallory"]))
    rotation = rotate(authority, kits)
    assert set(rotation.kits) == {"alice", "bob", "mallory"}
    assert len(install_all(rotation, members)) == 1
    assert set(rotate(authority, kits, ["mallory"]).kits) == {"alice", "bob"}


def test_a_new_client_starts_with_the_newest_epoch(
    authority: Authority, members: dict[str, Identity], enrolled: Enrol, kits: Path
) -> None:
    (key,) = install_all(rotate(authority, kits), members)
    carol = CohortSecrets.load(enrolled(authority, "carol").folder)
    assert (carol.epoch, carol.derive(2, "x")) == (2, key)
    with pytest.raises(IdentityError, match="no cohort secret of epoch 1"):
        carol.derive(1, "x")


def test_a_second_name_of_a_removed_key_goes_with_it(
    authority: Authority, members: dict[str, Identity], kits: Path
) -> None:
    csr = (members["mallory"].folder / "identity.csr").read_bytes()
    authority.admit(csr, name="malory", role="client", days=10)
    rotation = rotate(authority, kits, ["mallory"])
    assert [record.name for record in rotation.removed] == ["mallory", "malory"]
    assert set(rotate(authority, kits).kits) == {"alice", "bob"}


def test_the_holder_of_a_lost_key_gets_nothing(
    authority: Authority, members: dict[str, Identity], kits: Path, tmp_path: Path
) -> None:
    """Approved with --replace because alice lost her key: whoever found it is no member any more."""
    csr = request(tmp_path / "new", "alice", "client").read_bytes()
    kit = authority.admit(csr, name="alice", role="client", days=10, replace=True)
    install_kit(tmp_path / "new", kit)
    path = rotate(authority, kits).kits["alice"]
    with pytest.raises(IdentityError, match="this kit is for another client's key"):
        install_kit(members["alice"].folder, Kit.unpack(path.read_bytes(), "it"))
    install_kit(tmp_path / "new", Kit.unpack(path.read_bytes(), "it"))
    operator = request(tmp_path / "olga", "bob", "operator").read_bytes()
    authority.admit(operator, name="bob", role="operator", days=10, replace=True)
    assert set(rotate(authority, kits / "2").kits) == {"alice", "mallory"}


def test_who_has_expired_gets_nothing(authority: Authority, members: dict[str, Identity], kits: Path) -> None:
    later = datetime.now(UTC) + timedelta(days=11)
    assert rotate(authority, kits, now=later).kits == {}
    with pytest.raises(IdentityError, match=r"alice is no client with a live certificate: `pfed pki show"):
        rotate(authority, kits, ["alice"], now=later)


@pytest.mark.parametrize("without", [["nobody"], ["mallory", "nobody"], ["fl"], ["olga"], [""]])
def test_an_unknown_name_and_nothing_is_done(
    authority: Authority, members: dict[str, Identity], kits: Path, without: list[str]
) -> None:
    before = {path.name: path.read_bytes() for path in authority.folder.iterdir()}
    with pytest.raises(IdentityError, match=r"is no client with a live certificate: `pfed pki show .*` lists them"):
        rotate(authority, kits, without)
    assert {path.name: path.read_bytes() for path in authority.folder.iterdir()} == before
    assert not kits.exists()


def test_there_is_nothing_to_rotate_before_the_first_client(authority: Authority, enrolled: Enrol, kits: Path) -> None:
    enrolled(authority, "fl", "server", hosts=["localhost"])
    with pytest.raises(IdentityError, match="has no cohort secret yet: the first one comes with the first client's"):
        rotate(authority, kits)
    assert not (authority.folder / "epoch.json").exists()
    assert not kits.exists()


def test_a_client_that_an_older_version_approved(
    authority: Authority, members: dict[str, Identity], kits: Path, tmp_path: Path
) -> None:
    csr = request(tmp_path / "old", "old", "client").read_bytes()
    authority.approve(csr, name="old", role="client", days=10)
    with pytest.raises(IdentityError, match=r"old has no sealing key, an older version approved it: .* --without old"):
        rotate(authority, kits)
    assert not kits.exists()
    assert set(rotate(authority, kits, ["old"]).kits) == set(members)
    assert set(rotate(authority, kits).kits) == set(members)


def test_a_kit_that_was_not_sent_yet_is_not_overwritten(
    authority: Authority, members: dict[str, Identity], kits: Path
) -> None:
    before = (authority.folder / "epoch.json").read_bytes()
    kits.mkdir()
    approval = again(authority, members["bob"]).pack()
    (kits / "bob.kit.json").write_bytes(approval)
    with pytest.raises(IdentityError, match=r"bob.kit.json is the kit of an approval: send it first, or give another"):
        rotate(authority, kits)
    (kits / "bob.kit.json").write_bytes(b"my notes")
    with pytest.raises(IdentityError, match=r"bob.kit.json is not a kit"):
        rotate(authority, kits)
    assert [path.name for path in kits.iterdir()] == ["bob.kit.json"]
    assert (authority.folder / "epoch.json").read_bytes() == before
    shutil.rmtree(kits)
    kits.write_text("a file")
    with pytest.raises(IdentityError, match="a file is in the way"):
        rotate(authority, kits)


WRITERS = {
    "_write": "pfedsecure.pki.epochs._write",
    "write_public": "pfedsecure.pki.rotation.write_public",
    "append": "pfedsecure.pki.registry.append",
}


def test_a_rotation_that_dies_anywhere_is_done_again(
    authority: Authority, members: dict[str, Identity], kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of its writes in turn. The secret that is current stays so until all kits are there."""
    current, secret = epochs_of(authority)
    left = 0

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def attempt(*arguments: object) -> object:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return real(*arguments)

        return attempt

    for writes in range(5):  # the number, two kits, the removal, the new secret
        left = writes
        with monkeypatch.context() as patch:
            for function in (epochs._write, write_public, registry.append):
                patch.setattr(WRITERS[function.__name__], dying(function))
            with pytest.raises(KeyboardInterrupt):
                rotate(authority, kits, ["mallory"])
        assert epochs_of(authority) == (current, secret)
        for path in kits.glob("alice*"):  # sent though the rotation did not finish
            install_kit(members["alice"].folder, Kit.unpack(path.read_bytes(), "it"))
    rotation = rotate(authority, kits, ["mallory"])
    assert rotation.epoch == 6
    assert set(rotation.kits) == {"alice", "bob"}
    assert len(install_all(rotation, members)) == 1
    assert epochs_of(authority)[0] == 6


def epochs_of(authority: Authority) -> tuple[int, bytes]:
    epoch = epochs.read(authority.folder)
    assert epoch is not None
    return epoch.number, epoch.secret


def test_numbers_and_secrets_are_never_used_twice(
    authority: Authority, members: dict[str, Identity], kits: Path
) -> None:
    seen = [epochs_of(authority)]
    for _ in range(5):
        rotate(authority, kits)
        seen.append(epochs_of(authority))
    assert [number for number, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert len({secret for _, secret in seen}) == 6


def test_a_damaged_record_of_removals_stops_everything(
    authority: Authority, members: dict[str, Identity], kits: Path
) -> None:
    rotate(authority, kits, ["mallory"])
    path = authority.folder / "removed.jsonl"
    for damage in (b'{"name": "mallory"', b"[]\n", b"{}\n"):
        path.write_bytes(damage)
        with pytest.raises(IdentityError, match=r"removed.jsonl line 1 is damaged: restore the file"):
            rotate(authority, kits)


def test_who_is_a_client_now(authority: Authority, members: dict[str, Identity]) -> None:
    assert list(live_clients(authority.issued(), datetime.now(UTC))) == ["alice", "bob", "mallory"]

"""Kits in the wrong hands: whoever carries one, the server's operator for example, tries to gain by it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pfedsecure.errors import IdentityError
from pfedsecure.pki import sealed as sealing
from pfedsecure.pki.author import Author
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.certificates import fingerprint
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.keys import new_private_key, read_private_key
from pfedsecure.pki.kit import Kit
from pfedsecure.pki.names import Role
from pfedsecure.pki.request import SigningRequest, request
from pfedsecure.pki.rotation import rotate
from pfedsecure.pki.sealed import SealedSecret

Approve = Callable[..., Kit]

PLANTED = b"mallory knows it".ljust(32, b"!")


@pytest.fixture
def approve(authority: Authority, tmp_path: Path) -> Approve:
    """The kit of a new party, whose request lies in the folder of its name."""

    def approved(name: str = "alice", role: Role = "client", hosts: tuple[str, ...] = ()) -> Kit:
        csr = request(tmp_path / name, name, role, hosts).read_bytes()
        return authority.admit(csr, name=name, role=role, days=9, hosts=hosts)

    return approved


@pytest.fixture
def alice(tmp_path: Path) -> Path:
    """Where her request lies, once approved."""
    return tmp_path / "alice"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def refused(folder: Path, kit: Kit, message: str) -> None:
    """`kit` is not installed, for that reason, and nothing in `folder` changes."""
    before = files(folder)
    with pytest.raises(IdentityError, match=message) as caught:
        install_kit(folder, kit)
    assert "\n" not in str(caught.value)
    assert files(folder) == before


def sealed_of(kit: Kit) -> SealedSecret:
    assert kit.sealed is not None
    return kit.sealed


def keys_of(folder: Path) -> tuple[str, SigningRequest]:
    asked = SigningRequest.parse((folder / "identity.csr").read_bytes(), "it")
    return asked.fingerprint, asked


def planted(authority: Authority, folder: Path, epoch: int = 1) -> tuple[bytes, bytes]:
    """Ciphertext and signature of a secret that anybody who saw the request could seal, signed by that somebody."""
    recipient, asked = keys_of(folder)
    assert asked.client_keys is not None
    about = sealing._about(authority.fingerprint, recipient, epoch)
    ciphertext = sealing._SUITE.encrypt(PLANTED, asked.client_keys.sealing, about)
    return ciphertext, new_private_key().sign(sealing._signed(about, ciphertext), sealing._ALGORITHM)


def test_a_kit_brings_a_client_all_it_needs(approve: Approve, alice: Path) -> None:
    identity = install_kit(alice, approve())
    assert identity.subject.name == "alice"
    assert Author.load(alice).pseudonym
    assert CohortSecrets.load(alice).epoch == 1
    assert install_kit(alice, approve_again(identity.folder, approve)).subject.name == "alice"


def approve_again(folder: Path, approve: Approve) -> Kit:
    """Another kit for the same request."""
    authority = Authority.load(folder.parent / "authority")
    return authority.admit((folder / "identity.csr").read_bytes(), name=folder.name, role="client", days=30)


def test_a_secret_that_somebody_else_sealed(authority: Authority, approve: Approve, alice: Path) -> None:
    """HPKE alone would take it: whoever sees a request can seal to it."""
    genuine = approve()
    sealed = sealed_of(genuine)
    ciphertext, signature = planted(authority, alice)
    for forged in (
        dataclasses.replace(sealed, ciphertext=ciphertext),  # under the genuine signature
        dataclasses.replace(sealed, ciphertext=ciphertext, signature=signature),
        dataclasses.replace(sealed, ciphertext=ciphertext, signature=b""),
    ):
        refused(alice, dataclasses.replace(genuine, sealed=forged), "is not from the authority, or was changed: ask")
    install_kit(alice, genuine)
    assert PLANTED not in files(alice)["cohort.json"]


def test_a_rotation_that_the_server_made_up(authority: Authority, approve: Approve, alice: Path) -> None:
    install_kit(alice, approve())
    ciphertext, signature = planted(authority, alice, epoch=2)
    forged = SealedSecret(2, keys_of(alice)[0], ciphertext, signature)
    refused(alice, Kit(authority.certificate, sealed=forged), "is not from the authority, or was changed")


def test_another_member_cannot_pass_its_secret_off_as_the_authoritys(
    authority: Authority, approve: Approve, alice: Path, tmp_path: Path
) -> None:
    """Its identity key is certified, and still not the authority's."""
    install_kit(alice, approve())
    install_kit(tmp_path / "mallory", approve("mallory"))
    recipient, asked = keys_of(alice)
    assert asked.client_keys is not None
    key = read_private_key(tmp_path / "mallory" / "identity.key")
    forged = SealedSecret.seal(PLANTED, 2, recipient, asked.client_keys.sealing, key)
    refused(alice, Kit(authority.certificate, sealed=forged), "is not from the authority")


def test_the_kit_of_another_client(authority: Authority, approve: Approve, alice: Path, tmp_path: Path) -> None:
    for_alice, for_bob = approve(), approve("bob")
    refused(alice, for_bob, "this certificate is for bob with another key than")
    refused(alice, dataclasses.replace(for_alice, sealed=for_bob.sealed), "this kit is for another client's key: use")
    renamed = dataclasses.replace(sealed_of(for_bob), recipient=keys_of(alice)[0])
    refused(alice, dataclasses.replace(for_alice, sealed=renamed), "is not from the authority, or was changed")
    refused(alice, dataclasses.replace(for_alice, author=for_bob.author), "author certificate for another key than")
    install_kit(alice, for_alice)
    rotation = rotate(authority, tmp_path / "kits")
    bobs = Kit.unpack(rotation.kits["bob"].read_bytes(), "it")
    refused(alice, bobs, "this kit is for another client's key: use the one that was made for this identity")


def test_every_part_that_was_tampered_with(authority: Authority, approve: Approve, alice: Path) -> None:
    genuine = approve()
    sealed = sealed_of(genuine)
    for changed in (
        dataclasses.replace(sealed, epoch=2),
        dataclasses.replace(sealed, ciphertext=flipped(sealed.ciphertext)),
        dataclasses.replace(sealed, signature=flipped(sealed.signature)),
    ):
        refused(alice, dataclasses.replace(genuine, sealed=changed), "is not from the authority, or was changed")
    swapped = dataclasses.replace(genuine, author=genuine.certificate)
    refused(alice, swapped, "this is no author certificate")
    refused(alice, dataclasses.replace(genuine, certificate=genuine.author), "carries no valid name and role")
    install_kit(alice, genuine)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_every_byte_of_the_sealed_part_counts(authority: Authority, approve: Approve) -> None:
    sealed = sealed_of(approve())
    assert len(sealed.ciphertext) == 32 + 32 + 16  # ephemeral key, secret, tag
    key = X25519PrivateKey.generate()
    for position in range(len(sealed.ciphertext)):
        bad = bytearray(sealed.ciphertext)
        bad[position] ^= 0x80
        with pytest.raises(IdentityError, match="is not from the authority, or was changed"):
            dataclasses.replace(sealed, ciphertext=bytes(bad)).open(key, sealed.recipient, authority.certificate)


def test_what_the_authority_itself_sealed_wrongly_is_refused_too(
    authority: Authority, approve: Approve, alice: Path
) -> None:
    genuine = approve()
    recipient, asked = keys_of(alice)
    assert asked.client_keys is not None
    key = read_private_key(authority.folder / "authority.key")
    own = asked.client_keys.sealing
    for wrong, message in [
        (
            SealedSecret.seal(bytes(32), 1, recipient, X25519PrivateKey.generate().public_key(), key),
            "another sealing key",
        ),
        (SealedSecret.seal(bytes(31), 1, recipient, own, key), "this kit holds no cohort secret"),
    ]:
        refused(alice, dataclasses.replace(genuine, sealed=wrong), message)


def test_the_kit_of_another_federation(approve: Approve, alice: Path, tmp_path: Path) -> None:
    genuine = approve()
    other = Authority.create(tmp_path / "other", "hospitals")
    csr = (alice / "identity.csr").read_bytes()
    theirs = other.admit(csr, name="alice", role="client", days=9)
    mixed = dataclasses.replace(genuine, sealed=theirs.sealed)
    refused(alice, mixed, "is not from the authority, or was changed")
    refused(alice, dataclasses.replace(genuine, author=theirs.author), "was not issued by authority")
    install_kit(alice, genuine)
    refused(alice, Kit(other.certificate, sealed=theirs.sealed), "this kit is of another authority than the one of")


def test_a_client_that_moves_to_another_authority_leaves_the_old_secrets_behind(
    authority: Authority, approve: Approve, alice: Path, tmp_path: Path
) -> None:
    install_kit(alice, approve())
    rotation = rotate(authority, tmp_path / "kits")
    install_kit(alice, Kit.unpack(rotation.kits["alice"].read_bytes(), "it"))
    other = Authority.create(tmp_path / "other", "banks")
    theirs = other.admit((alice / "identity.csr").read_bytes(), name="alice", role="client", days=9)
    install_kit(alice, theirs)
    secrets = CohortSecrets.load(alice)
    assert secrets.epoch == 1
    with pytest.raises(IdentityError, match="no cohort secret of epoch 2 here, only of 1"):
        secrets.derive(2, "x")


def test_an_old_kit_does_not_bring_an_old_epoch_back(
    authority: Authority, approve: Approve, alice: Path, tmp_path: Path
) -> None:
    first = approve()
    install_kit(alice, first)
    install_kit(alice, first)  # once more is no harm
    kits = [Kit.unpack(rotate(authority, tmp_path / "k").kits["alice"].read_bytes(), "it") for _ in range(3)]
    install_kit(alice, kits[1])
    for old in (first, Kit(authority.certificate, sealed=first.sealed), kits[0]):
        refused(alice, old, r"this kit is of epoch [12], .*alice already has epoch 3: ask for the newest kit")
    assert install_kit(alice, kits[2]).subject.name == "alice"


def test_a_client_keeps_the_newest_two_epochs(
    authority: Authority, approve: Approve, alice: Path, tmp_path: Path
) -> None:
    install_kit(alice, approve())
    keys = {1: CohortSecrets.load(alice).derive(1, "x")}
    for epoch in (2, 3, 4):
        install_kit(alice, Kit.unpack(rotate(authority, tmp_path / "k").kits["alice"].read_bytes(), "it"))
        secrets = CohortSecrets.load(alice)
        keys[epoch] = secrets.derive(epoch, "x")
        assert secrets.epoch == epoch
        assert secrets.derive(epoch - 1, "x") == keys[epoch - 1]
    assert len(set(keys.values())) == 4
    with pytest.raises(IdentityError, match="no cohort secret of epoch 2 here, only of 3 and 4"):
        secrets.derive(2, "x")


def test_another_secret_for_a_known_epoch(authority: Authority, approve: Approve, alice: Path) -> None:
    """As when the authority was restored from a backup and began an epoch a second time."""
    install_kit(alice, approve())
    recipient, asked = keys_of(alice)
    assert asked.client_keys is not None
    key = read_private_key(authority.folder / "authority.key")
    second = SealedSecret.seal(os.urandom(32), 1, recipient, asked.client_keys.sealing, key)
    kit = Kit(authority.certificate, sealed=second)
    refused(alice, kit, r"this kit holds another secret of epoch 1 than .*cohort.json: nothing was done, ask the")


def test_a_client_gets_all_or_nothing(approve: Approve, alice: Path) -> None:
    kit = approve()
    refused(alice, Kit(kit.authority, kit.certificate), "this kit lacks the cohort secret of client alice: ask for")


@pytest.mark.parametrize("role", ["server", "operator"])
def test_a_server_installs_no_secret(approve: Approve, tmp_path: Path, role: Role) -> None:
    own = approve("fl", role, ("a.org",) if role == "server" else ())
    clients = approve()
    smuggled = dataclasses.replace(own, author=clients.author, sealed=clients.sealed)
    refused(tmp_path / "fl", smuggled, rf"this kit gives {role} fl a secret of clients: ask for a new approval")
    install_kit(tmp_path / "fl", own)
    rotation = Kit(own.authority, sealed=clients.sealed)
    refused(tmp_path / "fl", rotation, rf"fl is the identity of a {role}, a client is needed")


def test_a_rotation_needs_an_identity_that_is_installed_and_live(
    authority: Authority, approve: Approve, alice: Path, tmp_path: Path
) -> None:
    approval = approve()
    kit = Kit.unpack(rotate(authority, tmp_path / "k").kits["alice"].read_bytes(), "it")
    refused(alice, kit, "alice holds a request that is not approved yet: run `pfed pki install KIT")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", kit, "none holds no identity: make one with")
    install_kit(alice, approval)
    before = files(alice)
    with pytest.raises(IdentityError, match="certificate of client alice expired"):
        install_kit(alice, kit, now=datetime.now(UTC) + timedelta(days=20))
    assert files(alice) == before


@pytest.mark.parametrize("name", ["sealing.key", "author.key"])
def test_lost_and_open_keys(approve: Approve, alice: Path, name: str) -> None:
    kit = approve()
    (alice / name).chmod(0o640)
    refused(alice, kit, rf"{name} is open to other users \(mode 0640\)")
    (alice / name).chmod(0o600)
    (alice / name).write_bytes((alice / "identity.key").read_bytes())
    refused(alice, kit, "sealing.key is not an X25519 key" if name == "sealing.key" else "certificate for another key")
    (alice / name).unlink()
    refused(alice, kit, rf"cannot read key .*{name}: No such file")


def test_the_recipient_is_the_identity_key(approve: Approve, alice: Path) -> None:
    kit = approve()
    assert kit.certificate is not None
    assert sealed_of(kit).recipient == fingerprint(kit.certificate.public_key())


def test_an_install_that_died_is_done_again(approve: Approve, alice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = approve()
    replace, left = Path.replace, 0

    def dying(self: Path, target: Path) -> Path:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return replace(self, target)

    for written in range(4):
        left = written
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                install_kit(alice, kit)
        with pytest.raises(IdentityError, match="not approved yet"):
            Author.load(alice)
    install_kit(alice, kit)
    assert CohortSecrets.load(alice).epoch == 1

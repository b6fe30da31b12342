from __future__ import annotations

import copy
import hashlib
import hmac
import json
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pfedsecure.errors import IdentityError
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.request import request

Enrol = Callable[..., Identity]

ONE, TWO = bytes(range(32)), bytes(range(32, 64))


def test_keys_are_the_ones_of_rfc_5869() -> None:
    """Against HKDF written out, for an info whose bytes stand here."""
    info = b"".join(
        len(part).to_bytes(8) + part for part in (b"pfedsecure key from a cohort secret", b"x", bytes(7) + b"\2")
    )
    extracted = hmac.digest(bytes(32), TWO, hashlib.sha256)
    assert CohortSecrets.of({1: ONE, 2: TWO}).derive(2, "x") == hmac.digest(extracted, info + b"\1", hashlib.sha256)


def test_every_purpose_and_epoch_has_a_key_of_its_own() -> None:
    secrets = CohortSecrets.of({1: ONE, 2: TWO, 12: ONE})
    wanted = [(1, ""), (1, "a"), (1, "a1"), (2, "a"), (12, "a"), (12, ""), (1, "ä")]
    assert len({secrets.derive(epoch, purpose) for epoch, purpose in wanted}) == len(wanted)
    assert secrets.epoch == 12


def test_an_epoch_without_a_secret() -> None:
    secrets = CohortSecrets.of({4: ONE, 5: TWO})
    for epoch in (3, 6, 0, -1):
        with pytest.raises(
            IdentityError, match=rf"epoch {epoch} here, only of 4 and 5: install the newest kit"
        ) as caught:
            secrets.derive(epoch, "x")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("secrets", [{}, {0: ONE}, {-1: ONE}, {1: b"short"}, {1: ONE, 2: TWO + b"x"}, {True: ONE}])
def test_what_are_no_secrets(secrets: dict[int, bytes]) -> None:
    with pytest.raises(ValueError, match="32 bytes for each of one or more epochs"):
        CohortSecrets.of(secrets)


def test_secrets_do_not_leave_their_object() -> None:
    given = {1: ONE}
    secrets = CohortSecrets.of(given)
    assert repr(secrets) == "CohortSecrets(epoch=1)"
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied or stored"):
            way(secrets)
    before = secrets.derive(1, "x")
    given[1] = TWO
    assert secrets.derive(1, "x") == before


def test_all_clients_derive_the_same_and_other_federations_something_else(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    alice, bob = (CohortSecrets.load(enrolled(authority, name).folder) for name in ("alice", "bob"))
    assert (alice.epoch, bob.epoch) == (1, 1)
    assert alice.derive(1, "experts") == bob.derive(1, "experts")
    other = enrolled(Authority.create(tmp_path / "other", "hospitals"), "alice")
    assert CohortSecrets.load(other.folder).derive(1, "experts") != alice.derive(1, "experts")


def test_the_file_is_private_and_refused_when_it_is_not(authority: Authority, enrolled: Enrol) -> None:
    folder = enrolled(authority, "alice").folder
    assert stat.S_IMODE((folder / "cohort.json").stat().st_mode) == 0o600
    (folder / "cohort.json").chmod(0o640)
    with pytest.raises(IdentityError, match=r"cohort.json is open to other users \(mode 0640\): run chmod 600"):
        CohortSecrets.load(folder)


def test_missing_secrets(authority: Authority, enrolled: Enrol, tmp_path: Path) -> None:
    server = enrolled(authority, "fl", "server", hosts=["localhost"])
    with pytest.raises(IdentityError, match=r"fl holds no cohort secret: have its request approved again"):
        CohortSecrets.load(server.folder)
    request(tmp_path / "a", "alice", "client")
    with pytest.raises(IdentityError, match=r"a holds a request that is not approved yet"):
        CohortSecrets.load(tmp_path / "a")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"authority": "ab", "secrets": {}}',
        b'{"authority": "ab", "secrets": {"1": "00"}}',
        b'{"authority": "ab", "secrets": {"0": "%s"}}' % (b"00" * 32),
        b'{"authority": "ab", "secrets": ["%s"]}' % (b"00" * 32),
    ],
)
def test_a_damaged_file(authority: Authority, enrolled: Enrol, content: bytes) -> None:
    path = enrolled(authority, "alice").folder / "cohort.json"
    path.write_bytes(content)
    with pytest.raises(IdentityError, match=r"cohort.json is damaged: delete it and install the newest kit again"):
        CohortSecrets.load(path.parent)


def test_the_secrets_of_another_federation_are_not_taken_for_ours(
    authority: Authority, enrolled: Enrol, tmp_path: Path
) -> None:
    ours = enrolled(authority, "alice").folder / "cohort.json"
    theirs = enrolled(Authority.create(tmp_path / "other", "banks"), "alice").folder / "cohort.json"
    assert json.loads(ours.read_bytes())["secrets"].keys() == json.loads(theirs.read_bytes())["secrets"].keys()
    theirs.replace(ours)
    with pytest.raises(IdentityError, match=r"is of another authority than the identity beside it: install the kit"):
        CohortSecrets.load(ours.parent)

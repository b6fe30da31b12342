from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pfedsecure.errors import IdentityError
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.kit import Kit
from pfedsecure.pki.request import request


@pytest.fixture
def kit(authority: Authority, tmp_path: Path) -> Kit:
    """Of a client."""
    return authority.admit(request(tmp_path / "a", "alice", "client").read_bytes(), name="alice", role="client", days=9)


def test_every_kind_of_kit_comes_back_as_it_was(authority: Authority, kit: Kit) -> None:
    for sent in (kit, Kit(authority.certificate, kit.certificate), Kit(authority.certificate, sealed=kit.sealed)):
        assert Kit.unpack(sent.pack(), "kit") == sent
        assert b"PRIVATE" not in sent.pack()


def test_the_secret_cannot_be_read_in_the_kit(authority: Authority, kit: Kit) -> None:
    secret = json.loads((authority.folder / "epoch.json").read_bytes())["secret"]
    assert len(bytes.fromhex(secret)) == 32
    assert kit.sealed is not None
    assert bytes.fromhex(secret) not in kit.sealed.ciphertext
    assert secret.encode() not in kit.pack()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        json.dumps({"format": "pfedsecure-kit-2", "authority": 1}).encode(),
        json.dumps({"format": "pfedsecure-kit-2", "certificate": ""}).encode(),
    ],
)
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(IdentityError, match="it is not a kit: get the file that `pfed pki approve` or `pfed pki rot"):
        Kit.unpack(content, "it")


@pytest.mark.parametrize("version", ["pfedsecure-kit-1", "pfedsecure-kit-9"])
def test_a_kit_of_another_version_is_asked_for_again(version: str) -> None:
    content = json.dumps({"format": version, "certificate": "", "authority": ""}).encode()
    with pytest.raises(IdentityError, match="it is a kit of another version than pfedsecure-kit-2: ask for a new appr"):
        Kit.unpack(content, "it")


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 0},
        {"epoch": -1},
        {"epoch": 1.0},
        {"epoch": True},
        {"epoch": "1"},
        {"epoch": 1 << 64},
        {"recipient": "ab"},
        {"recipient": "AB" * 32},
        {"ciphertext": "#"},
        {"signature": 7},
    ],
)
def test_a_malformed_secret_is_refused(kit: Kit, change: dict[str, object]) -> None:
    content = json.loads(kit.pack())
    content["cohort"].update(change)
    with pytest.raises(IdentityError, match="it is not a kit"):
        Kit.unpack(json.dumps(content).encode(), "it")


def test_half_a_kit_is_none(kit: Kit) -> None:
    for left_out in (
        ["sealed"],
        ["author"],
        ["certificate"],
        ["certificate", "sealed"],
        ["certificate", "author", "sealed"],
    ):
        nothing: dict[str, Any] = dict.fromkeys(left_out)
        half = dataclasses.replace(kit, **nothing)
        with pytest.raises(IdentityError, match="it is not a kit"):
            Kit.unpack(half.pack(), "it")

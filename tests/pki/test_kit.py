from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from pfedsecure.errors import IdentityError
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.kit import pack, unpack


def test_a_kit_carries_both_certificates_and_nothing_secret(
    authority: Authority, enrolled: Callable[..., Identity]
) -> None:
    alice = enrolled(authority, "alice")
    kit = pack(alice.certificate, authority.certificate)
    assert unpack(kit, "kit") == (alice.certificate, authority.certificate)
    assert b"PRIVATE" not in kit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "kit is not an approval kit: get the file that `pfed pki approve` wrote"),
        (b"\xff", "kit is not an approval kit"),
        (b"[]", "kit is not an approval kit"),
        (b"{}", "kit is not an approval kit"),
        (json.dumps({"format": "pfedsecure-kit-1", "certificate": 1, "authority": ""}).encode(), "not an approval kit"),
        (json.dumps({"format": "pfedsecure-kit-1", "certificate": "", "authority": ""}).encode(), "not one PEM"),
        (json.dumps({"format": "pfedsecure-kit-9"}).encode(), "kit is a kit of another version than pfedsecure-kit-1"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(IdentityError, match=message):
        unpack(content, "kit")

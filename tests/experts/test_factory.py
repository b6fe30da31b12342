"""The plan chooses how experts travel, and what a folder must hold for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedsecure.errors import IdentityError, MessageRejected, ProtectionUnavailable
from pfedsecure.experts.factory import client_experts, server_experts
from pfedsecure.experts.plain import PlainExperts
from pfedsecure.experts.sealed import SealedExperts, SealedServerExperts
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.kit import Kit
from pfedsecure.pki.request import request
from pfedsecure.pki.rotation import rotate
from pfedsecure.plan import Plan, ProtectionPlan

SHAPE = (2, 3)
SEALED = Plan(class_names=("cat", "dog"))
PLAIN = Plan(class_names=("cat", "dog"), protection=ProtectionPlan(experts="plain", matching="random"))

Enrol = Callable[[str], Identity]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Of today: the factory goes by the clock."""
    return Authority.create(tmp_path / "authority", "hospitals")


@pytest.fixture
def enrol(authority: Authority, tmp_path: Path) -> Enrol:
    def enrol(name: str) -> Identity:
        csr = request(tmp_path / name, name, "client").read_bytes()
        return install_kit(tmp_path / name, authority.admit(csr, name=name, role="client", days=10))

    return enrol


class Unseen:
    def newest(self, pseudonym: str) -> int:
        return 0

    def note(self, pseudonym: str, round_number: int) -> None:
        pass


def made(plan: Plan, identity: Identity | None, federation: str = "f1") -> Any:
    return client_experts(plan, SHAPE, federation, identity, Unseen())


def pseudonym_of(experts: SealedExperts) -> str:
    return experts._author.pseudonym


def test_clients_of_one_federation_lend_each_other_experts(enrol: Enrol, context_of: Any) -> None:
    alice, bob = (made(SEALED, enrol(name)) for name in ("alice", "bob"))
    assert isinstance(alice, SealedExperts)
    context = context_of(1)
    envelope = alice.pack(context, 1)
    assert server_experts(SEALED, SHAPE).check(envelope, pseudonym_of(alice), 1) == alice.epoch == 1
    np.testing.assert_array_equal(bob.unpack(envelope, pseudonym_of(alice), 2), context)


def test_the_digest_of_the_plan_and_the_federation_are_bound(enrol: Enrol, context_of: Any) -> None:
    alice, bob = enrol("alice"), enrol("bob")
    ours = made(SEALED, alice)
    envelope = ours.pack(context_of(1), 1)
    for plan, federation in ((SEALED.model_copy(update={"seed": 2}), "f1"), (SEALED, "f2")):
        with pytest.raises(MessageRejected, match="not sealed by this cohort for what it claims"):
            made(plan, bob, federation).unpack(envelope, pseudonym_of(ours), 2)


def test_a_newer_kit_is_taken_up_without_a_restart(
    authority: Authority, enrol: Enrol, tmp_path: Path, context_of: Any
) -> None:
    identity = enrol("alice")
    experts = made(SEALED, identity)
    before = experts.pack(context_of(1), 1)
    path = rotate(authority, tmp_path / "kits").kits["alice"]
    install_kit(identity.folder, Kit.unpack(path.read_bytes(), str(path)))
    assert experts.epoch == 2
    server = server_experts(SEALED, SHAPE)
    assert server.check(before, pseudonym_of(experts), 1) == 1
    assert server.check(experts.pack(context_of(1), 1), pseudonym_of(experts), 1) == 2


def test_the_plan_chooses(enrol: Enrol) -> None:
    assert isinstance(made(PLAIN, None), PlainExperts)
    assert isinstance(made(PLAIN, enrol("alice")), PlainExperts)
    assert isinstance(server_experts(PLAIN, SHAPE), PlainExperts)
    assert isinstance(server_experts(SEALED, SHAPE), SealedServerExperts)
    assert isinstance(made(Plan(class_names=("cat", "dog"), method="promptfl"), None), PlainExperts)


def test_sealing_takes_certificates() -> None:
    with pytest.raises(
        ProtectionUnavailable, match=r'protection.experts = "sealed", which takes certificates: use TLS'
    ):
        made(SEALED, None)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("author.crt", "holds no author certificate"), ("cohort.json", "holds no cohort secret"), ("author.key", "")],
)
def test_what_lacks_in_the_folder_is_said_at_the_start(enrol: Enrol, missing: str, message: str) -> None:
    identity = enrol("alice")
    (identity.folder / missing).unlink()
    with pytest.raises(IdentityError, match=f"{re.escape(str(identity.folder))}.*{message}") as caught:
        made(SEALED, identity)
    assert "\n" not in str(caught.value)

"""Clients with certificates and secrets of a real authority, who lend each other experts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pfedsecure.experts.envelope import Label, seal, unseal
from pfedsecure.experts.sealed import Belonging, SealedExperts, padded_bytes
from pfedsecure.pki.author import Author
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.keys import read_private_key
from pfedsecure.pki.kit import Kit
from pfedsecure.pki.request import request
from pfedsecure.pki.rotation import rotate
from pfedsecure.wire.v1.expert_pb2 import SealedExpert, SignedExpert

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SHAPE = (2, 3)
MAX_NORM = 100.0
FEDERATION, PLAN = "0f" * 16, "ab" * 32


class Remembered(dict[str, int]):
    """What one client has seen."""

    def newest(self, pseudonym: str) -> int:
        return self.get(pseudonym, 0)

    def note(self, pseudonym: str, round_number: int) -> None:
        self[pseudonym] = max(round_number, self.newest(pseudonym))


@dataclass
class Member:
    """One client with all that its folder holds; `secrets` and `author` are read from there."""

    name: str
    folder: Path
    authority: Authority
    seen: Remembered = field(default_factory=Remembered)
    clock: datetime = NOW

    @property
    def author(self) -> Author:
        return Author.load(self.folder, now=NOW)

    @property
    def pseudonym(self) -> str:
        return self.author.pseudonym

    def secrets(self) -> CohortSecrets:
        return CohortSecrets.load(self.folder)

    def raw_secret(self, epoch: int) -> bytes:
        """For attackers, who are not bound to the class that guards it."""
        return bytes.fromhex(json.loads((self.folder / "cohort.json").read_bytes())["secrets"][str(epoch)])

    def author_key(self) -> object:
        return read_private_key(self.folder / "author.key")

    def experts(
        self,
        shape: tuple[int, int] = SHAPE,
        *,
        federation: str = FEDERATION,
        plan: str = PLAN,
        secrets: CohortSecrets | None = None,
    ) -> SealedExperts:
        """The client's own side; the keywords are what it, or an attacker in its place, was led to believe."""
        return SealedExperts(
            shape,
            MAX_NORM,
            Belonging(federation, plan, self.authority.certificate),
            self.author,
            self.secrets if secrets is None else lambda: secrets,
            self.seen,
            lambda: self.clock,
        )

    def label(self, round_number: int, **changed: object) -> Label:
        """What its envelope of a round is for."""
        return Label(
            **{
                "federation_id": FEDERATION,
                "plan_digest": PLAN,
                "round": round_number,
                "author": self.pseudonym,
                "epoch": self.secrets().epoch,
            }
            | changed
        )


class Cohort:
    """An authority and the clients that it approved, in the order of their names."""

    def __init__(self, folder: Path, federation_name: str = "hospitals") -> None:
        self._folder = folder
        self.authority = Authority.create(folder / "authority", federation_name, now=NOW)
        self.members: dict[str, Member] = {}

    def enrol(self, name: str, days: int = 10) -> Member:
        folder = self._folder / name
        csr = request(folder, name, "client").read_bytes()
        install_kit(folder, self.authority.admit(csr, name=name, role="client", days=days, now=NOW), now=NOW)
        self.members[name] = Member(name, folder, self.authority)
        return self.members[name]

    def rotate(self, without: Collection[str] = ()) -> None:
        """The next epoch, installed by everybody who gets a kit."""
        rotation = rotate(self.authority, self._folder / "kits", without, now=NOW)
        for name, path in rotation.kits.items():
            install_kit(self.members[name].folder, Kit.unpack(path.read_bytes(), str(path)), now=NOW)


class Insider:
    """A member that keeps to no rule: it opens every envelope and seals whatever it likes."""

    def __init__(self, secrets: CohortSecrets) -> None:
        self.secrets = secrets

    def open(self, envelope: bytes, label: Label) -> SignedExpert:
        sealed = SealedExpert.FromString(envelope)
        plaintext = unseal(sealed.salt, sealed.ciphertext, label, self.secrets)
        assert plaintext is not None
        return SignedExpert.FromString(plaintext)

    def seal(self, signed: SignedExpert, label: Label, shape: tuple[int, int] = SHAPE) -> bytes:
        """Padded so that its length is right."""
        content = SignedExpert(expert=signed.expert, certificate=signed.certificate, signature=signed.signature)
        content.padding = bytes(padded_bytes(shape) - 3 - content.ByteSize())
        return self.seal_bytes(content.SerializeToString(), label)

    def seal_bytes(self, plaintext: bytes, label: Label) -> bytes:
        salt, ciphertext = seal(plaintext, label, self.secrets)
        return SealedExpert(
            epoch=label.epoch, round=label.round, author=label.author, salt=salt, ciphertext=ciphertext
        ).SerializeToString(deterministic=True)


def make_context(seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    """Of alice, bob and mallory."""
    made = Cohort(tmp_path / "cohort")
    for name in ("alice", "bob", "mallory"):
        made.enrol(name)
    return made


@pytest.fixture
def new_cohort(tmp_path: Path) -> Callable[..., Cohort]:
    """Makes a cohort of nobody, with another authority."""

    def make(federation_name: str = "hospitals") -> Cohort:
        return Cohort(tmp_path / f"other-{len(list(tmp_path.iterdir()))}", federation_name)

    return make


@pytest.fixture
def alice(cohort: Cohort) -> Member:
    return cohort.members["alice"]


@pytest.fixture
def bob(cohort: Cohort) -> Member:
    return cohort.members["bob"]


@pytest.fixture
def mallory(cohort: Cohort) -> Member:
    return cohort.members["mallory"]


@pytest.fixture
def insider_of() -> Callable[[Member], Insider]:
    """A member off the rails, with the secrets that it has now."""
    return lambda member: Insider(member.secrets())


@pytest.fixture
def insider(mallory: Member, insider_of: Callable[[Member], Insider]) -> Insider:
    return insider_of(mallory)


@pytest.fixture(scope="session")
def context_of() -> Callable[..., np.ndarray]:
    """A prompt whose numbers are known from its seed."""
    return make_context


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """oracle.py; these tests are no package that could import it."""
    spec = importlib.util.spec_from_file_location("experts_oracle", Path(__file__).with_name("oracle.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Accounts on one shelf, of images that are given by numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from pfed_client.ledger.account import Account
from pfedsecure.privacy.events import SampledGaussianSteps


def digests(numbers: Iterable[int]) -> list[bytes]:
    """SHA-256 of images."""
    return [sha256(b"%d" % number).digest() for number in numbers]


@pytest.fixture
def open_account(tmp_path: Path) -> Callable[..., Account]:
    """`open_account(range(5))`: of these images, in the test's own folder, for the client `a` of federation `f`."""

    def opened(numbers: Iterable[int] = range(5), federation: str = "f", client: str = "a") -> Account:
        return Account(tmp_path / "ledgers", digests(numbers), federation=federation, client=client)

    return opened


@pytest.fixture
def training() -> Callable[[int], SampledGaussianSteps]:
    """What training in a round releases."""
    return lambda number: SampledGaussianSteps("prompt and gate", number, 2.0, 0.25, 10)


@pytest.fixture
def allow() -> Callable[[Any], None]:
    return lambda events: None

"""Loaded before every test module: some of them import gRPC, which must find its settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pfedsecure.wire.grpc_settings  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def no_ledger_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Private clients write down what they release outside of their state: not where the user has his own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PFED_LEDGER", str(tmp_path_factory.mktemp("ledgers")))
        yield

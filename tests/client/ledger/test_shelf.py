"""The folder of ledgers when it cannot be written, or was left as it was by a crash."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pfed_client.ledger import shelf
from pfed_client.ledger.account import Account
from pfedsecure.errors import LedgerError, StateError


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_full_disk_releases_nothing(
    open_account: Callable[..., Account], training: Any, allow: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    account = open_account()
    account.reserve(training(1), allow)
    real = {name: getattr(os, name) for name in dir(os)}
    with monkeypatch.context() as patch:
        patch.setattr(shelf, "os", SimpleNamespace(**{**real, call: full}))
        with pytest.raises(LedgerError, match=r"cannot be written .* so nothing is released; free space"):
            account.reserve(training(2), allow)
    account.reserve(training(3), allow)
    rounds = [event.round for event in account.read().events]
    assert rounds in ([1, 3], [1, 2, 3])  # written, and only not known to be on the disk: it counts


def test_half_a_row_is_an_error_and_then_gone(
    open_account: Callable[..., Account], training: Any, allow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = open_account()
    account.reserve(training(1), allow)
    real = {name: getattr(os, name) for name in dir(os)}

    def half(descriptor: int, line: bytes) -> int:
        return os.write(descriptor, line[: len(line) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(shelf, "os", SimpleNamespace(**{**real, "write": half}))
        with pytest.raises(LedgerError, match="only a part was written"):
            account.reserve(training(2), allow)
    account.reserve(training(3), allow)
    assert [event.round for event in account.read().events] == [1, 3]


def test_a_folder_that_cannot_be_made(tmp_path: Path, training: Any, allow: Any) -> None:
    (tmp_path / "file").touch()
    account = Account(tmp_path / "file" / "ledgers", [b"x" * 32], federation="f", client="a")
    with pytest.raises(LedgerError, match=r"cannot be used for ledgers .* give another --ledger"):
        account.reserve(training(1), allow)


def test_what_a_crash_left_of_a_new_ledger_is_swept_away(
    open_account: Callable[..., Account], training: Any, allow: Any
) -> None:
    account = open_account()
    (account.folder / ".new-0123").mkdir(parents=True)
    account.reserve(training(1), allow)
    assert [path.name for path in account.folder.glob(".new-*")] == []
    assert account.read().events == [training(1)]


@pytest.mark.parametrize("error", [StateError("disk full; free space"), OSError(errno.ENOSPC, "disk full")])
def test_a_full_disk_opens_no_ledger(
    open_account: Callable[..., Account], training: Any, allow: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(path: Path, content: bytes) -> None:
        raise error

    account = open_account()
    with monkeypatch.context() as patch:
        patch.setattr(shelf, "write_atomically", fails)
        with pytest.raises(LedgerError, match="disk full"):
            account.reserve(training(1), allow)
    account.reserve(training(1), allow)
    assert account.read().events == [training(1)]


def test_a_lock_that_cannot_be_made_is_told_in_one_line(
    open_account: Callable[..., Account], monkeypatch: pytest.MonkeyPatch
) -> None:
    account = open_account()
    acquire = shelf.FileLock.acquire

    def fails(self: Any, *args: Any, **more: Any) -> Any:
        if Path(self.lock_file).parent != account.folder:
            raise PermissionError(errno.EACCES, "Permission denied")
        return acquire(self, *args, **more)

    monkeypatch.setattr(shelf.FileLock, "acquire", fails)
    with pytest.raises(LedgerError, match=r"cannot be written .Permission denied."):
        account.held().__enter__()

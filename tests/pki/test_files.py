from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pfedsecure.errors import IdentityError
from pfedsecure.pki.files import exists, locked, make_folder, read_public, read_secret, write_public, write_secret


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("open_umask")
def test_a_secret_is_private_before_its_content_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    write = os.fdopen

    def spying_fdopen(descriptor: int, mode: str) -> object:
        seen.append((stat.S_IMODE(os.fstat(descriptor).st_mode), os.fstat(descriptor).st_size))
        return write(descriptor, mode)

    monkeypatch.setattr(os, "fdopen", spying_fdopen)
    write_secret(tmp_path / "key", b"secret")
    assert seen == [(0o600, 0)]
    assert mode_of(tmp_path / "key") == 0o600
    assert read_secret(tmp_path / "key") == b"secret"


def test_a_secret_is_never_overwritten(tmp_path: Path) -> None:
    write_secret(tmp_path / "key", b"first")
    with pytest.raises(FileExistsError):
        write_secret(tmp_path / "key", b"second")
    assert (tmp_path / "key").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["key"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (write_secret, write_public):
        with pytest.raises(IdentityError, match=r"cannot write .*/x: No space left on device"):
            write(tmp_path / "x", b"data")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o666, 0o610])
def test_a_key_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"secret")
    key.chmod(mode)
    with pytest.raises(IdentityError, match=rf"is open to other users \(mode {mode:04o}\): run chmod 600 .*/key"):
        read_secret(key)


def test_public_files_are_replaced_whole(tmp_path: Path) -> None:
    write_public(tmp_path / "crt", b"old")
    with (tmp_path / "crt").open("rb") as reader:
        write_public(tmp_path / "crt", b"new")
        assert reader.read() == b"old"
    assert read_public(tmp_path / "crt") == b"new"
    assert os.listdir(tmp_path) == ["crt"]


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"cannot read key .*/none: No such file or directory"):
        read_secret(tmp_path / "none")
    with pytest.raises(IdentityError, match=r"cannot read .*/none: No such file or directory"):
        read_public(tmp_path / "none")
    (tmp_path / "big").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(IdentityError, match="big is larger than 1048576 bytes: it is no certificate"):
        read_public(tmp_path / "big")


def test_what_cannot_be_looked_at_is_not_taken_for_absent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert exists(tmp_path / "file")
    assert not exists(tmp_path / "none")
    assert not exists(tmp_path / "file" / "sub")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(IdentityError, match=r"cannot look for .*/loop/x: Too many levels of symbolic links"):
        exists(tmp_path / "loop" / "x")


def test_locks_exclude_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfedsecure.pki.files._LOCK_PATIENCE", 0.1)
    with (
        locked(tmp_path),
        pytest.raises(IdentityError, match=r"another process keeps .* busy: try again"),
        locked(tmp_path),
    ):
        pytest.fail("two at once")
    with locked(tmp_path):
        pass
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(IdentityError, match=r"cannot lock .*/loop: "), locked(tmp_path / "loop"):
        pytest.fail("no folder")


@pytest.mark.usefixtures("open_umask")
def test_folders_are_private_and_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert mode_of(tmp_path / "a" / "b") == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(IdentityError, match=r"cannot make folder .*/file: a file is in the way"):
        make_folder(tmp_path / "file")
    with pytest.raises(IdentityError, match=r"cannot write .*/file/sub: Not a directory"):
        make_folder(tmp_path / "file" / "sub")

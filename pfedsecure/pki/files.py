"""Reading and writing keys and certificates: atomic, secrets never readable by anyone else, no key ever overwritten."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pfedsecure.errors import IdentityError

_LARGEST_FILE = 1 << 20  # bytes; keys, certificates, requests and kits are a few kilobytes
_LARGEST_LIST = 1 << 28  # bytes; a certificate takes some hundred
_LOCK_PATIENCE = 30.0  # seconds; what is done under a lock takes milliseconds


def write_secret(path: Path, data: bytes) -> None:
    """Creates `path` with mode 0600 and `data`, whole or not at all.

    The mode holds from the first instant, whatever the umask. Raises FileExistsError rather than overwrite.
    """
    with reported(path):
        temporary = _write_beside(path, data, 0o600)
        try:
            os.link(temporary, path)  # unlike rename, fails when path exists
        finally:
            temporary.unlink()


def replace_secret(path: Path, data: bytes) -> None:
    """Creates or replaces `path` with `data`, open to its owner alone. For secrets that follow each other, not keys."""
    _replace(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    """Creates or replaces `path` with `data`, readable by all; a reader sees the old file or the new, never a part."""
    _replace(path, data, 0o644)


def make_folder(folder: Path) -> None:
    """Creates `folder` for its owner alone unless it exists; IdentityError when that cannot be done."""
    try:
        with reported(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise IdentityError(f"cannot make folder {folder}: a file is in the way") from None


def read_secret(path: Path) -> bytes:
    """The content of a key file, refused with IdentityError when its group or others may read or write it."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise IdentityError(f"key {path} is open to other users (mode {mode:04o}): run chmod 600 {path}")
            return file.read(_LARGEST_FILE)
    except OSError as error:
        raise IdentityError(f"cannot read key {path}: {error.strerror}") from None


def read_public(path: Path) -> bytes:
    """The content of a certificate, request or kit; IdentityError when it cannot be read or is far too large."""
    return _read(path, _LARGEST_FILE, "it is no certificate, request or kit")


def read_list(path: Path) -> bytes:
    """The content of a file that grows with every certificate; IdentityError when it cannot be read."""
    return _read(path, _LARGEST_LIST, "it is no record or list of certificates")


def _read(path: Path, most: int, otherwise: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise IdentityError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > most:
        raise IdentityError(f"{path} is larger than {most} bytes: {otherwise}")
    return data


def exists(path: Path) -> bool:
    """Whether `path` is there; IdentityError when that cannot be found out, for want of permission for example."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise IdentityError(f"cannot look for {path}: {error.strerror}") from None
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of `folder` meanwhile; IdentityError when one of them holds it for too long."""
    lock = FileLock(folder / ".lock", timeout=_LOCK_PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise IdentityError(f"another process keeps {folder} busy: try again when it is done") from None
    except OSError as error:
        raise IdentityError(f"cannot lock {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turns a failure to write `path`, except that it exists, into an IdentityError."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise IdentityError(f"cannot write {path}: {error.strerror}") from None


def _replace(path: Path, data: bytes, mode: int) -> None:
    with reported(path):
        temporary = _write_beside(path, data, mode)
        try:
            temporary.replace(path)
        except OSError:
            temporary.unlink()
            raise


def _write_beside(path: Path, data: bytes, mode: int) -> Path:
    """A new file with `data` on disk, in the folder of `path`, under a name that nobody can guess."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink()
        raise
    return temporary

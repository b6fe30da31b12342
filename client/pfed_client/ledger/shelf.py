"""The folder in which the ledgers of all sets of images on this machine are: which of them concern a client.

lock                 held while a row is added
ID/ledger.jsonl      the rows
ID/images.bin        of which images
ID/lock              held by the one client that takes part with exactly these images
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pfed_client.files import sync_folder, write_atomically
from pfed_client.ledger.images import SALT_BYTES, KnownImages
from pfed_client.ledger.rows import NO_HEAD, Chain, Opened, Row, encode, head_of, read_chain
from pfedsecure.errors import LedgerError, StateLocked

LEDGER_FILE = "ledger.jsonl"
IMAGES_FILE = "images.bin"
_SCRATCH = ".new-"


@dataclass(frozen=True)
class Ledger:
    """One ledger as it was read: `name` is its folder's."""

    name: str
    images: KnownImages
    chain: Chain


class Shelf:
    """All ledgers in `folder`, which is made when the first is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / "lock", mode=0o600, thread_local=False)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else on this machine adds a row meanwhile. Raises LedgerError."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise LedgerError(
                f"{self.folder}: cannot be used for ledgers ({error.strerror}); mend its permissions, or give another "
                "--ledger"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    def concerning(self, digests: Collection[bytes]) -> tuple[Ledger | None, dict[str, Ledger]]:
        """The ledger of exactly the images with these SHA-256, None before there is one, and those that share some.

        Raises LedgerError where one that is here cannot be trusted, whatever it may be of.
        """
        own, others = None, {}
        for folder in sorted(self.folder.glob("*/")) if self.folder.exists() else []:
            if folder.name.startswith("."):
                continue
            images, chain = _known_images(folder), _chain(folder / LEDGER_FILE)
            if not isinstance(opened := next(iter(chain.rows), None), Opened) or opened.images != images.digest():
                raise _spoilt(folder, "its two files do not belong together")
            asked = KnownImages.of(digests, images.salt)
            if asked == images:
                if own is not None:
                    raise LedgerError(
                        f"{self.folder}: {own.name} and {folder.name} are both of these images; leave the newest "
                        "there, with all that was released, and move the other away"
                    )
                own = Ledger(folder.name, images, chain)
            elif asked.entries & images.entries:
                others[folder.name] = Ledger(folder.name, images, chain)
        return own, others

    def open(self, digests: Collection[bytes]) -> Ledger:
        """A new ledger, on disk on return. Only while `locked`."""
        for left_over in self.folder.glob(f"{_SCRATCH}*"):  # by a crash
            shutil.rmtree(left_over, ignore_errors=True)
        name, images = secrets.token_hex(8), KnownImages.of(digests, secrets.token_bytes(SALT_BYTES))
        scratch, line = self.folder / f"{_SCRATCH}{name}", encode(Opened(images=images.digest()), NO_HEAD)
        try:
            scratch.mkdir(mode=0o700)
            write_atomically(scratch / IMAGES_FILE, images.to_bytes())
            write_atomically(scratch / LEDGER_FILE, line)
            scratch.replace(self.folder / name)
            sync_folder(self.folder)
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        return Ledger(name, images, read_chain(line, self.folder / name / LEDGER_FILE))

    def append(self, ledger: Ledger, row: Row) -> str:
        """Add a row behind all those of `ledger`; on disk on return, which gives its head. Only while `locked`.

        Raises LedgerError, and then nothing may be made of what the row says.
        """
        path = self.folder / ledger.name / LEDGER_FILE
        line = encode(row, ledger.chain.head)
        try:
            descriptor = os.open(path, os.O_WRONLY)
            try:
                os.ftruncate(descriptor, ledger.chain.size)  # what a crash left of a row that never was
                os.lseek(descriptor, 0, os.SEEK_END)
                if os.write(descriptor, line) != len(line):
                    raise OSError(0, "only a part was written")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unwritable(path, error) from None
        return head_of(line[:-1])

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """This process alone takes part with the images of the ledger `name`. Raises StateLocked."""
        lock = FileLock(self.folder / name / "lock", timeout=0, mode=0o600, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise StateLocked(
                f"{self.folder / name}: another client on this machine takes part with the same images, and the two "
                "would spend one budget; stop it, or let it end first"
            ) from None
        try:
            yield
        finally:
            lock.release()


def _known_images(folder: Path) -> KnownImages:
    try:
        images = KnownImages.from_bytes((folder / IMAGES_FILE).read_bytes())
    except OSError as error:
        raise _spoilt(folder, f"{IMAGES_FILE} cannot be read ({error.strerror})") from None
    if images is None:
        raise _spoilt(folder, f"{IMAGES_FILE} is damaged")
    return images


def _chain(path: Path) -> Chain:
    try:
        return read_chain(path.read_bytes(), path)
    except OSError as error:
        raise _spoilt(path.parent, f"{path.name} cannot be read ({error.strerror})") from None


def _spoilt(folder: Path, what: str) -> LedgerError:
    return LedgerError(f"{folder}: not the ledger that was kept there ({what}); restore the newest copy of the folder")


def _unwritable(path: Path, error: OSError) -> LedgerError:
    return LedgerError(
        f"{path}: cannot be written ({error.strerror}), so nothing is released; free space or mend its permissions"
    )

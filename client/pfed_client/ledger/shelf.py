"""The folder in which the ledgers of all sets of images on this machine are: which of them concern a client.

    lock                 held while ledgers are read or a row is added
    ID/ledger.jsonl      the rows
    ID/images.bin        of which images
    ID/lock              held by the one client that takes part with exactly these images

What else is in the folder is left alone.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pfed_client.files import sync_folder, write_atomically
from pfed_client.ledger.images import SALT_BYTES, KnownImages
from pfed_client.ledger.rows import NO_HEAD, Chain, Opened, Row, encode, head_of, read_chain
from pfedsecure.errors import LedgerError, StateError, StateLocked

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
    """All ledgers in `folder`, which is made when the first is. Methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = threading.Lock()
        self._lock = FileLock(folder / "lock", mode=0o600, thread_local=False)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else on this machine reads or adds rows meanwhile. Raises LedgerError."""
        with self._thread:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock.acquire()
            except OSError as error:
                raise _unusable(self.folder, error) from None
            try:
                yield
            finally:
                self._lock.release()

    def exists(self) -> bool:
        """Whether there is anything to be read. Raises LedgerError where that cannot be known."""
        try:
            self.folder.stat()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _unusable(self.folder, error) from None
        return True

    def concerning(self, digests: Collection[bytes]) -> tuple[Ledger | None, dict[str, Ledger]]:
        """The ledger of exactly the images with these SHA-256, None before there is one, and those that share some.

        Only while `locked`. Raises LedgerError where one of them cannot be trusted, or it cannot be told whether one
        that cannot be is among them.
        """
        try:
            folders = sorted(Path(entry) for entry in os.scandir(self.folder) if entry.is_dir())
        except OSError as error:
            raise _unusable(self.folder, error) from None
        own, others = None, {}
        for folder in folders:
            if folder.name.startswith(".") or not any((folder / file).exists() for file in (LEDGER_FILE, IMAGES_FILE)):
                continue
            images, content = _known_images(folder), _content(folder / LEDGER_FILE)
            opened = read_chain(content[: content.find(b"\n") + 1], folder / LEDGER_FILE).rows
            if not opened or not isinstance(opened[0], Opened) or opened[0].images != images.digest():
                raise _spoilt(folder, "its two files do not belong together")
            asked = KnownImages.of(digests, images.salt)
            if not asked.entries & images.entries:
                continue  # whatever else is wrong with it
            ledger = Ledger(folder.name, images, read_chain(content, folder / LEDGER_FILE))
            if asked != images:
                others[folder.name] = ledger
            elif own is None:
                own = ledger
            else:
                both = sorted((own, ledger), key=lambda each: len(each.chain.rows))
                raise LedgerError(
                    f"{self.folder}: {both[0].name} and {both[1].name} are both of these images; leave the one there "
                    f"that has everything that was released ({both[1].name} has more rows), and move the other away"
                )
        return own, others

    def open(self, digests: Collection[bytes]) -> Ledger:
        """A new ledger, on disk on return. Only while `locked`. Raises LedgerError."""
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
        except StateError as error:
            raise LedgerError(str(error)) from None
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        return Ledger(name, images, read_chain(line, self.folder / name / LEDGER_FILE))

    def append(self, ledger: Ledger, row: Row) -> Ledger:
        """Add a row behind all those of `ledger`, which was read while `locked`, as it still is; on disk on return.

        Returns the ledger with it. Raises LedgerError, and then nothing may be made of what the row says.
        """
        path, chain = self.folder / ledger.name / LEDGER_FILE, ledger.chain
        line = encode(row, chain.head)
        try:
            descriptor = os.open(path, os.O_WRONLY)
            try:
                os.ftruncate(descriptor, chain.size)  # what a crash left of a row that never was
                os.lseek(descriptor, 0, os.SEEK_END)
                if os.write(descriptor, line) != len(line):
                    raise OSError(0, "only a part was written")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unwritable(path, error) from None
        longer = Chain([*chain.rows, row], [*chain.heads, head_of(line[:-1])], chain.size + len(line))
        return Ledger(ledger.name, ledger.images, longer)

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """This process alone takes part with the images of the ledger `name`. Raises StateLocked, LedgerError."""
        lock = FileLock(self.folder / name / "lock", timeout=0, mode=0o600, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise StateLocked(
                f"{self.folder / name}: another client on this machine takes part with the same images, and the two "
                "would spend one budget; stop it, or let it end first"
            ) from None
        except OSError as error:
            raise _unwritable(self.folder / name, error) from None
        try:
            yield
        finally:
            lock.release()


def _known_images(folder: Path) -> KnownImages:
    images = KnownImages.from_bytes(_content(folder / IMAGES_FILE))
    if images is None:
        raise _spoilt(folder, f"{IMAGES_FILE} is damaged")
    return images


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _spoilt(path.parent, f"{path.name} cannot be read ({error.strerror})") from None


def _spoilt(folder: Path, what: str) -> LedgerError:
    return LedgerError(f"{folder}: not the ledger that was kept there ({what}); restore the newest copy of the folder")


def _unusable(folder: Path, error: OSError) -> LedgerError:
    return LedgerError(
        f"{folder}: cannot be used for ledgers ({error.strerror}); mend its permissions, or give another --ledger"
    )


def _unwritable(path: Path, error: OSError) -> LedgerError:
    return LedgerError(
        f"{path}: cannot be written ({error.strerror}), so nothing is released; free space or mend its permissions"
    )

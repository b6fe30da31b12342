"""What matching made at random for this client and must have again after a crash, on disk: one file for each kind."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pfed_client.files import write_atomically
from pfedsecure.errors import StateError

_DIGEST_BYTES = 32


class KeptFiles:
    """`pfedsecure.matching` `Kept` in a folder. Readable by its owner alone.

    A file: SHA-256 of the rest, length of the key, key, content. A damaged one counts as not there: its content is made
    anew, and what depended on it (a message that the server already has) is then refused there, by name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, what: str, key: str) -> bytes | None:
        """The entry of the kind `what`, when it was kept under this key. Raises StateError."""
        path = self._path(what)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from None
        body = content[_DIGEST_BYTES:]
        expected = _framed(key)
        if hashlib.sha256(body).digest() != content[:_DIGEST_BYTES] or not body.startswith(expected):
            return None
        return body[len(expected) :]

    def keep(self, what: str, key: str, content: bytes) -> None:
        """Put an entry in the place of the older one of its kind; on disk on return. Raises StateError."""
        body = _framed(key) + content
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StateError(f"{self._folder}: cannot be made ({error.strerror}); mend its permissions") from None
        write_atomically(self._path(what), hashlib.sha256(body).digest() + body)

    def _path(self, what: str) -> Path:
        return self._folder / f"{what}.bin"


def _framed(key: str) -> bytes:
    encoded = key.encode()
    return len(encoded).to_bytes(4, "big") + encoded

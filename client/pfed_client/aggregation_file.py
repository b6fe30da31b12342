"""This client's part in the aggregation of its newest round, on disk. It holds secrets while that round is open.

Once a round is over its number alone stays: a server that opened the round again, for another cohort, would learn from
two sums over nearly the same clients what the one that is in only one of them put in.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from pfed_client.files import write_atomically
from pfedsecure.errors import StateError

_DIGEST_BYTES = 32
_ROUND_BYTES = 8


class AggregationFile:
    """What `pfedsecure.aggregation.interface.Save` was handed last. Readable by its owner alone.

    The file: SHA-256 of the rest, number of the round, what was saved; nothing there once the round is over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open_round: int | None = None  # whose secrets the file holds, 0: none; None before it was read

    def load(self, round_number: int) -> bytes | None:
        """What was saved of a round; None when this client has not entered it.

        Raises StateError when that cannot be known because the file is damaged, and when the round is over.
        """
        found = self._read()
        if found is None or found[0] < round_number:
            return None
        if found[0] > round_number or not found[1]:
            raise StateError(f"round {round_number} is over for this client; it enters no round twice")
        return found[1]

    def save(self, round_number: int, content: bytes) -> None:
        """Keep `content` of a round, and of no other; on disk on return. Raises StateError."""
        body = round_number.to_bytes(_ROUND_BYTES) + content
        write_atomically(self._path, hashlib.sha256(body).digest() + body)
        self._open_round = round_number if content else 0

    def end(self, round_number: int) -> None:
        """Forget the secrets of rounds up to this one, which is over. A damaged file is left for `load` to tell of."""
        if self._open_round is None:
            try:
                found = self._read()
            except StateError:
                return
            self._open_round = found[0] if found is not None and found[1] else 0
        if 0 < self._open_round <= round_number:
            self.give_up(self._open_round)

    def give_up(self, round_number: int) -> None:
        """Take no further part in a round, nor in earlier ones, whatever a damaged file was of. Raises StateError."""
        with suppress(StateError):
            found = self._read()
            if found is not None and found[0] > round_number:
                return
        self.save(round_number, b"")

    def _read(self) -> tuple[int, bytes] | None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{self._path}: cannot be read ({error.strerror}); mend its permissions") from None
        body = content[_DIGEST_BYTES:]
        if len(body) < _ROUND_BYTES or hashlib.sha256(body).digest() != content[:_DIGEST_BYTES]:
            raise StateError(
                f"{self._path}: damaged; what this client signed for the round cannot be known, so it leaves it"
            )
        return int.from_bytes(body[:_ROUND_BYTES]), body[_ROUND_BYTES:]

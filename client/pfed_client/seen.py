"""The newest expert that this client opened of each author, on disk: an older one from the server is a replay."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pfed_client.files import write_atomically
from pfedsecure.errors import StateError

_ROUNDS = TypeAdapter(dict[str, int])


class SeenFile:
    """`pfedsecure.experts` `Seen` in a JSON file; rounds by pseudonym."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rounds: dict[str, int] | None = None

    def newest(self, pseudonym: str) -> int:
        """The round of the newest expert opened of this author; 0 when there was none. Raises StateError."""
        return self._load().get(pseudonym, 0)

    def note(self, pseudonym: str, round_number: int) -> None:
        """Remember that an expert of this round was opened; on disk on return. Raises StateError."""
        rounds = self._load()
        if round_number > rounds.get(pseudonym, 0):
            rounds[pseudonym] = round_number
            write_atomically(self._path, _ROUNDS.dump_json(rounds))

    def _load(self) -> dict[str, int]:
        if self._rounds is None:
            try:
                self._rounds = _ROUNDS.validate_json(self._path.read_bytes())
            except FileNotFoundError:
                self._rounds = {}
            except (OSError, ValidationError):
                raise StateError(f"{self._path}: damaged; restore it from a copy, or remove it") from None
        return self._rounds

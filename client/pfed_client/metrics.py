"""What a client records of its own rounds: `metrics.jsonl`, one JSON object a line.

It never leaves the client, but for accuracy and loss in the secure sum where both the plan and the user say so.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pfed_client.files import write_atomically
from pfedsecure.errors import StateError


@dataclass(frozen=True)
class RoundRecord:
    """One round that this client trained in.

    `train_loss`: as `trainer.RoundReport` has it. `test_accuracy`: of the model after training, on the own test images,
    in [0, 1]. `bytes_up`, `bytes_down`: prompt, query, answer, experts, publication, and the messages and requests of
    the aggregation, each counted once the server confirmed it, without framing and repetitions. `seconds`: wall-clock
    time from the start of the round's work until it is ready to be sent.
    """

    round: int
    train_loss: float
    test_accuracy: float
    n_train: int
    n_experts: int
    bytes_up: int
    bytes_down: int
    seconds: float


_RECORD = TypeAdapter(RoundRecord)


class MetricsLog:
    """The records of one client, in ascending order of rounds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[RoundRecord]:
        """All records. Raises StateError naming the line that cannot be read."""
        try:
            lines = self._path.read_text().splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError):
            raise StateError(f"{self._path}: cannot be read; restore it from a copy or remove it") from None
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(_RECORD.validate_json(line))
            except ValidationError:
                raise StateError(
                    f"{self._path}: line {number} is not a round's record; restore it from a copy or remove it"
                ) from None
        return records

    def of(self, round_number: int) -> RoundRecord | None:
        """The record of one round, None where there is none. Raises StateError."""
        return next((record for record in self.read() if record.round == round_number), None)

    def add(self, record: RoundRecord) -> None:
        """Append; replaces what was recorded of this round or a later one. Raises StateError."""
        self._write([*self._before(record.round), record])

    def forget_from(self, round_number: int) -> None:
        """Drop the records of this round and later ones. Raises StateError."""
        kept = self._before(round_number)
        if len(kept) < len(self.read()):
            self._write(kept)

    def _before(self, round_number: int) -> list[RoundRecord]:
        return [record for record in self.read() if record.round < round_number]

    def _write(self, records: list[RoundRecord]) -> None:
        lines = "".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in records)
        write_atomically(self._path, lines.encode())

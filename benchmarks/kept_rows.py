"""What a long benchmark has measured so far, on disk: a run that was broken off goes on where it was.

A file of JSON lines. The first says what configuration the rows are of, the others hold one cell each: its key and its
row. A line that was broken off in the middle counts for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from pfedsecure.errors import BenchError

from .contract import Row


class KeptRows:
    """The rows in `file`, which is made when the first is kept.

    Raises BenchError, in one line, when the file is of another `configuration` or cannot be used.
    """

    def __init__(self, file: Path, configuration: Mapping[str, object]) -> None:
        self._file = file
        self._configuration = json.dumps(configuration, sort_keys=True)
        self._rows: dict[str, Row] = {}
        for number, line in enumerate(self._lines()):
            try:
                found = json.loads(line)
                if number and isinstance(found["row"], dict):
                    self._rows[found["key"]] = found["row"]
                elif not number and json.dumps(found["configuration"], sort_keys=True) != self._configuration:
                    raise BenchError(
                        f"{file}: holds cells of another configuration (plan, data or backbone); "
                        "delete it, or give another --kept"
                    )
            except (json.JSONDecodeError, KeyError, TypeError):
                if not number:
                    raise BenchError(
                        f"{file}: does not begin as a file of kept cells does; delete it, or give another --kept"
                    ) from None

    def __contains__(self, key: Mapping[str, object]) -> bool:
        return _name(key) in self._rows

    def get(self, key: Mapping[str, object], measure: Callable[[], Row]) -> Row:
        """The row of the cell `key`: that which was kept, else what `measure` gives, which is kept."""
        name = _name(key)
        if name not in self._rows:
            row = measure()
            self._append({"key": name, "row": row})
            self._rows[name] = row
        return self._rows[name]

    def _lines(self) -> list[str]:
        try:
            return [line for line in self._file.read_text().splitlines() if line]
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError):
            raise BenchError(f"{self._file}: cannot be read; give another --kept") from None

    def _append(self, entry: Mapping[str, object]) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new = not self._file.exists()
            with self._file.open("a") as out:
                if new:
                    out.write('{"configuration": ' + self._configuration + "}")
                out.write("\n" + json.dumps(entry))  # in front: the line before may have been broken off
        except OSError as error:
            raise BenchError(f"{self._file}: cannot be written ({error.strerror}); give another --kept") from None


def _name(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True)

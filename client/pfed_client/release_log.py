"""The noised releases of this client: `releases.jsonl`, for whoever adds up what they cost.

Append-only, one JSON object a line, on disk before the noise of a release is drawn: one that a crash cut short counts
as made.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from pfedsecure.errors import StateError
from pfedsecure.privacy.events import Event


class ReleaseLog:
    """That of one client."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def record(self, event: Event) -> None:
        """Append; on disk on return. Raises StateError, and then nothing may be released."""
        line = json.dumps(asdict(event), allow_nan=False).encode() + b"\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError(0, "only a part was written")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StateError(
                f"{self._path}: cannot be written ({error.strerror}), so nothing is released; free space or mend its "
                "permissions"
            ) from None

"""Writing files so that a crash leaves the old content or the new, never a part."""

from __future__ import annotations

import os
from pathlib import Path

from pfedsecure.errors import StateError


def write_atomically(path: Path, content: bytes) -> None:
    """Create or replace `path`, readable by its owner alone; on return it is on the disk. Raises StateError."""
    scratch = path.with_name(f".{path.name}.new")  # one name, so that killed processes leave no more than one behind
    try:
        scratch.unlink(missing_ok=True)
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise StateError(f"{path}: cannot be written ({error.strerror}); free space or mend its permissions") from None


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The newest cohort secret, as the authority keeps it. Made when the first client is approved, and not a moment before:
the development authority is made inside the server's process, which must never have it.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from pfedsecure.errors import IdentityError
from pfedsecure.pki.cohort import SECRET_BYTES, is_epoch
from pfedsecure.pki.files import exists, read_secret, replace_secret

EPOCH_FILE = "epoch.json"


@dataclass(frozen=True)
class Epoch:
    """`reserved`: the highest number that any rotation took, `number` or one whose rotation did not finish."""

    number: int
    reserved: int
    secret: bytes = field(repr=False)


def read(folder: Path) -> Epoch | None:
    """That of the authority in `folder`, None before the first client; IdentityError when damaged or open to others."""
    path = folder / EPOCH_FILE
    if not exists(path):
        return None
    try:
        content = json.loads(read_secret(path))
        epoch = Epoch(content["epoch"], content["reserved"], bytes.fromhex(content["secret"]))
        if not is_epoch(epoch.number) or not is_epoch(epoch.reserved) or len(epoch.secret) != SECRET_BYTES:
            raise ValueError("out of range")
    except (ValueError, KeyError, TypeError):
        raise IdentityError(f"{path} is damaged: restore it from its newest backup") from None
    return epoch


def first(folder: Path) -> Epoch:
    """Makes epoch 1."""
    return _write(folder, Epoch(1, 1, secrets.token_bytes(SECRET_BYTES)))


def reserve(folder: Path, current: Epoch) -> Epoch:
    """A new secret under a number that no rotation has used; `current` stays current until `commit`.

    The number is taken on disk at once: were the rotation to die after some of its kits got out, the next one would
    otherwise give the same number to another secret.
    """
    number = max(current.number, current.reserved) + 1
    _write(folder, Epoch(current.number, number, current.secret))
    return Epoch(number, number, secrets.token_bytes(SECRET_BYTES))


def commit(folder: Path, epoch: Epoch) -> None:
    """Makes `epoch` the current one; the secret before it is forgotten."""
    _write(folder, epoch)


def _write(folder: Path, epoch: Epoch) -> Epoch:
    content = {"epoch": epoch.number, "reserved": epoch.reserved, "secret": epoch.secret.hex()}
    replace_secret(folder / EPOCH_FILE, json.dumps(content).encode() + b"\n")
    return epoch

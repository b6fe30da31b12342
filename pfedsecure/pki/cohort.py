"""The secrets that the clients of a federation share and its server never has, as one client holds them.

There is one per *epoch*: 1 from the first approval on, then one more with every `pfed pki rotate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import fingerprint
from pfedsecure.pki.files import exists, read_secret, replace_secret
from pfedsecure.pki.identity import read_certificates
from pfedsecure.pki.statement import statement

COHORT_FILE = "cohort.json"
SECRET_BYTES = 32
LARGEST_EPOCH = (1 << 31) - 1
"""What every database takes for a number."""

_KEPT = 2  # epochs: what was sealed just before a rotation can still be opened


@dataclass(frozen=True, eq=False)
class CohortSecrets:
    """The cohort secrets of one client. `epoch`: the newest, the one to seal with.

    The secrets themselves never leave this object, not in its repr and not in a pickle: use `derive`. Every client of
    the federation has the same ones: what they protect is hidden from the server and the network, and from no client.
    """

    epoch: int
    _secrets: Mapping[int, bytes] = field(repr=False)

    def derive(self, epoch: int, purpose: str) -> bytes:
        """32 bytes for `purpose` that every client with the secret of `epoch` derives alike, and nobody else.

        HKDF with SHA-256; different purposes and epochs give independent keys. Raises IdentityError for an epoch that
        this client has no secret of.
        """
        secret = self._secrets.get(epoch)
        if secret is None:
            known = " and ".join(map(str, sorted(self._secrets)))
            raise IdentityError(
                f"no cohort secret of epoch {epoch} here, only of {known}: install the newest kit of the authority"
            )
        info = statement("key from a cohort secret", purpose.encode(), epoch)
        return HKDF(hashes.SHA256(), SECRET_BYTES, salt=None, info=info).derive(secret)

    def __reduce__(self) -> NoReturn:
        raise TypeError("cohort secrets cannot be copied or stored: load them where they are needed")

    @classmethod
    def load(cls, folder: Path) -> CohortSecrets:
        """Those in the identity folder `folder`.

        Raises IdentityError when they are missing, damaged, open to other users or of another authority than the
        identity beside them.
        """
        _certificate, authority = read_certificates(folder)
        path = folder / COHORT_FILE
        if not exists(path):
            raise IdentityError(f"{folder} holds no cohort secret: have its request approved again and install the kit")
        owner, secrets = _read(path)
        if owner != fingerprint(authority.public_key()):
            raise IdentityError(f"{path} is of another authority than the identity beside it: install the kit again")
        return cls.of(secrets)

    @classmethod
    def of(cls, secrets: Mapping[int, bytes]) -> CohortSecrets:
        """From epochs and their 32 bytes, for tests and simulations. Raises ValueError when they are no such thing."""
        if not secrets or not all(is_epoch(epoch) and len(secret) == SECRET_BYTES for epoch, secret in secrets.items()):
            raise ValueError(f"cohort secrets are {SECRET_BYTES} bytes for each of one or more epochs from 1 on")
        return cls(max(secrets), MappingProxyType(dict(secrets)))


def is_epoch(value: object) -> bool:
    """Whether `value` can be the number of an epoch."""
    return type(value) is int and 1 <= value <= LARGEST_EPOCH


def extended(folder: Path, authority: str, epoch: int, secret: bytes) -> dict[int, bytes]:
    """The secrets in `folder` with that of `epoch` added, the newest two; what another authority gave is left out.

    `authority`: fingerprint of the one that gave `secret`. Raises IdentityError when `folder` has a newer epoch, or
    another secret of this one: then an old kit is played back, or two authorities were restored from one backup.
    """
    path = folder / COHORT_FILE
    owner, secrets = _read(path) if exists(path) else (authority, {})
    if owner != authority:
        secrets = {}
    if secrets and epoch < max(secrets):
        raise IdentityError(
            f"this kit is of epoch {epoch}, {folder} already has epoch {max(secrets)}: ask for the newest kit"
        )
    if secrets.get(epoch, secret) != secret:
        raise IdentityError(
            f"this kit holds another secret of epoch {epoch} than {path}: nothing was done, ask the authority to rotate"
        )
    secrets[epoch] = secret
    return {number: secrets[number] for number in sorted(secrets)[-_KEPT:]}


def write(folder: Path, authority: str, secrets: Mapping[int, bytes]) -> None:
    """Puts `secrets`, given by the authority of that fingerprint, in the place of those in `folder`."""
    content = {"authority": authority, "secrets": {str(epoch): secret.hex() for epoch, secret in secrets.items()}}
    replace_secret(folder / COHORT_FILE, json.dumps(content).encode() + b"\n")


def _read(path: Path) -> tuple[str, dict[int, bytes]]:
    """Fingerprint of the authority, and the secrets by epoch."""
    try:
        content = json.loads(read_secret(path))
        owner = str(content["authority"])
        secrets = {int(epoch): bytes.fromhex(secret) for epoch, secret in content["secrets"].items()}
        CohortSecrets.of(secrets)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IdentityError(f"{path} is damaged: delete it and install the newest kit again") from None
    return owner, secrets

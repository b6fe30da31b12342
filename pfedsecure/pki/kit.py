"""The kit: the one file that goes from the authority to a party. What is secret in it that party alone can open."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass

from cryptography import x509

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import parse_certificate, to_pem
from pfedsecure.pki.cohort import is_epoch
from pfedsecure.pki.sealed import SealedSecret

_FORMAT = "pfedsecure-kit-2"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Kit:
    """What an authority gives a party.

    An approval has a `certificate`; a client's also an `author` certificate and the sealed cohort secret. A rotation
    brings a client the next cohort secret and nothing else.
    """

    authority: x509.Certificate
    certificate: x509.Certificate | None = None
    author: x509.Certificate | None = None
    sealed: SealedSecret | None = None

    def pack(self) -> bytes:
        """The file."""
        content: dict[str, object] = {"format": _FORMAT, "authority": to_pem(self.authority).decode()}
        if self.certificate is not None:
            content["certificate"] = to_pem(self.certificate).decode()
        if self.author is not None:
            content["author"] = to_pem(self.author).decode()
        if self.sealed is not None:
            content["cohort"] = {
                "epoch": self.sealed.epoch,
                "recipient": self.sealed.recipient,
                "ciphertext": base64.b64encode(self.sealed.ciphertext).decode(),
                "signature": base64.b64encode(self.sealed.signature).decode(),
            }
        return json.dumps(content, indent=1).encode() + b"\n"

    @classmethod
    def unpack(cls, data: bytes, source: str) -> Kit:
        """The kit in a file, well-formed and unverified; IdentityError naming `source` when it is none."""
        try:
            content = json.loads(data)
            if content["format"] != _FORMAT:
                raise IdentityError(f"{source} is a kit of another version than {_FORMAT}: ask for a new approval")
            kit = cls(
                parse_certificate(content["authority"].encode(), source),
                _certificate(content.get("certificate"), source),
                _certificate(content.get("author"), source),
                _sealed(content["cohort"]) if "cohort" in content else None,
            )
            if (kit.certificate is None and kit.sealed is None) or (kit.author is None) != (
                kit.certificate is None or kit.sealed is None
            ):
                raise ValueError("neither an approval nor a rotation")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise IdentityError(
                f"{source} is not a kit: get the file that `pfed pki approve` or `pfed pki rotate` wrote"
            ) from None
        return kit


def _certificate(pem: str | None, source: str) -> x509.Certificate | None:
    return None if pem is None else parse_certificate(pem.encode(), source)


def _sealed(content: dict[str, object]) -> SealedSecret:
    epoch, recipient = content["epoch"], str(content["recipient"])
    if not isinstance(epoch, int) or not is_epoch(epoch) or not _FINGERPRINT.fullmatch(recipient):
        raise ValueError("no epoch or no fingerprint")
    return SealedSecret(
        epoch,
        recipient,
        base64.b64decode(str(content["ciphertext"]), validate=True),
        base64.b64decode(str(content["signature"]), validate=True),
    )

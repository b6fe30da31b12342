"""What is signed, bound to a key or derived from: a label and fields, so that no two meanings share their bytes."""

from __future__ import annotations


def statement(label: str, *fields: bytes | int) -> bytes:
    """Label and fields, each after its length in 8 bytes; an integer counts as its 8 bytes, big-endian.

    Injective for a given label with a given number and kinds of fields. Starts with a zero byte, so it cannot be
    mistaken for the DER of a certificate or a request, which the same keys sign.
    """
    parts = (
        f"pfedsecure {label}".encode(),
        *(part if isinstance(part, bytes) else part.to_bytes(8) for part in fields),
    )
    return b"".join(len(part).to_bytes(8) + part for part in parts)

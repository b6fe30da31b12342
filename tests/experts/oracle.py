"""Sealed experts a second time, from what the documents say and not from the project's code.

HKDF: RFC 5869, written out. Protobuf: written out. AES-256-GCM and ECDSA: the primitives of cryptography. It imports
nothing of pfedsecure.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

ECDSA = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    extracted = hmac.new(salt or bytes(32), secret, hashlib.sha256).digest()
    result, block, number = b"", b"", 0
    while len(result) < length:
        number += 1
        block = hmac.new(extracted, block + info + bytes([number]), hashlib.sha256).digest()
        result += block
    return result[:length]


def framed(*parts: bytes | str | int) -> bytes:
    """Everything after its length in 8 bytes; a number is 8 bytes."""
    result = b""
    for part in parts:
        data = part.to_bytes(8, "big") if isinstance(part, int) else part.encode() if isinstance(part, str) else part
        result += len(data).to_bytes(8, "big") + data
    return result


class Setting(NamedTuple):
    """Everything that an envelope is bound to, and the cohort's secret of that epoch."""

    secret: bytes
    federation: str
    plan: str
    round: int
    author: str
    epoch: int

    def bound(self, purpose: str, *content: bytes) -> bytes:
        return framed(
            f"pfedsecure {purpose}", self.federation, self.plan, self.round, self.author, self.epoch, *content
        )

    def purpose_key(self, purpose: str) -> bytes:
        return hkdf(self.secret, b"", framed("pfedsecure key from a cohort secret", purpose, self.epoch), 32)

    def salt(self, plaintext: bytes) -> bytes:
        key = self.purpose_key("expert salt")
        return hmac.new(key, self.bound("expert salt", plaintext), hashlib.sha256).digest()

    def key_and_nonce(self, salt: bytes) -> tuple[bytes, bytes]:
        derived = hkdf(self.purpose_key("expert content key"), salt, b"expert", 44)
        return derived[:32], derived[32:]

    def seal(self, plaintext: bytes) -> tuple[bytes, bytes]:
        salt = self.salt(plaintext)
        key, nonce = self.key_and_nonce(salt)
        encryptor = Cipher(algorithms.AES256(key), modes.GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(self.bound("expert envelope"))
        return salt, encryptor.update(plaintext) + encryptor.finalize() + encryptor.tag

    def open(self, salt: bytes, ciphertext: bytes) -> bytes:
        """Raises InvalidTag."""
        key, nonce = self.key_and_nonce(salt)
        decryptor = Cipher(algorithms.AES256(key), modes.GCM(nonce, ciphertext[-16:])).decryptor()
        decryptor.authenticate_additional_data(self.bound("expert envelope"))
        return decryptor.update(ciphertext[:-16]) + decryptor.finalize()


# --- protobuf -------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    digits = []
    while True:
        digits.append(value & 127 | (128 if value > 127 else 0))
        value >>= 7
        if not value:
            return bytes(digits)


def message(*values: int | bytes) -> bytes:
    """The fields 1, 2 and so on."""
    result = b""
    for number, value in enumerate(values, start=1):
        if isinstance(value, int):
            result += varint(number << 3) + varint(value)
        else:
            result += varint(number << 3 | 2) + varint(len(value)) + value
    return result


def fields(data: bytes) -> list[int | bytes]:
    """What `message` put together."""
    result: list[int | bytes] = []
    position = 0

    def number() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        tag = number()
        assert tag >> 3 == len(result) + 1
        value = number()
        if tag & 7:
            result.append(data[position : position + value])
            position += value
        else:
            result.append(value)
    return result


# --- envelopes ------------------------------------------------------------------------------------------------------


def pack(context: Any, setting: Setting, certificate: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """`certificate`: DER."""
    shape = b"".join(map(varint, context.shape))
    expert = message(message(shape, context.astype("<f4").tobytes()))
    signature = key.sign(setting.bound("expert signature", expert), ECDSA)
    room = 4 * context.size + 2048 - len(message(expert, certificate, signature))
    plaintext = message(expert, certificate, signature, bytes(room - 3))  # tag and length take three bytes
    return message(setting.epoch, setting.round, setting.author.encode(), *setting.seal(plaintext))


def unpack(envelope: bytes, setting: Setting) -> bytes:
    """The bytes of the numbers, in the order of the file; AssertionError, InvalidTag or InvalidSignature if not."""
    epoch, number, author, salt, ciphertext = fields(envelope)
    assert (epoch, number, author) == (setting.epoch, setting.round, setting.author.encode())
    assert isinstance(salt, bytes)
    assert isinstance(ciphertext, bytes)
    expert, certificate, signature, padding = fields(setting.open(salt, ciphertext))
    assert isinstance(certificate, bytes)
    assert isinstance(expert, bytes)
    assert isinstance(signature, bytes)
    assert isinstance(padding, bytes)
    assert not any(padding)
    public = x509.load_der_x509_certificate(certificate).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(signature, setting.bound("expert signature", expert), ECDSA)
    (context,) = fields(expert)
    assert isinstance(context, bytes)
    _shape, data = fields(context)
    assert isinstance(data, bytes)
    return data

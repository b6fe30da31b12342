"""Secure aggregation a second time: small, slow, integers only, from the documents and not from the project's code.

X25519: RFC 7748. HKDF: RFC 5869. AES: FIPS 197. GCM: SP 800-38D. ECDSA: FIPS 186-5 on P-256. Shamir: as in
pfedsecure/secagg/shamir.py. It reads protobuf by itself and imports nothing but the standard library's hash functions
and struct.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

# --- bytes ----------------------------------------------------------------------------------------------------------


def fields(message: bytes) -> dict[int, list]:
    """A protobuf message: by field number, integers and byte strings in their order."""
    found: dict[int, list] = {}
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        tag = varint()
        if tag & 7 == 0:
            value: int | bytes = varint()
        else:
            assert tag & 7 == 2
            length = varint()
            value = message[position : position + length]
            position += length
        found.setdefault(tag >> 3, []).append(value)
    return found


def packed(data: bytes) -> list[int]:
    """The integers of a packed repeated field."""
    values, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            values.append(value)
            value = shift = 0
    return values


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def bits(bitmap: bytes) -> set[int]:
    return {8 * index + bit for index, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1}


def transcript(label: str, *parts: bytes | int) -> bytes:
    whole = b""
    for part in [b"pfedsecure secure aggregation v1", label.encode(), *parts]:
        content = part.to_bytes(8, "big") if isinstance(part, int) else part
        whole += len(content).to_bytes(8, "big") + content
    return whole


def digest(label: str, *parts: bytes | int) -> bytes:
    return hashlib.sha256(transcript(label, *parts)).digest()


# --- key agreement and derivation -----------------------------------------------------------------------------------


def x25519(private: bytes, public: bytes) -> bytes:
    p = 2**255 - 19
    k = int.from_bytes(private, "little") & ~7 & (2**255 - 1) | 2**254
    x1 = int.from_bytes(public, "little") % 2**255 % p
    x2, z2, x3, z3 = 1, 0, x1, 1
    for bit in reversed(range(255)):
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb = d * a, c * b
        x3, z3 = (da + cb) ** 2 % p, x1 * (da - cb) ** 2 % p
        e = a * a - b * b
        x2, z2 = a * a * b * b % p, e * (a * a + 121665 * e) % p
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, -1, p) % p).to_bytes(32, "little")


def x25519_public(private: bytes) -> bytes:
    return x25519(private, (9).to_bytes(32, "little"))


def hkdf(secret: bytes, info: bytes) -> bytes:
    """32 bytes, no salt: one block is all of it."""
    key = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(key, info + b"\x01", "sha256")


# --- AES ------------------------------------------------------------------------------------------------------------


def _double(a: int) -> int:
    return (a << 1 ^ (0x11B if a & 128 else 0)) & 0xFF


def _times(a: int, b: int) -> int:
    product = 0
    while b:
        if b & 1:
            product ^= a
        a, b = _double(a), b >> 1
    return product


def _substitute(a: int) -> int:
    inverse = next((b for b in range(256) if _times(a, b) == 1), 0)
    turned = [(inverse << shift | inverse >> (8 - shift)) & 0xFF for shift in range(5)]
    return turned[0] ^ turned[1] ^ turned[2] ^ turned[3] ^ turned[4] ^ 0x63


SBOX = [_substitute(a) for a in range(256)]


def expand_key(key: bytes) -> list[list[int]]:
    """The 15 round keys of AES-256."""
    words = [list(word) for word in pieces(key, 4)]
    constant = 1
    for index in range(8, 60):
        word = list(words[-1])
        if index % 8 == 0:
            word = [SBOX[byte] for byte in word[1:] + word[:1]]
            word[0] ^= constant
            constant = _double(constant)
        elif index % 8 == 4:
            word = [SBOX[byte] for byte in word]
        words.append([a ^ b for a, b in zip(words[index - 8], word, strict=True)])
    return [[byte for word in words[start : start + 4] for byte in word] for start in range(0, 60, 4)]


def aes(round_keys: list[list[int]], block: bytes) -> bytes:
    state = [a ^ b for a, b in zip(block, round_keys[0], strict=True)]
    for number, round_key in enumerate(round_keys[1:], start=1):
        state = [SBOX[byte] for byte in state]
        state = [state[(index + 4 * (index % 4)) % 16] for index in range(16)]
        if number < 14:
            mixed = []
            for column in pieces(bytes(state), 4):
                for row in range(4):
                    a, b, c, d = (column[(row + shift) % 4] for shift in range(4))
                    mixed.append(_double(a) ^ _double(b) ^ b ^ c ^ d)
            state = mixed
        state = [a ^ b for a, b in zip(state, round_key, strict=True)]
    return bytes(state)


def keystream(key: bytes, length: int) -> bytes:
    """AES-256 in counter mode, the counter from zero."""
    round_keys = expand_key(key)
    blocks = [aes(round_keys, counter.to_bytes(16, "big")) for counter in range(-(-length // 16))]
    return b"".join(blocks)[:length]


def gcm_open(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """The plaintext of nonce, ciphertext and tag."""
    nonce, ciphertext, tag = sealed[:12], sealed[12:-16], sealed[-16:]
    round_keys = expand_key(key)
    h = int.from_bytes(aes(round_keys, bytes(16)), "big")

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 16)

    lengths = (8 * len(context)).to_bytes(8, "big") + (8 * len(ciphertext)).to_bytes(8, "big")
    y = 0
    for block in pieces(padded(context) + padded(ciphertext) + lengths, 16):
        x, z, v = y ^ int.from_bytes(block, "big"), 0, h
        for bit in range(127, -1, -1):
            if x >> bit & 1:
                z ^= v
            v = v >> 1 ^ (0xE1 << 120 if v & 1 else 0)
        y = z
    first = aes(round_keys, nonce + (1).to_bytes(4, "big"))
    assert bytes(a ^ b for a, b in zip(y.to_bytes(16, "big"), first, strict=True)) == tag
    pad = b"".join(aes(round_keys, nonce + n.to_bytes(4, "big")) for n in range(2, 2 + -(-len(ciphertext) // 16)))
    return bytes(a ^ b for a, b in zip(ciphertext, pad, strict=False))


# --- ECDSA ----------------------------------------------------------------------------------------------------------

P = 2**256 - 2**224 + 2**192 + 2**96 - 1
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
BASE = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
Point = tuple[int, int] | None


def _add(one: Point, other: Point) -> Point:
    if one is None or other is None:
        return one or other
    if one[0] == other[0]:
        if (one[1] + other[1]) % P == 0:
            return None
        slope = (3 * one[0] ** 2 - 3) * pow(2 * one[1], -1, P)
    else:
        slope = (other[1] - one[1]) * pow(other[0] - one[0], -1, P)
    x = (slope**2 - one[0] - other[0]) % P
    return x, (slope * (one[0] - x) - one[1]) % P


def _multiply(times: int, point: Point) -> Point:
    total: Point = None
    while times:
        if times & 1:
            total = _add(total, point)
        point, times = _add(point, point), times >> 1
    return total


def p256_point(certificate: bytes) -> Point:
    """The public key in a certificate: 65 bytes after the marks of P-256 and of a bit string."""
    mark = bytes.fromhex("06082a8648ce3d030107034200" + "04")
    start = certificate.index(mark) + len(mark)
    x, y = (int.from_bytes(part, "big") for part in pieces(certificate[start : start + 64], 32))
    assert (y * y - x**3 + 3 * x - 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B) % P == 0
    return x, y


def signed(public: Point, signature: bytes, data: bytes) -> bool:
    """Whether a DER signature is right."""
    assert signature[0] == 0x30
    assert signature[1] == len(signature) - 2
    size = signature[3]
    r = int.from_bytes(signature[4 : 4 + size], "big")
    s = int.from_bytes(signature[6 + size :], "big")
    w = pow(s, -1, N)
    e = int.from_bytes(hashlib.sha256(data).digest(), "big")
    point = _add(_multiply(e * w % N, BASE), _multiply(r * w % N, public))
    return point is not None and point[0] % N == r


# --- Shamir ---------------------------------------------------------------------------------------------------------

PRIME = 65521


def shamir_shares(secret: bytes, coefficients: list[list[int]], points: list[int]) -> list[list[int]]:
    """Per point 18 numbers; `coefficients`: for each power from 1 the 18 coefficients of the limbs."""
    number = int.from_bytes(secret, "little")
    limbs = [number >> 15 * index & 0x7FFF for index in range(18)]
    return [
        [
            (limb + sum(row[index] * point ** (power + 1) for power, row in enumerate(coefficients))) % PRIME
            for index, limb in enumerate(limbs)
        ]
        for point in points
    ]


def shamir_secret(shares: dict[int, bytes]) -> bytes:
    """The secret of exactly threshold shares by their points."""
    number = 0
    for index in range(18):
        limb = 0
        for point, share in shares.items():
            weight = 1
            for other in shares:
                if other != point:
                    weight = weight * other * pow(other - point, -1, PRIME) % PRIME
            limb += int.from_bytes(share[2 * index : 2 * index + 2], "little") * weight
        number |= limb % PRIME << 15 * index
    return number.to_bytes(32, "little")


# --- the round ------------------------------------------------------------------------------------------------------


def setting_digest(setting: dict) -> bytes:
    """Of a round's setting as the vectors write it down."""
    parameters = setting["parameters"]
    assumed = parameters["assumptions"]
    reals = struct.pack(">4d", parameters["clip"], parameters["precision"], assumed["corrupt"], assumed["dropout"])
    integers = [parameters[name] for name in ("values", "max_weight", "minimum_cohort", "complete_up_to")]
    integers += [assumed["security_bits"], assumed["correctness_bits"]]
    names = digest("metrics", *(name.encode() for name in parameters["metrics"]))
    return digest(
        "setting",
        setting["federation_id"].encode(),
        setting["round"],
        bytes.fromhex(setting["plan_digest"]),
        bytes.fromhex(setting["model_digest"]),
        digest("parameters", *integers, reals, names),
    )


class Wire:
    """A finished round as its messages tell it. `messages`: by step, then by client in the roster's order."""

    def __init__(self, setting_digest: bytes, threshold: int, messages: dict[str, dict[str, bytes]]) -> None:
        self.names = sorted(messages["ADVERTISE"])
        number = {name: index for index, name in enumerate(self.names)}
        self.setting_digest, self.threshold = setting_digest, threshold
        self.advertisements = [fields(messages["ADVERTISE"][name]) for name in self.names]
        self.roster_digest = digest("roster", setting_digest, *(self._digest_of(ad) for ad in self.advertisements))
        self.shares = {number[name]: fields(message) for name, message in messages["SHARE"].items()}
        self.masked = {number[name]: fields(message)[2][0] for name, message in messages["MASK"].items()}
        self.signatures = {number[name]: fields(message)[1][0] for name, message in messages["CONFIRM"].items()}
        self.given_out = {
            number[name]: pieces(fields(message)[1][0], 36) for name, message in messages["UNMASK"].items()
        }
        self.participants_digest = digest("participants", self.roster_digest, self._bitmap(self.shares))

    def signed_statement(self, advertisement: dict[int, list]) -> bytes:
        return transcript("advertisement", *(advertisement[field][0] for field in range(1, 9)))

    def survivors_statement(self) -> bytes:
        return transcript("survivors", self.participants_digest, self._bitmap(self.masked))

    def public(self, client: int) -> Point:
        return p256_point(self.advertisements[client][5][0])

    def holders(self, dealer: int) -> list[int]:
        return packed(self.shares[dealer][1][0])

    def partners(self, client: int) -> list[int]:
        """With whom a participant has masks."""
        return [
            other
            for other in sorted(self.shares)
            if other != client and (other in self.holders(client) or client in self.holders(other))
        ]

    def opened(self, dealer: int, holder: int, share_private: bytes) -> list[bytes]:
        """The two shares that a holder finds in what a dealer sealed for it, after checking the commitments."""
        place = self.holders(dealer).index(holder)
        sealed = pieces(self.shares[dealer][2][0], 100)[place]
        commitments = pieces(self.shares[dealer][3][0], 64)[place]
        secret = x25519(share_private, self.advertisements[dealer][7][0])
        key = hkdf(secret, transcript("share", self.roster_digest, dealer, holder))
        context = transcript("share context", self.roster_digest, dealer, holder, commitments)
        shares = pieces(gcm_open(key, sealed, context), 36)
        for kind, share in enumerate(shares):
            assert (
                digest("share commitment", self.roster_digest, dealer, holder, kind, share)
                == pieces(commitments, 32)[kind]
            )
        return shares

    def secret(self, client: int) -> bytes:
        """What the shares that were given out say of a participant: a survivor's seed, or a private mask key."""
        found = {}
        for helper, shares in sorted(self.given_out.items()):
            held = [dealer for dealer in sorted(self.shares) if dealer == helper or helper in self.holders(dealer)]
            if client in held and len(found) < self.threshold:
                found[helper + 1] = shares[held.index(client)]
        return shamir_secret(found)

    def self_key(self, client: int, seed: bytes) -> bytes:
        return hkdf(seed, transcript("self mask", self.participants_digest, client))

    def pair_key(self, private: bytes, one: int, other: int) -> bytes:
        """`private`: mask key of `one`."""
        secret = x25519(private, self.advertisements[other][6][0])
        return hkdf(secret, transcript("pairwise mask", self.participants_digest, min(one, other), max(one, other)))

    def mask(self, client: int, mask_private: bytes, seed: bytes, length: int, size: int) -> list[int]:
        """All that a client adds to its vector of `length` elements of `size` bytes."""
        total = _elements(keystream(self.self_key(client, seed), length * size), size)
        for partner in self.partners(client):
            stream = _elements(keystream(self.pair_key(mask_private, client, partner), length * size), size)
            sign = 1 if client < partner else -1
            total = [a + sign * b for a, b in zip(total, stream, strict=True)]
        return [a % 2 ** (8 * size) for a in total]

    def sum(self, size: int) -> list[int]:
        """The survivors' sum, by nothing but messages."""
        vectors = {client: _elements(data, size) for client, data in self.masked.items()}
        length = len(next(iter(vectors.values())))
        total = [sum(column) for column in zip(*vectors.values(), strict=True)]
        for client in sorted(self.shares):
            secret = self.secret(client)
            if client in self.masked:
                streams = [(-1, self.self_key(client, secret))]
            else:
                # The other's own sign turned around: what it added has to go.
                streams = [
                    (-1 if other < client else 1, self.pair_key(secret, client, other))
                    for other in self.partners(client)
                    if other in self.masked
                ]
            for sign, key in streams:
                stream = _elements(keystream(key, length * size), size)
                total = [a + sign * b for a, b in zip(total, stream, strict=True)]
        return [a % 2 ** (8 * size) for a in total]

    def _digest_of(self, advertisement: dict[int, list]) -> bytes:
        return digest("advertisement digest", self.signed_statement(advertisement), advertisement[9][0])

    def _bitmap(self, clients: dict[int, object]) -> bytes:
        size = -(-len(self.names) // 8)
        return sum(1 << client for client in clients).to_bytes(size, "little")


def _elements(data: bytes, size: int) -> list[int]:
    return [int.from_bytes(piece, "little") for piece in pieces(data, size)]

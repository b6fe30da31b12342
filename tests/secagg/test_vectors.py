"""The library, the frozen messages and the second implementation agree, bit for bit."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfedsecure.secagg import Assumptions, Encoding, Parameters, RoundSetting, keys, masking, shamir
from pfedsecure.secagg.entropy import uniform_below

HERE = Path(__file__).parent
CASES = json.loads((HERE / "vectors.json").read_text())


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"secagg_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load("oracle")
makers = load("make_vectors")


def setting_of(case: dict[str, Any]) -> RoundSetting:
    parameters = dict(case["setting"]["parameters"])
    parameters["assumptions"] = Assumptions(**parameters["assumptions"])
    parameters["metrics"] = tuple(parameters["metrics"])
    return RoundSetting(**{**case["setting"], "parameters": Parameters(**parameters)})


def wire_of(case: dict[str, Any]) -> Any:
    messages = {
        step: {name: bytes.fromhex(data) for name, data in sent.items()} for step, sent in case["messages"].items()
    }
    return oracle.Wire(oracle.setting_digest(case["setting"]), case["threshold"], messages)


def secrets_of(case: dict[str, Any]) -> list[dict[str, bytes]]:
    return [
        {key: bytes.fromhex(value) for key, value in secrets.items()} for _, secrets in sorted(case["secrets"].items())
    ]


@pytest.mark.parametrize("case", CASES, ids=[case["title"] for case in CASES])
def test_the_library_still_says_what_was_frozen(case: dict[str, Any]) -> None:
    certificates = {name: bytes.fromhex(der) for name, der in case["certificates"].items()}
    fresh = makers.run(setting_of(case), case["dropped"], certificates, bytes.fromhex(case["authority"]))
    assert fresh == {name: case[name] for name in fresh}


@pytest.mark.parametrize("case", CASES, ids=[case["title"] for case in CASES])
class TestOracle:
    def test_signatures(self, case: dict[str, Any]) -> None:
        wire = wire_of(case)
        for client, advertisement in enumerate(wire.advertisements[:4]):
            assert oracle.signed(wire.public(client), advertisement[9][0], wire.signed_statement(advertisement))
        for client, signature in sorted(wire.signatures.items())[:4]:
            assert oracle.signed(wire.public(client), signature, wire.survivors_statement())
            assert not oracle.signed(wire.public(client), signature, b"another statement")

    def test_advertised_keys_and_commitments(self, case: dict[str, Any]) -> None:
        wire = wire_of(case)
        for advertisement, secrets in zip(wire.advertisements, secrets_of(case), strict=True):
            assert advertisement[6][0] == oracle.x25519_public(secrets["mask_key"])
            assert advertisement[7][0] == oracle.x25519_public(secrets["share_key"])
            assert advertisement[8][0] == oracle.digest("seed commitment", wire.setting_digest, secrets["seed"])

    def test_sealed_shares_determine_both_secrets(self, case: dict[str, Any]) -> None:
        wire, secrets = wire_of(case), secrets_of(case)
        for dealer in (0, len(secrets) - 1):
            holders = wire.holders(dealer)[: wire.threshold]
            opened = {holder: wire.opened(dealer, holder, secrets[holder]["share_key"]) for holder in holders}
            if len(holders) == wire.threshold:
                for kind, name in enumerate(("seed", "mask_key")):
                    shares = {holder + 1: shares[kind] for holder, shares in opened.items()}
                    assert oracle.shamir_secret(shares) == secrets[dealer][name]

    def test_given_out_shares_determine_one_secret_each(self, case: dict[str, Any]) -> None:
        wire, secrets = wire_of(case), secrets_of(case)
        assert wire.masked.keys() < wire.shares.keys()
        for client in wire.shares:
            assert wire.secret(client) == secrets[client]["seed" if client in wire.masked else "mask_key"]

    def test_masked_inputs_are_encoded_inputs_under_the_masks(self, case: dict[str, Any]) -> None:
        wire, secrets, parameters = wire_of(case), secrets_of(case), setting_of(case).parameters
        encoding = Encoding.of(parameters, len(secrets))
        assert (encoding.bits, encoding.fraction_bits) == (case["bits"], case["fraction_bits"])
        size = encoding.bits // 8
        for client, data in wire.masked.items():
            masks = wire.mask(client, secrets[client]["mask_key"], secrets[client]["seed"], encoding.length, size)
            masked = [int.from_bytes(piece, "little") for piece in oracle.pieces(data, size)]
            plain = [(a - b) % 2**encoding.bits for a, b in zip(masked, masks, strict=True)]
            signed = [value - 2**encoding.bits if value >> (encoding.bits - 1) else value for value in plain]
            update = makers.update_of(client, parameters)
            assert signed[parameters.values] == update.weight
            for value, encoded in zip(update.values, signed[: parameters.values], strict=True):
                clipped = min(max(float(value), -parameters.clip), parameters.clip)
                assert abs(encoded - clipped * update.weight * 2**encoding.fraction_bits) < 1

    def test_the_sum(self, case: dict[str, Any]) -> None:
        wire, parameters = wire_of(case), setting_of(case).parameters
        encoding = Encoding.of(parameters, len(case["certificates"]))
        total = np.array(wire.sum(encoding.bits // 8), encoding.dtype)
        mean = encoding.decode(total, len(wire.masked))
        assert mean.values.tolist() == case["mean"]
        assert mean.total_weight == case["total_weight"]
        assert mean.metrics == case["metrics"]


def test_the_oracle_knows_the_standards() -> None:
    """FIPS 197, C.3; RFC 7748, 5.2 (one iteration); RFC 5869, A.3; GCM by its specification's test case 14."""
    block = oracle.aes(oracle.expand_key(bytes(range(32))), bytes.fromhex("00112233445566778899aabbccddeeff"))
    assert block.hex() == "8ea2b7ca516745bfeafc49904b496089"
    nine = (9).to_bytes(32, "little")
    assert oracle.x25519(nine, nine).hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    okm = oracle.hkdf(b"\x0b" * 22, b"")
    assert okm.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    sealed = bytes(12) + bytes.fromhex("cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919")
    assert oracle.gcm_open(bytes(32), sealed, b"") == bytes(16)


@given(st.binary(min_size=32, max_size=32), st.integers(2, 9), st.integers(0, 5), st.integers(0, 2**32))
@settings(max_examples=30)
def test_shamir_agrees(secret: bytes, threshold: int, spare: int, seed: int) -> None:
    entropy = makers.stream(str(seed))
    points = np.sort(np.random.default_rng(seed).choice(65520, threshold + spare, replace=False) + 1)
    shares = shamir.share([secret], points, threshold, entropy)
    coefficients = uniform_below(shamir.PRIME, (threshold - 1) * 18, makers.stream(str(seed))).reshape(-1, 18)
    assert shares[:, 0].tolist() == oracle.shamir_shares(secret, coefficients.tolist(), points.tolist())
    some = {
        int(point): shamir.to_bytes(share)
        for point, share in zip(points[-threshold:], shares[-threshold:, 0], strict=True)
    }
    assert oracle.shamir_secret(some) == secret


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=80), st.integers(1, 40))
@settings(max_examples=15)
def test_derivation_and_keystream_agree(secret: bytes, info: bytes, length: int) -> None:
    key = keys.derive(secret, info)
    assert key == oracle.hkdf(secret, info)
    for dtype in (np.dtype(np.uint32), np.dtype(np.uint64)):
        total = np.zeros(length, dtype)
        masking.Masks(length, dtype).add(total, key)
        assert total.tobytes() == oracle.keystream(key, length * dtype.itemsize)


def test_the_vectors_cover_both_rings_and_both_graphs() -> None:
    assert {case["bits"] for case in CASES} == {32, 64}
    sparse = setting_of(CASES[1])
    assert len(wire_of(CASES[1]).holders(0)) < (len(CASES[1]["certificates"]) - 1) / 2
    assert replace(sparse, round=sparse.round + 1).digest != sparse.digest

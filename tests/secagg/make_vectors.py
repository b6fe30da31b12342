"""Write vectors.json: `python tests/secagg/make_vectors.py`. To be run again only when the wire is changed on purpose.

Whole rounds of the library with all randomness from SHAKE-256 of a name: their messages, private keys and sums.
Nothing in the file protects anything. Certificates are random and frozen; their private keys follow from the clients'
names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.pki.authority import Authority
from pfedsecure.secagg import (
    Assumptions,
    Certificates,
    ClientRound,
    Credentials,
    Parameters,
    RoundSetting,
    ServerRound,
    Step,
    Update,
    result,
)
from pfedsecure.wire.v1.secagg_pb2 import ClientRoundState

VECTORS = Path(__file__).with_name("vectors.json")
NOW = datetime(2030, 1, 1, tzinfo=UTC)
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

CASES: dict[str, dict[str, Any]] = {
    "complete graph, 32-bit ring, one dropped out after its shares": {
        "clients": 4,
        "dropped": 1,
        "parameters": Parameters(values=6, clip=1.0, max_weight=1000, precision=1e-3),
    },
    "sparse graph, 64-bit ring, metrics, two dropped out": {
        "clients": 12,
        "dropped": 2,
        "parameters": Parameters(
            values=3,
            clip=2.0,
            max_weight=100_000,
            precision=1e-6,
            metrics=("accuracy", "loss"),
            complete_up_to=4,
            assumptions=Assumptions(corrupt=0.1, dropout=0.1, security_bits=1, correctness_bits=1),
        ),
    },
}


def stream(name: str) -> Callable[[int], bytes]:
    """Bytes that follow from `name`, in the place of the operating system's."""
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        position += count
        return hashlib.shake_256(name.encode()).digest(position)[position - count :]

    return take


def identity_key(name: str) -> ec.EllipticCurvePrivateKey:
    """The certified key of a client of the vectors."""
    return ec.derive_private_key(int.from_bytes(hashlib.sha512(name.encode()).digest()) % P256_ORDER, ec.SECP256R1())


def update_of(index: int, parameters: Parameters) -> Update:
    """What client `index` puts in; every third one keeps its metrics to itself."""
    values = np.array([(-1) ** k * (index + 1) / (k + 3) for k in range(parameters.values)], np.float32)
    metrics = None if index % 3 == 2 else dict.fromkeys(parameters.metrics, (index + 1) / 16)
    return Update(values, 10 * index + 1, metrics)


def run(setting: RoundSetting, dropped: int, certificates: dict[str, bytes], authority: bytes) -> dict[str, Any]:
    """One round: messages by step and client, each client's secrets, the sum and the mean."""
    judge = Certificates(x509.load_der_x509_certificate(authority))
    clients = {
        name: ClientRound.begin(
            setting, Credentials(der, identity_key(name)), judge, save=lambda state: None, entropy=stream(name)
        )
        for name, der in certificates.items()
    }
    secrets = {}
    for name, client in clients.items():
        state: ClientRoundState = client._state
        secrets[name] = {key: getattr(state, key).hex() for key in ("mask_key", "share_key", "seed")}
    names = sorted(clients)
    stored = {Step.ADVERTISE: {name: clients[name].reply for name in names}}
    for step in (Step.SHARE, Step.MASK, Step.CONFIRM, Step.UNMASK):
        server = ServerRound(setting, judge, stored)
        stored[step] = {}
        for name in server.expected(step)[dropped if step is Step.MASK else 0 :]:
            request, client = server.request(step, name), clients[name]
            match step:
                case Step.SHARE:
                    reply = client.share(request, NOW)
                case Step.MASK:
                    reply = client.mask(request, update_of(names.index(name), setting.parameters))
                case Step.CONFIRM:
                    reply = client.confirm(request)
                case Step.UNMASK:
                    reply = client.unmask(request)
            stored[step][name] = reply
    server = ServerRound(setting, judge, stored)
    mean = result(server).mean
    return {
        "threshold": server.sharing.threshold,
        "bits": server.encoding.bits,
        "fraction_bits": server.encoding.fraction_bits,
        "secrets": secrets,
        "messages": {step.name: {name: data.hex() for name, data in sent.items()} for step, sent in stored.items()},
        "mean": mean.values.tolist(),
        "total_weight": mean.total_weight,
        "metrics": mean.metrics,
        "metrics_weight": mean.metrics_weight,
    }


def make_certificates(names: list[str]) -> tuple[dict[str, bytes], bytes]:
    """Certificates for the clients' keys, and that of an authority that exists for a moment only."""
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority.create(Path(folder) / "authority", "vectors", now=NOW)
        made = {}
        for name in names:
            role = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:pfedsecure:role:client")])
            csr = (
                x509.CertificateSigningRequestBuilder()
                .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
                .add_extension(role, critical=False)
                .sign(identity_key(name), hashes.SHA256())
            )
            certificate = authority.approve(
                csr.public_bytes(Encoding.PEM), name=name, role="client", days=3000, now=NOW
            )
            made[name] = certificate.public_bytes(Encoding.DER)
        return made, authority.certificate.public_bytes(Encoding.DER)


def main() -> None:
    written = []
    for number, (title, case) in enumerate(CASES.items(), start=1):
        setting = RoundSetting("f" * 32, number, "1a" * 32, "2b" * 32, case["parameters"])
        certificates, authority = make_certificates([f"client-{index:02d}" for index in range(case["clients"])])
        written.append(
            {
                "title": title,
                "setting": dataclasses.asdict(setting),
                "dropped": case["dropped"],
                "authority": authority.hex(),
                "certificates": {name: der.hex() for name, der in certificates.items()},
                **run(setting, case["dropped"], certificates, authority),
            }
        )
    VECTORS.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

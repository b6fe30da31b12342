"""One round of secure aggregation with real certificates: CPU time and bytes of clients and server.

Every client runs the whole protocol. Those that are not timed take all signatures for good, because verifying
everybody's for everybody costs the square of the cohort.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from pfedsecure.pki.authority import Authority
from pfedsecure.pki.names import ROLE_URI_PREFIX
from pfedsecure.secagg import Certificates, ClientRound, Credentials, RoundSetting, ServerRound, Step, Update
from pfedsecure.secagg.credentials import Signer
from pfedsecure.secagg.roster import read_roster

from .secagg_server import LastStep, last_step

T = TypeVar("T")


@dataclass(frozen=True)
class Consortium:
    """An authority's certificate, DER, and the credentials of its clients by name."""

    authority: bytes
    clients: Mapping[str, Credentials]

    @classmethod
    def of(cls, size: int) -> Consortium:
        """`size` clients with certificates for a day."""
        clients = {}
        with tempfile.TemporaryDirectory() as folder:
            authority = Authority.create(Path(folder) / "authority", "benchmark")
            for number in range(size):
                name, key = f"client-{number:04d}", ec.generate_private_key(ec.SECP256R1())
                role = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(ROLE_URI_PREFIX + "client")])
                request = (
                    x509.CertificateSigningRequestBuilder()
                    .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
                    .add_extension(role, critical=False)
                    .sign(key, hashes.SHA256())
                )
                certificate = authority.approve(request.public_bytes(Encoding.PEM), name=name, role="client", days=1)
                clients[name] = Credentials(certificate.public_bytes(Encoding.DER), key)
            return cls(authority.certificate.public_bytes(Encoding.DER), clients)

    def certificates(self) -> Certificates:
        """A judge that has not seen any certificate yet."""
        return Certificates(x509.load_der_x509_certificate(self.authority))


@dataclass
class Cost:
    """CPU milliseconds, and bytes sent and received, of one client."""

    milliseconds: float = 0.0
    sent: int = 0
    received: int = 0


@dataclass
class Rehearsal:
    """A round of `names` with these `updates`; whoever has no update vanishes after dealing its shares.

    The names in `timed` do everything themselves. `relay_ms` is the server's CPU on all messages but the last step.
    """

    consortium: Consortium
    setting: RoundSetting
    names: list[str]
    updates: Mapping[str, Update]
    timed: list[str]
    costs: dict[str, Cost] = field(default_factory=dict)
    relay_ms: float = 0.0

    def __post_init__(self) -> None:
        self._now = datetime.now(UTC)
        self._known = self.consortium.certificates()
        self._credulous = _CredulousCertificates(x509.load_der_x509_certificate(self.consortium.authority))
        self._clients: dict[str, ClientRound] = {}
        self._stored: dict[Step, dict[str, bytes]] = {}

    @property
    def server(self) -> ServerRound:
        return ServerRound(self.setting, self._known, dict(self._stored))

    @property
    def masked_bytes(self) -> int:
        """Size of a masked input on the wire."""
        return len(self._stored[Step.MASK][self.timed[0]])

    def run(self) -> LastStep:
        """All five steps."""
        self._close(Step.ADVERTISE, self.names, lambda name, request: self._begin(name))
        self._close(Step.SHARE, self.names, lambda name, request: self._clients[name].share(request, self._now))
        survivors = [name for name in self.names if name in self.updates]
        self._close(Step.MASK, survivors, lambda name, request: self._clients[name].mask(request, self.updates[name]))
        self._close(Step.CONFIRM, survivors, lambda name, request: self._clients[name].confirm(request))
        self._close(Step.UNMASK, survivors, lambda name, request: self._clients[name].unmask(request))
        return last_step(self.setting, self.consortium.authority, self._stored)

    def certificates_ms(self) -> float:
        """What verifying everybody's certificates for the first time adds to a client's cost."""
        roster = self.server.request(Step.SHARE, self.names[0])
        first, known = (
            median(cpu(partial(read_roster, roster, self.setting, judge(), self._now))[1] for _ in range(3))
            for judge in (self.consortium.certificates, lambda: self._known)
        )
        return first - known

    def median_cost(self) -> Cost:
        """Of the timed clients, each number by itself."""
        costs = [self.costs[name] for name in self.timed]
        return Cost(
            median(cost.milliseconds for cost in costs),
            int(median(cost.sent for cost in costs)),
            int(median(cost.received for cost in costs)),
        )

    def _close(self, step: Step, names: list[str], answer: Callable[[str, bytes], bytes]) -> None:
        server = self.server
        arrived: dict[str, bytes] = {}
        if step is Step.ADVERTISE:  # the only step in which a message is compared with those before it
            server = ServerRound(self.setting, self._known, {step: arrived})
        for name in names:
            request, relayed = (b"", 0.0) if step is Step.ADVERTISE else cpu(partial(server.request, step, name))
            message, milliseconds = cpu(partial(answer, name, request))
            _, checked = cpu(partial(server.check, step, name, message, self._now))
            arrived[name] = message
            self.relay_ms += relayed + checked
            cost = self.costs.setdefault(name, Cost())
            cost.milliseconds += milliseconds
            cost.sent += len(message)
            cost.received += len(request)
        self._stored[step] = arrived

    def _begin(self, name: str) -> bytes:
        judge = self._known if name in self.timed else self._credulous
        self._clients[name] = ClientRound.begin(
            self.setting, self.consortium.clients[name], judge, save=lambda state: None
        )
        return self._clients[name].reply


class _CredulousSigner(Signer):
    def signed(self, signature: bytes, data: bytes) -> bool:
        return True


class _CredulousCertificates(Certificates):
    """Those of clients that are not timed."""

    def signer(self, certificate: bytes, now: datetime | None) -> Signer:
        signer = super().signer(certificate, now)
        return _CredulousSigner(signer.name, signer.fingerprint, signer.key, signer.until)


def cpu(function: Callable[[], T]) -> tuple[T, float]:
    """What a function returns, and the CPU milliseconds that it took on all threads."""
    started = time.process_time()
    value = function()
    return value, 1000 * (time.process_time() - started)


def make_updates(names: list[str], values: int, max_weight: int) -> dict[str, Update]:
    """The same numbers every time."""
    generator = np.random.default_rng(len(names))
    return {
        name: Update(
            generator.normal(0, 0.1, values).astype(np.float32), int(generator.integers(1, max_weight, endpoint=True))
        )
        for name in names
    }

"""What a session does as JSON lines in the log, for whatever collects them.

Logs leave the machine they are made on. So nothing of the images is in these: no accuracy, no loss, no numbers of
images; those stay in `metrics.jsonl` of the client's state.
"""

from __future__ import annotations

import logging

from pfed_client.metrics import RoundRecord
from pfed_client.progress import QuietWatcher, too_few
from pfedsecure.console import one_line
from pfedsecure.errors import PfedError
from pfedsecure.logs import json_formatter
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed

_logger = logging.getLogger("pfed_client")


class JsonWatcher(QuietWatcher):
    """One line for whatever is new."""

    def __init__(self) -> None:
        self._last = ""

    def promised(self, privacy: str) -> None:
        self._say(f"differential privacy: {privacy}")

    def joined(self, plan: Plan) -> None:
        if (formatter := json_formatter()) is not None:
            formatter.federation = plan.name
        self._say(f"joined, {plan.rounds.count} rounds are planned")

    def waiting(self, view: fed.FederationView) -> None:
        if too_few(view):
            self._say(f"waiting for clients: {view.clients_online} of {view.clients_needed} are online")
        elif view.phase == fed.FEDERATION_PHASE_ROUND_OPEN and not view.selected:
            self._say("not chosen for this round", view.round)

    def round_done(self, record: RoundRecord) -> None:
        self._say(f"work of this round is sent, {record.n_experts} experts borrowed", record.round)

    def left_out(self, round_number: int) -> None:
        self._say("closed before this client was done; the federation went on without it", round_number)

    def withdrew(self, round_number: int, reason: str) -> None:
        self._say(f"left this round ({one_line(reason)}); the federation goes on without this client", round_number)

    def finished(self, accuracy: float) -> None:
        self._say("finished")

    def retrying(self, reason: PfedError, pause_seconds: float) -> None:
        self._say(f"{one_line(str(reason))}; trying again")

    def _say(self, message: str, round_number: int | None = None) -> None:
        line = f"{round_number} {message}"
        if line != self._last:
            _logger.info("%s", message, extra={} if round_number is None else {"round": round_number})
            self._last = line

"""Weighted averaging by secure aggregation: the rounds of a federation on the protocol of `pfedsecure.secagg`.

Guarantee, against the server and fewer than a third of the cohort together, whatever they do: of the other clients'
prompts, weights and metrics they learn the sum over all of these others at most. `pfedsecure.secagg` says it in full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta

import numpy as np
from cryptography import x509

from pfedsecure.aggregation.interface import Aggregate, Contribution, RoundIdentity, Save, Stored
from pfedsecure.errors import MessageRejected
from pfedsecure.pki.identity import Identity
from pfedsecure.plan import Plan
from pfedsecure.secagg import (
    Assumptions,
    ClientRound,
    Credentials,
    Encoding,
    Parameters,
    RoundSetting,
    ServerRound,
    Step,
    Update,
    certificates_under,
    result,
)
from pfedsecure.secagg.setting import LARGEST_COHORT
from pfedsecure.secagg.sharing import Sharing
from pfedsecure.seeds import derive_seed
from pfedsecure.wire.tensors import bounded

METRICS: Mapping[str, float] = {"test_accuracy": 1.0, "train_loss": 16.0}
"""What may ride along, and the largest value that is told: larger ones count as it."""

OVERHEAD_BYTES = 64 * 1024
BYTES_PER_CLIENT = 512
"""More than the shares for one holder, with their commitments, take in any message."""

LONGEST_MARGIN_SECONDS = 24 * 3600.0
"""No certificate that lasts longer is kept out of a round, however long the plan lets it take."""


class SecureClientAggregation:
    """The client's side for contexts of `shape (n, d)`, with the client's own identity."""

    input_step = int(Step.MASK)

    def __init__(self, plan: Plan, shape: tuple[int, int], identity: Identity) -> None:
        self._plan = plan
        self._parameters = parameters(plan, shape)
        self._name = identity.subject.name
        self._credentials = Credentials.of(identity)
        self._certificates = certificates_under(identity.authority)

    def begin(self, identity: RoundIdentity, contribution: Contribution, save: Save) -> SecureClientRound:
        """Enter a round with fresh ephemeral keys, which `save` gets before the advertisement of step 1 is given out.

        What leaves this client afterwards tells the server and fewer than a third of the cohort nothing of
        `contribution` but the cohort's sum. A weight over the plan's `max_weight` counts as that.
        """
        setting = _setting(self._plan, identity, self._parameters)
        client = ClientRound.begin(setting, self._credentials, self._certificates, save=save)
        return SecureClientRound(client, self._update(contribution), self._rounding_seed(identity))

    def restore(
        self, saved: bytes, identity: RoundIdentity, contribution: Contribution, save: Save, now: datetime
    ) -> SecureClientRound:
        """Go on with the keys in `saved`: no second mask is ever made for the same round. `now` judges certificates.

        Raises StateError for bytes of another round or form, MessageRejected as `answer`.
        """
        setting = _setting(self._plan, identity, self._parameters)
        client = ClientRound.restore(saved, setting, self._credentials, self._certificates, now=now, save=save)
        return SecureClientRound(client, self._update(contribution), self._rounding_seed(identity))

    def _update(self, contribution: Contribution) -> Update:
        weight = min(contribution.weight, self._parameters.max_weight)
        return Update(contribution.context.reshape(-1), weight, self._metrics(contribution))

    def _metrics(self, contribution: Contribution) -> dict[str, float] | None:
        """What is told of them; None where one is no number, such as a mean over no images."""
        if not self._parameters.metrics or contribution.metrics is None:
            return None
        shares = {name: contribution.metrics[name] / METRICS[name] for name in self._parameters.metrics}
        if any(map(math.isnan, shares.values())):
            return None
        return {name: min(max(share, 0.0), 1.0) * self._parameters.clip for name, share in shares.items()}

    def _rounding_seed(self, identity: RoundIdentity) -> int:
        return derive_seed(self._plan.seed, self._name, "secure aggregation rounding", identity.number)


class SecureClientRound:
    """One client in one round."""

    def __init__(self, client: ClientRound, update: Update, rounding_seed: int) -> None:
        self._client = client
        self._update = update
        self._rounding_seed = rounding_seed

    @property
    def step(self) -> int:
        """The last step that has a message, 1 (keys) to 5 (the shares that unmask)."""
        return int(self._client.step)

    @property
    def message(self) -> bytes:
        """The message of that step, as it was saved: the same bytes each time."""
        return self._client.reply

    def answer(self, request: bytes, now: datetime) -> bytes:
        """The message of the next step. `now` judges the certificates in a roster.

        Raises MessageRejected where the server's request breaks a rule that keeps this client's contribution hidden (a
        roster that is too small, survivors without enough signatures, a step too many): nothing is revealed then.
        """
        if self._client.step is Step.UNMASK:
            raise MessageRejected("secure aggregation ended with this client's shares; the server asks for more")
        match Step(self._client.step + 1):
            case Step.SHARE:
                return self._client.share(request, now)
            case Step.MASK:
                # Which way a number is rounded hides nothing, so it may come from the plan's seed: then the same
                # federation gives the same mean again. Masks and keys come from the operating system.
                rounding = np.random.default_rng(self._rounding_seed).bytes
                return self._client.mask(request, self._update, rounding=rounding)
            case Step.CONFIRM:
                return self._client.confirm(request)
            case _:
                return self._client.unmask(request)


class SecureServerAggregation:
    """The server's side for contexts of `shape (n, d)` and clients certified by `authority`."""

    steps = int(Step.UNMASK)
    input_step = int(Step.MASK)

    def __init__(self, plan: Plan, shape: tuple[int, int], authority: x509.Certificate) -> None:
        """Raises PlanError for a precision that the largest cohort could not have."""
        self._plan = plan
        self._shape = shape
        self._parameters = parameters(plan, shape)
        Encoding.of(self._parameters, LARGEST_COHORT)
        self._certificates = certificates_under(authority)

    def max_message_bytes(self, clients: int) -> int:
        """Bytes of the largest vector of the ring, and of shares for `clients` holders."""
        values = Encoding.of(self._parameters, LARGEST_COHORT).length
        return values * np.dtype(np.uint64).itemsize + clients * BYTES_PER_CLIENT + OVERHEAD_BYTES

    def wiring(self, clients: int) -> Mapping[str, int]:
        """For a cohort of `clients`: how many hold shares of each client (`holders`), how many of these open its mask
        (`threshold`), and how many must stay to the end (`quorum`).
        """
        sharing = Sharing.of(self._parameters, clients)
        return {"holders": sharing.holders, "threshold": sharing.threshold, "quorum": sharing.quorum}

    def round(self, identity: RoundIdentity, stored: Stored) -> SecureServerRound:
        """The round whose messages are `stored`, with certificates judged under the federation's authority."""
        setting = _setting(self._plan, identity, self._parameters)
        by_step = {Step(step): messages for step, messages in stored.items()}
        return SecureServerRound(ServerRound(setting, self._certificates, by_step), self._shape, self._plan)


class SecureServerRound:
    """One round of `plan`, of contexts of `shape (n, d)`."""

    def __init__(self, server: ServerRound, shape: tuple[int, int], plan: Plan) -> None:
        self._server = server
        self._shape = shape
        self._max_norm = plan.prompt.max_norm
        seconds = plan.rounds.deadline_seconds + (SecureServerAggregation.steps - 1) * plan.rounds.step_seconds
        self._longest = timedelta(seconds=min(seconds, LONGEST_MARGIN_SECONDS))

    def check(self, step: int, name: str, message: bytes, now: datetime) -> None:
        """Raise MessageRejected for a message that would spoil the round, or whose certificate ends before the round
        can.

        The server checks form, signatures and commitments; what is masked it cannot read.
        """
        self._server.check(Step(step), name, message, now, over=now + self._longest)

    def ready(self, step: int) -> bool:
        """Whether a quorum, and the plan's minimum of clients, has sent its message of `step`."""
        return self._server.ready(Step(step))

    def request(self, step: int, name: str) -> bytes:
        """What `name` needs for `step`: roster, sealed shares, survivors, signatures. Raises MessageRejected."""
        return self._server.request(Step(step), name)

    def result(self) -> Aggregate:
        """The mean `(n, d)` over the survivors, shortened to the plan's norm where clients put it over; metrics in
        their own units. Raises RoundLost when too few shares came to take the masks off.
        """
        outcome = result(self._server)
        mean = outcome.mean
        metrics = None
        if mean.metrics is not None:
            clip = self._server.setting.parameters.clip
            metrics = {name: value / clip * METRICS[name] for name, value in mean.metrics.items()}
        # The clip bounds single numbers only: one client can put the mean over the norm that everybody else refuses.
        context = bounded(mean.values.astype(np.float32).reshape(self._shape), self._max_norm)
        return Aggregate(context, mean.total_weight, metrics, outcome.culprits)


def parameters(plan: Plan, shape: tuple[int, int]) -> Parameters:
    """What `plan` means for contexts of `shape (n, d)`."""
    asked = plan.secure_aggregation
    return Parameters(
        values=shape[0] * shape[1],
        clip=asked.clip,
        max_weight=asked.max_weight,
        precision=asked.precision,
        minimum_cohort=plan.rounds.minimum_cohort,
        metrics=tuple(METRICS) if plan.protection.metrics else (),
        complete_up_to=asked.complete_up_to,
        assumptions=Assumptions(corrupt=asked.assumed_corrupt, dropout=asked.assumed_dropout),
    )


def _setting(plan: Plan, identity: RoundIdentity, agreed: Parameters) -> RoundSetting:
    return RoundSetting(identity.federation_id, identity.number, plan.digest(), identity.start_digest, agreed)

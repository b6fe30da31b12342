"""A client's part in a federation, from joining to the last round, over any transport.

Everything that decides what is sent is on disk before it is sent, and training is a pure function of what it starts
from (with differential privacy: it is paid for each time it is done): a session that is killed at any instant and
started again on the same state directory trains no round twice and sends the same bytes. Only prompts leave the client,
in the form of the plan's aggregation, experts and matching, and where plan and client both say so accuracy and loss, in
the secure sum; gate and labels do not.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import replace

import pfedsecure
from pfed_client.agreement import Agreement, agree, check_pins
from pfed_client.contributing import Contributor, LeftRound
from pfed_client.exchange import Exchange
from pfed_client.ledger.countersigner import Countersigner
from pfed_client.limits import Limits
from pfed_client.observer import Observer, SilentObserver
from pfed_client.privacy import Privacy
from pfed_client.state import ClientState, model_owner
from pfed_client.training import RoundTrainer, Training
from pfedsecure.aggregation.factory import client_aggregation
from pfedsecure.aggregation.interface import Contribution, RoundIdentity
from pfedsecure.console import one_line
from pfedsecure.errors import MessageRejected, NotAMember, StateError
from pfedsecure.experts.factory import client_experts
from pfedsecure.matching.factory import client_matching
from pfedsecure.pki.identity import Identity
from pfedsecure.wire.api import FederationApi
from pfedsecure.wire.v1 import federation_pb2 as fed

_logger = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 30.0
SHORTEST_WAIT_SECONDS = 1.0
"""Between two questions for what is new, where nothing was: a server that answers at once must not keep a core busy."""


class Session:
    """One client in one federation.

    `backbone_digest` is of the weights that `trainer` uses; with the plan it says what a saved model belongs to.
    `identity`: this client's certificate, for the protections that take one. `share_metrics`: whether accuracy and loss
    join the secure sum where the plan has them. `fetch_all`: see `Exchange`. `privacy`: differential privacy, whose
    promise `trainer` keeps: all that is sent is then made of what it released, and no metrics are. `executor` runs
    the training, by default a thread of the event loop's own pool. `between_rounds` is called now and then while no
    round is under way for this client; what it raises ends the session. Raises ProtectionUnavailable when the plan asks
    for what cannot be had without an identity.
    """

    def __init__(
        self,
        api: FederationApi,
        agreement: Agreement,
        state: ClientState,
        trainer: RoundTrainer,
        *,
        backbone_digest: str,
        identity: Identity | None = None,
        share_metrics: bool = False,
        fetch_all: bool = False,
        privacy: Privacy | None = None,
        observer: Observer | None = None,
        executor: Executor | None = None,
        between_rounds: Callable[[], None] = lambda: None,
    ) -> None:
        self._api = api
        self._agreement = agreement
        self._plan = agreement.plan
        self._state = state
        self._between_rounds = between_rounds
        self._trainer = trainer
        self._observer: Observer = observer or SilentObserver()
        self._share_metrics = share_metrics and agreement.plan.protection.metrics and privacy is None
        initial = trainer.initial_context()
        shape = initial.shape[0], initial.shape[1]
        self._experts = client_experts(agreement.plan, shape, agreement.federation_id, identity, state.seen)
        matching = client_matching(
            agreement.plan,
            initial,
            identity,
            state.kept,
            state.releases.record,
            private_prompt=privacy is not None,
        )
        self._exchange = Exchange(api, agreement.plan, initial, self._experts, matching, fetch_all=fetch_all)
        self._contributor = Contributor(api, client_aggregation(agreement.plan, shape, identity), state)
        self._limits = Limits(agreement.plan)
        owner = model_owner(agreement.plan, backbone_digest)
        self._countersigner: Countersigner | None = None
        if privacy is not None and privacy.account is not None:
            self._countersigner = Countersigner(
                api,
                privacy.account,
                federation_id=agreement.federation_id,
                member=state.record.name,
                instance_id=state.record.instance_id,
                authority=None if identity is None else identity.authority,
            )
        self._training = Training(
            self._exchange, state, trainer, owner, self._observer, executor, privacy, self._countersigner
        )
        self._claim = self._experts.claim(identity.subject.fingerprint if identity else "")
        # What the server gave a receipt for: experts by round, and a round with the last step of its aggregation.
        self._confirmed_experts: set[int] = set()
        self._confirmed_step = 0, 0
        self._over_for_me = 0
        self._sealed_again: set[tuple[int, int, bool]] = set()

    async def run(self) -> float:
        """Take part until the federation is finished.

        Returns the final model's accuracy on the own test images, in [0, 1]. When cancelled, the training thread ends
        with its next step and nothing is lost. Raises PfedError.
        """
        await self._join()
        try:
            view = await self._newer_than(0)
            while view.phase != fed.FEDERATION_PHASE_FINISHED:
                self._contributor.end(_newest_over(view))
                if not self._is_under_way(view):
                    self._between_rounds()
                await self._seal_again(view)
                if self._has_work(view):
                    await self._take_part(view)
                else:
                    self._observer.waiting(view)
                view = await self._newer_than(view.version)
            return await self._finish(view)
        except NotAMember:
            await agree(self._api, self._state)  # says so if the server lost the federation
            raise

    async def _join(self) -> None:
        reply = await self._api.join(
            fed.JoinRequest(
                plan_digest=self._plan.digest(),
                instance_id=self._state.record.instance_id,
                software_version=pfedsecure.__version__,
                author_certificate=self._claim.certificate,
                author_signature=self._claim.signature,
            )
        )
        if reply.federation_id != self._agreement.federation_id:
            raise StateError(
                "the server changed to another federation while this client joined; start the client again"
            )
        check_pins(self._state, self._plan, reply.federation_id)
        if self._state.record.plan is None:
            self._state.pin(self._plan, reply.federation_id)
        if self._countersigner is not None:
            await self._countersigner.ask()  # an older copy of the ledger is noticed now, and not only in a round
        self._observer.joined(self._plan)

    async def _newer_than(self, version: int) -> fed.FederationView:
        wait_seconds = min(self._plan.rounds.heartbeat_seconds, LONGEST_WAIT_SECONDS)
        asked = time.monotonic()
        view = await self._api.await_view(
            fed.AwaitRequest(
                instance_id=self._state.record.instance_id, seen_version=version, wait_seconds=wait_seconds
            )
        )
        if view.version == version:
            await asyncio.sleep(min(wait_seconds, SHORTEST_WAIT_SECONDS) - (time.monotonic() - asked))
        return view

    def _is_under_way(self, view: fed.FederationView) -> bool:
        """Whether this client has begun with the open round and may still have to do something for it."""
        if view.phase != fed.FEDERATION_PHASE_ROUND_OPEN or not view.selected or view.round == self._over_for_me:
            return False
        begun = view.step_received or view.expert_received or self._training.model.trained_round == view.round
        return view.step > 1 or bool(begun)

    def _has_work(self, view: fed.FederationView) -> bool:
        if view.phase != fed.FEDERATION_PHASE_ROUND_OPEN or not view.selected or view.round == self._over_for_me:
            return False
        awaited = view.step == 1 and self._plan.n_experts and not view.expert_received
        return bool(awaited) or view.step_received < view.step

    async def _seal_again(self, view: fed.FederationView) -> None:
        """Replace this client's expert in the pool when the cohort has a newer secret than the one that sealed it."""
        model, epoch = self._training.model, self._experts.epoch
        if not (model.trained_round and 0 < view.expert_epoch < epoch):
            return
        # The pool has a sealed-again expert at once, except one of the open round: it is there when the round closes.
        attempt = epoch, model.trained_round, _newest_over(view) < model.trained_round
        if attempt in self._sealed_again:
            return
        self._sealed_again.add(attempt)
        try:
            await self._exchange.publish(self._exchange.bounded(await self._training.lent()), model.trained_round)
        except MessageRejected as refused:
            _logger.warning("%s; the expert stays sealed with the older secret until the next round", refused)

    async def _take_part(self, view: fed.FederationView) -> None:
        """Do what the open step of the round wants of this client."""
        number = view.round
        self._check_confirmed(view)
        try:
            async with self._heartbeats(number) as (over, beating):
                if view.step == 1 and not await self._train_and_publish(view, over):
                    await beating  # raises what ended it, if that was not the end of the round
                    self._leave_out(number)
                elif view.step_received < view.step:
                    await self._contribute(view)
        except LeftRound as left:
            self._over_for_me = number
            self._observer.withdrew(number, str(left))
        except MessageRejected as refused:
            # One round is lost for this client, whoever broke the rules; the next may be none the worse for it.
            now = await self._newer_than(0)
            if now.phase == fed.FEDERATION_PHASE_ROUND_OPEN and (now.round, now.step) == (number, view.step):
                self._over_for_me = number
                self._observer.withdrew(number, one_line(str(refused)))
            elif view.step <= self._contributor.input_step:
                self._leave_out(number)

    def _leave_out(self, number: int) -> None:
        self._over_for_me = number
        self._observer.left_out(number)

    async def _train_and_publish(self, view: fed.FederationView, over: threading.Event) -> bool:
        """Have the round's model, and its expert with the server; False when `over` was set before that."""
        number = view.round
        if not await self._training.train(number, over):
            return False
        if self._plan.n_experts and not view.expert_received:
            sent = await self._exchange.publish(self._exchange.bounded(await self._training.lent()), number)
            self._confirmed_experts.add(number)
            self._count(number, sent, 0)
        return True

    async def _contribute(self, view: fed.FederationView) -> None:
        number, step, model = view.round, view.step, self._training.model
        if step > view.step_received + 1 or model.trained_round != number:
            raise LeftRound("the server went on without waiting for this client")
        metrics = None
        if self._share_metrics and (record := self._state.metrics.of(number)) is not None:
            metrics = {"test_accuracy": record.test_accuracy, "train_loss": record.train_loss}
        identity = RoundIdentity(self._agreement.federation_id, number, model.start_digest)
        contribution = Contribution(self._exchange.bounded(model.context), model.n_train, metrics)
        if step == self._contributor.input_step:
            self._limits.tell(contribution)
        traffic = await self._contributor.send(identity, step, contribution)
        self._confirmed_step = number, step
        self._count(number, traffic.sent, traffic.received)
        if step == self._contributor.input_step and (record := self._state.metrics.of(number)) is not None:
            self._observer.round_done(record)

    def _count(self, number: int, sent: int, received: int) -> None:
        record = self._state.metrics.of(number)
        if record is not None:
            up, down = record.bytes_up + sent, record.bytes_down + received
            self._state.metrics.add(replace(record, bytes_up=up, bytes_down=down))

    def _check_confirmed(self, view: fed.FederationView) -> None:
        """Raise MessageRejected when the server has not received what it gave a receipt for."""
        number, step = self._confirmed_step
        lost = None
        if view.round == number and view.step_received < step:
            lost = f"message of step {step}"
        elif view.round in self._confirmed_experts and not view.expert_received:
            lost = "expert"
        if lost is not None:
            raise MessageRejected(
                f"the server denies the {lost} of round {view.round} that it confirmed; nothing was sent again; "
                "ask its operator, then start the client again"
            )

    @asynccontextmanager
    async def _heartbeats(self, number: int) -> AsyncIterator[tuple[threading.Event, asyncio.Task[None]]]:
        """Keep this client counted as online while it works on a round; the event is set once that is not open."""
        over = threading.Event()
        beating = asyncio.create_task(self._beat(number, over))
        try:
            yield over, beating
        finally:
            over.set()
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _beat(self, number: int, over: threading.Event) -> None:
        request = fed.HeartbeatRequest(instance_id=self._state.record.instance_id)
        try:
            while True:
                await asyncio.sleep(self._plan.rounds.heartbeat_seconds)
                reply = await self._api.heartbeat(request)
                if not reply.round_open or reply.round != number:
                    return
        finally:
            over.set()

    async def _finish(self, view: fed.FederationView) -> float:
        self._contributor.end(view.round)
        if self._plan.method == "promptfl" or not self._training.model.trained_round:
            # PromptFL's result is the shared prompt; it is also all there is for a client that was never chosen.
            await self._training.take_global_prompt()
        accuracy = await self._training.evaluate()
        self._state.save_result(
            {
                "method": self._plan.method,
                "rounds_completed": view.rounds_completed,
                "trained_round": self._training.model.trained_round,
                "test_accuracy": accuracy,
                "n_train": self._trainer.n_train,
            }
        )
        self._observer.finished(accuracy)
        return accuracy


def _newest_over(view: fed.FederationView) -> int:
    """The newest round that is closed or abandoned."""
    return view.round - 1 if view.phase == fed.FEDERATION_PHASE_ROUND_OPEN else view.round

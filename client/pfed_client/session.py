"""A client's part in a federation, from joining to the last round, over any transport.

Everything that decides what is sent is on disk before it is sent, and training is a pure function of what it starts
from: a session that is killed at any instant and started again on the same state directory trains no round twice and
sends the same bytes. Only prompts leave the client, in the form of the plan's aggregation and matching; gate, labels,
accuracy and loss do not.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

import pfedsecure
from pfed_client.agreement import Agreement, agree, check_pins
from pfed_client.exchange import Download, Exchange
from pfed_client.local_model import Array, LocalModel
from pfed_client.metrics import RoundRecord
from pfed_client.observer import Observer, SilentObserver
from pfed_client.state import ClientState, model_owner
from pfedsecure.errors import MessageRejected, NotAMember, PlanError, StateError
from pfedsecure.wire.api import FederationApi
from pfedsecure.wire.v1 import federation_pb2 as fed

LONGEST_WAIT_SECONDS = 30.0
SHORTEST_WAIT_SECONDS = 1.0
"""Between two questions for what is new, where nothing was: a server that answers at once must not keep a core busy."""


class Report(Protocol):
    """The part of `trainer.RoundReport` that a session needs."""

    @property
    def train_loss(self) -> float: ...

    @property
    def n_experts(self) -> int: ...


class RoundTrainer(Protocol):
    """The part of `trainer.Trainer` that a session needs; it is imported without torch."""

    @property
    def n_train(self) -> int: ...

    def initial_context(self) -> Array: ...

    def new_model(self) -> LocalModel: ...

    def train_round(
        self,
        model: LocalModel,
        start: Array,
        experts: Array,
        round_number: int,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> tuple[LocalModel, Report]: ...

    def evaluate(self, model: LocalModel) -> float: ...


@dataclass(frozen=True)
class _Trained:
    model: LocalModel
    report: Report
    accuracy: float


class _Over(Exception):
    """Raised inside the training thread to end it early."""


class Session:
    """One client in one federation.

    `backbone_digest` is of the weights that `trainer` uses; with the plan it says what a saved model belongs to.
    `executor` runs the training, by default a thread of the event loop's own pool.
    """

    def __init__(
        self,
        api: FederationApi,
        agreement: Agreement,
        state: ClientState,
        trainer: RoundTrainer,
        *,
        backbone_digest: str,
        observer: Observer | None = None,
        executor: Executor | None = None,
    ) -> None:
        self._api = api
        self._agreement = agreement
        self._plan = agreement.plan
        self._state = state
        self._trainer = trainer
        self._owner = model_owner(agreement.plan, backbone_digest)
        self._observer: Observer = observer or SilentObserver()
        self._executor = executor
        self._exchange = Exchange(api, agreement.plan, trainer.initial_context())
        self._model = state.load_model(self._owner) or trainer.new_model()
        self._confirmed: set[tuple[int, str]] = set()  # round and what of it the server gave a receipt for
        # A crash between writing the record and saving the model: that round is going to be trained again, if at all.
        state.metrics.forget_from(self._model.trained_round + 1)

    async def run(self) -> float:
        """Take part until the federation is finished.

        Returns the final model's accuracy on the own test images, in [0, 1]. When cancelled, the training thread ends
        with its next step and nothing is lost. Raises PfedError.
        """
        await self._join()
        try:
            view = await self._newer_than(0)
            while view.phase != fed.FEDERATION_PHASE_FINISHED:
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
            )
        )
        if reply.federation_id != self._agreement.federation_id:
            raise StateError(
                "the server changed to another federation while this client joined; start the client again"
            )
        check_pins(self._state, self._plan, reply.federation_id)
        if self._state.record.plan is None:
            self._state.pin(self._plan, reply.federation_id)
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

    def _has_work(self, view: fed.FederationView) -> bool:
        all_received = view.update_received and (view.expert_received or not self._plan.n_experts)
        return view.phase == fed.FEDERATION_PHASE_ROUND_OPEN and view.selected and not all_received

    async def _take_part(self, view: fed.FederationView) -> None:
        number = view.round
        self._check_confirmed(view)
        over = threading.Event()
        beating = asyncio.create_task(self._beat(number, over))
        try:
            if not await self._train(number, over):
                await beating  # raises what ended it, if that was not the end of the round
                self._observer.left_out(number)
                return
            upload = self._exchange.upload(self._model.context, self._model.n_train)
            if not view.update_received:
                await self._exchange.submit(number, upload)
                self._confirmed.add((number, "update"))
            if self._plan.n_experts and not view.expert_received:
                await self._exchange.publish(number, upload)
                self._confirmed.add((number, "expert"))
        except MessageRejected:
            now = await self._newer_than(0)
            if now.phase == fed.FEDERATION_PHASE_ROUND_OPEN and now.round == number:
                raise
            self._observer.left_out(number)
            return
        finally:
            over.set()
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
        if (record := self._state.metrics.of(number)) is not None:
            self._observer.round_done(record)

    def _check_confirmed(self, view: fed.FederationView) -> None:
        """Raise MessageRejected when the server has not received what it gave a receipt for."""
        for what, received in (("update", view.update_received), ("expert", view.expert_received)):
            if not received and (view.round, what) in self._confirmed:
                raise MessageRejected(
                    f"the server denies the {what} of round {view.round} that it confirmed; nothing was sent again; "
                    "ask its operator, then start the client again"
                )

    async def _beat(self, number: int, over: threading.Event) -> None:
        """Keep this client counted as online while it works; ends, and sets `over`, once the round is not open."""
        request = fed.HeartbeatRequest(instance_id=self._state.record.instance_id)
        try:
            while True:
                await asyncio.sleep(self._plan.rounds.heartbeat_seconds)
                reply = await self._api.heartbeat(request)
                if not reply.round_open or reply.round != number:
                    return
        finally:
            over.set()

    async def _train(self, number: int, over: threading.Event) -> bool:
        """Make `self._model` the one of round `number`, on disk too; False when `over` was set before that."""
        trained_round = self._model.trained_round
        if trained_round == number:
            return True  # by an earlier session that did not live to see it arrive
        if trained_round > number:
            raise StateError(
                f"{self._state.folder}: already trained in round {trained_round}, the server is back at round {number} "
                "(an older copy of its state was restored); give another --state to start anew"
            )
        started = time.monotonic()
        own = self._model.context if trained_round else None
        download = await self._exchange.download(number, own)
        trained = await self._train_in_thread(number, download, over)
        if trained is None:
            return False
        finite = all(np.isfinite(tensor).all() for tensor in trained.model.tensors.values())
        if not (finite and np.isfinite(trained.report.train_loss)):
            raise PlanError(
                f"training diverged in round {number} (loss {trained.report.train_loss}); nothing was sent; "
                "the plan's training.prompt_lr or training.gate_lr is too high for this data"
            )
        upload = self._exchange.upload(trained.model.context, trained.model.n_train)
        self._state.metrics.add(
            RoundRecord(
                round=number,
                train_loss=trained.report.train_loss,
                test_accuracy=trained.accuracy,
                n_train=trained.model.n_train,
                n_experts=trained.report.n_experts,
                bytes_up=download.bytes_up + upload.size,
                bytes_down=download.bytes_down,
                seconds=round(time.monotonic() - started, 3),
            )
        )
        self._state.save_model(trained.model, self._owner)
        self._model = trained.model
        return True

    async def _train_in_thread(self, number: int, download: Download, over: threading.Event) -> _Trained | None:
        def on_step(done: int, total: int, loss: float) -> None:
            if over.is_set():
                raise _Over
            self._observer.step(number, done, total, loss)

        def train() -> _Trained:
            model, report = self._trainer.train_round(
                self._model, download.start, download.experts, number, on_step=on_step
            )
            return _Trained(model, report, self._trainer.evaluate(model))

        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, train)
        except _Over:
            return None

    async def _finish(self, view: fed.FederationView) -> float:
        if self._plan.method == "promptfl" or not self._model.trained_round:
            # PromptFL's result is the shared prompt; it is also all there is for a client that was never chosen.
            newest, _ = await self._exchange.global_prompt(0)
            self._model = replace(self._model, context=newest)
            self._state.save_model(self._model, self._owner)
        loop = asyncio.get_running_loop()
        accuracy = await loop.run_in_executor(self._executor, self._trainer.evaluate, self._model)
        self._state.save_result(
            {
                "method": self._plan.method,
                "rounds_completed": view.rounds_completed,
                "trained_round": self._model.trained_round,
                "test_accuracy": accuracy,
                "n_train": self._trainer.n_train,
            }
        )
        self._observer.finished(accuracy)
        return accuracy

"""A client's model from round to round: trained once in each, and on disk before anything of it is sent.

Without differential privacy training is a pure function of what it starts from: done again after a crash it gives the
same model. With it every training draws noise of its own and is paid for before it starts: one that a crash cut short
is paid for twice, and one whose model is on disk is never done again.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from pfed_client.exchange import Download, Exchange
from pfed_client.ledger.countersigner import Countersigner
from pfed_client.local_model import Array, LocalModel
from pfed_client.metrics import RoundRecord
from pfed_client.observer import Observer
from pfed_client.privacy import Privacy
from pfed_client.state import START_ANEW, ClientState
from pfedsecure.errors import PlanError, StateError


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

    def lent(self, model: LocalModel) -> Array: ...

    def evaluate(self, model: LocalModel) -> float: ...


@dataclass(frozen=True)
class _Trained:
    model: LocalModel
    report: Report
    accuracy: float


class _Over(Exception):
    """Raised inside the training thread to end it early."""


class Training:
    """The newest model of one client, kept in `state` as belonging to `owner`. `executor` runs what takes long."""

    def __init__(
        self,
        exchange: Exchange,
        state: ClientState,
        trainer: RoundTrainer,
        owner: Mapping[str, str],
        observer: Observer,
        executor: Executor | None,
        privacy: Privacy | None,
        countersigner: Countersigner | None,
    ) -> None:
        """With `privacy`, `trainer` is to keep its promise; `countersigner`, where there is one, is shown what it pays.

        Raises StateError or CheckpointMismatch for a saved model that cannot be used.
        """
        self._exchange = exchange
        self._state = state
        self._trainer = trainer
        self._owner = owner
        self._observer = observer
        self._executor = executor
        self._privacy = privacy
        self._countersigner = countersigner
        self._model = state.load_model(owner) or trainer.new_model()
        # A crash between writing the record and saving the model: that round is going to be trained again, if at all.
        state.metrics.forget_from(self._model.trained_round + 1)

    @property
    def model(self) -> LocalModel:
        """What is on disk; a new one before the first round."""
        return self._model

    async def train(self, number: int, over: threading.Event) -> bool:
        """Make `model` the one of round `number`; False when `over` was set before that.

        Raises MessageRejected for a download that cannot be used, PlanError for training that diverges, StateError for
        a round before the newest one, and BudgetExhausted or LedgerError where it cannot be paid for.
        """
        trained_round = self._model.trained_round
        if trained_round == number:
            return True  # by an earlier session that did not live to see it arrive
        if trained_round > number:
            raise StateError(
                f"{self._state.folder}: already trained in round {trained_round}, the server is back at round {number} "
                f"(an older copy of its state was restored); {START_ANEW}"
            )
        started = time.monotonic()
        own = self._model.context if trained_round else None
        download = await self._exchange.download(number, own, trained_round)
        if over.is_set():
            return False
        reservation = None if self._privacy is None else await self._privacy.reserve(number, self._countersigner)
        trained = await self._in_thread(number, download, over)
        if trained is None:
            return False
        finite = all(np.isfinite(tensor).all() for tensor in trained.model.tensors.values())
        loss = trained.report.train_loss
        if self._privacy is not None and not np.isfinite(loss):
            loss = 0.0  # it is made of the images themselves: whether this client goes on must not depend on it
        if not (finite and np.isfinite(loss)):
            raise PlanError(
                f"training diverged in round {number} (loss {loss}); nothing was sent; "
                "the plan's training.prompt_lr or training.gate_lr is too high for this data"
            )
        self._state.metrics.add(
            RoundRecord(
                round=number,
                train_loss=loss,
                test_accuracy=trained.accuracy,
                n_train=trained.model.n_train,
                n_experts=trained.report.n_experts,
                bytes_up=download.bytes_up,
                bytes_down=download.bytes_down,
                seconds=round(time.monotonic() - started, 3),
            )
        )
        self._keep(replace(trained.model, start_digest=download.prompt.digest))
        if reservation is not None:
            await asyncio.to_thread(reservation.commit)
        return True

    async def take_global_prompt(self) -> None:
        """Make the newest global prompt the context of `model`. Raises MessageRejected."""
        newest = await self._exchange.global_prompt(0)
        self._keep(replace(self._model, context=newest.start))

    async def lent(self) -> Array:
        """What peers get of `model`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._trainer.lent, self._model)

    async def evaluate(self) -> float:
        """Accuracy of `model` on the own test images, in [0, 1]."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._trainer.evaluate, self._model)

    def _keep(self, model: LocalModel) -> None:
        self._state.save_model(model, self._owner)
        self._model = model

    async def _in_thread(self, number: int, download: Download, over: threading.Event) -> _Trained | None:
        def on_step(done: int, total: int, loss: float) -> None:
            if over.is_set():
                raise _Over
            self._observer.step(number, done, total, loss)

        def train() -> _Trained:
            model, report = self._trainer.train_round(
                self._model, download.prompt.start, download.experts, number, on_step=on_step
            )
            return _Trained(model, report, self._trainer.evaluate(model))

        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, train)
        except _Over:
            return None

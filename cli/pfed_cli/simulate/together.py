"""All clients of a round train as one: their sessions meet, each in a thread of its own, and one thread computes.

A batch starts once every client has come to train, waits for news that there are none of, or is gone. Whoever is on its
way does one of the three sooner or later, whatever happens to the others: nobody waits for ever, and who is in a batch
is a matter of the federation alone and not of time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from pfed_cli.simulate.elsewhere import TrainerElsewhere
from pfed_client.batched_training import Job, Outcome, train_together
from pfed_client.local_model import Array, LocalModel
from pfed_client.trainer import RoundReport, StepCallback, Trainer
from pfed_client.training import RoundTrainer
from pfedsecure.plan import Plan

T = TypeVar("T")


class Together:
    """`Workers` that train the clients of `plan` in one batch a round; `clients`: how many there are."""

    def __init__(self, plan: Plan, clients: int) -> None:
        self.threads = clients
        self._plan = plan
        self._computing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="training together")
        self._version: Callable[[], int] = lambda: 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._present: set[str] = set()
        self._seen: dict[str, int] = {}
        self._come: dict[str, tuple[Job, Future[Outcome]]] = {}
        self._stopped = False

    def start(self, names: Sequence[str], version: Callable[[], int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._present = set(names)
        self._version = version

    def trainer(self, name: str, trainer: Trainer) -> RoundTrainer:
        return TogetherTrainer(self, name, trainer)

    @contextmanager
    def waiting(self, name: str, version: int) -> Iterator[None]:
        self._seen[name] = version
        self._meet()
        try:
            yield
        finally:
            del self._seen[name]

    def gone(self, name: str) -> None:
        self._present.discard(name)
        self._meet()

    def stop(self) -> None:
        self._stopped = True
        for _, outcome in self._come.values():
            outcome.set_exception(asyncio.CancelledError())
        self._come.clear()
        self._computing.shutdown(cancel_futures=True)

    def train(self, name: str, job: Job) -> tuple[LocalModel, RoundReport]:
        """Wait for the batch that the client's job is in; from a thread of its own."""
        assert self._loop is not None
        outcome: Future[Outcome] = Future()
        self._loop.call_soon_threadsafe(self._arrive, name, job, outcome)
        found = outcome.result()
        if isinstance(found, Exception):
            raise found
        return found

    def alone(self, call: Callable[[LocalModel], T], model: LocalModel) -> Future[T]:
        """`call(model)`, in the thread that computes."""
        return self._computing.submit(call, model)

    def _arrive(self, name: str, job: Job, outcome: Future[Outcome]) -> None:
        if self._stopped:
            outcome.set_exception(asyncio.CancelledError())
            return
        self._come[name] = job, outcome
        self._meet()

    def _meet(self) -> None:
        """Start the batch if nobody is on the way."""
        newest = self._version()
        on_the_way = (name for name in self._present if name not in self._come and self._seen.get(name) != newest)
        if not self._come or any(True for _ in on_the_way):
            return
        come = [self._come[name] for name in sorted(self._come)]
        self._come = {}
        self._computing.submit(self._train, [job for job, _ in come], [outcome for _, outcome in come])

    def _train(self, jobs: Sequence[Job], outcomes: Sequence[Future[Outcome]]) -> None:
        try:
            found = train_together(self._plan, jobs)
        except BaseException as error:
            for outcome in outcomes:
                outcome.set_exception(error)
            return
        for outcome, came in zip(outcomes, found, strict=True):
            outcome.set_result(came)


class TogetherTrainer(TrainerElsewhere):
    """A client's trainer that trains in the batches of `together`; what else it computes waits for its turn."""

    def __init__(self, together: Together, name: str, trainer: Trainer) -> None:
        super().__init__(name, trainer)
        self._together = together

    def train_round(
        self,
        model: LocalModel,
        start: Array,
        experts: Array,
        round_number: int,
        on_step: StepCallback | None = None,
    ) -> tuple[LocalModel, RoundReport]:
        return self._together.train(self._name, Job(self._trainer, model, start, experts, round_number, on_step))

    def lent(self, model: LocalModel) -> Array:
        return self._together.alone(self._trainer.lent, model).result()

    def evaluate(self, model: LocalModel) -> float:
        return self._together.alone(self._trainer.evaluate, model).result()

"""What many members ask for at the same moment, answered in one step of the federation instead of one after the other.

When a step of a round opens everybody calls at once. A step takes its turn, a thread, and often a transaction that is
on disk when it ends: for a thousand members one after the other that is a long time, for all who wait it is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Generic, Protocol, TypeVar

from pfed_server.faults import STORAGE_FAULTS
from pfed_server.federation import Federation

AT_ONCE = 64
"""Askers in one step: so that others' steps wait for no more than these."""


class Asking(Protocol):
    """What a member asks for."""

    @property
    def name(self) -> str:
        """The member's."""


Asked = TypeVar("Asked", bound=Asking)
Answer = TypeVar("Answer")
T = TypeVar("T")


class Together(Generic[Asked, Answer]):
    """Calls of a federation's members that one step answers, as many as have come when its turn is there.

    `answer_all` gets what they ask for, in the order it came, by their names, and gives each an answer or the exception
    that its call raises; it runs inside `Federation.exclusively`. What a member asks for while something that it asked
    for waits is left to a later step. A fault of the storage that `answer_all` raises itself all of them get. Anything
    else may be one member's doing, say a value that the database does not take: then each is answered by itself.
    """

    def __init__(
        self,
        federation: Federation,
        answer_all: Callable[[Mapping[str, Asked]], Awaitable[Mapping[str, Answer | Exception]]],
    ) -> None:
        self._federation = federation
        self._answer_all = answer_all
        self._waiting: list[tuple[Asked, asyncio.Future[Answer]]] = []
        self._turns: set[asyncio.Task[None]] = set()

    async def __call__(self, asked: Asked) -> Answer:
        """The answer. A caller that is cancelled is not waited for; what it asked for may have happened."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer))
        if len(self._waiting) == 1:
            self._take_a_turn()
        return await answer

    def _take_a_turn(self) -> None:
        turn = asyncio.create_task(self._turn())
        self._turns.add(turn)
        turn.add_done_callback(self._turns.discard)

    async def _turn(self) -> None:
        taken: dict[str, tuple[Asked, asyncio.Future[Answer]]] = {}
        try:
            await self._federation.exclusively(partial(self._step, taken))
        except Exception as error:
            if not taken:  # the step's turn did not come: say, there is no database to get its lock from
                self._take(taken)
            for _, answer in taken.values():
                _raise(answer, error)

    async def _step(self, taken: dict[str, tuple[Asked, asyncio.Future[Answer]]]) -> None:
        self._take(taken)
        answers = await self._answers({name: asked for name, (asked, _) in taken.items()})
        for name, (_, waiting) in taken.items():
            answer = answers[name]
            if isinstance(answer, Exception):
                _raise(waiting, answer)
            elif not waiting.done():
                waiting.set_result(answer)

    async def _answers(self, asked: Mapping[str, Asked]) -> Mapping[str, Answer | Exception]:
        try:
            return await self._answer_all(asked)
        except STORAGE_FAULTS:
            raise
        except Exception:
            if len(asked) == 1:
                raise
        answers: dict[str, Answer | Exception] = {}
        for name, each in asked.items():
            try:
                answers.update(await self._answers({name: each}))
            except Exception as error:
                answers[name] = error
        return answers

    def _take(self, taken: dict[str, tuple[Asked, asyncio.Future[Answer]]]) -> None:
        """Move what waits to `taken`, one thing of each member; what is left gets the next turn."""
        left = []
        for asked, answer in self._waiting:
            if answer.cancelled():
                continue
            if asked.name in taken or len(taken) >= AT_ONCE:
                left.append((asked, answer))
            else:
                taken[asked.name] = asked, answer
        self._waiting = left
        if left:
            self._take_a_turn()


def _raise(answer: asyncio.Future[Answer], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # its caller may be cancelled before it is told


def outcome(work: Callable[[], T]) -> T | Exception:
    """What `work` returns, or the exception that it raises: one member's mistake is not another's."""
    try:
        return work()
    except Exception as error:
        return error

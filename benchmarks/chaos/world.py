"""A world for one federation: its processes, its network, its clock, and time that passes at once."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from sqlalchemy.exc import OperationalError

from .cast import MEMBERS, Kind, plan_of, the_cast
from .network import Network
from .processes import MemberProcess, ServerProcess
from .storage import Killed
from .virtual_time import VirtualClock, VirtualTimeLoop
from .watch import Watch

LONGEST_FEDERATION = 6 * 3600.0
"""Seconds in which one with nothing in its way has to end, whatever happened to it before."""


class Violation(AssertionError):
    """Something is not as it must be."""


class World:
    """Nobody runs in it yet. Its faults are drawn from `seed`; `folder` is empty. Close it in the end."""

    def __init__(self, kind: Kind, folder: Path, seed: int) -> None:
        self.kind: Kind = kind
        self.folder = folder
        self.plan = plan_of(kind, seed)
        self.cast = the_cast()
        self.loop = VirtualTimeLoop()
        self.loop.set_exception_handler(self._unhandled)
        self.clock = VirtualClock(self.loop)
        self._problems: list[str] = []
        self._log = _Errors(self)
        logging.getLogger("pfed_server").addHandler(self._log)
        chance = random.Random(seed)  # noqa: S311 - faults need no secrets
        self.server: ServerProcess | None = None
        self.members = {
            name: MemberProcess(
                self,
                name,
                Network(name, self._running_server, random.Random(chance.random()), self.report),  # noqa: S311
            )
            for name in MEMBERS
        }
        self.watch = Watch(self)
        self._dying: set[asyncio.Future[None]] = set()

    def close(self) -> None:
        self._do(self._end_all())
        self.loop.close()
        logging.getLogger("pfed_server").removeHandler(self._log)

    def report(self, problem: str) -> None:
        """Something is wrong: `check` says so."""
        self._problems.append(problem)

    def check(self) -> None:
        """Raises Violation when something is, or was, not as it must be."""
        if self.server is not None:
            self.watch.look()
        if self._problems:
            raise Violation("; ".join(self._problems))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self._do(asyncio.sleep(seconds))

    def start_server(self) -> None:
        if self.server is None:
            self._do(self._start_server())

    def kill_server(self) -> None:
        if self.server is not None:
            self._do(self.server.kill())
            self.server = None

    def stop_server(self) -> None:
        if self.server is not None:
            self._do(self.server.stop())
            self.server = None

    def server_died(self, process: ServerProcess) -> None:
        """Of itself, in a transaction."""
        if self.server is process:
            self.server = None
        dying = asyncio.ensure_future(process.kill())
        self._dying.add(dying)
        dying.add_done_callback(self._dying.discard)

    def start(self, name: str) -> None:
        self._do(_at_once(self.members[name].start))

    def kill(self, name: str) -> None:
        self._do(self.members[name].kill())

    def leave(self, name: str) -> None:
        self._do(self.members[name].leave())

    def end(self) -> None:
        """Mend everything, start everybody, and wait: the federation has to come to its end, with all members."""
        for member in self.members.values():
            member.network.mend()
        if self.server is not None:
            self.server.store.mend()
        self.start_server()
        waited = 0.0
        while waited < LONGEST_FEDERATION and not all(member.finished for member in self.members.values()):
            self.start_server()
            for member in self.members.values():
                if not member.finished:
                    self.start(member.name)
            self.run(60)
            waited += 60
            self.check()
        late = sorted(member.name for member in self.members.values() if not member.finished and not member.ended)
        completed = 0 if self.server is None else self.server.coordinator._federation.state.rounds_completed
        if completed < self.plan.rounds.count or late:
            raise Violation(
                f"{completed} of {self.plan.rounds.count} rounds in {waited:.0f} s without faults; "
                f"not at their end: {late}"
            )

    async def _start_server(self) -> None:
        if self._dying:
            await asyncio.wait(self._dying)  # a process that is dead holds no lock any more
        process = ServerProcess(self)
        try:
            await process.start()
        except (Killed, OperationalError):
            return  # whoever watches over it starts it again
        self.server = process

    def _running_server(self) -> ServerProcess:
        if self.server is None:
            raise Killed
        return self.server

    def _do(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)

    async def _end_all(self) -> None:
        for member in self.members.values():
            await member.kill()
        if self.server is not None:
            await self.server.kill()
        if self._dying:
            await asyncio.wait(self._dying)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    def _unhandled(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, (Killed, OperationalError)):
            self.report(f"unhandled: {context.get('message')} {error!r}")


class _Errors(logging.Handler):
    """Reports what the server logs as its own fault."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, (Killed, OperationalError)):
            self._world.report(f"the server says: {record.getMessage()} {error!r}")


async def _at_once(work: Any) -> None:
    work()

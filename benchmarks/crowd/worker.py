"""A process of many clients: `python -m pfed_benchmarks.crowd.worker SETTING`, a JSON object, writes what they saw."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel

from pfed_client.agreement import agree
from pfed_client.grpc_api import GrpcApi
from pfed_client.observer import SilentObserver
from pfed_client.session import Session
from pfed_client.state import ClientState
from pfed_server.descriptors import make_room
from pfedsecure.console import Address
from pfedsecure.errors import PfedError
from pfedsecure.pki.identity import Identity
from pfedsecure.plan import Plan

from .timing import Seen
from .trainer import SeededTrainer

JOINING_AT_ONCE = 8
"""Of one process."""
RETRY_SECONDS = 300.0
LESS_URGENT = 5
"""By so much the clients give way to the server: real ones have machines of their own."""
SWITCH_SECONDS = 0.001
"""A thread that computes gives way to the one that sends and receives, whose calls are timed."""
THREADS = 2
BACKBONE = "load"


class Slow(BaseModel):
    """A client whose training takes so long in one round."""

    name: str
    round: int
    seconds: float


class Setting(BaseModel):
    """What a process is told."""

    plan_file: Path
    identities: Path
    states: Path
    address: tuple[str, int]
    names: list[str]
    slow: Slow | None
    result: Path


class ClientSeen(BaseModel):
    """One client: when it first called and when it had joined, by the monotonic clock, and what went wrong."""

    began: float = 0.0
    joined: float | None = None
    borrowed: dict[int, int] = {}
    """By round, how many experts."""
    retries: list[tuple[float, str]] = []
    """When a call had to be tried again, and why: the class of the error."""
    errors: list[str] = []


class Result(BaseModel):
    """What the clients of a process saw."""

    calls: dict[str, list[tuple[float, float]]]
    places: dict[str, float]
    clients: dict[str, ClientSeen]


class Watch(SilentObserver):
    """Notes of one client what becomes of it; `on_joined` is called once."""

    def __init__(self, seen: ClientSeen, on_joined: asyncio.Event) -> None:
        self._seen = seen
        self._on_joined = on_joined

    def joined(self, plan: Plan) -> None:
        self._seen.joined = time.monotonic()
        self._on_joined.set()

    def left_out(self, round_number: int) -> None:
        self._seen.errors.append(f"round {round_number} was closed without it")

    def withdrew(self, round_number: int, reason: str) -> None:
        self._seen.errors.append(f"left round {round_number}: {reason}")

    def retrying(self, error: PfedError, _seconds: float) -> None:
        self._seen.retries.append((time.monotonic(), type(error).__name__))


class Crowd:
    """The clients of this process."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._plan = Plan.from_toml(setting.plan_file)
        self._seen = Seen()
        self._clients = {name: ClientSeen() for name in setting.names}
        self._gate = asyncio.Semaphore(JOINING_AT_ONCE)

    async def run(self) -> Result:
        """All of them, until the federation is finished."""
        await asyncio.gather(*(self._live(name) for name in self._setting.names))
        return Result(calls=self._seen.calls, places=self._seen.places, clients=self._clients)

    async def _live(self, name: str) -> None:
        seen = self._clients[name]
        try:
            await self._take_part(name, seen)
        except Exception as error:  # one client's end is not that of the others; it is counted
            logging.getLogger(name).exception("ended")
            seen.errors.append(f"{type(error).__name__}: {error}")

    async def _take_part(self, name: str, seen: ClientSeen) -> None:
        setting, joined = self._setting, asyncio.Event()
        watch = Watch(seen, joined)
        identity = Identity.load(setting.identities / name, role="client")
        await self._gate.acquire()
        entering = asyncio.create_task(self._leave_gate(joined))
        seen.began = time.monotonic()
        try:
            with ClientState(setting.states / name) as state:
                state.claim(name)
                async with GrpcApi(
                    Address(*setting.address), identity, retry_seconds=RETRY_SECONDS, on_retry=watch.retrying
                ) as connection:
                    api = self._seen.timed(connection)
                    session = Session(
                        api,
                        await agree(api, state, self._plan),
                        state,
                        self._trainer(name),
                        backbone_digest=BACKBONE,
                        identity=identity,
                        observer=watch,
                    )
                    await session.run()
                seen.borrowed = {record.round: record.n_experts for record in state.metrics.read()}
        finally:
            joined.set()
            await entering

    def _trainer(self, name: str) -> SeededTrainer:
        slow = self._setting.slow
        return SeededTrainer(self._plan, name, {} if slow is None or slow.name != name else {slow.round: slow.seconds})

    async def _leave_gate(self, joined: asyncio.Event) -> None:
        await joined.wait()
        self._gate.release()


def main() -> None:
    setting = Setting.model_validate_json(sys.argv[1])
    os.nice(LESS_URGENT)
    sys.setswitchinterval(SWITCH_SECONDS)
    make_room(3 * len(setting.names))
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", level=logging.WARNING)

    async def run() -> Result:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        return await Crowd(setting).run()

    setting.result.write_text(asyncio.run(run()).model_dump_json())


if __name__ == "__main__":
    main()

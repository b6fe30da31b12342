"""A process that makes small calls in members' names: `python -m pfed_benchmarks.crowd.probing SETTING`, a JSON object.

It ends when it is told to, and writes how long each call took. Members do these calls themselves while they compute; a
call that waits for its caller's own processor says nothing of the server, so these come from a process that does
nothing else, as those of a real member come from a machine of its own.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from pydantic import BaseModel

from pfed_client.grpc_api import GrpcApi
from pfed_client.state import read_record
from pfed_server.descriptors import make_room
from pfedsecure.console import Address
from pfedsecure.errors import NotAMember
from pfedsecure.pki.identity import Identity
from pfedsecure.wire.v1 import federation_pb2 as fed

from .timing import Seen

RETRY_SECONDS = 300.0
LOOK_SECONDS = 0.5


class Setting(BaseModel):
    """What the process is told. Each of `names` makes two small calls every so many `seconds`."""

    identities: Path
    states: Path
    address: tuple[str, int]
    names: list[str]
    seconds: float
    result: Path


class Probes(BaseModel):
    """By method, when each call began and how many seconds it took; and what went wrong."""

    calls: dict[str, list[tuple[float, float]]] = {}
    errors: list[str] = []


class Probing:
    """The calls of this process."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._seen = Seen()
        self._errors: list[str] = []

    async def run(self) -> Probes:
        """Until SIGTERM."""
        told = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
        calling = [asyncio.create_task(self._call(number, name)) for number, name in enumerate(self._setting.names)]
        await told.wait()
        for task in calling:
            task.cancel()
        await asyncio.gather(*calling, return_exceptions=True)
        return Probes(calls=self._seen.calls, errors=self._errors)

    async def _call(self, number: int, name: str) -> None:
        setting = self._setting
        try:
            instance_id = await self._instance_of(name)
            identity = Identity.load(setting.identities / name, role="client")
            await asyncio.sleep(setting.seconds * number / len(setting.names))  # not all at the same moment
            address = Address(*setting.address)
            async with GrpcApi(address, identity, retry_seconds=RETRY_SECONDS) as connection:
                api = self._seen.timed(connection)
                while True:
                    try:
                        await api.heartbeat(fed.HeartbeatRequest(instance_id=instance_id))
                        await api.get_plan()
                    except NotAMember:  # it is about to join
                        pass
                    await asyncio.sleep(setting.seconds)
        except Exception as error:  # one member's end is not that of the others; it is counted
            self._errors.append(f"a small call of {name}: {type(error).__name__}: {error}")

    async def _instance_of(self, name: str) -> str:
        """Under which a client takes part, as soon as it has written that down."""
        while (record := read_record(self._setting.states / name)) is None:
            await asyncio.sleep(LOOK_SECONDS)
        return record.instance_id


def main() -> None:
    setting = Setting.model_validate_json(sys.argv[1])
    make_room(3 * len(setting.names))
    setting.result.write_text(asyncio.run(Probing(setting).run()).model_dump_json())


if __name__ == "__main__":
    main()

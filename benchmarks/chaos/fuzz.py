"""Random messages on every call of a real server, over mutual TLS: whatever they say, it answers, and stays.

Messages are of three kinds: any bytes; messages whose fields have extreme values; and such messages with bytes changed,
left out, or put in. The caller is a member in an open round, so that most of what reads messages is reached.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from pfedsecure.pki.development import DEVELOPMENT_FOLDER, enrol
from pfedsecure.plan import Plan
from pfedsecure.wire.options import CHANNEL_OPTIONS
from pfedsecure.wire.status import error_raised_by_server
from pfedsecure.wire.tls import channel_credentials
from pfedsecure.wire.upload import lost_answer
from pfedsecure.wire.v1 import federation_pb2, operations_pb2, round_pb2
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1.federation_pb2_grpc import FederationStub

from ..server_process import ServerProcess

T = TypeVar("T")

CHANNELS, AT_ONCE = 4, 12
"""Connections, and calls on each of them: less than the server takes as streams of one connection."""
CALL_SECONDS = 10.0
AWAITED_SECONDS = 0.1
"""Of Await, which stays open until there is something to tell."""
REFUSED_SECONDS = 0.02
"""After which a call is tried again that the transport took no more streams for: cancelled ones count for a while."""
PATIENCE_SECONDS = 30.0
"""Within which a server that lives has a stream again."""
MOST_GROWTH_MIB = 256.0
LOG_CHARACTERS = 4_000
"""Of the server's log, shown with what broke: the folder that it lies in is gone afterwards."""
_APART = ("grpc.use_local_subchannel_pool", 1)
"""So that channels to the same server do not share one connection."""
CRASHES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}
"""What a server answers when something went wrong in it that it did not expect, or in its storage."""
_NUMBERS = (0, 1, 2, 7, 255, 2**31 - 1, 2**32 - 1, 2**63 - 1)
_FLOATS = (0.0, 1.0, -1.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"))
_PLAN = """
class_names = ["cat", "dog"]
[prompt]
context_length = 4
[mixture]
experts = 2
gate_width = 32
[rounds]
count = 1000000
minimum_cohort = 1
deadline_seconds = 3600
[backbone]
model = "tiny-clip"
pretrained = "embedded"
[protection]
aggregation = "plain"
experts = "plain"
matching = "plain"
"""


@dataclass
class Fuzzed:
    """How many messages were answered, with what codes, and the server's memory; `problem`: what broke, if anything."""

    answered: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    mib_before: float = 0.0
    mib_after: float = 0.0
    problem: str | None = None


def fuzz(count: int, seed: int) -> Fuzzed:
    """Send so many messages, or until something breaks."""
    with tempfile.TemporaryDirectory(prefix="pfed-fuzz-") as name:
        folder = Path(name)
        (folder / "plan.toml").write_text(_PLAN)
        limits = ["--calls-a-second", "1000000", "--calls-at-once", "1000"]
        with ServerProcess(folder, ["--tls", "--plan", "plan.toml", "--state", "state", *limits]) as server:
            return asyncio.run(_fuzz(count, seed, folder, server))


def methods() -> list[MethodDescriptor]:
    """Every call of proto/."""
    files = (federation_pb2, round_pb2, operations_pb2)
    services = (service for file in files for service in file.DESCRIPTOR.services_by_name.values())
    return [method for service in services for method in service.methods]


class Messages:
    """An endless supply of messages for calls, from `seed`."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)  # noqa: S311 - not for secrets

    def method(self, of: list[MethodDescriptor]) -> MethodDescriptor:
        return self._chance.choice(of)

    def stream(self, method: MethodDescriptor) -> list[bytes]:
        """What an upload consists of."""
        return [self.message(method) for _ in range(self._chance.randint(0, 4))]

    def message(self, method: MethodDescriptor) -> bytes:
        kind = self._chance.random()
        if kind < 0.2:
            return self._chance.randbytes(self._chance.choice((0, 1, 3, 17, 200, 5000)))
        made = GetMessageClass(method.input_type)()
        self._fill(made)
        content = made.SerializeToString()
        return content if kind < 0.6 else self._changed(content)

    def _fill(self, message: Message) -> None:
        for one in message.DESCRIPTOR.fields:
            if self._chance.random() < 0.25:
                continue
            if one.is_repeated:
                values = [self._value(one) for _ in range(self._chance.choice((0, 1, 2, 40)))]
                if one.message_type is None:
                    getattr(message, one.name).extend(values)
                else:
                    for _ in values:
                        self._fill(getattr(message, one.name).add())
            elif one.message_type is not None:
                self._fill(getattr(message, one.name))
            else:
                setattr(message, one.name, self._value(one))

    def _value(self, one: Any) -> Any:
        match one.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if one.type == FieldDescriptor.TYPE_BYTES:
                return self._chance.randbytes(self._chance.choice((0, 1, 32, 64, 3000)))
            case FieldDescriptor.CPPTYPE_STRING:
                return self._chance.choice(("", "a", "fuzz", "\x00\n\x1b[31m", "ä" * 500, "../../etc"))
            case FieldDescriptor.CPPTYPE_BOOL:
                return self._chance.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return self._chance.choice(_FLOATS)
            case FieldDescriptor.CPPTYPE_ENUM:
                return self._chance.choice((0, 1, 2, 99))
            case FieldDescriptor.CPPTYPE_UINT64 | FieldDescriptor.CPPTYPE_INT64:
                return self._chance.choice(_NUMBERS)
            case FieldDescriptor.CPPTYPE_INT32:
                return self._chance.choice([number for number in _NUMBERS if number < 2**31])
            case FieldDescriptor.CPPTYPE_UINT32:
                return self._chance.choice([number for number in _NUMBERS if number < 2**32])
        return None

    def _changed(self, content: bytes) -> bytes:
        found = bytearray(content)
        for _ in range(self._chance.randint(1, 4)):
            place = self._chance.randrange(len(found) + 1)
            match self._chance.randrange(3):
                case 0 if place < len(found):
                    found[place] ^= 1 << self._chance.randrange(8)
                case 1:
                    del found[place : place + self._chance.randint(1, 8)]
                case _:
                    found[place:place] = self._chance.randbytes(self._chance.randint(1, 8))
        return bytes(found)


async def _fuzz(count: int, seed: int, folder: Path, server: ServerProcess) -> Fuzzed:
    identity = enrol(folder / DEVELOPMENT_FOLDER, "fuzz", "client", folder / "fuzz")
    plan = Plan.from_toml(folder / "plan.toml")
    found, messages, calls = Fuzzed(mib_before=server.mib), Messages(seed), methods()
    instance, process, address = "fuzz", server.process, str(server.address)
    left = count

    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(
                grpc.aio.secure_channel(address, channel_credentials(identity), [*CHANNEL_OPTIONS, _APART])
            )
            for _ in range(CHANNELS)
        ]

        async def join() -> None:
            request = fed.JoinRequest(plan_digest=plan.digest(), instance_id=instance)
            try:
                await FederationStub(channels[0]).Join(request, timeout=30)  # type: ignore[no-untyped-call]
            except grpc.aio.AioRpcError as error:
                if not _took_no_stream(error):
                    raise
                raise _Unanswered(repr(error)) from None

        async def worker(channel: grpc.aio.Channel) -> None:
            nonlocal left
            while left > 0 and found.problem is None:
                left -= 1
                method = messages.method(calls)
                requests = messages.stream(method) if method.client_streaming else [messages.message(method)]
                error = await _patiently(partial(_call, channel, method, requests))
                code = grpc.StatusCode.OK if error is None else error.code()
                found.codes[code.name] += 1
                if code in CRASHES:
                    found.problem = f"{method.full_name} was answered with {error!r}; {_log(server)}"
                else:
                    found.answered += 1
                if found.answered % 500 == 0 and found.problem is None:
                    await _patiently(join)  # a message may have been a good Leave

        try:
            await _patiently(join)
            async with asyncio.TaskGroup() as group:
                for channel in channels:
                    for _ in range(AT_ONCE):
                        group.create_task(worker(channel))
            await _patiently(join)  # what the last messages did to it may show a little later
        except* _Unanswered as unanswered:
            found.problem = found.problem or f"no answer, {unanswered.exceptions[0]}; {_log(server)}"
    found.mib_after = server.mib if process.poll() is None else 0.0
    if found.problem is None and found.mib_after > found.mib_before + MOST_GROWTH_MIB:
        found.problem = f"the server grew from {found.mib_before:.0f} to {found.mib_after:.0f} MiB"
    if found.problem is None and (failures := server.failures()):
        found.problem = f"{len(failures)} calls failed in the server, whatever it answered; the first: {failures[0]}"
    return found


def _log(server: ServerProcess) -> str:
    return f"the server's log ends with:\n{server.said(LOG_CHARACTERS)}"


class _Unanswered(Exception):
    """The transport took no more streams, so that nothing was read, or what the server said is lost, or it is gone."""


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    """What `call` returns, once it is answered. Raises _Unanswered when that takes too long."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await call()
        except _Unanswered:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(REFUSED_SECONDS)


async def _call(
    channel: grpc.aio.Channel, method: MethodDescriptor, requests: list[bytes]
) -> grpc.aio.AioRpcError | None:
    """What `requests` to `method` are answered with, where that is not OK. Raises _Unanswered."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    start: Any = kinds[method.client_streaming, method.server_streaming](path)

    async def upload() -> AsyncIterator[bytes]:
        for request in requests:
            yield request

    request = upload() if method.client_streaming else requests[0]
    call = start(request, timeout=AWAITED_SECONDS if method.name == "Await" else CALL_SECONDS)
    try:
        if method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except asyncio.CancelledError as error:
        if method.client_streaming and lost_answer(error):
            raise _Unanswered(repr(error)) from None
        raise
    except grpc.aio.AioRpcError as error:
        if _took_no_stream(error) or (method.client_streaming and lost_answer(error)):
            raise _Unanswered(repr(error)) from None
        return error
    return None


def _took_no_stream(error: grpc.aio.AioRpcError) -> bool:
    """Whether the transport took no more streams. The server itself says the like where its storage fails."""
    return error.code() is grpc.StatusCode.UNAVAILABLE and error_raised_by_server(error) is None

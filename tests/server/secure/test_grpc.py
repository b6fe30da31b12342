"""The aggregation's calls behind a real gRPC server with mutual TLS: chunks, limits, and what cannot be read."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
import pytest

from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.aggregation.factory import client_aggregation
from pfedsecure.aggregation.interface import Contribution, RoundIdentity
from pfedsecure.console import Address
from pfedsecure.errors import IdentityError, MessageRejected, NotAMember
from pfedsecure.plan import Plan
from pfedsecure.wire.payloads import CHUNK_BYTES, Payload, join_one, split
from pfedsecure.wire.status import raise_from
from pfedsecure.wire.tensors import from_tensor
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.payload_pb2 import PayloadChunk, PayloadHeader, Tensor

MakePlan = Callable[..., Plan]
WIDE = (100, 2000)
"""A context of 800 kB, so that a masked vector takes several chunks."""
FOUR = ("anna", "bert", "cleo", "dora")


async def outcome(call: Any) -> Any:
    """The answer to a call, or the error that a client of ours would raise."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise_from(error)


class Scene:
    """Four clients on connections of their own, in the first step of round 1."""

    def __init__(self, plan: Plan, coordinator: Coordinator, members: Any, stubs: dict[str, Any]) -> None:
        self.coordinator = coordinator
        self.stubs = stubs
        rng = np.random.default_rng(0)
        self.contexts = {name: rng.uniform(-0.5, 0.5, WIDE).astype(np.float32) for name in FOUR}
        self.sides = {name: client_aggregation(plan, WIDE, members.identity(name)) for name in FOUR}
        self.clients: dict[str, Any] = {}

    async def view(self, name: str = "anna", seen: int = 0) -> Any:
        request = fed.AwaitRequest(instance_id="1", seen_version=seen, wait_seconds=5 if seen else 0)
        return await outcome(self.stubs[name].federation.Await(request))

    async def opened(self, number: int, step: int) -> None:
        view = await self.view()
        while (view.round, view.step) != (number, step):
            view = await self.view(seen=view.version)

    async def enter(self) -> None:
        federation_id = (await self.stubs["anna"].federation.GetPlan(fed.GetPlanRequest())).federation_id
        identity = RoundIdentity(federation_id, 1, hashlib.sha256(b"").hexdigest())
        for name, side in self.sides.items():
            self.clients[name] = side.begin(identity, Contribution(self.contexts[name], 1), lambda saved: None)

    async def request(self, name: str, step: int, number: int = 1) -> Any:
        return await outcome(join_one(self.stubs[name].round.GetStepRequest(rnd.StepRequest(round=number, step=step))))

    async def submit(self, name: str, step: int, message: bytes) -> Any:
        return await outcome(self.stubs[name].round.SubmitStep(split(Payload(1, message, step=step))))

    async def send(self, name: str, step: int) -> Any:
        if step > 1:
            payload = await self.request(name, step)
            assert (payload.round, payload.step) == (1, step)
            self.clients[name].answer(payload.data, datetime.now(UTC))
        message = self.clients[name].message
        assert (await self.submit(name, step, message)).sha256 == hashlib.sha256(message).digest()
        return message


@pytest.fixture
def scene(secure_plan: MakePlan, members: Any, connect: Any) -> Any:
    """`async with scene() as scene`"""

    @asynccontextmanager
    async def running() -> AsyncIterator[Scene]:
        plan = secure_plan(clients=4, deadline_seconds=120, step_seconds=120)
        store = SqlStore.in_memory(plan)
        coordinator = Coordinator(plan, store, context_shape=WIDE, authority=members.server.authority)
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(serving(coordinator, Address("127.0.0.1", 0), members.server))
            stubs = {}
            for name in (*FOUR, "emil"):
                stubs[name] = await stack.enter_async_context(connect(address, members.identity(name)))
            olga = members.identity("olga", "operator")
            stubs["olga"] = await stack.enter_async_context(connect(address, olga))
            for name in FOUR:
                await stubs[name].federation.Join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="1"))
            scene = Scene(plan, coordinator, members, stubs)
            await scene.opened(1, 1)
            await scene.enter()
            yield scene
        store.close()

    return running


async def test_a_round_with_messages_of_several_chunks(scene: Any) -> None:
    async with scene() as this, asyncio.timeout(60):
        for step in range(1, 6):
            await this.opened(1, step)
            sent = [await this.send(name, step) for name in FOUR]
            if step == 3:
                assert min(map(len, sent)) > 2 * CHUNK_BYTES
        await this.opened(2, 1)
        reply = this.stubs["bert"].round.GetGlobalPrompt(rnd.GetGlobalPromptRequest(round=2))
        prompt = from_tensor(Tensor.FromString((await join_one(reply)).data), WIDE, "prompt")
        oracle = np.mean([context.astype(np.float64) for context in this.contexts.values()], axis=0)
        np.testing.assert_allclose(prompt, oracle, rtol=0, atol=1e-3)


async def test_the_step_stands_in_the_header(scene: Any) -> None:
    async with scene() as this:
        message = this.clients["anna"].message
        with pytest.raises(MessageRejected, match="step 0 of round 1 is not open, step 1 is"):
            await outcome(this.stubs["anna"].round.SubmitStep(split(Payload(1, message))))
        with pytest.raises(MessageRejected, match="step 4294967295 of round 1 is not open"):
            await this.submit("anna", 2**32 - 1, message)
        assert (await this.view()).step_received == 0
        await this.send("anna", 1)
        assert (await this.view()).step_received == 1


async def test_a_message_is_no_longer_than_the_aggregations_longest(scene: Any) -> None:
    async with scene() as this:
        limit = this.coordinator.max_upload_bytes

        async def announced(size: int) -> AsyncIterator[PayloadChunk]:
            yield PayloadChunk(header=PayloadHeader(round=1, step=1, size=size))
            await asyncio.sleep(3600)

        call = this.stubs["anna"].round.SubmitStep(announced(limit + 1))
        with pytest.raises(MessageRejected, match=f"a payload of {limit + 1} bytes is over the limit of {limit}"):
            await asyncio.wait_for(outcome(call), 10)
        with pytest.raises(MessageRejected, match=f"an advertisement has {limit} bytes, at most 4096 are allowed"):
            await this.submit("anna", 1, bytes(limit))
        await this.send("anna", 1)


async def test_what_cannot_be_read_is_refused_in_every_step_and_harms_nobody(scene: Any) -> None:
    async with scene() as this, asyncio.timeout(60):
        for step in range(1, 6):
            await this.opened(1, step)
            for content in (b"\xff" * 40, b"", np.random.default_rng(step).bytes(400)):
                with pytest.raises(MessageRejected):
                    await this.submit("anna", step, content)
            upload = this.stubs["anna"].raw.stream_unary("/pfedsecure.v1.Round/SubmitStep")
            with pytest.raises(MessageRejected, match="cannot be decoded"):
                await outcome(upload(iter([b"\xff"])))
            damaged = list(split(Payload(1, this.clients["anna"].message, step=step)))
            damaged[1].data = b"\0" + damaged[1].data[1:]
            with pytest.raises(MessageRejected, match="does not match its digest"):
                await outcome(this.stubs["anna"].round.SubmitStep(iter(damaged)))
            for name in FOUR:
                await this.send(name, step)
        await this.opened(2, 1)
        assert (await this.view()).rounds_completed == 1


async def test_requests_are_for_members_of_the_cohort_about_the_open_step(scene: Any) -> None:
    async with scene() as this:
        with pytest.raises(NotAMember):
            await this.request("emil", 1)
        with pytest.raises(IdentityError, match="takes a certificate for a client"):
            await this.request("olga", 1)
        with pytest.raises(MessageRejected, match="nothing is asked for in step 1"):
            await this.request("anna", 1)
        for step in (0, 2, 2**32 - 1):
            with pytest.raises(MessageRejected, match=f"step {step} of round 1 is not open"):
                await this.request("anna", step)
        with pytest.raises(MessageRejected, match="round 2 has not been opened"):
            await this.request("anna", 1, number=2)
        ask = this.stubs["anna"].raw.unary_stream("/pfedsecure.v1.Round/GetStepRequest")
        with pytest.raises(MessageRejected, match="cannot be decoded"):
            await outcome(anext(aiter(ask(b"\xff"))))


async def test_reports_are_for_members_and_about_others(scene: Any) -> None:
    async with scene() as this:
        request = rnd.ReportExpertRequest(round=1, expert_id="f" * 32)
        with pytest.raises(NotAMember):
            await outcome(this.stubs["emil"].round.ReportExpert(request))
        with pytest.raises(IdentityError, match="takes a certificate for a client"):
            await outcome(this.stubs["olga"].round.ReportExpert(request))
        with pytest.raises(MessageRejected, match=f"expert '{'f' * 32}' is not another member's"):
            await outcome(this.stubs["anna"].round.ReportExpert(request))
        long = rnd.ReportExpertRequest(round=1, expert_id="x" * 100_000)
        with pytest.raises(MessageRejected, match=f"expert '{'x' * 40}' is not another member's"):
            await outcome(this.stubs["anna"].round.ReportExpert(long))

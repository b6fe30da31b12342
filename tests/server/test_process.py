"""The server as a process: signals, what is taken already, and being killed."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import urllib.request
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from pfed_server.audit import AUDIT_FILE
from pfed_server.audit_chain import verify
from pfedsecure.console import Address
from pfedsecure.errors import AddressInUse, StateLocked
from pfedsecure.plan import Plan
from pfedsecure.wire.payloads import Payload, join_one, split
from pfedsecure.wire.tensors import from_tensor
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.payload_pb2 import Tensor

NAMES = ("anna", "bert")
PLAN = """
name = "processes"
class_names = ["cat", "dog"]
backbone.text_width = 3
prompt.context_length = 2
mixture.experts = 0
rounds = {count = 2, minimum_cohort = 2, heartbeat_seconds = 1}
protection = {aggregation = "plain", experts = "plain", matching = "plain"}
"""


@asynccontextmanager
async def started(folder: Path, members: Any, *options: str, listen: str = "127.0.0.1:0") -> AsyncIterator[Process]:
    """A `pfed-server` with its state in `folder`/state."""
    (folder / "plan.toml").write_text(PLAN)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pfed_server", "--tls", "--plan", "plan.toml", "--state", "state"),
        *("--identity", str(members.server.folder), "--listen", listen, *options),
        cwd=folder,
        stderr=PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def listening(process: Process) -> Address:
    assert process.stderr is not None
    while line := (await process.stderr.readline()).decode():
        if found := re.search(r"listening on (.+):(\d+), mutual TLS", line):
            return Address(found[1], int(found[2]))
    raise AssertionError("the server ended before it listened")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_order(tmp_path: Path, members: Any, connect: Any, number: signal.Signals) -> None:
    async with started(tmp_path, members) as process, asyncio.timeout(60):
        address = await listening(process)
        async with connect(address, members.identity("anna")) as anna:
            reply = await anna.health.Check(health_pb2.HealthCheckRequest())
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            process.send_signal(number)
            _, log = await process.communicate()
        assert process.returncode == 0
        stopping, head = log.decode().splitlines()[-2:]
        assert stopping.endswith("stopping")
        written = verify(tmp_path / "state" / AUDIT_FILE)
        assert head.endswith(f"audit log state/audit.jsonl: 2 lines, head {written.head}")


@pytest.mark.slow
async def test_what_is_taken_is_told_in_one_line(tmp_path: Path, members: Any) -> None:
    async with started(tmp_path, members) as first, asyncio.timeout(60):
        address = await listening(first)
        async with started(tmp_path, members) as second:
            _, log = await second.communicate()
            assert second.returncode == StateLocked.exit_code
            assert log.decode() == (
                "pfed-server: error: state: another pfed-server uses this state; stop it, or give another --state\n"
            )
        async with started(tmp_path, members, "--state", "other", listen=str(address)) as third:
            _, log = await third.communicate()
            assert third.returncode == AddressInUse.exit_code
            assert log.decode().splitlines()[-1] == (
                f"pfed-server: error: cannot listen on {address}: Address already in use; stop what listens there, "
                "or give another --listen HOST:PORT"
            )
            assert "Traceback" not in log.decode()


@pytest.mark.slow
async def test_killed_in_the_middle_of_rounds_it_finishes_with_the_right_prompt(
    tmp_path: Path, members: Any, connect: Any, contribute: Any
) -> None:
    contexts = np.random.default_rng(0).normal(0, 0.02, (2, 2, 2, 3)).astype(np.float32)
    weights = (3, 5)

    async def join(address: Address, name: str) -> None:
        async with connect(address, members.identity(name)) as stubs:
            digest = Plan.from_toml(tmp_path / "plan.toml").digest()
            await stubs.federation.Join(fed.JoinRequest(plan_digest=digest, instance_id=name))

    async def submit(address: Address, name: str, number: int) -> None:
        async with connect(address, members.identity(name)) as stubs:
            await seen(stubs, name, lambda view: view.round == number and view.selected)
            row = NAMES.index(name)
            update = contribute(contexts[number - 1, row], weights[row])
            await stubs.round.SubmitStep(split(Payload(number, update, step=1)))

    async def seen(stubs: Any, name: str, condition: Any) -> None:
        version = 0
        while not condition(
            view := await stubs.federation.Await(
                fed.AwaitRequest(instance_id=name, seen_version=version, wait_seconds=5)
            )
        ):
            version = view.version

    async with asyncio.timeout(120):
        async with started(tmp_path, members) as process:
            address = await listening(process)
            for name in NAMES:
                await join(address, name)
            await submit(address, "anna", 1)
            process.send_signal(signal.SIGKILL)
        async with started(tmp_path, members) as process:
            address = await listening(process)
            await submit(address, "bert", 1)
            await submit(address, "bert", 2)
            process.send_signal(signal.SIGKILL)
        async with started(tmp_path, members, "--exit-when-finished") as process:
            address = await listening(process)
            await submit(address, "anna", 2)
            for name in NAMES:
                async with connect(address, members.identity(name)) as stubs:
                    await seen(stubs, name, lambda view: view.phase == fed.FEDERATION_PHASE_FINISHED)
                    payload = await join_one(stubs.round.GetGlobalPrompt(rnd.GetGlobalPromptRequest(round=0)))
            assert await process.wait() == 0
    prompt = from_tensor(Tensor.FromString(payload.data), (2, 3), "prompt")
    oracle = np.average(contexts[1].astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(prompt, oracle, rtol=1e-6)


@pytest.mark.slow
async def test_pages_are_served_beside_the_calls_and_end_with_them(
    tmp_path: Path, members: Any, unused_tcp_port_factory: Any
) -> None:
    metrics, dashboard = (Address("127.0.0.1", unused_tcp_port_factory()) for _ in range(2))

    def fetch(url: str) -> str:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return str(reply.read().decode())

    async with asyncio.timeout(60):
        options = ("--metrics", str(metrics), "--dashboard", str(dashboard))
        async with started(tmp_path, members, *options) as process:
            await listening(process)
            assert "pfed_rounds_planned 2.0" in await asyncio.to_thread(fetch, f"http://{metrics}/metrics")
            assert '"federation": "processes"' in await asyncio.to_thread(fetch, f"http://{dashboard}/status.json")
            process.send_signal(signal.SIGTERM)
            _, log = await process.communicate()
        assert process.returncode == 0
        assert "Traceback" not in log.decode()
        async with started(tmp_path, members, "--metrics", str(dashboard), "--dashboard", str(dashboard)) as process:
            _, log = await process.communicate()
        assert process.returncode == AddressInUse.exit_code
        said = f"error: cannot listen on {dashboard}: Address already in use; give another --dashboard HOST:PORT"
        assert log.decode().splitlines()[-1] == f"pfed-server: {said}"

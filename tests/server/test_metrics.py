"""Metrics: what Prometheus is told of a real federation, that callers cannot make it grow, and Grafana's dashboard."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.metrics import Metrics
from pfed_server.sql_store import SqlStore
from pfed_server.watching import watching
from pfedsecure.console import Address
from pfedsecure.errors import PfedError
from pfedsecure.plan import Plan
from pfedsecure.wire.payloads import Payload, split
from pfedsecure.wire.v1 import federation_pb2 as fed

MakePlan = Callable[..., Plan]
SHAPE = (2, 3)
GRAFANA = Path(__file__).resolve().parents[2] / "deploy" / "grafana-dashboard.json"
CONTEXT = np.arange(6, dtype=np.float32).reshape(SHAPE) / 7
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Scene:
    def __init__(self, address: Address, metrics: Metrics) -> None:
        self.address = address
        self.metrics = metrics

    async def samples(self) -> Samples:
        page = (await asyncio.to_thread(self.metrics.page)).decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }


@asynccontextmanager
async def measured(plan: Plan, members: Any, folder: Path) -> AsyncIterator[Scene]:
    store = SqlStore.open(folder, plan)
    metrics = Metrics(folder, members.server.folder)
    coordinator = Coordinator(plan, store, context_shape=SHAPE, authority=members.server.authority, tell=metrics.tell)
    anywhere = Address("127.0.0.1", 0)
    with watching(coordinator.federation, "mtls", metrics, anywhere, None):
        async with serving(coordinator, anywhere, members.server, calls=[metrics]) as address:
            yield Scene(address, metrics)
    store.close()


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


async def join(stubs: Any, plan: Plan, digest: str = "") -> None:
    await stubs.federation.Join(fed.JoinRequest(plan_digest=digest or plan.digest(), instance_id="1"))


async def test_a_federation_is_counted_right(
    make_plan: MakePlan, members: Any, connect: Any, contribute: Any, tmp_path: Path
) -> None:
    plan = make_plan(count=1, experts=0, start_clients=3, deadline_seconds=2)
    identities = [members.identity(name) for name in ("anna", "bert", "cleo")]
    update = contribute(CONTEXT, 3)
    async with (
        asyncio.timeout(30),
        measured(plan, members, tmp_path) as scene,
        connect(scene.address, identities[0]) as first,
        connect(scene.address, identities[1]) as second,
        connect(scene.address, identities[2]) as third,
    ):
        before = await scene.samples()
        assert of(before, "pfed_phase", phase="gathering") == 1
        assert of(before, "pfed_members") == 0
        for stubs in (first, second, third):
            await join(stubs, plan)
        for _ in range(2):
            with pytest.raises(grpc.RpcError):
                await join(first, plan, digest="0" * 64)
        request = fed.AwaitRequest(instance_id="1")
        while not (await first.federation.Await(request)).selected:
            await asyncio.sleep(0.02)
        during = await scene.samples()
        assert (of(during, "pfed_round"), of(during, "pfed_cohort"), of(during, "pfed_round_step")) == (1, 3, 1)
        chunks = [list(split(Payload(1, update, step=1))) for _ in range(2)]
        for stubs, upload in zip((first, second), chunks, strict=True):
            await stubs.round.SubmitStep(iter(upload))
        while not (await first.federation.Await(request)).rounds_completed:
            await asyncio.sleep(0.05)
        # News of a round's end goes out before its event is written and told: the count comes a moment later.
        while not of(after := await scene.samples(), "pfed_rounds_total", outcome="closed"):
            await asyncio.sleep(0.05)

    assert of(after, "pfed_phase", phase="finished") == 1
    assert of(after, "pfed_phase", phase="round open") == 0
    assert of(after, "pfed_rounds_total", outcome="closed") == 1
    assert of(after, "pfed_rounds_total", outcome="abandoned") == 0
    assert of(after, "pfed_dropouts_total", step="1") == 1
    assert of(after, "pfed_round_seconds_count") == 1
    assert 1.5 < of(after, "pfed_round_seconds_sum") < 30
    assert of(after, "pfed_rpc_calls_total", method="Join", code="OK") == 3
    assert of(after, "pfed_rpc_calls_total", method="Join", code="FAILED_PRECONDITION") == 2
    assert of(after, "pfed_refused_calls_total", reason="PlanMismatch") == 2
    assert of(after, "pfed_rpc_seconds_count", method="Join") == 5
    sent = sum(chunk.ByteSize() for upload in chunks for chunk in upload)
    assert of(after, "pfed_rpc_received_bytes_total", method="SubmitStep") == sent
    assert of(after, "pfed_rpc_sent_bytes_total", method="SubmitStep") == 2 * 34  # a SHA-256 with two bytes of framing
    assert of(after, "pfed_members") == 3
    assert of(after, "pfed_storage_bytes", file="database") > 10_000
    assert of(after, "pfed_certificate_not_after_seconds") == members.server.subject.not_after.timestamp()


async def test_callers_cannot_make_the_metrics_grow(
    make_plan: MakePlan, members: Any, connect: Any, tmp_path: Path
) -> None:
    plan = make_plan()

    async def attack(scene: Scene, name: str, number: int) -> None:
        async with connect(scene.address, members.identity(name)) as stubs:
            for call in (f"/pfedsecure.v1.Federation/Made{number}Up", f"/x{number}/Join"):
                with pytest.raises(grpc.RpcError):
                    await stubs.raw.unary_unary(call)(b"x")
            for digest in (f"{number:064x}", f"reason-{number}"):
                with pytest.raises(grpc.RpcError):
                    await join(stubs, plan, digest)
            with pytest.raises(grpc.RpcError):
                await stubs.federation.Heartbeat(fed.HeartbeatRequest(instance_id=str(number)))

    async with measured(plan, members, tmp_path) as scene:
        await attack(scene, "anna", 0)
        first = set(await scene.samples())
        for number, name in enumerate(("anna", "bert", "cleo"), start=1):
            await attack(scene, name, number)
        assert set(await scene.samples()) == first
        labels = {value for _, labels in first for _, value in labels}
    assert not labels & {"anna", "bert", "cleo"}
    assert not any(word in value for value in labels for word in ("Made", "/x", "reason-"))
    reasons = {dict(labels)["reason"] for name, labels in first if name == "pfed_refused_calls_total"}
    assert reasons <= {cls.wire_code() for cls in PfedError.__subclasses__()}


async def test_every_query_of_the_grafana_dashboard_is_answered(
    make_plan: MakePlan, members: Any, connect: Any, contribute: Any, tmp_path: Path
) -> None:
    """Each metric that a query names is exported, with each label that the query selects or groups by."""
    plan = make_plan(count=1, experts=0, start_clients=3, deadline_seconds=0.5)
    async with measured(plan, members, tmp_path) as scene, asyncio.timeout(30):
        for name in ("anna", "bert", "cleo"):
            async with connect(scene.address, members.identity(name)) as stubs:
                await join(stubs, plan)
                with pytest.raises(grpc.RpcError):
                    await join(stubs, plan, "0" * 64)
        while ("pfed_dropouts_total", (("step", "1"),)) not in (samples := await scene.samples()):
            await asyncio.sleep(0.05)
    labels: dict[str, set[str]] = {}
    for name, found in samples:
        labels.setdefault(name, {"instance", "job"}).update(key for key, _ in found)

    dashboard = json.loads(GRAFANA.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    legends = [target["legendFormat"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 20
    for query, legend in zip(queries, legends, strict=True):
        named = re.findall(r"\b((?:pfed|process)_\w+)", query)
        assert named, query
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", query))))
        selected = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query))
        shown = set(re.findall(r"{{(\w+)}}", legend))
        for name in named:
            assert name in labels, f"{query}: no metric {name}"
            assert grouped | selected | shown <= labels[name], f"{query}: {name} has no such label"
        if "by (" in query:
            assert shown <= grouped, f"{query}: {legend} is grouped away"
    assert "pfed_build_info" in labels
    variables = [variable["query"] for variable in dashboard["templating"]["list"]]
    assert "label_values(pfed_build_info, instance)" in variables
    exported = {re.sub(r"_(bucket|count|sum|total)$", "", name) for name in labels if name.startswith("pfed_")}
    used = {re.sub(r"_(bucket|count|sum|total)$", "", n) for q in queries for n in re.findall(r"\bpfed_\w+", q)}
    assert {name for name in exported if not name.endswith("_created")} - used == {"pfed_build_info"}


async def test_without_tls_no_certificate_expires(make_plan: MakePlan, members: Any, tmp_path: Path) -> None:
    plan = make_plan()
    store = SqlStore.open(tmp_path, plan)
    metrics = Metrics(tmp_path, None)
    coordinator = Coordinator(plan, store, context_shape=SHAPE, authority=members.server.authority, tell=metrics.tell)
    with watching(coordinator.federation, "mtls", metrics, Address("127.0.0.1", 0), None):
        page = (await asyncio.to_thread(metrics.page)).decode()
    store.close()
    assert "pfed_round 0.0" in page
    assert "pfed_certificate_not_after_seconds" not in page

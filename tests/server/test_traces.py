"""Traces: a real federation's, as OpenTelemetry's own exporters have them, and a real collector's address."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from pfed_server.app import serving
from pfed_server.cli import main
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfed_server.traces import Traces, exported, warn_of_plain_text
from pfedsecure.console import Address
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed

MakePlan = Callable[..., Plan]


async def test_a_round_is_a_trace_with_its_calls(make_plan: MakePlan, members: Any, connect: Any) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the extra `traces` is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Traces(provider)
    plan = make_plan(experts=0, start_clients=2, deadline_seconds=1)
    with closing(SqlStore.in_memory(plan)) as store:
        coordinator = Coordinator(plan, store, context_shape=(2, 3), tell=tracing.tell)
        async with (
            asyncio.timeout(30),
            serving(coordinator, Address("127.0.0.1", 0), members.server, calls=[tracing]) as address,
            connect(address, members.identity("anna")) as anna,
            connect(address, members.identity("bert")) as bert,
        ):
            for stubs in (anna, bert):
                await stubs.federation.Join(fed.JoinRequest(plan_digest=plan.digest(), instance_id="1"))
            while not (await anna.federation.Await(fed.AwaitRequest(instance_id="1"))).selected:
                await asyncio.sleep(0.02)
            with pytest.raises(grpc.RpcError):
                await bert.federation.Heartbeat(fed.HeartbeatRequest(instance_id="2"))
            while not any(span.name == "round" for span in exporter.get_finished_spans()):
                await asyncio.sleep(0.05)
    spans = exporter.get_finished_spans()
    round_span = next(span for span in spans if span.name == "round")
    assert dict(round_span.attributes) == {
        "pfed.round": 1,
        "pfed.cohort": 2,
        "pfed.outcome": "abandoned",
        "pfed.updates": 0,
    }
    assert next(span for span in spans if span.name == "Join").parent is None
    beat = next(span for span in spans if span.name == "Heartbeat")
    assert beat.parent.span_id == round_span.context.span_id
    assert beat.attributes["rpc.service"] == "pfedsecure.v1.Federation"
    assert beat.attributes["rpc.grpc.status"] == "ALREADY_EXISTS"
    assert beat.start_time <= beat.end_time
    assert not any(name in span.to_json() for span in spans for name in ("anna", "bert"))


def test_they_reach_a_collector() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `traces` is not installed")
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with exported(f"http://127.0.0.1:{server.server_address[1]}/v1/traces") as tracing:
            tracing.ended("/pfedsecure.v1.Federation/Join", "OK", 0.5, 10, 20)
        server.shutdown()
        thread.join()
    assert any(b"pfed-server" in body and b"Join" in body for body in received)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    result = CliRunner().invoke(main, ["--tls", "--traces", "http://127.0.0.1:1/v1/traces"])
    assert result.exit_code == 2
    assert "pip install 'pfedsecure[traces]'" in result.stderr


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://collector.example:4318/v1/traces", True),
        ("HTTP://192.0.2.7/v1/traces", True),
        ("http://127.0.0.1.collector.example/", True),
        ("http://localhost@192.0.2.7/", True),
        ("https://collector.example:4318/v1/traces", False),
        ("http://127.0.0.1:4318/v1/traces", False),
        ("http://localhost:4318/v1/traces", False),
        ("http://[::1]:4318/v1/traces", False),
    ],
)
def test_traces_that_leave_the_machine_in_plain_text_are_called_unprotected(
    url: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_plain_text(url)
    assert [record.message.startswith("NOT PROTECTED: the traces go in plain text") for record in caplog.records] == (
        [True] if warned else []
    )


@pytest.mark.parametrize("url", ["collector:4318", "", "file:///etc/passwd", "http://", "http://[::1", "http://h:x/"])
def test_what_is_no_collector_is_a_wrong_option(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["--tls", "--traces", url])
    assert result.exit_code == 2
    assert f"--traces {url}: give the collector's address" in result.stderr

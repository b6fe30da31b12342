"""Traces by OpenTelemetry: one for each round, in it every call that ended while the round was open.

It takes the extra `traces`. Spans have methods, codes, sizes and counts, and nobody's name.
"""

from __future__ import annotations

import logging
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

import pfedsecure
from pfed_server.events import Event
from pfedsecure.wire.loopback import is_loopback

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SERVICE = "pfed-server"

_logger = logging.getLogger(__name__)


@contextmanager
def exported(url: str) -> Iterator[Traces]:
    """Traces that go to an OTLP/HTTP collector, such as http://127.0.0.1:4318/v1/traces; the last ones at the end.

    A collector that is away is no reason to stop: OpenTelemetry says so in the log, and drops what does not fit its
    queue. Raises click.UsageError without the extra, and for what is no such address.
    """
    warn_of_plain_text(url)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise click.UsageError("--traces takes OpenTelemetry: pip install 'pfedsecure[traces]'") from None
    provider = TracerProvider(
        resource=Resource.create({"service.name": SERVICE, "service.version": pfedsecure.__version__})
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    try:
        yield Traces(provider)
    finally:
        provider.shutdown()


def warn_of_plain_text(url: str) -> None:
    """Say in the log what can be read on the way to a collector. Raises click.UsageError for what is no address of one.

    Not more than a warning: spans have nothing of anybody's data, as the pages of `watching`.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise click.UsageError(f"--traces {url}: give the collector's address, such as https://HOST:4318/v1/traces")
    if parts.scheme == "http" and not is_loopback(host):
        _logger.warning(
            "NOT PROTECTED: the traces go in plain text to %s, and everybody on the way can read them; give an address "
            "that begins with https://",
            host,
        )


class Traces:
    """`Calls` of the gRPC server, and a listener to events."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer(SERVICE)
        self._round: Span | None = None

    def ended(self, method: str, code: str, seconds: float, received: int, sent: int) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        end = time.time_ns()
        context = None if self._round is None else set_span_in_context(self._round)
        service, _, name = method.strip("/").partition("/")
        attributes: dict[str, str | int] = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": name,
            "rpc.grpc.status": code,
            "pfed.bytes_received": received,
            "pfed.bytes_sent": sent,
        }
        start = end - int(seconds * 1e9)
        kind = SpanKind.SERVER
        span = self._tracer.start_span(name, context, kind, attributes=attributes, start_time=start)
        span.end(end)

    def refused(self, reason: str) -> None:
        """Its code says enough."""

    async def tell(self, event: Event) -> None:
        """Begin and end the trace of a round. One that was open when the server was killed has none."""
        match event.kind:
            case "round-opened":
                attributes = {"pfed.round": event.round, "pfed.cohort": _count(event, "cohort")}
                self._round = self._tracer.start_span("round", attributes=attributes)
            case "round-closed" | "round-abandoned" if self._round is not None:
                self._round.set_attribute("pfed.outcome", event.kind.removeprefix("round-"))
                self._round.set_attribute("pfed.updates", _count(event, "updates"))
                self._round.end()
                self._round = None
            case "server-stopped" if self._round is not None:
                self._round.end()
                self._round = None


def _count(event: Event, name: str) -> int:
    value = event.details[name]
    assert isinstance(value, int)
    return value

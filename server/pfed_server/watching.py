"""The metrics and the dashboard of a server that runs: their pages, and where these get what they show."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

from prometheus_client import CONTENT_TYPE_LATEST

from pfed_server.dashboard import dashboard_pages, shown
from pfed_server.federation import Federation
from pfed_server.metrics import Metrics, Snapshot, snapshot
from pfed_server.pages import Page, served_pages
from pfedsecure.console import Address
from pfedsecure.wire.loopback import is_loopback

T = TypeVar("T")

ANSWER_SECONDS = 5.0
"""A page that takes the server longer is not shown this time."""

_logger = logging.getLogger(__name__)


@contextmanager
def watching(
    federation: Federation,
    transport: str,
    metrics: Metrics | None,
    metrics_at: Address | None,
    dashboard: Address | None,
) -> Iterator[None]:
    """Serve the pages that are asked for; inside the event loop that runs `federation`. Raises AddressInUse."""
    loop = asyncio.get_running_loop()

    def ask(question: Callable[[], Awaitable[T]]) -> T:
        async def answer() -> T:
            return await question()

        return asyncio.run_coroutine_threadsafe(answer(), loop).result(ANSWER_SECONDS)

    async def standing() -> Snapshot:
        return snapshot(federation)

    async def whole() -> dict[str, object]:
        history = await federation.exclusively(partial(asyncio.to_thread, federation.store.history))
        return shown(federation, history, transport)

    with ExitStack() as stack:
        if metrics is not None and metrics_at is not None:
            metrics.watch(partial(ask, standing))
            pages = {"/metrics": Page(CONTENT_TYPE_LATEST, metrics.page)}
            bound = stack.enter_context(served_pages(metrics_at, pages, "--metrics"))
            _introduce("metrics", f"http://{bound}/metrics", bound)
        if dashboard is not None:
            bound = stack.enter_context(served_pages(dashboard, dashboard_pages(partial(ask, whole)), "--dashboard"))
            _introduce("dashboard", f"http://{bound}/", bound)
        yield


def _introduce(what: str, url: str, address: Address) -> None:
    _logger.info("%s on %s", what, url)
    if not is_loopback(address.host):
        _logger.warning("NOT PROTECTED: the %s go in plain text to everybody who can reach %s", what, address)

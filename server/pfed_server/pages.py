"""Pages for people and machines who watch the server: HTTP on an address of its own, reading only.

Plain text, and nobody is asked who he is: what is served must be fit for everybody who can reach the address, which is
a loopback one unless the operator says otherwise. A page of another site that a browser on this machine shows can reach
loopback addresses too; so a request whose Host is not one of ours gets nothing, whatever name points here.

Whoever can reach the address can open connections that say nothing, or a byte now and then, or take their answer as
slowly. Not more than `REQUESTS_AT_ONCE` are kept: for another one the oldest is ended that waits for its caller. An
honest one is done with within milliseconds, so that those who watch are not blinded by those who dawdle.
"""

from __future__ import annotations

import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pfedsecure.console import Address
from pfedsecure.errors import AddressInUse
from pfedsecure.wire.loopback import is_loopback

REQUESTS_AT_ONCE = 16
REQUEST_SECONDS = 10.0
"""So long a connection lasts at most, request and answer together, however many bytes come of it."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Page:
    """What is served under a path; `body` makes it anew for each request, in a thread of its own."""

    content_type: str
    body: Callable[[], bytes]
    headers: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def served_pages(address: Address, pages: Mapping[str, Page], option: str) -> Iterator[Address]:
    """Serve `pages`, by path, until the end of the block. Gives the address bound.

    Raises AddressInUse, which names `option`.
    """
    try:
        server = _Server(address, pages)
    except OSError as error:
        raise AddressInUse(
            f"cannot listen on {address}: {error.strerror or error}; give another {option} HOST:PORT"
        ) from None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="pages", daemon=True)
    thread.start()
    try:
        yield Address(address.host, server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 2 * REQUESTS_AT_ONCE  # of the base class' five the system drops more than it keeps in a burst

    def __init__(self, address: Address, pages: Mapping[str, Page]) -> None:
        self.pages = pages
        self.only_loopback = is_loopback(address.host)
        self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, None] = {}
        self._busy: set[socket.socket] = set()
        super().__init__((address.host, address.port), _Handler)

    def server_bind(self) -> None:
        # The base class looks up the host's name, which can take long and is used for nothing here.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._has_room(request):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._connections.pop(request, None)

    @contextmanager
    def busy_with(self, request: socket.socket) -> Iterator[None]:
        """Inside, it is this server that a connection waits for, and it is not ended to make room."""
        with self._lock:
            self._busy.add(request)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(request)

    def _has_room(self, request: socket.socket) -> bool:
        """Whether there is room for another connection, after the oldest that dawdles was ended if need be."""
        with self._lock:
            if len(self._connections) >= REQUESTS_AT_ONCE:
                dawdler = next((each for each in self._connections if each not in self._busy), None)
                if dawdler is None:
                    return False
                del self._connections[dawdler]
                with suppress(OSError):  # it may just have gone by itself
                    dawdler.shutdown(socket.SHUT_RDWR)  # its thread finds out, and closes it
            self._connections[request] = None
            return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        _logger.debug("a request for a page broke off", exc_info=True)


class _Timed(io.RawIOBase):
    """A connection's bytes, until it is over: however they come, and however they are taken."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._until = time.monotonic() + REQUEST_SECONDS

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._in_time().recv_into(buffer)

    def write(self, data: Any) -> int:
        self._in_time().sendall(data)  # the timeout is one for all of it
        return len(data)

    def _in_time(self) -> socket.socket:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "pfed-server", ""

    def setup(self) -> None:
        self.connection = self.request
        timed = _Timed(self.connection)
        self.rfile, self.wfile = io.BufferedReader(timed), timed  # type: ignore[assignment]

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if not self._is_for_us():
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"this server has another name\n")
        elif page is None:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page\n")
        else:
            try:
                with self.server.busy_with(self.request):
                    body = page.body()
            except Exception:
                _logger.exception("the page %s cannot be made", self.path.partition("?")[0])
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"not at the moment; the log says why\n")
                return
            self._answer(HTTPStatus.OK, page.content_type, body, page.headers)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a scraper asks every few seconds."""

    def _is_for_us(self) -> bool:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        return not self.server.only_loopback or is_loopback(host)

    def _answer(
        self, status: HTTPStatus, content_type: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        common = {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in {**common, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

"""The dashboard: what it serves and to whom, and what a real browser makes of it."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pfed_server import pages as server_pages
from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.dashboard import dashboard_pages
from pfed_server.pages import REQUESTS_AT_ONCE, Page, served_pages
from pfed_server.sql_store import SqlStore
from pfed_server.store import Closing, Member, Traffic
from pfed_server.watching import watching
from pfedsecure.console import Address
from pfedsecure.errors import AddressInUse
from pfedsecure.plan import Plan

MakePlan = Callable[..., Plan]
ANYWHERE = Address("127.0.0.1", 0)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
Answer = tuple[int, dict[str, str], bytes]


def ask(address: Address, path: str, method: str = "GET", host: str | None = None) -> Answer:
    with closing(http.client.HTTPConnection(address.host, address.port, timeout=30)) as connection:
        connection.request(method, path, headers={} if host is None else {"Host": host})
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()


@asynccontextmanager
async def shown(plan: Plan, members: Any, port: int) -> AsyncIterator[Address]:
    """A server with three members; its first round is closed with a dropout, its second abandoned, its third open."""
    store = SqlStore.in_memory(plan)
    for name in ("anna-of-the-clinic", "bert", "cleo"):
        store.save_member(Member(name, "f" * 64, "1", f"id-{name}", taking_part=True))
    names = ["anna-of-the-clinic", "bert", "cleo"]
    for number, updates, prompt in ((1, 2, b"prompt"), (2, 0, None)):
        store.open_round(number, 100.0, 160.0, names)
        for name in names[:updates]:
            store.record_messages(number, 1, {name: b"x"}, {name: Traffic(12_000, 5_000)}, counts=True)
        store.close_round(number, 130.5, Closing(prompt, {"test_accuracy": 0.987654} if prompt else None), {})
    coordinator = Coordinator(plan, store, context_shape=(2, 3), authority=members.server.authority)
    dashboard = Address("127.0.0.1", port)
    with watching(coordinator.federation, "mtls", None, None, dashboard):
        async with serving(coordinator, ANYWHERE, members.server):
            yield dashboard
    store.close()


async def test_it_tells_how_rounds_went_and_of_nobody_by_name(
    make_plan: MakePlan, members: Any, unused_tcp_port: int
) -> None:
    plan = make_plan(count=5)
    async with shown(plan, members, unused_tcp_port) as address:
        status, headers, body = await asyncio.to_thread(ask, address, "/status.json")
        _, _, page = await asyncio.to_thread(ask, address, "/")
    found = json.loads(body)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert [(r["number"], r["outcome"], r["cohort"], r["updates"]) for r in found["rounds"]] == [
        (1, "closed", 3, 2),
        (2, "abandoned", 3, 0),
        (3, "open", 3, 0),
    ]
    assert (found["members"], found["online"], found["cohort"], found["phase"]) == (3, 3, 3, "round open")
    assert found["rounds"][0]["bytes_received"] == 24_000
    assert found["protections"]["aggregation"] == "plain"
    assert len(found["unprotected"]) == 4
    for secret in (b"anna-of-the-clinic", b"id-bert", b"987654", b"test_accuracy", b"f" * 64):
        assert secret not in body + page


def test_it_reads_only_and_serves_nobody_elses_page() -> None:
    pages = dashboard_pages(lambda: {"federation": "x"})
    with served_pages(ANYWHERE, pages, "--dashboard") as address:
        assert ask(address, "/")[0] == 200
        assert ask(address, "/", host=f"localhost:{address.port}")[0] == 200
        for host in ("evil.example", f"evil.example:{address.port}", "192.0.2.1", "", "127.0.0.1.evil.example"):
            assert ask(address, "/status.json", host=host)[0] == 421, host
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            assert ask(address, "/", method)[0] == 501
        assert ask(address, "/../cli.py")[0] == 404
        assert ask(address, "/status.json?x=1")[0] == 200
        assert ask(address, "/", "HEAD")[2] == b""
        _, headers, body = ask(address, "/")
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert headers["X-Frame-Options"] == "DENY"
    assert "Access-Control-Allow-Origin" not in headers
    assert not re.search(rb'(src|href)="(?!data:,)', body)


def test_a_page_that_cannot_be_made_is_told_without_details() -> None:
    def broken() -> bytes:
        raise TimeoutError("deep inside")

    with served_pages(ANYWHERE, {"/": Page("text/plain", broken)}, "--metrics") as address:
        status, _, body = ask(address, "/")
    assert (status, body) == (503, b"not at the moment; the log says why\n")


def answering() -> int:
    """How many threads have a connection to a page."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    assert true()


@contextmanager
def dawdling(address: Address, kind: str) -> Iterator[list[socket.socket]]:
    """As many connections as there may be, and as many again, that never come to an end by themselves."""
    opened, over = [socket.create_connection(address) for _ in range(2 * REQUESTS_AT_ONCE)], threading.Event()

    def drip() -> None:
        while not over.wait(0.05):
            for connection in opened:
                with suppress(OSError):
                    connection.sendall(b"G")

    dripping = threading.Thread(target=drip)
    try:
        if kind == "dripping":
            dripping.start()
        for connection in opened:
            if kind == "taking nothing":
                with suppress(OSError):
                    connection.sendall(b"GET /large HTTP/1.0\r\nHost: localhost\r\n\r\n")
        yield opened
    finally:
        over.set()
        if dripping.is_alive():
            dripping.join()
        for connection in opened:
            connection.close()


@pytest.mark.parametrize("kind", ["silent", "dripping", "taking nothing"])
def test_who_dawdles_blinds_nobody_and_takes_few_threads(kind: str) -> None:
    large = bytes(2**24)
    pages = {"/": Page("text/plain", lambda: b"x"), "/large": Page("text/plain", lambda: large)}
    with served_pages(ANYWHERE, pages, "--metrics") as address, dawdling(address, kind):
        for _ in range(10):
            assert ask(address, "/")[::2] == (200, b"x")
            time.sleep(0.02)
        wait_until(lambda: answering() <= REQUESTS_AT_ONCE, 4)  # some are just ending; time alone ends none so soon


@pytest.mark.parametrize("kind", ["silent", "dripping", "taking nothing"])
def test_a_connection_has_an_end_whatever_comes_of_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps nothing open: the time is that of the whole connection."""
    wait_until(lambda: not answering())
    monkeypatch.setattr(server_pages, "REQUEST_SECONDS", 2)
    large = bytes(2**24)
    served = served_pages(ANYWHERE, {"/large": Page("text/plain", lambda: large)}, "--metrics")
    with served as address, dawdling(address, kind):
        wait_until(lambda: answering() > 1)
        wait_until(lambda: not answering())


def test_a_request_that_is_being_answered_is_not_ended_for_others() -> None:
    under_way, go_on = threading.Semaphore(0), threading.Event()

    def slow() -> bytes:
        under_way.release()
        assert go_on.wait(30)
        return b"done"

    with (
        served_pages(ANYWHERE, {"/": Page("text/plain", slow)}, "--metrics") as address,
        ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool,
    ):
        answers = [pool.submit(ask, address, "/") for _ in range(REQUESTS_AT_ONCE)]
        try:
            for _ in answers:
                assert under_way.acquire(timeout=10)
            with pytest.raises((ConnectionError, http.client.BadStatusLine)):
                ask(address, "/")
        finally:
            go_on.set()
        assert {answer.result()[::2] for answer in answers} == {(200, b"done")}


def test_an_address_that_is_taken_is_told_in_one_line() -> None:
    first = served_pages(ANYWHERE, {}, "--metrics")
    with first as address, pytest.raises(AddressInUse) as caught, served_pages(address, {}, "--metrics"):
        raise AssertionError("two servers share an address")
    said = f"cannot listen on {address}: Address already in use; give another --metrics HOST:PORT"
    assert str(caught.value) == said


def browse(address: Address, folder: Path, *options: str, path: str = "/") -> str:
    """What a headless browser has of a page after four seconds of its own time."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += ["--virtual-time-budget=4000", "--window-size=1200,1000", *options, f"http://{address}{path}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no chromium on this machine")


@needs_browser
async def test_a_real_browser_shows_it(make_plan: MakePlan, members: Any, unused_tcp_port: int, tmp_path: Path) -> None:
    async with shown(make_plan(count=5), members, unused_tcp_port) as address:
        page = await asyncio.to_thread(browse, address, tmp_path, "--dump-dom")
    assert "<title>test: round 3</title>" in page
    assert "federation test" in page
    rows = re.findall(r"<tr>(<td.*?)</tr>", page)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    assert [row[:5] for row in cells] == [
        ["3", "open", "3", "0", "–"],
        ["2", "abandoned", "3", "0", "3"],
        ["1", "closed", "3", "2", "1"],
    ]
    assert cells[2][5:] == ["30.5", "23.4 KiB", "9.8 KiB"]
    assert "<b>1 of 5</b>" in page
    assert page.count("<li>") == 4
    assert page.count("<rect ") == 6
    assert re.search(r'<span id="stale"[^>]*></span>', page)


@needs_browser
def test_a_browser_runs_no_script_but_the_pages_own(tmp_path: Path) -> None:
    """A federation's name that is markup stays text; and were it markup, the policy would stop its script."""
    evil = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    now: dict[str, object] = {"federation": evil, "plan_digest": "0" * 64, "phase": "gathering", "rounds": []}
    now |= dict.fromkeys(("round", "rounds_completed", "rounds_planned", "online", "members", "pooled"), 0)
    now |= {"protections": {evil: evil}, "unprotected": [evil]}
    with served_pages(ANYWHERE, dashboard_pages(lambda: now), "--dashboard") as address:
        page = browse(address, tmp_path / "text", "--dump-dom")
    assert "<title>owned</title>" not in page
    assert page.count("&lt;script&gt;") == 5  # title, heading, twice a protection, one that is off
    own = dashboard_pages(lambda: now)["/"]
    injected = own.body().replace(b"</main>", evil.encode() + b"</main>")
    pages = {"/": Page(own.content_type, partial(bytes, injected), own.headers)}
    with served_pages(ANYWHERE, pages, "--dashboard") as address:
        page = browse(address, tmp_path / "markup", "--dump-dom")
    assert "<title>owned</title>" not in page
    bare = {"/": Page(own.content_type, partial(bytes, injected))}
    with served_pages(ANYWHERE, bare, "--dashboard") as address:
        assert "<title>owned</title>" in browse(address, tmp_path / "bare", "--dump-dom")

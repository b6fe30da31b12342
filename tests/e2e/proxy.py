"""A TCP proxy before the server, one entrance for each client, that delays, holds and cuts: where `packets` cannot be.

What is cut is held and not refused: bytes and new connections wait, as they do while TCP sends again what is lost.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Sequence
from typing import Literal

Cut = Literal["both ways", "answers"]

_LOST_SECONDS = (0.2, 0.6)
"""What sending a lost packet again takes."""


class Proxy:
    """The same as `packets.Packets`, on loopback."""

    kind = "a TCP proxy"

    def __init__(self, names: Sequence[str], seed: int = 0) -> None:
        self._chance = random.Random(seed)
        self._cut: dict[str, Cut] = {}
        self._delay = self._jitter = self._loss = 0.0
        self._ports = {name: _free_port() for name in names if name != "server"}
        self._server = ("127.0.0.1", 0)
        self._pairs: dict[str, list[_Pair]] = {name: [] for name in self._ports}
        self._listening: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        for name in self._ports:
            asyncio.run_coroutine_threadsafe(self._listen(name), self._loop).result(10)

    def address(self, _name: str) -> str:
        return "127.0.0.1"

    def server_for(self, client: str, address: str) -> str:
        host, _, port = address.rpartition(":")
        self._server = host, int(port)
        return f"127.0.0.1:{self._ports[client]}"

    def command(self, _name: str) -> list[str]:
        return []

    def cut(self, name: str, how: Cut = "both ways") -> None:
        self._cut[name] = how

    def restore(self, name: str) -> None:
        del self._cut[name]

    def weather(self, delay: float, jitter: float, loss: float) -> None:
        self._delay, self._jitter, self._loss = delay, jitter, loss

    def move(self, name: str) -> str:
        """Loopback has one address for all: only the port is another one then."""
        return self.address(name)

    def connections(self, name: str) -> int:
        return sum(not pair.closed_by_server for pair in self._pairs[name])

    def close(self) -> None:
        async def end() -> None:
            for listening in self._listening:
                listening.close()
            for pairs in self._pairs.values():
                for pair in pairs:
                    pair.end()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.05)  # for transports to tell that they are closed

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _listen(self, name: str) -> None:
        def connected() -> _Side:
            pair = _Pair()
            self._pairs[name].append(pair)
            pair.task = asyncio.get_running_loop().create_task(self._serve(name, pair))
            return pair.client

        made = await asyncio.get_running_loop().create_server(connected, "127.0.0.1", self._ports[name])
        self._listening.append(made)

    async def _serve(self, name: str, pair: _Pair) -> None:
        await self._passable(name, to_server=True)
        try:
            await asyncio.get_running_loop().create_connection(lambda: pair.server, *self._server)
        except OSError:
            pair.end()
            return
        await asyncio.gather(
            self._pump(name, pair.client, pair.server, to_server=True),
            self._pump(name, pair.server, pair.client, to_server=False),
        )

    async def _passable(self, name: str, *, to_server: bool) -> None:
        while (how := self._cut.get(name)) == "both ways" or (how == "answers" and not to_server):
            await asyncio.sleep(0.02)

    async def _pump(self, name: str, source: _Side, target: _Side, *, to_server: bool) -> None:
        while True:
            chunk = await source.received.get()
            await asyncio.sleep(max(self._delay + self._chance.uniform(-1, 1) * self._jitter, 0.0))
            if self._chance.random() < self._loss:
                await asyncio.sleep(self._chance.uniform(*_LOST_SECONDS))
            await self._passable(name, to_server=to_server)
            if target.transport is None or target.transport.is_closing():
                return
            if not chunk:
                target.transport.close()
                return
            target.transport.write(chunk)


class _Side(asyncio.Protocol):
    """One of two connections; an empty chunk is its end."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.received: asyncio.Queue[bytes] = asyncio.Queue()
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received.put_nowait(data)

    def connection_lost(self, _error: Exception | None) -> None:
        self.is_closed = True
        self.received.put_nowait(b"")


class _Pair:
    def __init__(self) -> None:
        self.client, self.server = _Side(), _Side()
        self.task: asyncio.Task[None] | None = None

    @property
    def closed_by_server(self) -> bool:
        return self.server.is_closed or self.server.transport is None

    def end(self) -> None:
        for side in (self.client, self.server):
            if side.transport is not None:
                side.transport.abort()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

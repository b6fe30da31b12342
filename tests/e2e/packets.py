"""Machines of their own: network namespaces, and between them a switch that delays, loses and cuts, in this process.

Each machine has one TUN device, whose other end is here, so that every packet passes through Python: this takes root
and /dev/net/tun, and not netem, which many kernels lack. Real TCP stacks on both sides see real loss.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import json
import os
import random
import selectors
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Literal

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LARGEST_PACKET = 1 << 16
_AT_A_TIME = 64

Cut = Literal["both ways", "answers"]
"""A pulled cable, or a half-open connection: what comes from the machine arrives, what goes to it does not."""


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def available() -> bool:
    """Whether this machine lets this process make such machines."""
    if os.geteuid() != 0 or shutil.which("ip") is None or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return False
    name = f"pfed-{os.getpid()}-probe"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError:
        return False
    ip("netns", "del", name)
    return True


class Packets:
    """One machine for the server and one for each client; `close` takes them away."""

    kind = "packets between network namespaces"

    def __init__(self, names: Sequence[str], seed: int = 0) -> None:
        self._chance = random.Random(seed)
        self._cut: dict[str, Cut] = {}
        self._delay = self._jitter = self._loss = 0.0
        self._numbers = {name: number for number, name in enumerate(names, start=1)}
        self._devices: dict[int, str] = {}
        self._by_address: dict[bytes, tuple[str, int]] = {}
        self._stop_here, self._stop = os.pipe()
        for name in names:
            self._add(name)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def address(self, name: str) -> str:
        """Of a machine, for the others; the server's is where it listens and where clients find it."""
        return f"10.77.0.{self._numbers[name]}"

    def server_for(self, _client: str, address: str) -> str:
        """Where a client finds the server that listens at `address`."""
        return address

    def command(self, name: str) -> list[str]:
        """What makes a command run on a machine; the process has the command's own id."""
        return ["ip", "netns", "exec", self._namespace(name)]

    def cut(self, name: str, how: Cut = "both ways") -> None:
        """Drop packets silently: nobody is told that anything is wrong."""
        self._cut[name] = how

    def restore(self, name: str) -> None:
        del self._cut[name]

    def weather(self, delay: float, jitter: float, loss: float) -> None:
        """Of every packet from now on: seconds on its way, give or take, and the share that is lost."""
        self._delay, self._jitter, self._loss = delay, jitter, loss

    def move(self, name: str) -> str:
        """Give a machine another address in the place of its own; the new one. Nothing answers at the old one."""
        namespace, old, new = self._namespace(name), self.address(name), f"10.77.0.{self._numbers[name] + 100}"
        device = next(d for d in json.loads(ip("-j", "-n", namespace, "addr")) if d["ifname"] != "lo")["ifname"]
        ip("-n", namespace, "addr", "del", f"{old}/24", "dev", device)  # first: others of its subnet would go with it
        ip("-n", namespace, "addr", "add", f"{new}/24", "dev", device)
        self._by_address[_packed(new)] = self._by_address.pop(_packed(old))
        self._numbers[name] += 100
        return new

    def connections(self, name: str) -> int:
        """How many connections the server takes for open that lead to a machine."""
        of_server = [*self.command("server"), "ss", "-Htn", "state", "established", "dst", self.address(name)]
        return len(subprocess.run(of_server, check=True, capture_output=True, text=True).stdout.splitlines())

    def close(self) -> None:
        os.write(self._stop, b"x")
        self._thread.join(timeout=10)
        for descriptor in (*self._devices, self._stop, self._stop_here):
            os.close(descriptor)
        for name in self._numbers:
            ip("netns", "del", self._namespace(name))

    def _namespace(self, name: str) -> str:
        return f"pfed-{os.getpid()}-{name}"

    def _add(self, name: str) -> None:
        namespace, device = self._namespace(name), f"pf{os.getpid() % 100_000}n{self._numbers[name]}"
        ip("netns", "add", namespace)
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
        ip("link", "set", device, "netns", namespace)
        ip("-n", namespace, "addr", "add", f"{self.address(name)}/24", "dev", device)
        for each in ("lo", device):
            ip("-n", namespace, "link", "set", each, "up")
        self._devices[descriptor] = name
        self._by_address[_packed(self.address(name))] = name, descriptor

    def _run(self) -> None:
        on_their_way: list[tuple[float, int, int, bytes]] = []
        order = itertools.count()
        with selectors.DefaultSelector() as selector:
            for descriptor in (*self._devices, self._stop_here):
                selector.register(descriptor, selectors.EVENT_READ)
            while True:
                wait = max(on_their_way[0][0] - time.monotonic(), 0.0) if on_their_way else None
                for key, _ in selector.select(wait):
                    if key.fd == self._stop_here:
                        return
                    for packet in _read(key.fd):
                        target = self._route(self._devices[key.fd], packet)
                        if target is not None:
                            late = self._delay + self._chance.uniform(-1, 1) * self._jitter
                            heapq.heappush(on_their_way, (time.monotonic() + late, next(order), target, packet))
                while on_their_way and on_their_way[0][0] <= time.monotonic():
                    *_, target, packet = heapq.heappop(on_their_way)
                    _write(target, packet)

    def _route(self, sender: str, packet: bytes) -> int | None:
        """Where a packet goes on, if it does. Nothing here speaks IPv6."""
        if packet[0] >> 4 != 4 or self._chance.random() < self._loss:
            return None
        receiver, descriptor = self._by_address.get(packet[16:20], ("", None))
        if self._cut.get(sender) == "both ways" or receiver in self._cut:
            return None
        return descriptor


def _packed(address: str) -> bytes:
    return bytes(map(int, address.split(".")))


def _read(descriptor: int) -> list[bytes]:
    packets = []
    for _ in range(_AT_A_TIME):
        try:
            packets.append(os.read(descriptor, _LARGEST_PACKET))
        except OSError:  # nothing more, or the device is down
            break
    return packets


def _write(descriptor: int, packet: bytes) -> None:
    with contextlib.suppress(OSError):  # a full queue loses packets, as in any network
        os.write(descriptor, packet)

"""What the commands of the docs find when they are run: a checkout, two machines with certificates, federations."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import pfedsecure
from pfed_cli.pki import pki

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"pfed": "pfed_cli.main", "pfed-server": "pfed_server", "pfed-client": "pfed_client"}
CHECKOUT = ("README.md", "constraints.txt", "deploy", "docs")
"""What commands read or change in the folder that they are run in."""
MACHINES = ("server", "client")
PATIENCE_SECONDS = 280


def words_of(command: str) -> list[str]:
    """A command's words, with the programs of this checkout."""
    program, *rest = shlex.split(command)
    return [sys.executable, "-m", PROGRAMS[program], *rest] if program in PROGRAMS else [program, *rest]


class Background:
    """A process that goes on while others run."""

    def __init__(self, command: str, home: Path, log: Path, environment: dict[str, str]) -> None:
        self.command, self._log = command, log
        with log.open("ab") as to:
            self.process = subprocess.Popen(words_of(command), cwd=home, stdout=to, stderr=to, env=environment)

    def said(self) -> str:
        return self._log.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None, f"{self.command}: {self.said()}"
            assert time.monotonic() < deadline, f"{self.command}: {self.said()}"
            time.sleep(0.1)

    def ends(self) -> None:
        assert self.process.wait(timeout=PATIENCE_SECONDS) == 0, f"{self.command}: {self.said()}"


class World:
    """All that is prepared, made when it is first asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.home = folder / "checkout"
        self._machines = folder / "machines"
        self._folder, self._stack = folder, stack
        self._federation: Path | None = None
        self._server: str | None = None
        self.home.mkdir()
        for name in CHECKOUT:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, self.home / name)
        plans = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "plan.md").read_text(), re.DOTALL)
        (self.home / "plan.toml").write_text(plans[-1])  # the one for trying things out
        self.images = folder / "images"
        draw_images(self.images)
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PFED_LEDGER": str(folder / "ledgers")}
        self.environment.pop("MAKEFLAGS", None)

    def machine(self, name: str) -> Path:
        """The root of a machine's files. All of a consortium's certificates are made with the first."""
        if not self._machines.exists():
            for each in MACHINES:
                (self._machines / each / "etc/pfed").mkdir(parents=True)
                (self._machines / each / "etc/systemd/system").mkdir(parents=True)
                (self._machines / each / "var/lib/pfed").mkdir(parents=True, mode=0o700)
                shutil.copy(self.home / "plan.toml", self._machines / each / "etc/pfed/plan.toml")
            consortium(self._folder / "consortium", self._machines)
        return self._machines / name

    def server(self) -> str:
        """The address of the server machine's server, started as its systemd unit says."""
        if self._server is None:
            etc = self.machine("server")
            self._server = self.free_address()
            unit = (ROOT / "deploy" / "pfed-server.service").read_text()
            command = re.findall(r"^ExecStart=/opt/pfed/bin/(.*)$", unit, re.MULTILINE)[0]
            command = re.sub(r" /(etc|var)/", rf" {etc}/\1/", command).replace("0.0.0.0:8470", self._server)
            command = command.replace("--metrics", "--metrics 127.0.0.1:0")
            self.start(command, self.home, self._folder / "server.log", lambda said: "listening on" in said)
        return self._server

    def federation(self, members: Sequence[str], server: str) -> Path:
        """The folder of a finished federation, of a server and members with these commands; one for all tests."""
        if self._federation is None:
            home = self._folder / "federation"
            home.mkdir()
            demo = (Path(pfedsecure.__file__).parent / "demo_plan.toml").read_text()
            shorter = {"count = 10": "count = 2", "local_epochs = 5": "local_epochs = 1"}
            shorter["minimum_cohort = 3"] = f"minimum_cohort = 3\nstart_clients = {len(members)}"
            for setting, short in shorter.items():
                assert setting in demo
                demo = demo.replace(setting, short)
            (home / "short.toml").write_text(demo)
            self._play(home, members, server)
            self._federation = home
        return self._federation

    def _play(self, home: Path, commands: Sequence[str], server: str) -> None:
        address = self.free_address()
        hub = self.start(
            f"{server} --listen {address} --plan short.toml",
            home,
            home / "server.log",
            lambda said: "listening on" in said,
        )
        started = []
        for number, command in enumerate(commands, start=1):
            enrolled = home / f"state/clients/client-{number}/identity/identity.crt"
            member = Background(
                command.replace("pfed-client", f"pfed-client --server {address}", 1),
                home,
                home / f"client-{number}.log",
                self.environment,
            )
            self._stack.callback(end, member.process)
            member.until(enrolled.exists)  # under the next free name, as the docs say
            started.append(member)
        for member in started:
            member.ends()
        hub.process.send_signal(signal.SIGTERM)
        hub.ends()

    @staticmethod
    def free_address() -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"127.0.0.1:{probe.getsockname()[1]}"

    def run(self, command: str, where: Path) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        return subprocess.run(
            words_of(command),
            cwd=where,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def start(self, command: str, home: Path, log: Path, ready: Callable[[str], bool]) -> Background:
        made = Background(command, home, log, self.environment)
        self._stack.callback(end, made.process)
        made.until(lambda: ready(made.said()))
        return made


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(timeout=20)


def draw_images(folder: Path) -> None:
    """Six small pictures of each class of the plan for trying things out, in folders of their names."""
    for shape in ("circle", "square", "star"):
        (folder / shape).mkdir(parents=True)
        for number in range(12):
            picture = Image.new("RGB", (32, 32), (10 * number, 0, 0))
            box = (4 + number % 4, 4, 24 + number % 4, 24)
            pen = ImageDraw.Draw(picture)
            if shape == "circle":
                pen.ellipse(box, fill="white")
            elif shape == "square":
                pen.rectangle(box, fill="white")
            else:
                pen.polygon([(16, 2), (20, 30), (2, 12), (30, 12), (12, 30)], fill="white")
            picture.save(folder / shape / f"{number}.png")


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def consortium(folder: Path, machines: Path) -> None:
    """An authority, and certificates for a server, a client and an operator, by the commands of certs/README.md."""

    def run(*arguments: str | Path) -> None:
        pki.main([str(argument) for argument in arguments], prog_name="pfed pki", standalone_mode=False)

    folder.mkdir()
    with inside(folder):
        run("init", "authority", "--federation", "hospitals")
        for name, *options in (("server", "--role", "server", "--host", "127.0.0.1"), ("client",)):
            identity = machines / name / "etc/pfed/identity"
            run("request", identity, "--name", name, *options)
            run("approve", identity / "identity.csr", "--authority", "authority", "--yes", *options[:2])
            run("install", f"{name}.kit.json", identity, "--yes")
        run("revoke", "--authority", "authority", "--crl", machines / "server/etc/pfed/revoked.crl")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("docs"), stack)

"""Kills a private client at one boundary after another, has it go on, and compares what it drew with what it paid.

    python killing.py FOLDER [--put-back] [--without reservation|countersignature] [--every N]

A boundary is before and after each system call of the ledger (of a write also its middle), each answer of the server
about the ledger, each drawing of noise, each saving of the promise and of the model, and each sending. The noised
number of images counts as drawn when the promise is saved: before that it is in no file and in no message. For each of
them: a federation of two from its first round, in a process that ends with SIGKILL there; another process that goes on
to the end. With `--put-back` the ledger is first replaced by a copy: each of those that were made before a row was
added. `--without` takes a protection out, to see that it would be noticed. Prints what it found, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pfed_client import promise as promising
from pfed_client.agreement import agree
from pfed_client.ledger import shelf
from pfed_client.ledger.account import Account
from pfed_client.privacy import Privacy, privacy
from pfed_client.session import Session
from pfed_client.state import ClientState, Settings
from pfedsecure.errors import BudgetExhausted, LedgerError
from pfedsecure.privacy.accountant import epsilon

ROUNDS = 2
DONE, EXHAUSTED, REFUSED, FAILED = 0, 3, 4, 5
EPSILON, DELTA, NOISE = 50.0, 1e-5, 2.0
SETTINGS = Settings.of("images", dp_epsilon=EPSILON, dp_delta=DELTA)
IMAGES = [sha256(b"%d" % number).digest() for number in range(5)]


def load_conftest() -> Any:
    spec = importlib.util.spec_from_file_location("client_conftest", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


conftest = load_conftest()


class Killer:
    """Ends this process at the `kill_at`-th boundary; 0: never."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at
        self.count = 0

    def boundary(self) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Any) -> Any:
        def watched(*args: Any, **more: Any) -> Any:
            self.boundary()
            result = function(*args, **more)
            self.boundary()
            return result

        return watched

    def around_call(self, function: Any) -> Any:
        async def watched(*args: Any) -> Any:
            self.boundary()
            result = await function(*args)
            self.boundary()
            return result

        return watched

    def write(self, descriptor: int, line: bytes) -> int:
        """os.write, with a boundary in the middle."""
        self.boundary()
        self.count += 1
        if self.count == self.kill_at:
            os.write(descriptor, line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        written = os.write(descriptor, line)
        self.boundary()
        return written


async def take_part(home: Path, members: Any, killer: Killer, without: str | None) -> None:
    """One run of the federation: client `a` is private and watched, `b` is neither."""
    folder = home / "federation"
    plan = conftest.small_plan(rounds__count=ROUNDS, privacy__steps=3)
    it = conftest.Federation(plan, folder, members)
    account = account_of(home, it.store.load().federation_id)
    watched_os = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)})
    for name in ("open", "ftruncate", "fsync", "close"):
        setattr(watched_os, name, killer.around(getattr(os, name)))
    watched_os.write = killer.write
    shelf.os = watched_os  # type: ignore[attr-defined]
    shelf.write_atomically = killer.around(shelf.write_atomically)  # type: ignore[attr-defined]
    append, copies = shelf.Shelf.append, home / "copies"

    def copying(self: Any, ledger: Any, row: Any) -> str:
        shutil.copytree(self.folder, copies / f"{len(list(copies.glob('*'))):04d}")
        return append(self, ledger, row)

    shelf.Shelf.append = copying  # type: ignore[method-assign]
    trainer = conftest.NumpyTrainer("a")

    def draw(number: int, step: int) -> None:
        if step == 1:
            killer.boundary()
            with (home / "drawn").open("a") as file:
                file.write(f"{number}\n")
                file.flush()
                os.fsync(file.fileno())
            killer.boundary()

    save_promise = promising.write_atomically

    def save(path: Path, content: bytes) -> None:
        killer.boundary()
        save_promise(path, content)
        draw(0, 1)

    trainer.before_step = draw
    promising.write_atomically = save  # type: ignore[attr-defined]
    promising.noise_multiplier = lambda *_, **__: NOISE  # type: ignore[attr-defined]  # seconds, each time
    await it.coordinator.start()
    real = it.api("a")
    calls = ("countersign", "publish_expert", "submit_step")
    api = conftest.Around(real, **{name: killer.around_call(getattr(real, name)) for name in calls})
    with ClientState(folder / "a") as state:
        state.claim("a")
        state.save_model = killer.around(state.save_model)  # type: ignore[method-assign]
        if without == "reservation":
            Privacy.reserve = late  # type: ignore[method-assign,assignment]
        agreement = await agree(api, state)
        made = privacy(state, SETTINGS, plan, 3, account)
        assert made is not None
        session = Session(
            api,
            agreement,
            state,
            trainer,
            backbone_digest=conftest.BACKBONE_DIGEST,
            identity=members.identity("a"),
            privacy=Privacy(made.promise, made.budget, None) if without else made,
        )
        peer = asyncio.create_task(it.run("b"))
        try:
            await asyncio.wait_for(session.run(), timeout=20)
            await peer
        finally:
            peer.cancel()
            await it.coordinator.stop()


async def late(self: Privacy, round_number: int, countersigner: Any) -> Any:
    """What must not be: the ledger is told of what was done, afterwards."""
    return SimpleNamespace(commit=lambda: self.budget.reserve(self.promise.event(round_number)).commit())


def account_of(home: Path, federation_id: str = "whichever") -> Account:
    return Account(home / "ledgers", IMAGES, federation=federation_id, client="a")


def in_child(home: Path, members: Any, kill_at: int, without: str | None) -> int:
    """Exit status of a process that takes part; negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = FAILED
        try:
            asyncio.run(take_part(home, members, Killer(kill_at), without))
            status = DONE
        except BudgetExhausted:
            status = EXHAUSTED
        except LedgerError:
            status = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def drawn(home: Path) -> Counter[int]:
    path = home / "drawn"
    return Counter(map(int, path.read_text().split())) if path.exists() else Counter()


def complaint(home: Path, members: Any, without: str | None) -> str | None:
    """Go on to the end; what is wrong with what was paid, if anything."""
    before = drawn(home)
    status = in_child(home, members, 0, without)
    if status == REFUSED:
        return None if drawn(home) == before else "refused, but only after noise was drawn"
    if status not in (DONE, EXHAUSTED):
        return f"ended with {status}"
    events = account_of(home).read().events
    paid = Counter(event.round for event in events)
    if drawn(home) - paid:
        return f"drew {sorted(drawn(home).elements())}, paid for {sorted(paid.elements())}"
    if epsilon(events, DELTA) > EPSILON:
        return f"overspent: {sorted(paid.elements())}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--put-back", action="store_true")
    parser.add_argument("--without", choices=["reservation", "countersignature"])
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    members = conftest.Members(options.folder / "members")
    for name in ("a", "b"):
        members.identity(name)
    cases, complaints, kill_at = 0, [], 1
    while True:
        home = options.folder / f"{kill_at}"
        home.mkdir()
        status = in_child(home, members, kill_at, options.without)
        if status == DONE:
            break
        if status != -signal.SIGKILL:
            raise SystemExit(f"boundary {kill_at}: ended with {status}")
        copies = sorted((home / "copies").glob("*")) if options.put_back else [None]
        for number, copy in enumerate(copies):
            there = options.folder / f"{kill_at}-{number}"
            shutil.copytree(home, there)
            if copy is not None:
                shutil.rmtree(there / "ledgers")
                shutil.copytree(copy, there / "ledgers")
            cases += 1
            if (found := complaint(there, members, options.without)) is not None:
                complaints.append(f"boundary {kill_at}, copy {number}: {found}")
            shutil.rmtree(there)
        shutil.rmtree(home)
        kill_at += options.every
    print(json.dumps({"boundaries": kill_at - 1, "cases": cases, "complaints": complaints}))


if __name__ == "__main__":
    main()

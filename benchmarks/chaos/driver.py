"""Random sequences of orders to a `World` from a seed, and the shortest part of one that still breaks something."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import network, storage
from .cast import MEMBERS, Kind
from .world import Violation, World

MEMORY = Path("/dev/shm")  # noqa: S108 - what is put there is made by tempfile, for this user alone
ORDERS_EACH = (8, 30)
"""Fewest and most in a sequence."""

Order = tuple[str, object, object]
"""What happens, and with what."""


@dataclass(frozen=True)
class Story:
    """A world, and what happens in it."""

    kind: Kind
    seed: int
    orders: tuple[Order, ...]


def random_sequence(seed: int) -> Story:
    """The sequence of that number: always the same."""
    chance = random.Random(seed)  # noqa: S311 - faults need no secrets
    orders = tuple(_order(chance) for _ in range(chance.randint(*ORDERS_EACH)))
    kind: Kind = chance.choice(("plain", "secure"))
    return Story(kind, seed, orders)


def run(sequence: Story) -> str | None:
    """What breaks, if anything does: while it happens, after it, or because the federation never ends."""
    memory = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="pfed-world-", dir=memory) as folder:
        world = World(sequence.kind, Path(folder), sequence.seed)
        try:
            world.start_server()
            for name in MEMBERS:
                world.start(name)
            for order in sequence.orders:
                give(world, order)
                world.check()
            world.end()
        except Violation as violation:
            return str(violation)
        except Exception as error:  # nothing that can happen to a federation is an error of whoever starts its server
            return f"{type(error).__name__}: {error}"
        finally:
            world.close()
    return None


def shrunk(sequence: Story) -> Story:
    """A part of a sequence that breaks something, of which every order is needed for that."""
    orders: Sequence[Order] = sequence.orders
    place = 0
    while place < len(orders):
        fewer = Story(sequence.kind, sequence.seed, (*orders[:place], *orders[place + 1 :]))
        if run(fewer) is None:
            place += 1
        else:
            orders = fewer.orders
    return Story(sequence.kind, sequence.seed, tuple(orders))


def _order(chance: random.Random) -> Order:
    what = chance.choices(list(_LIKELY), list(_LIKELY.values()))[0]
    name = chance.choice(MEMBERS)
    match what:
        case "time passes":
            return what, chance.choice((0.2, 1.0, 3.0, 10.0, 40.0, 120.0)), None
        case "network fails":
            return what, name, (chance.choice(network.FAULTS), chance.randint(0, 12))
        case "disk fails":
            return what, chance.choice(storage.FAULTS), chance.randint(0, 12)
        case "clock jumps":
            return what, chance.choice((-3600.0, -30.0, 30.0, 3600.0)), None
        case "cable":
            return what, name, chance.random() < 0.5
    return what, name, None


def give(world: World, order: Order) -> None:
    """Have `order` happen. Raises ValueError for one that there is not."""
    what, one, other = order
    match what, one, other:
        case "time passes", float(seconds), _:
            world.run(seconds)
        case "member starts", str(name), _:
            world.start(name)
        case "member killed", str(name), _:
            world.kill(name)
        case "member leaves", str(name), _:
            if world.server is not None and not world.members[name].network.is_cut:
                world.leave(name)
        case "cable", str(name), bool(cut):
            world.members[name].network.is_cut = cut
        case "network fails", str(name), (fault, int(after)):
            world.members[name].network.plan(fault, after)  # type: ignore[arg-type]  # of network.FAULTS
        case "disk fails", fault, int(after):
            if world.server is not None:
                world.server.store.plan(fault, after)  # type: ignore[arg-type]
        case "clock jumps", float(seconds), _:
            world.clock.offset += seconds
        case "server killed", _, _:
            world.kill_server()
        case "server stopped", _, _:
            world.stop_server()
        case "server starts", _, _:
            world.start_server()
        case _:
            raise ValueError(f"no such order: {order}")


_LIKELY = {
    "time passes": 10,
    "member starts": 2,
    "member killed": 2,
    "member leaves": 1,
    "cable": 2,
    "network fails": 6,
    "disk fails": 3,
    "clock jumps": 1,
    "server killed": 2,
    "server stopped": 1,
    "server starts": 4,
}

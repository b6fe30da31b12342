"""Random sequences of faults on a `World`, shrunk to the shortest that still breaks something."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from . import network, storage
from .cast import MEMBERS, Kind
from .driver import MEMORY, give
from .world import World

_members = st.sampled_from(MEMBERS)
_after = st.integers(0, 12)
"""How many calls or transactions still work."""


class Operations(RuleBasedStateMachine):
    """Joins, leaves, kills, restarts; lost, repeated, late and cut messages; jumps of the clock; disks that fail.

    After every step `World.check` looks, and in the end the federation has to come to its end.
    """

    world: World | None = None

    @initialize(kind=st.sampled_from(("plain", "secure")), seed=st.integers(0, 2**16))
    def begin(self, kind: Kind, seed: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pfed-world-", dir=MEMORY if MEMORY.is_dir() else None)
        self.world = World(kind, Path(self._folder.name), seed)
        self.world.start_server()
        for name in MEMBERS:
            self.world.start(name)

    @rule(seconds=st.sampled_from((0.2, 1.0, 3.0, 10.0, 40.0, 120.0)))
    def time_passes(self, seconds: float) -> None:
        self._give("time passes", seconds)

    @rule(name=_members)
    def a_member_starts(self, name: str) -> None:
        self._give("member starts", name)

    @rule(name=_members)
    def a_member_is_killed(self, name: str) -> None:
        self._give("member killed", name)

    @rule(name=_members)
    def a_member_leaves(self, name: str) -> None:
        self._give("member leaves", name)

    @rule(name=_members, cut=st.booleans())
    def a_cable_is_pulled_or_plugged_in(self, name: str, cut: bool) -> None:
        self._give("cable", name, cut)

    @rule(name=_members, fault=st.sampled_from(network.FAULTS), after=_after)
    def the_network_fails(self, name: str, fault: network.NetworkFault, after: int) -> None:
        self._give("network fails", name, (fault, after))

    @rule(fault=st.sampled_from(storage.FAULTS), after=_after)
    def the_disk_fails(self, fault: storage.StorageFault, after: int) -> None:
        self._give("disk fails", fault, after)

    @rule()
    def the_server_is_killed(self) -> None:
        self._give("server killed")

    @rule()
    def the_server_is_stopped(self) -> None:
        self._give("server stopped")

    @precondition(lambda self: self.world is not None and self.world.server is None)
    @rule()
    def the_server_is_started(self) -> None:
        self._give("server starts")

    @rule(seconds=st.sampled_from((-3600.0, -30.0, 30.0, 3600.0)))
    def the_clock_jumps(self, seconds: float) -> None:
        self._give("clock jumps", seconds)

    @invariant()
    def all_is_as_it_must_be(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            self.world.end()
        finally:
            self.world.close()
            self._folder.cleanup()

    def _give(self, what: str, one: object = None, other: object = None) -> None:
        assert self.world is not None
        give(self.world, (what, one, other))

"""What must be true of a federation at every moment, whatever went wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pfed_server.reading import read_state
from pfed_server.store import State
from pfedsecure.errors import MessageRejected
from pfedsecure.experts.factory import client_experts
from pfedsecure.privacy.events import SampledGaussianSteps
from pfedsecure.wire.tensors import from_tensor
from pfedsecure.wire.v1.payload_pb2 import Tensor

from .cast import MEMBERS, SHAPE, value_of, weight_of

if TYPE_CHECKING:
    from .world import World


class NeverSeen:
    """A recipient that has opened nothing yet: `pfedsecure.experts.interface.Seen`."""

    def newest(self, _pseudonym: str) -> int:
        return 0

    def note(self, pseudonym: str, round_number: int) -> None:
        pass


class Watch:
    """Looks at what the server keeps, and remembers what it was asked and said."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._input_step = 1 if world.kind == "plain" else 3
        self._tolerance = 1e-6 if world.kind == "plain" else 2 * world.plan.secure_aggregation.precision
        self._asked: set[tuple[int, str]] = set()
        self._accepted: set[tuple[int, str]] = set()
        self._newest = (0, 0, 0)
        self._prompts: dict[int, bytes] = {}
        self._opened: set[bytes] = set()
        self._paid: dict[str, int] = {}
        self.closed: set[int] = set()
        self.abandoned: set[int] = set()

    def asks(self, method: str, name: str, args: tuple[Any, ...]) -> None:
        """A call arrives at the server."""
        if method == "submit_step" and args[1] == self._input_step:
            self._asked.add((args[0], name))

    def is_answered(self, method: str, name: str, args: tuple[Any, ...]) -> None:
        """The server gave a receipt."""
        if method == "submit_step" and args[1] == self._input_step:
            self._accepted.add((args[0], name))

    def look(self) -> None:
        """Report whatever is wrong. Needs a server that is alive."""
        server = self._world.server
        assert server is not None
        with server.sql._transaction() as session:
            state = read_state(session)  # not `load`, after which the store would know better itself
        if (held := server.coordinator._federation.state) != state:
            self._world.report(f"the server goes by {held}, its store has {state}")
        self._never_goes_back(state)
        history = server.sql.history().rounds
        for record in history:
            {"closed": self.closed, "abandoned": self.abandoned}.get(record.outcome, set()).add(record.number)
        for number in self.closed & self.abandoned:
            self._world.report(f"round {number} is closed and abandoned")
        for number in sorted(self.closed):
            self._sums_once(number, server.sql.global_prompt(number + 1))
        self._pool(state)
        self._budget()

    def _never_goes_back(self, state: State) -> None:
        now = (state.version, state.last_round, state.rounds_completed)
        if any(new < old for new, old in zip(now, self._newest, strict=True)):
            self._world.report(f"version, round and rounds completed went from {self._newest} to {now}")
        self._newest = now

    def _sums_once(self, number: int, prompt: bytes) -> None:
        """A round's prompt is the mean of those that it took, each once, and never changes."""
        if number in self._prompts:
            if prompt != self._prompts[number]:
                self._world.report(f"the prompt of round {number} has changed")
            return
        self._prompts[number] = prompt
        mean = from_tensor(Tensor.FromString(prompt), SHAPE, "prompt").flatten().astype(np.float64)
        inside = {name for place, name in enumerate(MEMBERS) if abs(mean[place]) > 0.01}
        total = sum(weight_of(name) for name in inside)
        expected = np.zeros(mean.size)
        for name in inside:
            expected[MEMBERS.index(name)] = weight_of(name) * value_of(number) / total
        if np.abs(mean - expected).max() > self._tolerance:
            self._world.report(f"round {number} is not the mean of {sorted(inside)}: {mean} instead of {expected}")
        accepted = {name for of, name in self._accepted if of == number}
        asked = {name for of, name in self._asked if of == number}
        if not accepted <= inside <= asked:
            self._world.report(
                f"round {number} has {sorted(inside)}; receipts went to {sorted(accepted)}, {sorted(asked)} sent"
            )

    def _pool(self, state: State) -> None:
        """Experts are those of closed rounds, and every member can open them."""
        for name, pooled in state.pooled.items():
            if pooled.round not in self.closed:
                self._world.report(f"the pool has an expert of {name} from round {pooled.round}, which is not closed")
            if pooled.digest not in self._opened:
                self._opened.add(pooled.digest)
                self._open(state, name, pooled.round)

    def _open(self, state: State, author: str, number: int) -> None:
        server = self._world.server
        assert server is not None
        expert_id = state.members[author].expert_id
        content = server.sql.experts([expert_id]).get(expert_id)
        for name in MEMBERS:
            if name == author or content is None:
                continue
            identity = self._world.cast.identities[name]
            experts = client_experts(self._world.plan, SHAPE, state.federation_id, identity, NeverSeen())
            try:
                context = experts.unpack(content, expert_id, state.last_round + 1)
            except MessageRejected as refused:
                self._world.report(f"{name} cannot open the expert of {author}: {refused}")
                continue
            own = float(context.flat[MEMBERS.index(author)])
            if abs(own - value_of(number)) > 1e-6:
                self._world.report(f"the expert of {author} is not the one of round {number}")

    def _budget(self) -> None:
        """Every noise that was drawn has an event that pays for it, and none is ever lost."""
        for member in self._world.members.values():
            if member.account is None:
                continue
            events = [event for event in member.account.read().events if isinstance(event, SampledGaussianSteps)]
            paid, drawn = len(events), len(member.trainer.trained)
            if paid < drawn:
                self._world.report(f"{member.name} trained {drawn} times and paid for {paid}")
            if paid < self._paid.get(member.name, 0):
                self._world.report(f"{member.name} had paid for {self._paid[member.name]}, and now for {paid}")
            self._paid[member.name] = paid

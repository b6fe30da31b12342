"""A session with differential privacy: what is paid when, what is not sent, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from pfed_client.agreement import agree
from pfed_client.ledger.account import Account
from pfed_client.local_model import LocalModel
from pfed_client.privacy import Privacy, check_privacy, privacy
from pfed_client.promise import Promise
from pfed_client.session import Session
from pfed_client.state import ClientState, Settings
from pfedsecure.errors import BudgetExhausted, LedgerError, StateError
from pfedsecure.plan import Plan
from pfedsecure.privacy.accountant import epsilon
from pfedsecure.privacy.events import Event, GaussianRelease

BACKBONE_DIGEST = "b" * 64
SIZE = 41
PROMISE = Promise(
    epsilon=8,
    delta=1e-5,
    size=SIZE,
    size_noise_multiplier=6,
    noise_multiplier=2,
    sample_rate=0.5,
    steps=3,
    rounds=3,
)


class Watched:
    """A budget that grants `most` events and writes down what happens to it."""

    def __init__(self, story: list[str], most: int = 99) -> None:
        self.events: list[Event] = []
        self._story = story
        self._most = most
        self.on_commit: Callable[[], None] = lambda: None

    def reserve(self, event: Event) -> Watched:
        if len(self.events) == self._most:
            raise BudgetExhausted("the budget is spent")
        self.events.append(event)
        self._story.append(f"reserve {event.round}")
        return self

    def commit(self) -> None:
        self._story.append("commit")
        self.on_commit()


async def run(it: Any, name: str, trainer: Any, budget: Any, **options: Any) -> float:
    """One private session of client `name` in federation `it`."""
    api = it.api(name)
    with ClientState(it.folder / name) as state:
        state.claim(name)
        session = Session(
            api,
            await agree(api, state),
            state,
            trainer,
            backbone_digest=BACKBONE_DIGEST,
            identity=it.members.identity(name),
            privacy=Privacy(PROMISE, budget),
            **options,
        )
        return await asyncio.wait_for(session.run(), timeout=20)


async def test_every_round_is_paid_before_it_is_trained_and_settled_once_it_is_on_disk(
    federation: Any, make_trainer: Any
) -> None:
    story: list[str] = []
    budget = Watched(story)
    trainer = make_trainer("a", n_train=3)
    trainer.before_step = lambda number, step: story.append(f"step {number}.{step}")
    async with federation() as it:
        budget.on_commit = lambda: story.append(f"on disk {it.model('a').trained_round}")
        await asyncio.gather(run(it, "a", trainer, budget), it.run("b"))
    expected = []
    for number in (1, 2, 3):
        expected += [f"reserve {number}", *(f"step {number}.{step}" for step in (1, 2, 3))]
        expected += ["commit", f"on disk {number}"]
    assert story == expected
    assert budget.events == [PROMISE.event(number) for number in (1, 2, 3)]


async def test_a_killed_training_is_paid_for_again_and_a_kept_one_is_not_done_again(
    federation: Any, make_trainer: Any
) -> None:
    story: list[str] = []
    budget = Watched(story)
    async with federation() as it:
        trainer = make_trainer("a")
        in_training, go_on = threading.Event(), threading.Event()

        def pause(number: int, step: int) -> None:
            if (number, step) == (2, 2):
                in_training.set()
                go_on.wait(10)

        trainer.before_step = pause
        peer = asyncio.create_task(it.run("b"))
        first = asyncio.create_task(run(it, "a", trainer, budget))
        await asyncio.to_thread(in_training.wait, 10)
        first.cancel()
        go_on.set()
        await asyncio.gather(first, return_exceptions=True)
        await run(it, "a", make_trainer("a"), budget)
        await peer
        assert [event.round for event in budget.events] == [1, 2, 2, 3]
        await run(it, "a", make_trainer("a"), budget)  # when all is over
        assert len(budget.events) == 4


async def test_a_spent_budget_ends_the_client_and_leaves_it_its_model(federation: Any, make_trainer: Any) -> None:
    async with federation() as it:
        trainer = make_trainer("a")
        peer = asyncio.create_task(it.run("b"))
        with pytest.raises(BudgetExhausted):
            await run(it, "a", trainer, Watched([], most=2))
        assert trainer.trained == [1, 2]
        assert it.model("a").trained_round == 2
        await it.run("a")  # without privacy, so that the federation ends; a real client is refused that
        await peer


async def test_the_weight_in_the_mean_is_the_noised_number_of_images(
    federation: Any, make_trainer: Any, make_plan: Any
) -> None:
    """What the server sees of the size is what the promise released: here, in plain, for all to see."""

    @dataclasses.dataclass
    class Sized(make_trainer):  # type: ignore[misc]
        def train_round(self, *args: Any, **more: Any) -> Any:
            model, report = super().train_round(*args, **more)
            return dataclasses.replace(model, n_train=SIZE), report

    async with federation(make_plan(rounds__count=1)) as it:
        await asyncio.gather(run(it, "a", Sized("a", n_train=1000), Watched([])), it.run("b"))
        a, b = it.model("a"), it.model("b")
        mean = (SIZE * a.context.astype(np.float64) + 3 * b.context) / (SIZE + 3)
        np.testing.assert_allclose(it.global_prompt(), mean, atol=1e-6)


@pytest.mark.parametrize("matching", ["dp", "he"])
async def test_sketches_of_private_prompts_are_free(
    federation: Any, make_trainer: Any, make_protected_plan: Any, matching: str
) -> None:
    """No noise on them, and no event: they are made of what was paid for. Without privacy there is both."""
    plan = make_protected_plan(protection__matching=matching, matching__epsilon=8.0)
    async with federation(plan) as it:
        budget = Watched([])
        await asyncio.gather(run(it, "a", make_trainer("a"), budget), it.run("b"), it.run("c"))
        assert [event.round for event in budget.events] == [1, 2]
        logs = {name: it.folder / name / "releases.jsonl" for name in ("a", "b")}
        assert not logs["a"].exists()
        released = [TypeAdapter(GaussianRelease).validate_json(line) for line in logs["b"].read_text().splitlines()]
        assert len(released) == 2


async def test_metrics_stay_at_home(
    federation: Any, make_trainer: Any, make_protected_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the plan has them and the client agreed: no noise covers them."""
    sent: dict[str, list[Any]] = {"a": [], "b": []}
    from pfed_client.contributing import Contributor

    send = Contributor.send

    async def seen(self: Contributor, identity: Any, step: int, contribution: Any) -> Any:
        sent["a" if contribution.weight == SIZE else "b"].append(contribution.metrics)
        return await send(self, identity, step, contribution)

    monkeypatch.setattr(Contributor, "send", seen)
    async with federation(make_protected_plan(protection__metrics=True, rounds__count=1)) as it:
        trainer = make_trainer("a", n_train=SIZE)
        await asyncio.gather(
            run(it, "a", trainer, Watched([]), share_metrics=True),
            it.run("b", share_metrics=True),
            it.run("c", share_metrics=True),
        )
    assert sent["a"]
    assert set(map(str, sent["a"])) == {"None"}
    assert all(metrics is not None for metrics in sent["b"])


async def test_no_loss_stops_a_private_client(federation: Any, make_trainer: Any) -> None:
    """Whether a client goes on is seen by the server, and a loss is made of images."""

    class Odd(make_trainer):  # type: ignore[misc]
        def train_round(self, *args: Any, **more: Any) -> Any:
            model, report = super().train_round(*args, **more)
            return model, dataclasses.replace(report, train_loss=float("nan"))

    async with federation() as it:
        peer = asyncio.create_task(it.run("b"))
        await run(it, "a", Odd("a"), Watched([]))
        await peer
        assert it.model("a").trained_round == 3


def settings(**changes: Any) -> Settings:
    base: dict[str, Any] = {
        "data": "demo:0/5",
        "data_root": Path.cwd(),
        "test_fraction": 0.5,
        "strict": False,
        "model": None,
        "pretrained": None,
        "backbone_dir": None,
        "precision": "fp32",
    }
    return Settings(**(base | changes))


@pytest.fixture
def state(tmp_path: Path) -> Any:
    with ClientState(tmp_path / "state") as it:
        it.claim("a")
        yield it


@pytest.fixture
def account(tmp_path: Path) -> Account:
    return Account(tmp_path / "ledgers", [bytes([number]) * 32 for number in range(9)], federation="f", client="a")


PLAN = Plan.model_validate({"class_names": ["a", "b"], "rounds": {"count": 2}, "privacy": {"steps": 3}})


async def test_the_promise_is_made_once_and_kept(state: ClientState, account: Account) -> None:
    assert privacy(state, settings(), PLAN, 100, account) is None
    assert not account.folder.exists()
    asked = settings(dp_epsilon=4.0)
    first = privacy(state, asked, PLAN, 100, account)
    assert first is not None
    assert [event.what for event in account.read().events] == ["number of training images"]
    again = privacy(state, asked, PLAN, 100, account)
    assert again is not None
    assert again.promise == first.promise  # the size is not drawn again: its mean would be the size
    assert len(account.read().events) == 1
    for number in (1, 2):
        (await again.reserve(number, None)).commit()
    assert epsilon(account.read().events, 1e-5) <= 4
    with pytest.raises(BudgetExhausted, match="epsilon 4 is spent"):
        await again.reserve(3, None)
    other = PLAN.model_copy(update={"privacy": PLAN.privacy.model_copy(update={"steps": 4})})
    with pytest.raises(StateError, match="promise is for another plan, of 2 rounds of 3 steps"):
        privacy(state, asked, other, 100, account)


@pytest.mark.slow
def test_what_the_images_spent_before_counts(tmp_path: Path, account: Account) -> None:
    """Another federation, another state directory: the same images, one budget."""

    def joined(folder: str, epsilon: float) -> None:
        with ClientState(tmp_path / folder) as state:
            state.claim("a")
            made = privacy(state, settings(dp_epsilon=epsilon), PLAN, 100, account)
            assert made is not None
            for number in (1, 2):
                made.budget.reserve(made.promise.event(number))

    joined("first", 4.0)
    with pytest.raises(BudgetExhausted, match=r"have spent epsilon (3.9|4 ).* it takes well over"):
        joined("second", 4.0)
    joined("third", 8.0)
    assert 7.8 < epsilon(account.read().events, 1e-5) <= 8  # both federations together


@pytest.mark.parametrize(("epsilon", "delta"), [(4.0, 1e-4), (3.0, 1e-5)])
def test_a_promise_is_not_kept_by_making_an_easier_one(
    tmp_path: Path, account: Account, epsilon: float, delta: float
) -> None:
    """The same epsilon with a larger delta would be more than was promised; a default delta is not larger."""
    with ClientState(tmp_path / "first") as state:
        state.claim("a")
        assert privacy(state, settings(dp_epsilon=4.0, dp_delta=1e-6), PLAN, 100, account) is not None
    with ClientState(tmp_path / "second") as state:
        state.claim("a")
        with pytest.raises(BudgetExhausted, match=r"delta 1e-06 was promised .* give --dp-delta 1e-06, less, or none"):
            privacy(state, settings(dp_epsilon=epsilon, dp_delta=delta), PLAN, 100, account)
        assert len(account.read().events) == 1
        made = privacy(state, settings(dp_epsilon=4.0), PLAN, 100, account)
        assert made is not None
        assert made.promise.delta == 1e-6


def test_a_larger_epsilon_may_come_with_a_larger_delta(tmp_path: Path, account: Account) -> None:
    with ClientState(tmp_path / "first") as state:
        state.claim("a")
        assert privacy(state, settings(dp_epsilon=4.0, dp_delta=1e-6), PLAN, 100, account) is not None
    with ClientState(tmp_path / "second") as state:
        state.claim("a")
        made = privacy(state, settings(dp_epsilon=8.0, dp_delta=1e-4), PLAN, 100, account)
        assert made is not None
        assert made.promise.delta == 1e-4


def test_a_promise_of_an_earlier_version_is_refused(state: ClientState, account: Account) -> None:
    state.promise.write(PROMISE)
    with pytest.raises(LedgerError, match="made by an earlier version, without a ledger"):
        privacy(state, settings(dp_epsilon=8.0), PLAN, 100, account)


def test_a_promise_without_what_was_released_for_it_is_refused(state: ClientState, account: Account) -> None:
    """Deleting the ledger does not fill the budget up again."""
    asked = settings(dp_epsilon=4.0)
    assert privacy(state, asked, PLAN, 100, account) is not None
    shutil.rmtree(account.folder)
    with pytest.raises(LedgerError, match="is not in the ledger of its images"):
        privacy(state, asked, PLAN, 100, account)


def test_another_promise_is_refused(state: ClientState) -> None:
    state.promise.write(PROMISE)
    check_privacy(state, settings(dp_epsilon=8.0))
    check_privacy(state, settings(dp_epsilon=8.0, dp_delta=1e-5))
    for other in ({"dp_epsilon": 9.0}, {}, {"dp_epsilon": 8.0, "dp_delta": 1e-6}):
        with pytest.raises(StateError, match="promised epsilon 8 with delta 1e-05 for the whole federation"):
            check_privacy(state, settings(**other))


def test_what_was_learned_without_cannot_be_made_private(state: ClientState) -> None:
    """The gate goes on from what it learned; a promise over it would be void."""
    check_privacy(state, settings(dp_epsilon=8.0))
    zeros = np.zeros((2, 3), np.float32)
    state.save_model(LocalModel(zeros, {}, zeros[None][:0], trained_round=1), {"plan": "p"})
    check_privacy(state, settings())
    with pytest.raises(StateError, match="trained without differential privacy"):
        check_privacy(state, settings(dp_epsilon=8.0))

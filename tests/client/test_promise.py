"""The promise of a client: that it holds, that it tells nothing but what was paid for, and what cannot be promised."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfed_client.promise import SIZE, Promise, PromiseFile, promise
from pfedsecure.errors import BudgetExhausted, BudgetTooSmall, StateError
from pfedsecure.plan import Plan
from pfedsecure.privacy.accountant import epsilon
from pfedsecure.privacy.events import Event, GaussianRelease
from pfedsecure.privacy.noise import RoundedGaussian


class Granted:
    """A budget that grants everything, and knows what."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.committed = 0

    def reserve(self, event: Event) -> Granted:
        self.events.append(event)
        return self

    def commit(self) -> None:
        self.committed += 1


def plan(rounds: int = 4, **privacy: Any) -> Plan:
    values = {"batch_size": 20, "steps": 5, **privacy}
    return Plan.model_validate({"class_names": ["a", "b"], "rounds": {"count": rounds}, "privacy": values})


def made(
    n_train: int,
    epsilon: float = 8.0,
    delta: float | None = None,
    the_plan: Plan | None = None,
    budget: Any = None,
    entropy: Callable[[int], bytes] | None = None,
) -> Promise:
    granted = budget or Granted()
    more = {} if entropy is None else {"entropy": entropy}
    return promise(the_plan or plan(), epsilon, delta, n_train, lambda _epsilon, _delta: granted, **more)


def fixed(_count: int) -> bytes:
    return hashlib.shake_256(b"promise").digest(_count)


def test_everything_together_stays_within_what_was_promised_and_uses_it() -> None:
    granted = Granted()
    it = made(150, budget=granted)
    events = [*granted.events, *(it.event(number) for number in range(1, 5))]
    assert 7.9 < epsilon(events, it.delta) <= 8
    assert epsilon([*events, it.event(5)], it.delta) > 8
    assert (it.epsilon, it.delta, it.rounds, it.steps) == (8, 1e-5, 4, 5)
    assert it.sample_rate == 20 / it.size
    assert granted.committed == 1


def test_the_number_of_images_is_known_by_its_noised_release_alone() -> None:
    """Data sets of other sizes whose noised size is the same give the same promise, to the last bit."""
    granted = Granted()
    one = made(150, budget=granted, entropy=fixed)
    (released,) = granted.events
    assert isinstance(released, GaussianRelease)
    assert released.what == SIZE
    assert released.noise_multiplier == one.size_noise_multiplier > 2.5
    noise = int(RoundedGaussian(released.noise_multiplier).sample(1, fixed)[0])
    assert one.size == 150 + noise != 150

    def mirrored(count: int) -> bytes:  # the sign is the lowest bit of a draw's eight bytes
        return (int.from_bytes(fixed(count), "little") ^ 1).to_bytes(count, "little")

    assert made(150 + 2 * noise, entropy=mirrored) == one


def test_sizes_are_as_noisy_as_the_event_says() -> None:
    everything = plan(rounds=1, steps=1, batch_size=5000)  # at sample rate 1 noise is solved for at once
    sizes = np.array([made(1000, epsilon=2.0, the_plan=everything).size for _ in range(12)])
    multiplier = made(1000, epsilon=2.0, the_plan=everything).size_noise_multiplier
    assert len(set(sizes.tolist())) > 4
    assert np.abs(sizes - 1000).max() < 6 * multiplier
    assert made(1, epsilon=1.0).size >= 1  # also where the noise brings it below


def test_nothing_is_drawn_before_it_is_paid_for() -> None:
    class Empty:
        def reserve(self, event: Event) -> Any:
            raise BudgetExhausted("spent")

    def never(count: int) -> bytes:
        raise AssertionError("drew noise")

    with pytest.raises(BudgetExhausted):
        made(150, budget=Empty(), entropy=never)


def test_a_smaller_epsilon_and_more_rounds_take_more_noise() -> None:
    base = made(150, entropy=fixed).noise_multiplier
    assert made(150, epsilon=2.0, entropy=fixed).noise_multiplier > 1.5 * base
    assert made(150, the_plan=plan(rounds=16), entropy=fixed).noise_multiplier > 1.3 * base


def test_what_was_spent_before_counts() -> None:
    """An attempt to join that came to nothing has drawn the number of images already."""
    granted = Granted()
    before = [GaussianRelease(SIZE, 0, 2.0), GaussianRelease(SIZE, 0, 3.0)]
    it = promise(plan(), 8.0, None, 150, lambda _epsilon, _delta: granted, spent=iter(before))
    events = [*before, *granted.events, *(it.event(number) for number in range(1, 5))]
    assert 7.9 < epsilon(events, it.delta) <= 8


def test_small_clients_take_every_image_in_every_step() -> None:
    assert made(3).sample_rate == 1


def test_delta_is_below_one_over_the_number_of_images() -> None:
    it = made(40_000, the_plan=plan(rounds=1, steps=1, batch_size=10**6))
    assert it.delta == pytest.approx(0.1 / it.size)
    assert it.delta < 1e-5
    assert made(150, delta=1e-6).delta == 1e-6
    with pytest.raises(BudgetTooSmall, match=r"delta 0\.05 protects nobody among some \d+ images"):
        made(150, delta=0.05)


def test_the_impossible_says_what_is_possible() -> None:
    with pytest.raises(BudgetTooSmall, match=r"epsilon 1e-06 with delta 1e-05 is too small: it takes well over 0\.00"):
        made(150, epsilon=1e-6)
    with pytest.raises(BudgetTooSmall, match=r"epsilon 0\.1 with delta 1e-05 is too small for 100 steps") as caught:
        made(150, epsilon=0.1, the_plan=plan(rounds=20, batch_size=5000))
    possible = re.search(r"smallest possible is ([0-9.]+), and leaves next to nothing", str(caught.value))
    assert possible is not None
    assert 0.3 < float(possible[1]) < 0.5


def test_it_is_kept(tmp_path: Path) -> None:
    file = PromiseFile(tmp_path / "privacy.json")
    assert file.read() is None
    it = made(150)
    file.write(it)
    assert file.read() == it
    for damaged in (b"", b"{}", it.model_dump_json().replace("8.0", "-8.0", 1).encode()):
        (tmp_path / "privacy.json").write_bytes(damaged)
        with pytest.raises(StateError, match=r"privacy\.json: damaged"):
            file.read()
    assert "epsilon 8, delta 1e-05 for all 4 rounds: 5 steps each" in it.in_words()

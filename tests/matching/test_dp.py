"""Noised sketches: what is released, how often, and what somebody who wants more gets."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.candidates import Candidate, read_candidates, write_candidates
from pfedsecure.matching.dp import (
    RADIUS,
    DpClientMatching,
    DpServerMatching,
    read_grid_sketch,
    write_sketch,
)
from pfedsecure.matching.interface import PoolEntry
from pfedsecure.matching.release import MAX_NOISE_MULTIPLIER, SKETCH, Release, largest_norm, to_grid
from pfedsecure.matching.sketch import Sketcher
from pfedsecure.privacy.calibration import gaussian_delta
from pfedsecure.privacy.events import GaussianRelease
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1.payload_pb2 import PlainMatchAnswer, PlainSketch

PROMPTS = Path(__file__).with_name("demo_prompts.npz")
SHAPE = (3, 8)
SENSITIVITY = 2 * RADIUS
M = 16
CLIP = 4.0
DELTA = 1e-5


class Crash(Exception):
    """The process ends here."""


class Disk:
    """What outlives a crash: the kept contents, the events, and how often noise was drawn."""

    def __init__(self) -> None:
        self.contents: dict[str, tuple[str, bytes]] = {}
        self.events: list[GaussianRelease] = []
        self.draws = 0
        self.crash: str | None = None

    def find(self, what: str, key: str) -> bytes | None:
        known, content = self.contents.get(what, ("", b""))
        return content if known == key else None

    def keep(self, what: str, key: str, content: bytes) -> None:
        self._maybe_crash("before keeping")
        self.contents[what] = (key, content)
        self._maybe_crash("after keeping")

    def record(self, event: GaussianRelease) -> None:
        self._maybe_crash("before the event")
        self.events.append(event)
        self._maybe_crash("after the event")

    def entropy(self, count: int) -> bytes:
        self.draws += 1
        return np.random.default_rng(self.draws).bytes(count)

    def _maybe_crash(self, where: str) -> None:
        if self.crash == where:
            self.crash = None
            raise Crash


def sketcher(clip: float = CLIP) -> Sketcher:
    return Sketcher(np.zeros(SHAPE, np.float32), M, clip, 1)


def client(disk: Disk, epsilon: float | None = 1.0) -> DpClientMatching:
    return DpClientMatching(sketcher(), release(disk, epsilon))


def release(disk: Disk, epsilon: float | None) -> Release | None:
    return None if epsilon is None else Release(epsilon, DELTA, disk, disk.record, disk.entropy)


def context_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def integers(sketch: bytes) -> np.ndarray:
    return read_grid_sketch(sketch, M, math.inf).astype(np.int64)


def test_one_event_is_recorded_that_gives_what_it_says() -> None:
    disk = Disk()
    client(disk, epsilon=1.0).sketch(context_of(1), 3)
    (event,) = disk.events
    assert (event.what, event.round) == (SKETCH, 3)
    assert gaussian_delta(event.noise_multiplier, 1.0, 1.0) <= DELTA
    assert gaussian_delta(event.noise_multiplier * 0.999, 1.0, 1.0) > DELTA


def test_the_noise_is_as_large_as_the_event_says() -> None:
    context, exact = context_of(1), to_grid(sketcher().sketch(context_of(1)), CLIP, RADIUS)
    disk = Disk()
    matching = client(disk, epsilon=8.0)
    noise = np.array([integers(matching.sketch(context, number)) - exact for number in range(1, 400)])
    ratio = noise.std() / (disk.events[0].noise_multiplier * SENSITIVITY)
    assert ratio == pytest.approx(1, abs=5 / math.sqrt(2 * noise.size))
    assert abs(noise.mean()) < 5 * noise.std() / math.sqrt(noise.size)


def test_the_same_round_gives_the_same_bytes_whoever_asks() -> None:
    disk = Disk()
    released = client(disk).sketch(context_of(1), 2)
    restarted = client(disk)
    assert restarted.query(context_of(1), 2, 9) == released == restarted.sketch(context_of(1), 2)
    assert restarted.sketch(context_of(2), 2) == released  # trained again after a crash: still one release
    assert (len(disk.events), disk.draws) == (1, 1)
    assert client(disk).sketch(context_of(1), 3) != released
    assert [event.round for event in disk.events] == [2, 3]


def test_a_query_that_comes_first_is_the_release() -> None:
    disk = Disk()
    query = client(disk).query(context_of(1), 2, 9)
    assert client(disk).sketch(context_of(1), 2) == query
    assert len(disk.events) == 1


def test_averaging_is_an_attack_and_gets_nowhere() -> None:
    """Somebody who asks thousands of times: fresh noise would cancel out; what is sent is one draw for ever."""
    context, exact = context_of(1), to_grid(sketcher().sketch(context_of(1)), CLIP, RADIUS)
    noise = 8 * SENSITIVITY / 10  # about that of epsilon 8

    def error(sketches: list[np.ndarray]) -> float:
        return float(np.linalg.norm(np.mean(sketches, axis=0) - exact) / np.linalg.norm(exact))

    fresh = Disk()
    matching = client(fresh, 8.0)
    careless = [integers(matching.sketch(context, number)) for number in range(1, 3001)]
    assert len(fresh.events) == 3000  # and the ledger knows what that costs
    assert error(careless) < 0.2
    disk = Disk()
    matching = client(disk, 8.0)
    answers = [integers(matching.query(context, 1, 9)) for _ in range(3000)]
    assert len(disk.events) == 1
    assert error(answers) == error(answers[:1]) > 0.5 * noise * math.sqrt(M) / RADIUS


@pytest.mark.parametrize(
    ("where", "events", "draws"),
    [("before the event", 1, 1), ("after the event", 2, 1), ("before keeping", 2, 2), ("after keeping", 1, 1)],
)
def test_a_crash_costs_an_event_at_most_and_never_hides_one(where: str, events: int, draws: int) -> None:
    disk = Disk()
    disk.crash = where
    with pytest.raises(Crash):
        client(disk).sketch(context_of(1), 2)
    assert disk.draws <= len(disk.events)
    on_disk = disk.find(SKETCH, f"2 {RADIUS} {M}")
    released = client(disk).sketch(context_of(1), 2)
    assert (len(disk.events), disk.draws) == (events, draws)
    assert on_disk in (None, integers(released).astype("<i8").tobytes())


def test_a_ledger_that_refuses_stops_everything() -> None:
    disk = Disk()

    def refuse(event: GaussianRelease) -> None:
        raise RuntimeError("out of budget")

    matching = DpClientMatching(sketcher(), Release(1.0, DELTA, disk, refuse, disk.entropy))
    with pytest.raises(RuntimeError, match="out of budget"):
        matching.query(context_of(1), 1, 9)
    assert (disk.draws, disk.contents) == (0, {})


def test_what_is_public_or_private_already_gets_no_noise() -> None:
    disk = Disk()
    context = context_of(1)
    exact = write_sketch(to_grid(sketcher().sketch(context), CLIP, RADIUS))
    assert client(disk, epsilon=1.0).query(context, 0, 9) == exact
    after_dp_sgd = client(disk, epsilon=None)
    assert after_dp_sgd.sketch(context, 5) == after_dp_sgd.query(context, 5, 9) == exact
    assert (disk.events, disk.draws, disk.contents) == ([], 0, {})
    with pytest.raises(ValueError, match="only a prompt that was trained"):
        client(disk).sketch(context, 0)


@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0, 1e4), clip=st.floats(1e-3, 1e3))
def test_the_sensitivity_is_kept_in_whole_numbers(seed: int, size: float, clip: float) -> None:
    context = (size * np.random.default_rng(seed).normal(size=SHAPE)).astype(np.float32)
    sketch = sketcher(clip).sketch(context)
    grid = to_grid(sketch, clip, RADIUS)
    assert int(grid @ grid) <= RADIUS**2
    assert np.abs(grid * (clip / RADIUS) - sketch).max() <= 1.0001 * clip / RADIUS


@given(st.integers(0, M - 1), st.booleans())
def test_a_sketch_along_an_axis_stays_within_the_radius(axis: int, negative: bool) -> None:
    vector = np.zeros(M)
    vector[axis] = math.nextafter(CLIP, math.inf) * (-1 if negative else 1)
    assert np.abs(to_grid(vector, CLIP, RADIUS)).max() <= RADIUS


def sketch_of(values: np.ndarray) -> bytes:
    return PlainSketch(vector=to_tensor(values.astype(np.float32))).SerializeToString()


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        (b"\xff", "not a PlainSketch"),
        (b"", "expected"),
        (sketch_of(np.zeros(M + 1)), r"shape \(17,\), expected \(16,\)"),
        (sketch_of(np.full(M, np.nan)), "not finite"),
        (sketch_of(np.full(M, np.inf)), "not finite"),
        (sketch_of(np.full(M, 0.5)), "not of integers"),
        (sketch_of(np.full(M, 2.0**24)), "over what any noise"),
        (sketch_of(np.full(M, 3e38)), "over what any noise"),
    ],
)
def test_a_sketch_that_cannot_be_one_is_refused(sketch: bytes, message: str) -> None:
    server = DpServerMatching(M)
    with pytest.raises(MessageRejected, match=message):
        server.check_sketch(sketch, 0)
    with pytest.raises(MessageRejected, match=message):
        server.index([]).answer(sketch, 1, "nobody", 1)


def test_without_noise_the_radius_is_the_bound_and_with_noise_a_generous_one() -> None:
    edge = np.zeros(M)
    edge[0] = RADIUS
    DpServerMatching(M, 0.0).check_sketch(sketch_of(edge), 0)
    with pytest.raises(MessageRejected, match="over what any noise"):
        DpServerMatching(M, 0.0).check_sketch(sketch_of(edge * 1.5), 0)
    disk = Disk()
    matching = client(disk, epsilon=1.0)
    server = None
    for number in range(1, 300):
        sketch = matching.sketch(100 * context_of(number), number)
        server = server or DpServerMatching(M, disk.events[0].noise_multiplier)
        server.check_sketch(sketch, 0)
    with pytest.raises(MessageRejected, match="over what any noise"):
        server.check_sketch(sketch_of(np.rint(edge * 1.1 * largest_norm(M, disk.events[0].noise_multiplier))), 0)


def test_the_nearest_are_found_and_distances_are_those_of_prompts() -> None:
    contexts = [context_of(seed) * 0.3 for seed in range(20)]
    matching, server = client(Disk(), epsilon=None), DpServerMatching(M)
    pool = [PoolEntry(f"client-{row:02d}", f"id-{row}", matching.sketch(c, 1), b"") for row, c in enumerate(contexts)]
    answer = server.index(pool).answer(matching.query(contexts[4], 1, 9), 5, "client-04", 1)
    found = matching.rank(answer, 3)
    assert len(matching.rank(answer, 9)) == 5
    sketches = np.array([sketcher().sketch(context) for context in contexts])
    distances = np.linalg.norm(sketches - sketches[4], axis=1)
    distances[4] = np.inf
    assert [candidate.expert_id for candidate in found] == [f"id-{row}" for row in np.argsort(distances)[:3]]
    np.testing.assert_allclose([candidate.distance for candidate in found], np.sort(distances)[:3], atol=0.01)
    assert server.index(pool[:1]) is server.index(pool)  # one index, which follows the pool


def test_on_real_prompts_noise_costs_what_it_must() -> None:
    """Without noise the sketches find the nearest; at epsilon 1 they find hardly more than a lot would."""
    with np.load(PROMPTS) as prompts:
        contexts, centre = prompts["first"], prompts["centre"]
    flat = contexts.reshape(len(contexts), -1).astype(np.float64)
    recalls = {}
    for epsilon in (None, 1.0):
        shares = []
        disk = Disk()
        matching = DpClientMatching(Sketcher(centre, 64, CLIP, 1), release(disk, epsilon))
        released = [matching.sketch(context, number) for number, context in enumerate(contexts, start=1)]
        pool = [PoolEntry(f"client-{row:02d}", str(row), sketch, b"") for row, sketch in enumerate(released)]
        index = DpServerMatching(64).index(pool)
        for row, sketch in enumerate(released):
            found = matching.rank(index.answer(sketch, 9, f"client-{row:02d}", 1), 9)
            distances = np.linalg.norm(flat - flat[row], axis=1)
            nearest = {str(other) for other in np.argsort(distances)[1:10]}
            shares.append(len(nearest & {candidate.expert_id for candidate in found}) / 9)
        recalls[epsilon] = np.mean(shares)
    assert recalls[None] > 0.85
    assert recalls[1.0] == pytest.approx(9 / 49, abs=0.08)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.01, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 2.0)])
def test_noise_that_makes_no_sense_is_refused(epsilon: float, delta: float) -> None:
    disk = Disk()
    with pytest.raises(ValueError):  # noqa: PT011 - one of several sentences
        Release(epsilon, delta, disk, disk.record)
    assert RADIUS * largest_norm(4096, MAX_NOISE_MULTIPLIER) < 2**63


@pytest.mark.parametrize("distance", [math.nan, math.inf, -1.0])
def test_a_distance_that_is_none_is_refused(distance: float) -> None:
    answer = PlainMatchAnswer()
    answer.candidates.add(expert_id="a", distance=distance)
    with pytest.raises(MessageRejected, match="has a distance of"):
        client(Disk()).rank(answer.SerializeToString(), 1)


def test_candidates_come_back_as_they_went() -> None:
    candidates = [Candidate("a", 0.0), Candidate("b", 1.5), Candidate("c", None)]
    assert read_candidates(write_candidates(candidates)) == candidates


def test_none_of_it_needs_torch() -> None:
    modules = "matching.dp, pfedsecure.privacy.calibration, pfedsecure.privacy.noise, pfedsecure.privacy.events"
    code = f"import sys, pfedsecure.{modules}\nprint({{'torch', 'scipy', 'open_clip', 'opacus'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""Does epsilon hold? An attack on what a private client publishes, and the epsilon that its success refutes.

Three audits, of the training that `pfed-client` runs, at several epsilons and without privacy:

- `coins` (Steinke et al. 2023): dozens of canaries in a training, each by a fair coin; the adversary guesses the coins
  with the largest scores and those with the smallest. Trainings are repeated, each with coins and noise of its own, and
  their guesses are counted together: no coin is in two of them, so all of them together are as private as one.
- `membership`: many trainings with one canary in the data or not. Some are the adversary's own, to which it fits normal
  distributions with and without (a likelihood ratio test, as in LiRA, Carlini et al. 2022) and chooses its threshold.
- `gaussian`: the same trainings, and the claim that noise is what it is said to be, in one release of everybody.

Rows with a flaw are of a client that does not do what it promises: they show what the audit would find. All bounds of a
report hold together with 95 %: each with 1 - 0.05 / (number of rows).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import click
import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm  # type: ignore[import-untyped]

from pfedsecure.clip.features import FeatureSet
from pfedsecure.seeds import derive_seed

from .audit_attack import Attack, FromLosses, FromMoves, View
from .audit_bounds import gaussian_bound, membership_bound, one_run_bound
from .audit_target import DELTA, SETTINGS, audited
from .contract import Bar, Outcome, Row, benchmark

Array = NDArray[np.float64]

EPSILONS = (None, 8.0, 4.0, 1.0)
"""None: without differential privacy."""
TOGETHER = 0.95
"""Confidence in all bounds of a report at once."""
GUESSED, GUESSED_IN_CLEAR = 0.2, 0.5
"""Shares of coins that are guessed: with privacy, and where scores are expected to be far apart."""


@dataclass(frozen=True)
class Size:
    """How many trainings: by setting, of `coins` with privacy, without it, and with flaws; of `membership`, with the
    canary and without each, the adversary's own and those that count."""

    runs: dict[str, int]
    open_runs: dict[str, int]
    flawed_runs: dict[str, int]
    shadows: int
    tests: int


FULL = Size(
    runs={"one step": 500, "one step, per-sample": 500, "thirty sampled steps": 120, "demo": 40},
    open_runs={"one step": 500, "demo": 250},
    flawed_runs={"one step": 100, "thirty sampled steps": 60},
    shadows=100,
    tests=800,
)
QUICK = Size(
    runs={"one step": 32},
    open_runs={"one step": 32},
    flawed_runs={"one step": 32},
    shadows=20,
    tests=40,
)


@dataclass(frozen=True)
class Case:
    """What one row is about."""

    audit: str
    setting: str
    epsilon: float | None
    flaw: str | None = None

    def __str__(self) -> str:
        epsilon = "without privacy" if self.epsilon is None else f"epsilon {self.epsilon:g}"
        return ", ".join(filter(None, (self.audit, self.setting, epsilon, self.flaw)))


def cases(size: Size) -> list[Case]:
    """All rows."""
    found = [Case("coins", setting, epsilon) for setting in size.runs for epsilon in EPSILONS if epsilon is not None]
    # Without privacy there is no mechanism and no sample: one step of any is the same.
    found += [Case("coins", setting, None) for setting in size.open_runs]
    found += [Case("membership", "one step", epsilon) for epsilon in EPSILONS]
    found += [Case("gaussian", "one step", epsilon) for epsilon in EPSILONS if epsilon is not None]
    for epsilon in (4.0, 1.0):  # no number of right guesses refutes 8 with this delta and confidence
        found += [
            Case("coins", "one step", epsilon, flaw) for flaw in ("a tenth of the noise", "clips at ten times the norm")
        ]
    found.append(Case("gaussian", "one step", 8.0, "a tenth of the noise"))
    if size.tests >= FULL.tests:  # fewer do not show so little
        found.append(Case("gaussian", "one step", 8.0, "seven tenths of the noise"))
    if "thirty sampled steps" in size.flawed_runs:
        found.append(Case("coins", "thirty sampled steps", 1.0, "everybody in every step"))
    return found


@benchmark
def command(*, quick: bool) -> Outcome:
    """What the success of an attack on published prompts says about epsilon, from below."""
    size = QUICK if quick else FULL
    todo = cases(size)
    confidence = 1 - (1 - TOGETHER) / len(todo)
    rows: list[Row] = []
    for case in todo:
        click.echo(f"{case}", err=True)
        rows.append(row_of(case, size, confidence))
    params = {
        "delta": DELTA,
        "confidence": TOGETHER,
        "rounds": {name: setting.rounds for name, setting in SETTINGS.items()},
        "canaries": {name: setting.canaries for name, setting in SETTINGS.items()},
        "runs": size.runs,
        "shadows": size.shadows,
    }
    return Outcome(params=params, rows=rows, bars=bars(rows))


def row_of(case: Case, size: Size, confidence: float = TOGETHER) -> Row:
    """The row of `case`, whose bound holds with `confidence`."""
    found = _coins(case, size, confidence) if case.audit == "coins" else _membership(case, size, confidence)
    named: Row = {"audit": case.audit, "setting": case.setting, "epsilon": case.epsilon, "flaw": case.flaw}
    return named | found


def bars(rows: list[Row]) -> dict[str, Bar]:
    """Of sound clients the largest bound over its epsilon. What shows that this means something: without privacy the
    smallest bound of all attacks, and of clients with flaws the smallest over its epsilon."""
    sound = [_over_epsilon(row) for row in rows if row["epsilon"] is not None and row["flaw"] is None]
    flawed = [_over_epsilon(row) for row in rows if row["flaw"] is not None]
    open_ = [float(str(row["bound"])) for row in rows if row["epsilon"] is None]
    return {
        "lower_bound_over_epsilon": Bar.of(max(sound), 1.0, "<="),
        "lower_bound_at_inf": Bar.of(min(open_), 1.0, ">="),
        "flaws_over_epsilon": Bar.of(min(flawed), 1.0, ">="),
    }


def _over_epsilon(row: Row) -> float:
    return float(str(row["bound"])) / float(str(row["epsilon"]))


def _coins(case: Case, size: Size, confidence: float) -> Row:
    setting = SETTINGS[case.setting]
    sizes = size.flawed_runs if case.flaw else size.runs if case.epsilon is not None else size.open_runs
    runs = sizes[case.setting]
    attack = _attack(case, setting.canaries)
    rng = np.random.default_rng(derive_seed(1, "coins"))
    coins = rng.integers(2, size=(runs, setting.canaries)).astype(bool)
    scores = np.array([attack.scores(included) for included in coins])
    if case.setting == "demo":
        # Losses are no likelihoods: some canaries are harder than others. All trainings say by how much.
        scores = (scores - scores.mean(axis=0)) / (scores.std(axis=0) + 1e-12)
    in_clear = case.setting == "one step" and (case.epsilon is None or case.flaw is not None)
    guesses = round(coins.size * (GUESSED_IN_CLEAR if in_clear else GUESSED) / 2)
    order = np.argsort(scores, axis=None)
    right = int((~coins.flat[order[:guesses]]).sum() + coins.flat[order[-guesses:]].sum())
    bound = one_run_bound(coins.size, 2 * guesses, right, DELTA, confidence)
    return {"right": right, "guesses": 2 * guesses, "canaries": coins.size, "bound": round(bound, 3)}


def _membership(case: Case, size: Size, confidence: float) -> Row:
    tests = size.tests
    members, others = _trainings(case.setting, case.epsilon, case.flaw, size.shadows, tests)
    bound_of = gaussian_bound if case.audit == "gaussian" else membership_bound

    def bound(caught: int, mistaken: int) -> float:
        return bound_of(caught, tests, mistaken, tests, DELTA, confidence)

    threshold = _threshold(members[: size.shadows], others[: size.shadows], tests, bound)
    caught, mistaken = (int((scores[size.shadows :] >= threshold).sum()) for scores in (members, others))
    found = round(bound(caught, mistaken), 3)
    return {"caught": caught, "mistaken": mistaken, "tests": tests, "bound": found}


@cache
def _trainings(setting: str, epsilon: float | None, flaw: str | None, shadows: int, tests: int) -> tuple[Array, Array]:
    """Scores of one canary with it and without, of the adversary's own trainings and then of the tests."""
    attack = _attack(Case("membership", setting, epsilon, flaw), 1)
    members, others = (
        np.array([attack.scores(np.array([member]))[0] for _ in range(shadows + tests)]) for member in (True, False)
    )
    return members, others


def _threshold(members: Array, others: Array, tests: int, bound: Callable[[int, int], float]) -> float:
    """From which score on a likelihood ratio test of two normal distributions says "member".

    Both have the same deviation, as noise is the same with and without, so that the ratio grows with the score. Of all
    thresholds that with the best `bound(caught, mistaken)`, if counts out of `tests` were as the distributions say.
    """
    means = members.mean(), others.mean()
    deviation = max(math.sqrt((members.var() + others.var()) / 2), 1e-9)
    thresholds = np.linspace(min(means) - 3 * deviation, max(means) + 3 * deviation, 200)
    expected = [np.rint(tests * norm.sf(thresholds, mean, deviation)).astype(int) for mean in means]
    promises = np.array([bound(int(caught), int(mistaken)) for caught, mistaken in zip(*expected, strict=True)])
    equal = thresholds[promises == promises.max()]
    return float(equal[len(equal) // 2])  # where many are as good, far from both ends of them


def _attack(case: Case, canaries: int) -> Attack:
    target = audited(case.setting, case.epsilon, canaries, case.flaw)
    view, planted = _planted(case.setting, case.epsilon is not None, case.flaw, canaries)
    return FromLosses(target, planted) if case.setting == "demo" else FromMoves(target, planted, view)


@cache
def _planted(setting: str, private: bool, flaw: str | None, canaries: int) -> tuple[View, FeatureSet]:
    """What can be seen in a setting, and the canaries that are seen best: the same for all epsilons."""
    view = View(audited(setting, EPSILONS[1] if private else None, canaries, flaw))
    return view, view.canaries(canaries, 1)

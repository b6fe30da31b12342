"""Does epsilon hold? An attack on what a private client publishes, and the epsilon that its success refutes.

Two audits, of the training that `pfed-client` runs, at several epsilons and without privacy:

- `one run` (Steinke et al. 2023): a hundred canaries, each in the data by a fair coin; the adversary guesses the coins
  of the quarter with the largest scores and of the quarter with the smallest.
- `membership`: many trainings with one canary in the data or not. Half of them are the adversary's own, to which it
  fits normal distributions with and without (a likelihood ratio test, as in LiRA, Carlini et al. 2022).

Two settings: `demo` has the steps, samples and learning rates of the embedded demo; `one step` takes all images at
once, one step a round, in which moves are easiest to read. Each bound holds with a probability of 95 %: of many rows
some can be above their epsilon by chance even where it holds.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from statistics import fmean, pstdev

import click
import numpy as np

from pfed_cli.demo.layout import demo_clients, demo_plan
from pfed_client.participant import agreed_backbone, split
from pfed_client.promise import Promise, promise
from pfed_client.state import Settings
from pfedsecure.clip.backbone import Backbone
from pfedsecure.clip.features import FeatureSet, image_features
from pfedsecure.data import open_images
from pfedsecure.plan import Plan, PrivacyPlan, RoundsPlan
from pfedsecure.privacy.budget import Budget, Reservation
from pfedsecure.privacy.events import Event
from pfedsecure.seeds import derive_seed

from .audit_attack import Target, canaries, scores
from .audit_bounds import membership_bound, one_run_bound
from .contract import Bar, Outcome, Row, benchmark

EPSILONS = (None, 8.0, 4.0, 1.0)
"""None: without differential privacy."""
DELTA = 1e-5
SETTINGS = ("demo", "one step")
OWN_IMAGES, CANARIES = 40, 100
ROUNDS, QUICK_ROUNDS = 10, 3
MEMBERSHIP_ROUNDS = 3
RUNS, QUICK_RUNS = 3, 1
TRAININGS, QUICK_TRAININGS = 60, 12
"""Of `membership`, with the canary and without, half of them the adversary's own."""


@benchmark
@click.option("--runs", type=click.IntRange(1), help=f"Audits in one run, of each kind.  [default: {RUNS}]")
def command(*, quick: bool, runs: int | None) -> Outcome:
    """What the success of an attack on published prompts says about epsilon, from below."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    runs = runs or (QUICK_RUNS if quick else RUNS)
    trainings = QUICK_TRAININGS if quick else TRAININGS
    rows: list[Row] = []
    for setting in SETTINGS:
        for epsilon in EPSILONS:
            click.echo(f"one run, {setting}, epsilon {_named(epsilon)}", err=True)
            rows += [one_run(setting, epsilon, rounds, seed) for seed in range(1, runs + 1)]
    for epsilon in EPSILONS:
        click.echo(f"membership, epsilon {_named(epsilon)}", err=True)
        rows.append(membership("one step", epsilon, MEMBERSHIP_ROUNDS, trainings))
    params = {
        "rounds": rounds,
        "canaries": CANARIES,
        "own": OWN_IMAGES,
        "trainings": trainings,
        "membership_rounds": MEMBERSHIP_ROUNDS,
        "delta": DELTA,
    }
    return Outcome(params=params, rows=rows, bars=bars(rows))


def one_run(setting: str, epsilon: float | None, rounds: int, seed: int, *, noise: float = 1.0) -> Row:
    """One row. `noise`: of what the promise says; less than 1 is for a test, of a mechanism that does not keep it."""
    target = audited(setting, epsilon, rounds, seed, OWN_IMAGES + CANARIES // 2, noise)
    coins = np.random.default_rng(derive_seed(seed, "coins")).integers(2, size=CANARIES).astype(bool)
    planted = canaries(CANARIES, target.own.features.shape[1], len(target.plan.class_names), seed)
    order = np.argsort(scores(target, planted, coins))
    out, members = order[: CANARIES // 4], order[-CANARIES // 4 :]
    right = int((~coins[out]).sum() + coins[members].sum())
    bound = one_run_bound(CANARIES, CANARIES // 2, right, DELTA)
    return _row("one run", setting, epsilon, bound, right=right, guesses=CANARIES // 2)


def membership(setting: str, epsilon: float | None, rounds: int, trainings: int) -> Row:
    """One row."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(1, trainings + 1):
        for member in (True, False):
            target = audited(setting, epsilon, rounds, seed, OWN_IMAGES, 1.0)
            planted = canaries(1, target.own.features.shape[1], len(target.plan.class_names), 1)
            found[member].append(float(scores(target, planted, np.array([member]))[0]))
    half = trainings // 2
    fits = {member: (fmean(values[:half]), max(pstdev(values[:half]), 1e-9)) for member, values in found.items()}

    def says_member(score: float) -> bool:
        logs = {m: -((score - mean) ** 2) / (2 * sd**2) - math.log(sd) for m, (mean, sd) in fits.items()}
        return logs[True] > logs[False]

    caught, mistaken = (sum(map(says_member, found[member][half:])) for member in (True, False))
    others = trainings - half
    bound = membership_bound(caught, others, mistaken, others, DELTA)
    right = caught + others - mistaken
    return _row("membership", setting, epsilon, bound, right=right, guesses=2 * others)


def audited(setting: str, epsilon: float | None, rounds: int, seed: int, size: int, noise: float) -> Target:
    """A client of the demo, alone and without experts, that holds `size` images with its canaries."""
    plan = demo_plan(rounds=rounds, n_clients=5, seed=1).model_copy(update={"seed": seed})
    update: dict[str, object] = {"mixture": plan.mixture.model_copy(update={"experts": 0})}
    if setting == "one step":
        update["training"] = plan.training.model_copy(update={"local_epochs": 1, "batch_size": 1024})
        update["privacy"] = plan.privacy.model_copy(update={"steps": 1, "batch_size": 2 * size})
    plan = plan.model_copy(update=update)
    backbone, own = _images()
    made: Promise | None = None
    if epsilon is not None:
        made = _promised(plan.rounds, plan.privacy, epsilon, size)
        made = made.model_copy(update={"noise_multiplier": noise * made.noise_multiplier})
    return Target(plan, backbone, own, made)


@cache
def _promised(rounds: RoundsPlan, privacy: PrivacyPlan, epsilon: float, size: int) -> Promise:
    """Made once for all trainings alike: to solve for the noise takes longer than a training."""
    plan = Plan(class_names=("any", "other"), rounds=rounds, privacy=privacy)
    return promise(plan, epsilon, DELTA, size, lambda _epsilon, _delta: _Granted())


def bars(rows: list[Row]) -> dict[str, Bar]:
    """The largest bound over its epsilon, and the largest without privacy, in one run."""
    private = [float(str(row["bound"])) / float(str(row["epsilon"])) for row in rows if row["epsilon"] is not None]
    open_ = [float(str(row["bound"])) for row in rows if row["epsilon"] is None and row["audit"] == "one run"]
    return {
        "lower_bound_over_epsilon": Bar.of(max(private), 1.0, "<="),
        "lower_bound_at_inf": Bar.of(max(open_), 1.0, ">="),
    }


def _named(epsilon: float | None) -> str:
    return "inf" if epsilon is None else f"{epsilon:g}"


class _Granted(Budget, Reservation):
    """Audits are of public images: nothing is to be accounted for."""

    def reserve(self, event: Event) -> Reservation:
        return self

    def commit(self) -> None:
        return


_KEPT: list[tuple[Backbone, FeatureSet]] = []


def _images() -> tuple[Backbone, FeatureSet]:
    """The embedded model, and the features of some training images of the demo's first client."""
    if not _KEPT:
        plan, client = demo_plan(rounds=1, n_clients=5, seed=1), demo_clients(5, 1)[0]
        settings = Settings(
            data=client.data,
            data_root=Path(),
            test_fraction=0.5,
            strict=False,
            model=None,
            pretrained=None,
            backbone_dir=None,
            precision="fp32",
        )
        images = open_images(client.data, strict=False, root=Path()).relabel(plan.class_names)
        backbone = agreed_backbone(plan, settings, "cpu")
        rows, _ = split(images, plan, client.name, settings.test_fraction)
        _KEPT.append((backbone, image_features(backbone, images.subset(rows[:OWN_IMAGES]))))
    return _KEPT[0]


def _row(audit: str, setting: str, epsilon: float | None, bound: float, *, right: int, guesses: int) -> Row:
    return {
        "audit": audit,
        "setting": setting,
        "epsilon": epsilon,
        "right": right,
        "guesses": guesses,
        "bound": round(bound, 3),
    }

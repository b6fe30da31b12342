"""How long a simulation of many clients takes, and where the time goes.

The bar is the wall-clock time of the command that a user types, in a process of its own, with every protection that the
network has: features of images were computed before. Then the same federation over fewer rounds in each of the ways of
training, with the processor time of its parts. Photographs with `--data`, the embedded digits without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from pfed_cli.plan_file import to_toml
from pfed_cli.simulate.clients import clients_of
from pfed_cli.simulate.plans import demo_plan, fitted
from pfed_cli.simulate.shares import digits_of, joined, partition
from pfed_cli.simulate.together import Together
from pfed_cli.simulate.workers import SideBySide, Workers
from pfed_cli.simulation import SimulatedClient, simulate
from pfed_client.metrics import RoundRecord
from pfed_client.observer import SilentObserver
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.errors import PfedError
from pfedsecure.plan import BackbonePlan, MixturePlan, Plan, PromptPlan, RoundsPlan, TrainingPlan

from .contract import Bar, Outcome, Row, benchmark
from .photo_features import Sources, model_name, photo_backbone, photo_features
from .photo_options import backbone_dir_option, cache_option, data_option
from .photos import unpacked
from .simulation_parts import watching

PHOTOS = "caltech101"
CLIENTS, QUICK_CLIENTS = 100, 6
ROUNDS, QUICK_ROUNDS = 10, 2
COMPARED_ROUNDS = 3
BETA = 0.3
LIMIT_SECONDS = 600.0
WAYS = ("one by one", "side by side", "batched")


@dataclass(frozen=True)
class Setting:
    """One federation: as the command has it (`arguments`), and as this process has it."""

    plan: Plan
    clients: list[SimulatedClient]
    backbone: Backbone
    arguments: list[str]
    feature_seconds: float


@benchmark
@data_option(f"Folder with {PHOTOS}.tar.  [default: none, the embedded digits]", default=None)
@backbone_dir_option
@cache_option
@click.option("--clients", "n_clients", type=click.IntRange(3), help=f"How many.  [default: {CLIENTS}]")
def command(
    *, quick: bool, data: Path | None, backbone_dir: Path | None, cache_dir: Path, n_clients: int | None
) -> Outcome:
    """The whole of `pfed simulate` for 100 clients and 10 rounds, and the ways of training side by side."""
    count = n_clients or (QUICK_CLIENTS if quick else CLIENTS)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    if data is None or quick:
        setting = digits(count, rounds, cache_dir)
    else:
        setting = photos(count, rounds, Sources(data, backbone_dir or data / "backbone", cache_dir))
    torch.set_num_threads(1)
    whole = whole_command(setting)
    compared = min(rounds, COMPARED_ROUNDS)
    rows = [whole, *(measure(way, setting, compared) for way in WAYS)]
    return Outcome(
        params={
            "quick": quick,
            "data": "digits" if data is None or quick else PHOTOS,
            "clients": count,
            "classes": len(setting.plan.class_names),
            "images": sum(len(client.train) + len(client.test) for client in setting.clients),
            "rounds": rounds,
            "compared_rounds": compared,
            "backbone": setting.plan.backbone.model,
            "plan": setting.plan.model_dump(mode="json", by_alias=True, include={"prompt", "mixture", "training"}),
            "protections": setting.plan.protection.model_dump(),
            "feature_seconds": round(setting.feature_seconds, 1),
            "load": round(os.getloadavg()[0], 1),
        },
        rows=rows,
        bars=bars(rows, count),
    )


def bars(rows: Sequence[Row], clients: int) -> dict[str, Bar]:
    """Seconds of the whole command, held to a limit for 100 clients; and how much less a batched round takes."""
    by_way = {str(row["way"]): row for row in rows}
    seconds = float(str(by_way["pfed simulate"]["seconds"]))
    found = {f"seconds_{clients}_clients": Bar.of(seconds, LIMIT_SECONDS if clients == CLIENTS else None, "<=")}
    alone = float(str(by_way["one by one"]["training"]))
    batched = float(str(by_way["batched"]["training"]))
    return found | {"batched_training_speedup": Bar.of(alone / batched, None, ">=")}


def digits(count: int, rounds: int, cache: Path) -> Setting:
    """The embedded digits and model, as `pfed simulate` has them by default."""
    started = time.monotonic()
    plan, _ = fitted(demo_plan(None, None, None), count, rounds, None)
    backbone = load_backbone(plan.backbone.model, plan.backbone.pretrained)
    images, rows = joined(digits_of(count, plan.seed))
    clients = clients_of(plan, backbone, images, rows, test_fraction=0.5, cache=cache)
    return Setting(plan, clients, backbone, ["--cache", str(cache)], time.monotonic() - started)


def photos(count: int, rounds: int, sources: Sources) -> Setting:
    """Photographs of 100 classes, labels skewed by Dirichlet(0.3)."""
    started = time.monotonic()
    images, _ = photo_features(PHOTOS, sources, quiet=False)
    model = model_name(sources.backbone_dir)
    plan = Plan(
        name="bench",
        class_names=images.class_names,
        backbone=BackbonePlan(model=model, pretrained=str((sources.backbone_dir / f"{model}.safetensors").absolute())),
        prompt=PromptPlan(context_length=8, context_init="a photo of a"),
        mixture=MixturePlan(experts=9, gate_width=64),
        training=TrainingPlan(local_epochs=2, prompt_lr=0.02, gate_lr=0.01),
        rounds=RoundsPlan(count=rounds, start_clients=count),
    )
    backbone = photo_backbone(sources.backbone_dir)
    _, rows = partition(images, None, count, BETA, plan.seed)
    clients = clients_of(plan, backbone, images, rows, test_fraction=0.5, cache=sources.cache)
    feature_seconds = time.monotonic() - started
    arguments = [
        "--data",
        str(unpacked(PHOTOS, sources.data, sources.cache / "photos")),
        "--backbone-dir",
        str(sources.backbone_dir),
        "--cache",
        str(sources.cache),
    ]
    return Setting(plan, clients, backbone, arguments, feature_seconds)


def whole_command(setting: Setting) -> Row:
    """`pfed simulate` with all its defaults, timed from outside. Raises PfedError when it fails."""
    with tempfile.TemporaryDirectory(prefix="pfed-bench-") as folder:
        plan_file, json_file = Path(folder) / "plan.toml", Path(folder) / "out.json"
        plan_file.write_text(to_toml(setting.plan))
        arguments = ["simulate", "--plan", str(plan_file), "--clients", str(len(setting.clients))]
        started = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-m", "pfed_cli.main", *arguments, *setting.arguments, "--json", str(json_file)],
            stdout=sys.stderr,
        )
        seconds = time.monotonic() - started
        if result.returncode:
            raise PfedError(f"pfed simulate ended with status {result.returncode}; what it said stands above")
        report = json.loads(json_file.read_bytes())
    return {
        "way": "pfed simulate",
        "rounds": setting.plan.rounds.count,
        "seconds": round(seconds, 1),
        "simulation_seconds": report["seconds"],
        "mean_accuracy": report["mean_accuracy"],
    }


def measure(way: str, setting: Setting, rounds: int) -> Row:
    """A federation of `rounds` rounds in this process, training in one of WAYS."""
    plan, _ = fitted(setting.plan, len(setting.clients), rounds, None)
    times = Times(len(setting.clients))
    with watching() as parts:
        result = simulate(plan, setting.clients, setting.backbone, workers=workers(way, plan, setting), observer=times)
    click.echo(f"{way}: {rounds} rounds in {result.seconds:.0f} s", err=True)
    return {
        "way": way,
        "rounds": rounds,
        "seconds": round(result.seconds, 1),
        "later_round_seconds": round(times.later_round(), 2),
        "cpu_seconds": round(sum(parts.values()), 1),
        **{part: round(spent, 2) for part, spent in parts.items()},
        "mean_accuracy": result.mean_accuracy,
    }


def workers(way: str, plan: Plan, setting: Setting) -> Workers:
    """Of one of WAYS."""
    if way == "batched":
        return Together(plan, len(setting.clients))
    return SideBySide(1 if way == "one by one" else len(os.sched_getaffinity(0)))


class Times(SilentObserver):
    """When each round was done by all of `clients`."""

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._done = 0
        self._ends: list[float] = []

    def round_done(self, record: RoundRecord) -> None:
        self._done += 1
        if self._done % self._clients == 0:
            self._ends.append(time.monotonic())

    def later_round(self) -> float:
        """Mean seconds of the rounds behind the first, which has no experts; 0 where there are none."""
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if len(self._ends) > 1 else 0.0

"""Does personalising pay on photographs? pFedMoAP against its baselines, in process, over several seeds.

The federations run the code of the real server and client (`pfed_cli.simulation`). One row per data set, seed and
method; the methods of one data set and seed see the same shares.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import click
import torch

from pfed_cli.methods import Method, plan_of
from pfed_cli.scoring import score
from pfed_cli.simulation import SimulationResult, simulate
from pfedsecure.plan import BackbonePlan, MixturePlan, Plan, PromptPlan, ProtectionPlan, RoundsPlan, TrainingPlan

from .contract import Bar, Outcome, benchmark
from .photo_clients import PHOTO_SETS, Share, clients_of
from .photo_features import Sources, model_name, photo_backbone, photo_features
from .photo_options import backbone_dir_option, cache_option, data_option

ROUNDS = 10
SEEDS = (1, 2, 3)
QUICK_ROUNDS = 5
QUICK_SETS = ("office_caltech10",)

COMPARED = {Method.PROMPTFL: 0.0, Method.LOCAL: 0.0, Method.GATE_ONLY: None}
"""What pFedMoAP is compared with, and the limit of that bar in points."""


@dataclass(frozen=True)
class Task:
    """What one row takes."""

    data_set: str
    seed: int
    method: Method
    rounds: int


@dataclass(frozen=True)
class Score:
    """A row. `accuracy`: unweighted mean over the clients, in [0, 1], each on its own test images."""

    data_set: str
    seed: int
    method: str
    clients: int
    accuracy: float
    own_domain_share: float | None
    """Which part of all borrowed experts came from the borrower's own domain; None without experts or domains."""
    seconds: float


def make_plan(class_names: Sequence[str], n_clients: int, task: Task, model: str) -> Plan:
    """The plan of a task's federation."""
    plan = Plan(
        name="bench",
        seed=task.seed,
        class_names=tuple(class_names),
        backbone=BackbonePlan(model=model, pretrained=f"{model}.safetensors"),
        prompt=PromptPlan(context_length=8, context_init="a photo of a"),
        mixture=MixturePlan(experts=9, gate_width=64),
        training=TrainingPlan(local_epochs=2, prompt_lr=0.02, gate_lr=0.01),
        rounds=RoundsPlan(count=task.rounds, minimum_cohort=n_clients),
        # All parties are this one process: there is nobody to protect anybody from, and the nearest experts are asked.
        protection=ProtectionPlan(aggregation="plain", experts="plain", matching="plain"),
    )
    return plan_of(task.method, plan)


@benchmark
@data_option("Folder with office_caltech10.tar, pacs.tar and caltech101.tar.")
@backbone_dir_option
@cache_option
@click.option("--jobs", type=click.IntRange(1), help="Processes, of one thread each.  [default: one a core]")
def command(*, quick: bool, data: Path, backbone_dir: Path | None, cache_dir: Path, jobs: int | None) -> Outcome:
    """pFedMoAP against zero-shot, local prompts, PromptFL, the gate alone and random experts, on photographs."""
    sources = Sources(data, backbone_dir or data / "backbone", cache_dir)
    names = QUICK_SETS if quick else tuple(PHOTO_SETS)
    seeds = SEEDS[:1] if quick else SEEDS
    rounds = QUICK_ROUNDS if quick else ROUNDS
    for name in names:
        photo_features(name, sources, quiet=False)
    tasks = [Task(name, seed, method, rounds) for name in names for seed in seeds for method in Method]
    done = dict(_measure_all(tasks, sources, jobs or len(os.sched_getaffinity(0))))
    scores = [done[task] for task in tasks]
    plan = make_plan(("any", "other"), 1, tasks[-1], model_name(sources.backbone_dir))
    return Outcome(
        params={
            "quick": quick,
            "data_sets": list(names),
            "seeds": list(seeds),
            "rounds": rounds,
            "prompt": plan.prompt.model_dump(),
            "mixture": plan.mixture.model_dump(by_alias=True),
            "training": plan.training.model_dump(),
            "backbone": plan.backbone.model,
            "backbone_digest": photo_backbone(sources.backbone_dir).digest,
        },
        rows=[asdict(row) for row in scores],
        bars=bars(scores),
    )


def bars(scores: Sequence[Score]) -> dict[str, Bar]:
    """How many points of mean accuracy over the data sets pFedMoAP is ahead: mean and deviation over the seeds."""
    seeds = sorted({row.seed for row in scores})
    found = {}
    for method, limit in COMPARED.items():
        ahead = [100 * (_mean(scores, seed, Method.PFEDMOAP) - _mean(scores, seed, method)) for seed in seeds]
        deviation = stdev(ahead) if len(ahead) > 1 else None
        found[f"pfedmoap_over_{method}"] = Bar.of(fmean(ahead), limit, ">=", deviation=deviation)
    return found


def _mean(scores: Sequence[Score], seed: int, method: Method) -> float:
    """Mean accuracy over the data sets."""
    return fmean(row.accuracy for row in scores if row.seed == seed and row.method == method)


def _measure_all(tasks: Sequence[Task], sources: Sources, jobs: int) -> Iterator[tuple[Task, Score]]:
    """The score of every task as it is done, in processes of one thread each, so that it is the same for any `jobs`."""
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit torch's threads in an unknown state
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=spawn, initializer=_start_worker) as pool:
        futures = {pool.submit(measure, task, sources): task for task in tasks}
        try:
            for future in as_completed(futures):
                row = future.result()
                accuracy = f"{100 * row.accuracy:.1f} % in {row.seconds:.0f} s"
                click.echo(f"{row.data_set}, seed {row.seed}, {row.method}: {accuracy}", err=True)
                yield futures[future], row
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to report
    torch.set_num_threads(1)


def measure(task: Task, sources: Sources) -> Score:
    """Carry out a task."""
    started = time.monotonic()
    images, features = photo_features(task.data_set, sources)
    backbone = photo_backbone(sources.backbone_dir)
    shares = PHOTO_SETS[task.data_set](images, task.seed)
    clients = clients_of(shares, features)
    plan = make_plan(images.class_names, len(clients), task, model_name(sources.backbone_dir))
    own_domain = None
    if plan.n_experts:
        result = simulate(plan, clients, backbone)
        accuracies = result.accuracies
        own_domain = own_domain_share(result, shares)
    else:
        accuracies = score(task.method, plan, clients, backbone)
    return Score(
        data_set=task.data_set,
        seed=task.seed,
        method=task.method,
        clients=len(clients),
        accuracy=fmean(accuracies.values()),
        own_domain_share=own_domain,
        seconds=round(time.monotonic() - started, 1),
    )


def own_domain_share(result: SimulationResult, shares: Sequence[Share]) -> float | None:
    """`Score.own_domain_share` of a federation among `shares`."""
    domain = {share.name: share.domain for share in shares}
    own = [
        domain[lender] == domain[name]
        for name, client in result.clients.items()
        for lenders in client.borrowed.values()
        for lender in lenders
    ]
    return fmean(own) if own and None not in domain.values() else None

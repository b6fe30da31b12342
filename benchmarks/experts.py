"""Does matching matter, and do experts? Nearest, random, same, farthest and no experts at equal rounds.

A main setting for each data set (Dirichlet 0.3, all training images, K = 9) and variations of one factor each. Clients
are trained by the code of the real client in a loop without messages (`light_federation`). A federation is one task;
what it measured is on disk when the next begins, and a run that was broken off goes on there: delete experts.jsonl in
the cache when the code has changed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev

import click
import torch

from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import load_backbone
from pfedsecure.clip.features import image_features
from pfedsecure.plan import Plan

from .contract import Bar, Outcome, Row, Sense, benchmark
from .expert_clients import DIGITS, Data, accuracies, digits, likeness, mixed, plan_of_set, shares_of
from .expert_forms import TRIED, ShakenTrainer
from .expert_tasks import (
    ALONE,
    BORROWING,
    ENSEMBLE,
    FEW_EXPERTS,
    MAIN_BETA,
    MAIN_EXPERTS,
    OFFICE,
    PACS,
    PAPER,
    SHAKEN,
    SOFTENED,
    Task,
    quick_tasks,
    tasks_of,
)
from .light_federation import Federation, Matching, choose, federate, with_experts
from .photo_clients import Share
from .photo_features import Sources, available, model_name, photo_backbone, photo_features
from .photo_options import backbone_dir_option, cache_option, data_option

SEEDS = (1, 2, 3)
ROUNDS, QUICK_ROUNDS = 10, 3
SOFTENED_LAMBDA = 1.0
"""Twice the plan's: gate alone, with more of the prompt's own logits in predictions only."""


@benchmark
@data_option("Folder with office_caltech10.tar and pacs.tar; without them only the embedded digits are used.")
@backbone_dir_option
@cache_option
def command(*, quick: bool, data: Path, backbone_dir: Path | None, cache_dir: Path) -> Outcome:
    """Whose experts, how many, and in which form of the mixture, against the gate alone."""
    torch.set_num_threads(1)
    sources = Sources(data, backbone_dir or data / "backbone", cache_dir)
    data_sets = [DIGITS] if quick else [DIGITS, *available((OFFICE, PACS), data)]
    rounds = QUICK_ROUNDS if quick else ROUNDS
    tasks = quick_tasks() if quick else tasks_of(data_sets, SEEDS)
    rows = measure_all(tasks, rounds, sources)
    return Outcome(
        params={
            "quick": quick,
            "data_sets": data_sets,
            "seeds": sorted({task.seed for task in tasks}),
            "rounds": rounds,
            "softened_lambda": SOFTENED_LAMBDA,
            "plans": {
                name: plan_of_set(name, ("any", "other"), 1, rounds, "MODEL").model_dump(
                    by_alias=True, include={"prompt", "mixture", "training"}
                )
                for name in data_sets
            },
        },
        rows=rows,
        bars=bars(rows),
    )


def measure_all(tasks: Sequence[Task], rounds: int, sources: Sources) -> list[Row]:
    """The rows of all tasks, those of earlier runs from the cache."""
    loaded: dict[str, Data] = {}
    rows: list[Row] = []
    with click.progressbar(tasks, label="federations", file=sys.stderr, show_pos=True) as bar:
        for task in bar:
            if task.data_set not in loaded:
                loaded[task.data_set] = load(task.data_set, sources)
            data = loaded[task.data_set]
            plan = plan_of_set(task.data_set, data.images.class_names, task.seed, rounds, _model(task, sources))
            plan = mixed(plan, experts=task.experts)
            # What a plan does not tell: the data, through the backbone's digest and their number, and the task itself.
            key = json.dumps([plan.digest(), data.backbone.digest, len(data.images), asdict(task)])
            rows += _kept(sources.cache / "experts.jsonl", key) or _keep(
                sources.cache / "experts.jsonl", key, measure(task, plan, data)
            )
    return rows


def _kept(file: Path, key: str) -> list[Row] | None:
    """The rows that stand in `file` under `key`; a line that was broken off is none."""
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if found["key"] == key:
            return list(found["rows"])
    return None


def _keep(file: Path, key: str, rows: list[Row]) -> list[Row]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write("\n" + json.dumps({"key": key, "rows": rows}))  # the line before may have been broken off
    return rows


def load(data_set: str, sources: Sources) -> Data:
    """A data set by its name. Raises DataError or BackboneError."""
    if data_set == DIGITS:
        backbone, images = load_backbone("tiny-clip", "embedded"), digits()
        return Data(images, image_features(backbone, images, cache_dir=sources.cache / "features"), backbone)
    images, features = photo_features(data_set, sources)
    return Data(images, features, photo_backbone(sources.backbone_dir))


def _model(task: Task, sources: Sources) -> str:
    return "" if task.data_set == DIGITS else model_name(sources.backbone_dir)


def measure(task: Task, plan: Plan, data: Data) -> list[Row]:
    """Train a task's federation and score it; `plan` has the task's K."""
    started = time.monotonic()
    shares = shares_of(data.images, task.seed, task.beta, task.shots)
    kind = ShakenTrainer if task.form == SHAKEN else TRIED.get(task.form, Trainer)
    # An ensemble's clients train as if alone, so its federation without experts is that of the gate alone.
    trainers = _trainers(kind, mixed(plan, form=ENSEMBLE) if task.form == ALONE else plan, shares, data)
    federation = federate(plan, trainers, task.matching)
    seconds = round(time.monotonic() - started, 1)
    rows = [_row(task, shares, data, trainers, federation, seconds)]
    if task.form == ALONE:
        softened = _trainers(Trainer, mixed(plan, lambda_=SOFTENED_LAMBDA), shares, data)
        rows.append(_row(replace(task, form=SOFTENED), shares, data, softened, federation, 0.0))
        for experts in (FEW_EXPERTS, MAIN_EXPERTS):
            for matching in (*BORROWING, Matching.OWN_DOMAIN):
                of = replace(task, form=ENSEMBLE, matching=matching, experts=experts)
                rows.append(_ensemble(of, mixed(plan, form=ENSEMBLE, experts=experts), shares, data, federation))
    return rows


def _ensemble(task: Task, plan: Plan, shares: Sequence[Share], data: Data, alone: Federation) -> Row:
    """The row of an ensemble of the clients of `alone`, with experts that they could borrow in its last round."""
    trainers = _trainers(Trainer, plan, shares, data)
    domains = {share.name: str(share.domain) for share in shares}
    borrowed = {
        name: choose(plan, alone.pool, name, task.matching, plan.rounds.count, domains) for name in alone.models
    }
    models = {name: with_experts(model, alone.pool, borrowed[name]) for name, model in alone.models.items()}
    return _row(task, shares, data, trainers, Federation(models, borrowed, alone.pool), 0.0)


def _trainers(kind: type[Trainer], plan: Plan, shares: Sequence[Share], data: Data) -> dict[str, Trainer]:
    return {
        share.name: kind(
            plan, data.backbone, data.features.subset(share.train), data.features.subset(share.test), name=share.name
        )
        for share in shares
    }


def _row(
    task: Task,
    shares: Sequence[Share],
    data: Data,
    trainers: Mapping[str, Trainer],
    federation: Federation,
    seconds: float,
) -> Row:
    """`own_domain_share`: of the experts that were used last. `prompts_and_...`: `Likeness` of the final prompts."""
    domain = {share.name: share.domain for share in shares}
    own_domain = [domain[lender] == domain[name] for name, of in federation.borrowed.items() for lender in of]
    contexts = {name: model.context for name, model in federation.models.items()}
    return {
        **asdict(task),
        **asdict(accuracies(data, shares, trainers, federation.models)),
        "own_domain_share": fmean(own_domain) if own_domain else None,
        **{f"prompts_and_{name}": value for name, value in asdict(likeness(data, shares, contexts)).items()},
        "seconds": seconds,
    }


COMPARED: dict[str, tuple[str, str, str, float | None]] = {
    "paper_over_alone_own": (f"{PAPER}/nearest", ALONE, "own", None),
    "paper_nearest_over_random_own": (f"{PAPER}/nearest", f"{PAPER}/random", "own", None),
    "ensemble_over_alone_own": (f"{ENSEMBLE}/random", ALONE, "own", -0.5),
    "ensemble_over_alone_balanced": (f"{ENSEMBLE}/random", ALONE, "balanced", 0.0),
    "ensemble_over_alone_unseen": (f"{ENSEMBLE}/random", ALONE, "unseen", 0.0),
    "ensemble_over_softened_own": (f"{ENSEMBLE}/random", SOFTENED, "own", 0.0),
    "ensemble_over_softened_balanced": (f"{ENSEMBLE}/random", SOFTENED, "balanced", 0.0),
}
"""Bars: what is compared with what on which images, and the limit in points; K = 9, main settings."""


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """Mean over the main settings, then mean and deviation over seeds; and the correlations of gate alone's prompts."""
    main = [row for row in rows if row["beta"] == MAIN_BETA and row["experts"] in (0, MAIN_EXPERTS)]
    full = [row for row in main if row["shots"] is None] or main  # the quick run has only few shots
    found = {}
    for name, (this, other, score, limit) in COMPARED.items():
        ahead = [100 * (_mean(full, seed, this, score) - _mean(full, seed, other, score)) for seed in _seeds(full)]
        found[name] = _bar(ahead, limit, ">=")
    for name in ("prompts_and_labels", "prompts_and_domains"):
        alone = [row for row in full if row["form"] == ALONE]
        by_seed = [fmean(float(str(row[name])) for row in alone if row["seed"] == seed) for seed in _seeds(alone)]
        found[name] = _bar(by_seed, None, ">=")
    return found


def _seeds(rows: Sequence[Row]) -> list[int]:
    return sorted({int(str(row["seed"])) for row in rows})


def _mean(rows: Sequence[Row], seed: int, what: str, score: str) -> float:
    """Mean of a score over the data sets; `what` is FORM or FORM/MATCHING."""
    form, _, matching = what.partition("/")
    return fmean(
        float(str(row[score]))
        for row in rows
        if row["seed"] == seed and row["form"] == form and matching in ("", row["matching"]) and row[score] is not None
    )


def _bar(values: Sequence[float], limit: float | None, sense: Sense) -> Bar:
    return Bar.of(fmean(values), limit, sense, deviation=stdev(values) if len(values) > 1 else None)

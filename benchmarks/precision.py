"""What does bfloat16 do to accuracy? The same federations with the frozen model in float32 and in bfloat16.

Data, shares, seeds, matching and steps are the same; what differs is the arithmetic of the image and the text tower.
Prompts, gates and their optimiser are float32 either way. CPU time of a training step beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone, Precision, load_backbone
from pfedsecure.clip.features import image_features
from pfedsecure.data import ImageSet

from .allocator import keep_freed_memory
from .contract import Bar, Outcome, Row, benchmark
from .expert_clients import DIGITS, Data, accuracies, digits, plan_of_set, shares_of
from .expert_tasks import OFFICE
from .kept_rows import KeptRows
from .light_federation import Matching, federate
from .photo_clients import DIRICHLET_BETA
from .photo_features import Sources, available, model_name, photo_backbone
from .photo_options import backbone_dir_option, cache_option, data_option, kept_option
from .photos import open_photos

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
SEEDS, QUICK_SEEDS = (1, 2, 3), (1, 2)
ROUNDS, QUICK_ROUNDS = 10, 1
MOST_LOST = 1.0
"""In points of mean accuracy, over the seeds."""


@benchmark
@data_option(f"Folder with {OFFICE}.tar.  [default: none, digits alone]", default=None)
@backbone_dir_option
@cache_option
@kept_option(Path("runs/precision"))
def command(*, quick: bool, data: Path | None, backbone_dir: Path | None, cache_dir: Path, kept: Path) -> Outcome:
    """bfloat16 against float32: accuracy of twenty clients' federation, and CPU time of a step."""
    torch.set_num_threads(1)
    keep_freed_memory()
    names = [DIGITS] if data is None or quick else [DIGITS, *available([OFFICE], data)]
    folder = data or Path("photographs")
    sources = Sources(folder, backbone_dir or folder / "backbone", cache_dir)
    seeds, rounds = (QUICK_SEEDS, QUICK_ROUNDS) if quick else (SEEDS, ROUNDS)
    rows: list[Row] = []
    for name in names:
        rows += measure_all(name, seeds, rounds, sources, kept / f"{name}{'-quick' if quick else ''}.jsonl")
    return Outcome(
        params={"quick": quick, "data_sets": names, "seeds": list(seeds), "rounds": rounds}, rows=rows, bars=bars(rows)
    )


def measure_all(name: str, seeds: Sequence[int], rounds: int, sources: Sources, file: Path) -> list[Row]:
    """A row for each precision and seed. Raises click.ClickException, DataError or BackboneError."""
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(name, total=len(seeds) * len(PRECISIONS))
        for precision in PRECISIONS:
            data = load(name, precision, sources)
            kept = KeptRows(file, {"data_set": name, "rounds": rounds, "weights": data.backbone.text_digest})
            for seed in seeds:
                progress.update(bar, description=f"{name}: {precision}, seed {seed}")
                key: Row = {"data_set": name, "precision": precision, "seed": seed}
                rows.append(key | kept.get(key, partial(measure, name, data, seed, rounds, sources)))
                progress.advance(bar)
    return rows


def load(name: str, precision: Precision, sources: Sources) -> Data:
    """Images and their features by a backbone of this precision."""
    images, backbone = _images(name, sources), _backbone(name, precision, sources)
    return Data(images, image_features(backbone, images, cache_dir=sources.cache / "features"), backbone)


def _images(name: str, sources: Sources) -> ImageSet:
    return digits() if name == DIGITS else open_photos(name, sources.data, sources.cache / "photos")


def _backbone(name: str, precision: Precision, sources: Sources) -> Backbone:
    if name == DIGITS:
        return load_backbone("tiny-clip", "embedded", precision=precision)
    return photo_backbone(sources.backbone_dir, precision)


def measure(name: str, data: Data, seed: int, rounds: int, sources: Sources) -> Row:
    """Mean accuracy of the clients on their own test images, in [0, 1], and processor time of the whole in seconds."""
    shares = shares_of(data.images, seed, DIRICHLET_BETA, shots=None)
    model = "" if name == DIGITS else model_name(sources.backbone_dir)
    plan = plan_of_set(name, data.images.class_names, seed, rounds, model)
    trainers = {
        share.name: Trainer(
            plan,
            data.backbone,
            data.features.subset(share.train),
            data.features.subset(share.test),
            name=share.name,
        )
        for share in shares
    }
    started = time.process_time()
    federation = federate(plan, trainers, Matching.NEAREST)
    seconds = time.process_time() - started
    return {
        "accuracy": accuracies(data, shares, trainers, federation.models).own,
        "cpu_seconds": round(seconds, 1),
        "clients": len(shares),
    }


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """Points of mean accuracy that bfloat16 loses, paired by seed, and how many times float32's CPU time it takes."""
    found = {}
    for name in dict.fromkeys(str(row["data_set"]) for row in rows):
        full, half = (_by_seed(rows, name, precision, "accuracy") for precision in PRECISIONS)
        lost = [100 * (a - b) for a, b in zip(full, half, strict=True)]
        found[f"{name}_points_lost"] = Bar.of(fmean(lost), MOST_LOST, "<=", deviation=stdev(lost))
        full, half = (_by_seed(rows, name, precision, "cpu_seconds") for precision in PRECISIONS)
        found[f"{name}_time_ratio"] = Bar.of(fmean(half) / fmean(full), None, "<=")
    return found


def _by_seed(rows: Sequence[Row], name: str, precision: str, column: str) -> list[float]:
    return [float(str(row[column])) for row in rows if (row["data_set"], row["precision"]) == (name, precision)]

"""How fast does a client train, against the published way and against what the machine can do at most?

The published way is stated anew in `published_way`; ours is a client's own code. Both train on the same weights, images
and batches, and their losses are compared. All that a case measures of ours is of several rounds, so that what is done
once a round (the experts' features) is in what an epoch costs.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pfedsecure.clip.config import TINY_NAME

from .contract import Bar, Outcome, Row, benchmark
from .gate_forms import gate_rows
from .training_cases import Case, Measured, measure_ours, measure_published

VIT, RESNET = "ViT-B-16", "RN50"
BATCH, EXPERTS, IMAGES = 32, 9, 160
CLASSES = (10, 37, 100)
PUBLISHED_STEPS = {10: 4, 37: 3, 100: 3}
"""They are all alike, and take up to minutes each."""
ROUNDS, QUICK_ROUNDS = 3, 2
WARM_UP = 5
"""Steps that are not counted, where there are enough of them."""
LIMITS = {10: 40.0, 100: 20.0}
SCALED_CLASSES, SCALED_EXPERTS, SCALED_BATCHES = (10, 37, 100, 400, 1000), (0, 3, 9, 19), (8, 32, 128)


@benchmark
@click.option("--device", default="cpu", show_default=True, help="Where to compute, say cuda.")
@click.option("--model", "models", multiple=True, help=f"Of open_clip, may be repeated.  [default: {VIT}, {RESNET}]")
@click.option("--classes", type=click.IntRange(2), multiple=True, help=f"May be repeated.  [default: {CLASSES}]")
@click.option(
    "--compare-only", is_flag=True, help="Leave out what grows with C, K and B, bfloat16 and forms of the gate."
)
def command(
    *, quick: bool, device: str, models: tuple[str, ...], classes: tuple[int, ...], compare_only: bool
) -> Outcome:
    """A local epoch of ours against the published way: time, memory and losses; and a step against the floor.

    About an hour on two cores.
    """
    models = models or ((TINY_NAME,) if quick else (VIT, RESNET))
    classes = tuple(sorted(classes)) or ((4, 10) if quick else CLASSES)
    base = Case(models[0], classes[0], 8 if quick else BATCH, 2 if quick else EXPERTS, 16 if quick else IMAGES)
    base = replace(base, device=device)
    compared = [replace(base, model=model, classes=count) for model in models for count in classes]
    scaled = [] if quick or compare_only else scaling_cases(base)
    half = replace(base, precision="bf16", epochs=1)
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="pfed-") as folder,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        cache = Path(folder)
        bar = progress.add_task("training", total=len(compared) + len(scaled) + (0 if compare_only else 2))
        for case in compared:
            progress.update(bar, description=f"{case.model}, C = {case.classes}")
            rows.append(compare(case, QUICK_ROUNDS if quick else ROUNDS, cache))
            progress.advance(bar)
        for case in scaled:
            progress.update(bar, description=f"C = {case.classes}, K = {case.experts}, B = {case.batch}")
            rows.append(alone("scaling", case, measure_ours(case, 2, cache)))
            progress.advance(bar)
        if not compare_only:
            progress.update(bar, description="bfloat16")
            rows += precision_rows(half, cache)
            progress.advance(bar)
            progress.update(bar, description="gate")
            rows += gate_rows(classes[-1], base.batch, base.experts, device)
            progress.advance(bar)
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    params = {
        "quick": quick,
        "models": list(models),
        "images": base.images,
        "local_epochs": base.epochs,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    return Outcome(params=params, rows=rows, bars=bars(rows, models[0]), gpu=gpu)


def scaling_cases(base: Case) -> list[Case]:
    """`base` with one of C, K and B varied at a time."""
    base = replace(base, epochs=1)
    cases = [replace(base, classes=count) for count in SCALED_CLASSES]
    cases += [replace(base, experts=count) for count in SCALED_EXPERTS]
    cases += [replace(base, batch=count) for count in SCALED_BATCHES]
    return list(dict.fromkeys(cases))


def compare(case: Case, rounds: int, cache: Path) -> Row:
    """One row of both ways."""
    published = measure_published(case, PUBLISHED_STEPS.get(case.classes, 4))
    ours = measure_ours(case, rounds, cache / f"{case.model}-{case.classes}")  # its first epoch encodes its images
    published_step = median(published.steps[1:])
    epoch = median(ours.rounds[1:]) / case.epochs
    n_compared = len(published.losses)
    return alone("against published", case, ours) | {
        "published_step_ms": 1e3 * published_step,
        "published_epoch_s": case.steps_an_epoch * published_step,
        "epoch_s": epoch,
        "epoch_ratio": case.steps_an_epoch * published_step / epoch,
        "first_epoch_s": ours.first_epoch,
        "encoding_s": ours.encoding,
        "loss_difference": max(abs(a - b) for a, b in zip(published.losses, ours.losses[:n_compared], strict=True)),
        "published_peak_mib": published.peak_mib,
        "peak_mib": ours.peak_mib,
    }


def alone(kind: str, case: Case, ours: Measured) -> Row:
    """What there is to say of our way without another."""
    step = median(ours.steps[min(WARM_UP, len(ours.steps) // 3) :])
    return {
        "kind": kind,
        "model": case.model,
        "classes": case.classes,
        "experts": case.experts,
        "batch": case.batch,
        "precision": case.precision,
        "step_ms": 1e3 * step,
        "floor_ms": 1e3 * case.flops(ours.tail_tokens) / ours.peak_flops,
        "tail_tokens": ours.tail_tokens,
        "peak_gflops": ours.peak_flops / 1e9,
    }


def precision_rows(half: Case, cache: Path) -> list[Row]:
    """bfloat16 beside float32: time of a step, and how far image features and losses are from each other."""
    full = replace(half, precision="fp32")
    measured = {case.precision: measure_ours(case, 2, cache) for case in (full, half)}
    full_features, half_features = measured["fp32"].features, measured["bf16"].features
    assert full_features is not None
    assert half_features is not None
    difference = {
        "feature_difference": float(np.abs(full_features - half_features).max()),
        "loss_difference": max(
            abs(a - b) for a, b in zip(measured["fp32"].losses, measured["bf16"].losses, strict=True)
        ),
    }
    return [
        alone("precision", full, measured["fp32"]),
        alone("precision", half, measured["bf16"]) | difference,
    ]


def bars(rows: list[Row], model: str) -> dict[str, Bar]:
    """Of the rows of `model` that compare; losses of all rows that do."""
    compared = [row for row in rows if row["kind"] == "against published"]
    by_classes = {int(str(row["classes"])): row for row in compared if row["model"] == model}
    fewest, most = min(by_classes), max(by_classes)

    def number(count: int, column: str) -> float:
        return float(str(by_classes[count][column]))

    found = {
        f"epoch_ratio_c{count}": Bar.of(number(count, "epoch_ratio"), LIMITS.get(count), ">=") for count in by_classes
    }
    published = number(fewest, "published_epoch_s")
    found[f"first_epoch_ratio_c{fewest}"] = Bar.of(published / number(fewest, "first_epoch_s"), 4.0, ">=")
    found[f"first_epoch_most_c{fewest}"] = Bar.of(published / number(fewest, "encoding_s"), None, ">=")
    for count in (fewest, most):
        over = number(count, "step_ms") / number(count, "floor_ms")
        found[f"step_over_floor_c{count}"] = Bar.of(over, 1.5, "<=")
    found["loss_difference"] = Bar.of(max(float(str(row["loss_difference"])) for row in compared), 1e-4, "<=")
    memory = number(most, "peak_mib") / number(most, "published_peak_mib")
    found["peak_memory_ratio"] = Bar.of(memory, 0.5, "<=")
    return found

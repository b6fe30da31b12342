"""What does differential privacy cost a training step? Either mechanism against a step without, in one run.

The model is the paper's, on a text tower of the size of ViT-B/16 with random weights, whose numbers do not change the
time. A step is everything from a batch's features to the new prompt and gate: with privacy also clipping, noise and the
optimiser. The three take turns, so that a machine that is busy in between slows all of them down.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F

from pfed_client.private_trainer import FeatureSpaceStep, PerSampleStep
from pfed_client.trainer import make_optimizers
from pfedsecure.clip.backbone import load_backbone
from pfedsecure.clip.class_tails import ClassTails
from pfedsecure.clip.text import TextTower
from pfedsecure.moe.gate import Gate
from pfedsecure.moe.mixture import MixtureModel
from pfedsecure.plan import Plan
from pfedsecure.privacy.noisy_sum import NoisySum

from .contract import Bar, Outcome, Row, benchmark

MODEL = "ViT-B-16"
BATCH = 32
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
NOISE_MULTIPLIER = 1.0
REPEATS, QUICK_REPEATS = 15, 3
LIMITS = {"feature-space": 1.5, "per-sample": 20.0}


@benchmark
@click.option("--repeats", type=click.IntRange(1), help=f"Steps of each kind that are timed.  [default: {REPEATS}]")
@click.option("--device", default="cpu", show_default=True, help="Where to compute, say cuda.")
def command(*, quick: bool, repeats: int | None, device: str) -> Outcome:
    """A training step with differential privacy against one without: ViT-B/16's text tower, C = 10, B = 32."""
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS)
    plan = Plan(class_names=CLASSES)
    backbone = load_backbone(MODEL, "random", device=device)
    classes = backbone.tower.class_tails(backbone.tokenizer, plan.class_names, plan.prompt.context_length)
    steps = steps_of(plan, backbone.tower, classes, backbone.logit_scale, torch.device(device))
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(repeats + 1):
        for way, step in steps.items():
            took = _timed(step)
            if number:  # the first is to warm up
                seconds[way].append(took)
    rows: list[Row] = [
        {"way": way, "median_ms": 1e3 * statistics.median(took), "least_ms": 1e3 * min(took)}
        for way, took in seconds.items()
    ]
    params = {
        "model": MODEL,
        "classes": len(CLASSES),
        "batch": BATCH,
        "context_length": plan.prompt.context_length,
        "experts": plan.mixture.experts,
        "gate_width": plan.mixture.gate_width,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return Outcome(params=params, rows=rows, bars=bars(rows), gpu=gpu)


def steps_of(
    plan: Plan, tower: TextTower, classes: ClassTails, logit_scale: float, device: torch.device
) -> dict[str, Callable[[], object]]:
    """A step of each kind by name, each with a model of its own, all on the same batch."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    mixture, width = plan.mixture, int(classes.tokens.shape[1])
    context, others = random(plan.prompt.context_length, width), random(mixture.experts, *(1, width))
    with torch.no_grad():
        embedding = tower(context[None], classes).shape[-1]
        experts = tower((context + others) * 0.02, classes)
    features = F.normalize(random(BATCH, embedding), dim=-1)
    labels = torch.randint(len(plan.class_names), (BATCH,), generator=generator).to(device)

    def model() -> MixtureModel:
        gate = Gate(mixture.gate_width, mixture.gate_heads, mixture.attention_scale, generator).to(device)
        start = context * 0.02
        return MixtureModel(tower, classes, start, logit_scale, gate, mixture.gate_width, experts, mixture.lambda_).to(
            device
        )

    plain = model()
    optimizers = make_optimizers(plain, plan.training)

    def without() -> None:
        loss = F.cross_entropy(plain(features), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    summed = NoisySum(plan.privacy.clip, NOISE_MULTIPLIER)
    by_features = FeatureSpaceStep(model(), plan, summed)
    by_sample = PerSampleStep(model(), plan, summed)
    return {
        "non-private": without,
        "feature-space": lambda: by_features.step(features, labels),
        "per-sample": lambda: by_sample.step(features, labels),
    }


def bars(rows: list[Row]) -> dict[str, Bar]:
    """Both mechanisms' medians over that of a step without privacy."""
    median = {str(row["way"]): float(str(row["median_ms"])) for row in rows}
    return {
        f"{way.replace('-', '_')}_over_nonprivate": Bar.of(median[way] / median["non-private"], limit, "<=")
        for way, limit in LIMITS.items()
    }


def _timed(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started

"""The benchmark of private steps: its bars from known rows, and all three steps on a small tower."""

from __future__ import annotations

import torch

from pfed_benchmarks.contract import Outcome, Report, Row
from pfed_benchmarks.dp_step import CLASSES, bars, steps_of
from pfed_benchmarks.tables import table_of
from pfedsecure.clip.backbone import load_backbone
from pfedsecure.plan import Plan


def test_bars_are_ratios_of_medians() -> None:
    rows: list[Row] = [
        {"way": "non-private", "median_ms": 100.0, "least_ms": 1.0},
        {"way": "feature-space", "median_ms": 140.0, "least_ms": 1.0},
        {"way": "per-sample", "median_ms": 2100.0, "least_ms": 1.0},
    ]
    assert {name: (bar.value, bar.limit, bar.ok) for name, bar in bars(rows).items()} == {
        "feature_space_over_nonprivate": (1.4, 1.5, True),
        "per_sample_over_nonprivate": (21.0, 20.0, False),
    }


def test_every_step_can_be_taken() -> None:
    plan = Plan.model_validate(
        {"class_names": CLASSES, "prompt": {"context_length": 4}, "mixture": {"experts": 2, "gate_width": 32}}
    )
    backbone = load_backbone("tiny-clip", "embedded")
    classes = backbone.tower.class_tails(backbone.tokenizer, plan.class_names, plan.prompt.context_length)
    steps = steps_of(plan, backbone.tower, classes, backbone.logit_scale, torch.device("cpu"))
    assert list(steps) == ["non-private", "feature-space", "per-sample"]
    for step in steps.values():
        step()


def test_the_table_has_the_ratios() -> None:
    rows: list[Row] = [
        {"way": "non-private", "median_ms": 200.0, "least_ms": 1.0},
        {"way": "feature-space", "median_ms": 250.0, "least_ms": 1.0},
        {"way": "per-sample", "median_ms": 2000.0, "least_ms": 1.0},
    ]
    outcome = Outcome(params={"threads": 1, "repeats": 3}, rows=rows, bars=bars(rows))
    table = table_of(Report.of("dp-step", outcome))
    assert "1 thread; torch" in table
    assert "| per-sample | 2000 | 10.00 |" in table
    assert "`feature_space_over_nonprivate`: 1.25" in table

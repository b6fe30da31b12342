"""The benchmark of training: its two ways are the same training, its floor and memory are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pfed_benchmarks import training_cases
from pfed_benchmarks.contract import Outcome, Report, Row
from pfed_benchmarks.gate_forms import gate_rows
from pfed_benchmarks.tables import table_of
from pfed_benchmarks.training import bars, command, scaling_cases
from pfed_benchmarks.training_cases import Case
from torch.utils.flop_counter import FlopCounterMode

from pfedsecure.clip.backbone import load_backbone

CASE = Case("tiny-clip", classes=7, batch=4, experts=3, images=10, epochs=2)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases run in this process: a new one takes seconds to load torch."""
    monkeypatch.setattr(training_cases, "_in_own_process", lambda function, *arguments: function(*arguments))


@pytest.mark.usefixtures("here")
def test_the_published_way_is_the_same_training(tmp_path: Path) -> None:
    published = training_cases.measure_published(CASE, steps=6)
    ours = training_cases.measure_ours(CASE, 2, tmp_path)
    assert len(published.losses) == len(ours.losses) == 6  # ten images by four, twice
    np.testing.assert_allclose(published.losses, ours.losses, atol=2e-6, rtol=0)
    assert len(set(ours.losses)) == 6
    assert (len(ours.steps), len(ours.rounds), len(published.steps)) == (12, 2, 6)
    other = training_cases.measure_published(replace(CASE, experts=2), steps=2)
    assert abs(other.losses[1] - ours.losses[1]) > 1e-5  # experts matter to what is compared


@pytest.mark.parametrize(("classes", "experts"), [(7, 3), (30, 0)])
def test_the_floor_is_what_the_tower_computes(classes: int, experts: int) -> None:
    """PyTorch's own count of a step: below the floor's by what the last block leaves out, and never above."""
    case = replace(CASE, classes=classes, experts=experts)
    plan, backbone = case.plan(), load_backbone("tiny-clip", "embedded")
    tails = backbone.tower.class_tails(backbone.tokenizer, plan.class_names, plan.prompt.context_length)
    context = torch.from_numpy(backbone.initial_context(plan)).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        backbone.tower(context[None], tails).sum().backward()
    share_of_last = 1 / 3  # three blocks
    floor = case.flops(max(tails.lengths))
    assert floor * (1 - share_of_last) < counter.get_total_flops() < floor


def test_scaling_varies_one_at_a_time() -> None:
    cases = scaling_cases(CASE)
    assert len(cases) == len(set(cases))
    changed = [
        {name for name in ("classes", "experts", "batch") if getattr(case, name) != getattr(CASE, name)}
        for case in cases
    ]
    assert all(len(names) <= 1 for names in changed)
    assert {name for names in changed for name in names} == {"classes", "experts", "batch"}


def test_the_gate_keeps_less_than_copies_do() -> None:
    kept = {str(row["form"]): float(str(row["kept_over_bcg"])) for row in gate_rows(40, 32, 9, "cpu")}
    assert kept["ours"] < 0.5 * kept["copies"]
    assert kept["ours"] < 3


def compared(classes: int, **numbers: float) -> Row:
    return {
        "kind": "against published",
        "model": "ViT-B-16",
        "classes": classes,
        "experts": 9,
        "batch": 32,
        "precision": "fp32",
        "step_ms": 100.0,
        "floor_ms": 80.0,
        "published_step_ms": 10_000.0,
        "published_epoch_s": 50.0,
        "epoch_s": 1.0,
        "epoch_ratio": 50.0,
        "first_epoch_s": 20.0,
        "encoding_s": 10.0,
        "loss_difference": 1e-6,
        "published_peak_mib": 4000.0,
        "peak_mib": 1000.0,
    } | numbers


def test_bars_and_table() -> None:
    rows: list[Row] = [compared(10), compared(100, epoch_ratio=15.0, step_ms=140.0, loss_difference=2e-4)]
    rows.append({"kind": "precision", "precision": "fp32", "step_ms": 100.0})
    rows.append({"kind": "gate", "form": "ours", "ms": 1.0, "kept_over_bcg": 0.5})
    found = bars(rows, "ViT-B-16")
    assert {name: (bar.value, bar.limit, bar.ok) for name, bar in found.items()} == {
        "epoch_ratio_c10": (50.0, 40.0, True),
        "epoch_ratio_c100": (15.0, 20.0, False),
        "first_epoch_ratio_c10": (2.5, 4.0, False),
        "first_epoch_most_c10": (5.0, None, True),
        "step_over_floor_c10": (1.25, 1.5, True),
        "step_over_floor_c100": (1.75, 1.5, False),
        "loss_difference": (2e-4, 1e-4, False),
        "peak_memory_ratio": (0.25, 0.5, True),
    }
    table = table_of(Report.of("training", Outcome(params={"threads": 2, "images": 160}, rows=rows, bars=found)))
    assert "| ViT-B-16 | 10 | 10.0 | 100 | 80 | 1.25 | 50.0 s / 1.00 s = 50 |" in table
    assert "`epoch_ratio_c100`: 15 (>= 20: missed)" in table


@pytest.mark.slow
def test_quick_measures_in_processes_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "training.json"
    result = CliRunner().invoke(command, ["--quick", "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = Report.read(file)
    assert report.bars["loss_difference"].ok
    assert {row["kind"] for row in report.rows} == {"against published", "precision", "gate"}
    assert all(row["peak_mib"] > 100 for row in report.rows if row["kind"] == "against published")  # type: ignore[operator]
    assert json.loads(file.read_text())["params"]["models"] == ["tiny-clip"]

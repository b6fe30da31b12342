"""The benchmark of precisions: bars and table from known rows, and that both precisions really compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pfed_benchmarks.contract import Outcome, Report, Row
from pfed_benchmarks.expert_clients import DIGITS
from pfed_benchmarks.photo_features import Sources
from pfed_benchmarks.precision import bars, load, measure
from pfed_benchmarks.tables import table_of

ACCURACIES = {"fp32": (0.80, 0.90, 0.85), "bf16": (0.79, 0.90, 0.82)}
ROWS: list[Row] = [
    {"data_set": "digits", "precision": precision, "seed": seed, "accuracy": accuracy, "cpu_seconds": seconds}
    for (precision, values), seconds in zip(ACCURACIES.items(), (10.0, 25.0), strict=True)
    for seed, accuracy in enumerate(values, start=1)
]


def test_bars_pair_seeds() -> None:
    found = bars(ROWS)
    assert found["digits_points_lost"].value == pytest.approx(4 / 3)
    assert found["digits_points_lost"].deviation == pytest.approx((7 / 3) ** 0.5)
    assert not found["digits_points_lost"].ok
    assert found["digits_time_ratio"].value == pytest.approx(2.5)


def test_the_table() -> None:
    outcome = Outcome(params={"rounds": 10, "seeds": [1, 2, 3]}, rows=ROWS, bars=bars(ROWS))
    table = table_of(Report.of("precision", outcome))
    assert "10 rounds, 3 seeds" in table
    assert "| digits | 85.0 ± 5.0 | 83.7 ± 5.7 | 10 / 25 |" in table
    assert "- `digits_points_lost`: 1.33 ± 1.53 (<= 1: missed)" in table


@pytest.mark.slow
def test_a_federation_in_either_precision(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "none", tmp_path / "none", tmp_path / "cache")
    loaded = {precision: load(DIGITS, precision, sources) for precision in ("fp32", "bf16")}
    apart = float((loaded["fp32"].features.features - loaded["bf16"].features.features).abs().max())
    assert 1e-4 < apart < 0.1  # the one was not computed by the other's arithmetic, nor served from its cache
    assert loaded["bf16"].backbone.tower.dtype == torch.bfloat16
    scores = {precision: measure(DIGITS, data, 1, 1, sources)["accuracy"] for precision, data in loaded.items()}
    assert all(float(str(score)) > 0.4 for score in scores.values())
    assert scores["fp32"] == pytest.approx(scores["bf16"], abs=0.05)

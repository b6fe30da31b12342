"""The benchmark of views: bars and table from known rows, what fresh crops are, and a small run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pfed_benchmarks import views as bench
from pfed_benchmarks.contract import Outcome, Report, Row
from pfed_benchmarks.expert_clients import DIGITS
from pfed_benchmarks.kept_rows import KeptRows
from pfed_benchmarks.photo_features import Sources
from pfed_benchmarks.tables import table_of
from pfed_benchmarks.views import Features, FreshTrainer, bars, load, measure_all, shares_of

from pfedsecure.clip.features import image_features

ACCURACIES = {1: (0.50, 0.60), 2: (0.52, 0.68), 4: (0.62, 0.70), None: (0.60, 0.72)}
ROWS: list[Row] = [
    {"seed": seed, "client": client, "views": views, "accuracy": accuracy + off}
    for views, both in ACCURACIES.items()
    for seed, accuracy in enumerate(both, start=1)
    for client, off in (("a", -0.1), ("b", 0.1))
] + [
    {"seed": 1, "client": "a", "views": 4, "cpu_ms_a_step": 20.0},
    {"seed": 1, "client": "a", "views": None, "cpu_ms_a_step": 500.0},
]
PARAMS = {"data_set": "pacs", "shots": 4, "rounds": 10}


def test_bars_are_of_means_over_clients_and_deviations_over_seeds() -> None:
    found = bars(ROWS)
    assert found["fresh_over_plain"].value == pytest.approx(11.0)
    assert found["fresh_over_plain"].deviation == pytest.approx(2**0.5)
    assert found["fresh_over_stored_step"].value == pytest.approx(25.0)
    assert found["views_to_match"].value == 2  # 60 against 66, of which the two seeds are 8.5 apart from their mean
    assert all(bar.limit is None for bar in found.values())


def test_no_number_of_views_is_made_up_where_none_matches() -> None:
    worse = [row | {"accuracy": 0.1} if row["views"] is not None and "accuracy" in row else row for row in ROWS]
    assert "views_to_match" not in bars(worse)


def test_the_table() -> None:
    table = table_of(Report.of("views", Outcome(params=PARAMS, rows=ROWS, bars=bars(ROWS))))
    assert "pacs, 4 training images a class, 10 rounds, 2 seeds" in table
    assert "| 1 | 55.0 ± 7.1 | -11.0 ± 1.4 |" in table
    assert "| 4 | 66.0 ± 5.7 | +0.0 ± 2.8 |" in table
    assert "| fresh crops | 66.0 ± 8.5 | |" in table
    assert "- `views_to_match`: 2.00 (no limit)" in table


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path / "none", tmp_path / "none" / "backbone", tmp_path / "cache")


def test_fresh_crops_are_other_ones_each_time_and_of_the_same_image(sources: Sources) -> None:
    data = load(DIGITS, sources)
    features = Features(data, shares_of(data.images, 1)[0], 3)
    trainer = features.trainer(1, 1, None)
    assert isinstance(trainer, FreshTrainer)
    rows = torch.arange(8)
    first, second = (trainer.batch_features(rows, torch.Generator()) for _ in range(2))
    assert not torch.isclose(first, second, atol=1e-3).all(dim=1).any()
    torch.testing.assert_close(first.norm(dim=1), torch.ones(8))
    own = image_features(data.backbone, features.images).features
    hits = (torch.stack([first, second]).mean(dim=0) @ own[:8].T).argmax(dim=1) == rows
    assert hits.sum() >= 3  # one in eight by chance


@pytest.mark.slow
def test_what_is_done_is_not_done_again(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(DIGITS, sources)
    monkeypatch.setattr(bench, "shares_of", lambda images, seed: shares_of(images, seed)[:1])
    monkeypatch.setattr(bench, "TIMED_ROUNDS", 1)
    file = tmp_path / "kept.jsonl"
    first = measure_all(data, (1,), 1, (1, 2), KeptRows(file, {}))

    def never(*_: object) -> Row:
        raise AssertionError

    monkeypatch.setattr(bench, "measure", never)
    again = measure_all(data, (1,), 1, (1, 2), KeptRows(file, {}))
    assert [row["views"] for row in first] == [1, 2, None, 2, None]
    assert again[:3] == first[:3]
    assert len({row["accuracy"] for row in first[:3]}) > 1


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    file = tmp_path / "views.json"
    options = ["--quick", "--json", str(file), "--data", str(tmp_path), "--cache", str(tmp_path / "cache")]
    outcome = CliRunner().invoke(bench.command, [*options, "--kept", str(tmp_path / "kept")])
    assert outcome.exit_code == 0, outcome.output
    found = Report.read(file)
    assert (found.params["quick"], found.params["data_set"]) == (True, "digits")
    assert {"fresh_over_plain", "fresh_over_stored_step"} <= set(found.bars)

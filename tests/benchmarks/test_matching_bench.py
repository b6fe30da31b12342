"""The benchmark of matching: bars computed from rows, costs measured on what is really computed, and its table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pfed_benchmarks import matching, matching_ckks
from pfed_benchmarks.contract import Outcome, Report
from pfed_benchmarks.matching_noised import noised_rows
from pfed_benchmarks.matching_pool import EncryptedPool, nearest
from pfed_benchmarks.tables import table_of

from pfedsecure.matching.he.encryption import encrypt, query_polynomial
from pfedsecure.matching.he.parameters import Layout
from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.pki.cohort import CohortSecrets


@pytest.fixture(scope="module")
def key() -> SecretKey:
    return SecretKey(CohortSecrets.of({1: bytes(32)}), 1)


def test_the_pool_answers_like_a_search_in_clear(key: SecretKey) -> None:
    layout = Layout(1000)  # blocks of eight: more than one
    numbers = matching.drawn(11, 1000)
    with EncryptedPool(key, layout, numbers) as pool:
        for row in (0, 10):
            answer = pool.answer(encrypt(query_polynomial(numbers[row], layout), key), leave_out=row)
            assert pool.nearest(answer, numbers[row], 5) == nearest(pool.numbers, numbers[row], 5, leave_out=row)


@pytest.fixture(scope="module")
def outcome(key: SecretKey) -> Outcome:
    rows = [matching.encrypted_row(key, 12, 64), matching.encrypted_row(key, 9, 1000)]
    rows += [matching_ckks.dot_row(way, 64, 1) for way in matching_ckks.DOT_BITS]
    rows.append(matching_ckks.packed_row(64, 1))
    rows.append({"way": "he recall", "prompts": "p", "seed": 0, "recall": 0.5, "id_agreement": 0.75})
    rows.append(matching.round_row(key, 2, 5))
    rows += noised_rows(300, 9)
    return Outcome(params={}, rows=rows, bars=matching.bars(rows))


def test_bars_come_from_rows(outcome: Outcome) -> None:
    bars, (main, *_), dot = outcome.bars, outcome.rows, next(row for row in outcome.rows if row["way"] == "ckks dot")
    assert list(bars) == list(matching.LIMITS)
    assert bars["he_ms_per_pair"].value == main["ms_per_pair"]
    assert bars["he_ratio_tenseal_dot"].value == pytest.approx(dot["ms_per_pair"] / main["ms_per_pair"])  # type: ignore[operator]
    assert bars["he_recall_at_9"].value == 0.5
    assert bars["he_recall_at_9"].ok is False
    assert bars["he_id_agreement"].value == 0.75
    assert 200 < bars["he_upload_kb"].value < 250
    assert bars["dp_recall_100k"].value == 1


def test_the_other_ways_compute_the_same(outcome: Outcome) -> None:
    errors = [row["error"] for row in outcome.rows if str(row["way"]).startswith("ckks")]
    assert len(errors) == 3
    assert all(0 < float(error) < 1e-4 for error in errors)  # type: ignore[arg-type]


def test_the_table_has_every_row(outcome: Outcome) -> None:
    table = table_of(Report.of("matching", outcome))
    for piece in ("| 12 | 64 |", "| 9 | 1000 |", "| ckks packed |", "| p | 0 | 0.500 | 0.7500 |", "`he_round_seconds"):
        assert piece in table
    assert "A round of 2 clients and 5 experts" in table
    assert "Noised, 300 experts, epsilon 8" in table


def test_sorting_leaves_oneself_out() -> None:
    sketches = np.array([[0], [3], [1], [1]])
    assert nearest(sketches, sketches[0], 2, leave_out=0) == [2, 3]
    assert nearest(sketches, sketches[0], 1) == [0]


@pytest.mark.slow
def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def prompts(quick: bool) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        return {"made up": (np.zeros((2, 32), np.float32), 0.1 * rng.normal(size=(12, 2, 32)).astype(np.float32))}

    monkeypatch.setattr(matching, "real_prompts", prompts)
    monkeypatch.setattr(matching, "QUICK_NOISED", 100)
    found = matching._measure(quick=True)
    assert found.bars["he_id_agreement"].value == 1
    assert {str(row["way"]) for row in found.rows} >= {"he", "he recall", "he round", "dp", "ckks dot", "ckks packed"}

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pfed_client.local_model import LocalModel
from pfedsecure.errors import CheckpointMismatch, StateError

OWNER = {"plan": "p" * 64, "backbone": "b" * 64}


def model() -> LocalModel:
    generator = np.random.default_rng(0)
    gate = {f"W_{m}.{kind}": generator.random((3, 2), np.float32) for m in "qkvo" for kind in ("weight", "bias")}
    return LocalModel(generator.random((2, 5), np.float32), gate, generator.random((0, 2, 5), np.float32), 7)


def test_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    model().save(tmp_path / "model", belongs_to=OWNER)
    again = LocalModel.load(tmp_path / "model", belongs_to=OWNER)
    assert again.trained_round == 7
    np.testing.assert_array_equal(again.context, model().context)
    assert again.experts.shape == (0, 2, 5)
    assert again.gate.keys() == model().gate.keys()
    assert all(np.array_equal(again.gate[key], model().gate[key]) for key in again.gate)


def test_the_same_model_is_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for number in range(20):  # an order that is random would show
        model().save(tmp_path / str(number), belongs_to=OWNER)
        files.append((tmp_path / str(number)).read_bytes())
    assert len(set(files)) == 1


@pytest.mark.parametrize("key", OWNER)
def test_of_another_plan_or_backbone(tmp_path: Path, key: str) -> None:
    model().save(tmp_path / "model", belongs_to=OWNER)
    with pytest.raises(CheckpointMismatch, match=f"the saved model is of another {key}"):
        LocalModel.load(tmp_path / "model", belongs_to=OWNER | {key: "x" * 64})


@pytest.mark.parametrize("kept", [0, 9, 200, -1])
def test_damaged(tmp_path: Path, kept: int) -> None:
    model().save(tmp_path / "model", belongs_to=OWNER)
    whole = (tmp_path / "model").read_bytes()
    (tmp_path / "model").write_bytes(whole[:kept])
    with pytest.raises(StateError, match="the saved model is damaged"):
        LocalModel.load(tmp_path / "model", belongs_to=OWNER)

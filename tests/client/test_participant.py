"""From a client's images to its trainer: views for training, the image itself for tests, and the limit of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pfed_client.participant import Participant, prepare
from pfed_client.state import Settings
from pfedsecure.data import open_images
from pfedsecure.data.digits import CLASS_NAMES
from pfedsecure.plan import Plan

SETTINGS = Settings.of("demo:0/20")


def prepared(cache: Path | None, views: int, settings: Settings = SETTINGS, *, trains: bool = True) -> Participant:
    values = {
        "class_names": CLASS_NAMES,
        "prompt": {"context_length": 5},
        "mixture": {"experts": 0, "gate_width": 32},
        "training": {"local_epochs": 1, "views": views},
    }
    images = open_images(settings.data, strict=True)
    plan = Plan.model_validate(values)
    return prepare(plan, "client-1", settings, images, device="cpu", cache_dir=cache, trains=trains)


def train(participant: Participant) -> None:
    trainer = participant.trainer
    trainer.train_round(trainer.new_model(), trainer.initial_context(), trainer.new_model().experts, 1)


def test_a_client_trains_on_the_plan_s_views_and_is_tested_on_the_images(tmp_path: Path) -> None:
    plain, viewed = prepared(None, 1), prepared(tmp_path, 3)
    assert torch.equal(plain.test.features, viewed.test.features)
    assert viewed.test.n_views == 1
    train(viewed)
    assert len([folder for folder in tmp_path.iterdir() if folder.is_dir()]) == 3


def test_for_predictions_alone_no_views_are_computed(tmp_path: Path) -> None:
    participant = prepared(tmp_path, 3, trains=False)
    assert len([folder for folder in tmp_path.iterdir() if folder.is_dir()]) == 1
    with pytest.raises(ValueError, match="views were asked for"):
        train(participant)


def test_the_cache_keeps_to_the_client_s_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = SETTINGS.model_copy(update={"feature_cache_gib": 1e-6})
    participant = prepared(tmp_path, 1, small)
    assert torch.equal(participant.test.features, prepared(None, 1).test.features)
    assert "more than the cache" in caplog.text
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.features")) <= small.cache_bytes

"""From a client's images to its trainer: views for training, the image itself for tests, and the limit of the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pfed_client.participant import Participant, prepare
from pfed_client.splitting import SplitFile, split
from pfed_client.state import Settings
from pfedsecure.data import open_images
from pfedsecure.data.digits import CLASS_NAMES
from pfedsecure.errors import StateError
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


def in_files(folder: Path, order: list[int]) -> Path:
    """Images of the demo in a list whose names have them in an order of their own."""
    images = open_images("demo:0/20", strict=True)
    folder.mkdir()
    lines = ["path,label"]
    for place, number in enumerate(order):
        images.image(number).save(folder / f"{place:03}.png")
        lines.append(f"{place:03}.png,{images.class_names[images.labels[number]]}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "drawn again"])
def test_a_client_is_never_tested_on_images_that_it_trained_on(tmp_path: Path, kept: bool) -> None:
    """It is stopped, its files are renamed, and it is started again. Drawn again, the split would be another one."""
    n = len(open_images("demo:0/20", strict=True))
    plan = Plan.model_validate({"class_names": CLASS_NAMES})
    file = SplitFile(tmp_path / "split.json")

    def started(listed: Path, anew: bool) -> tuple[set[bytes], set[bytes], str]:
        images = open_images(str(listed), strict=True).relabel(plan.class_names)
        digests, drawn = images.content_digests(), split(images, plan, "client-1", 0.5)
        train, test = file.settled(digests, drawn, anew=anew) if kept else drawn
        return {digests[row] for row in train}, {digests[row] for row in test}, images.fingerprint(digests)

    trained, tested, before = started(in_files(tmp_path / "first", list(range(n))), anew=True)
    trained_again, tested_again, after = started(in_files(tmp_path / "again", list(range(n))[::-1]), anew=False)
    assert after == before  # so it is let in as a client with the same images
    assert (tested_again, trained_again) == (tested, trained) if kept else len(tested_again & trained) > n / 10


def test_a_split_is_of_its_images_and_of_no_others(tmp_path: Path) -> None:
    file = SplitFile(tmp_path / "split.json")
    twins = [b"a" * 32, b"b" * 32, b"a" * 32, b"c" * 32]
    drawn = np.array([0, 1]), np.array([2, 3])
    assert file.find(twins) is None
    assert file.settled(twins, drawn, anew=False) is drawn
    train, test = file.settled(twins[::-1], (drawn[1], drawn[0]), anew=False) or drawn
    assert (train.tolist(), test.tolist()) == ([2, 3], [0, 1])  # one of the twins on either side
    with pytest.raises(StateError, match=r"split\.json: is of other images; restore"):
        file.find([b"d" * 32, *twins[1:3]])
    assert file.settled(twins, (drawn[1], drawn[0]), anew=True)[1].tolist() == [0, 1]
    for damage in ("{", "[1]", "{}"):
        (tmp_path / "split.json").write_text(damage)
        with pytest.raises(StateError, match=r"split\.json: damaged"):
            file.find(twins)


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

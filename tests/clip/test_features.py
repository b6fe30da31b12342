"""Image features: what they are, and that the cache never changes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import image_features

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 1000, "width": 64, "heads": 4, "layers": 1},
}


class Pictures:
    """Random pictures that count how often they are opened."""

    def __init__(self, seeds: list[int]) -> None:
        self.labels = np.arange(len(seeds), dtype=np.int64) % 3
        self.labels.setflags(write=False)  # as those of an ImageSet
        self.opened = 0
        self._pixels = [np.random.default_rng(s).integers(0, 256, (32, 32, 3), dtype=np.uint8) for s in seeds]

    def image(self, index: int) -> Image.Image:
        self.opened += 1
        return Image.fromarray(self._pixels[index])

    def content_digest(self, index: int) -> str:
        return hashlib.sha256(self._pixels[index].tobytes()).hexdigest()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "features-test-clip.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    return load_backbone("features-test-clip", "random", config_dir=folder)


def test_features_are_open_clips_own_normalised(backbone: Backbone) -> None:
    pictures = Pictures([1, 2, 3, 4, 5])
    seen: list[tuple[int, int]] = []
    got = image_features(backbone, pictures, batch_size=2, on_progress=lambda done, total: seen.append((done, total)))
    batch = torch.stack([backbone.preprocess(pictures.image(index)) for index in range(5)])
    want = backbone.model.encode_image(batch, normalize=True)  # type: ignore[operator]
    torch.testing.assert_close(got.features, want, atol=1e-5, rtol=0)
    assert got.labels.tolist() == [0, 1, 2, 0, 1]
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_second_time_comes_from_the_cache(backbone: Backbone, tmp_path: Path) -> None:
    first, second = Pictures([1, 2, 3]), Pictures([1, 2, 3])
    computed = image_features(backbone, first, cache_dir=tmp_path)
    cached = image_features(backbone, second, cache_dir=tmp_path)
    assert (first.opened, second.opened) == (3, 0)
    assert torch.equal(computed.features, cached.features)


@pytest.mark.parametrize("seeds", [[2, 1, 3], [1, 2], [1, 2, 4]])
def test_other_images_or_another_order_are_another_entry(backbone: Backbone, tmp_path: Path, seeds: list[int]) -> None:
    image_features(backbone, Pictures([1, 2, 3]), cache_dir=tmp_path)
    other = image_features(backbone, Pictures(seeds), cache_dir=tmp_path)
    assert torch.equal(other.features, image_features(backbone, Pictures(seeds)).features)


def test_other_weights_are_another_entry(backbone: Backbone, tmp_path: Path) -> None:
    image_features(backbone, Pictures([1, 2]), cache_dir=tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "features-test-clip.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(1)
    other = load_backbone("features-test-clip", "random", config_dir=tmp_path / "config")
    pictures = Pictures([1, 2])
    image_features(other, pictures, cache_dir=tmp_path)
    assert pictures.opened == 2


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"truncated", b"not finite"])
def test_damaged_entry_is_computed_again(backbone: Backbone, tmp_path: Path, damage: bytes) -> None:
    good = image_features(backbone, Pictures([1, 2]), cache_dir=tmp_path)
    (entry,) = tmp_path.glob("*.npy")
    whole = entry.read_bytes()
    if damage == b"not finite":
        np.save(entry, np.full((2, 32), np.nan, dtype=np.float32))
    else:
        entry.write_bytes(whole[:-5] if damage == b"truncated" else damage)
    again = image_features(backbone, Pictures([1, 2]), cache_dir=tmp_path)
    assert torch.equal(good.features, again.features)
    assert entry.read_bytes() == whole


def test_subset_keeps_features_and_labels_together(backbone: Backbone) -> None:
    whole = image_features(backbone, Pictures([1, 2, 3, 4]))
    part = whole.subset([3, 1])
    assert len(part) == 2
    assert torch.equal(part.features, whole.features[[3, 1]])
    assert part.labels.tolist() == [0, 1]

"""Image features: what they are, and that the cache never changes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pfedsecure.clip import feature_segment
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import FeatureSet, image_features
from pfedsecure.clip.views import Augmentation
from pfedsecure.data import ImageSet, open_images
from pfedsecure.errors import DataError

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

    def image(self, index: int, digest: str | None = None) -> Image.Image:
        self.opened += 1
        assert digest in (None, self.content_digest(index))
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


def test_of_more_images_only_the_new_ones_are_computed(backbone: Backbone, tmp_path: Path) -> None:
    image_features(backbone, Pictures([1, 2, 3]), cache_dir=tmp_path)
    pictures = Pictures([9, 3, 2, 8, 1])
    seen: list[tuple[int, int]] = []
    found = image_features(
        backbone, pictures, cache_dir=tmp_path, on_progress=lambda done, total: seen.append((done, total))
    )
    assert pictures.opened == 2
    assert seen == [(5, 5)]
    assert torch.equal(found.features, image_features(backbone, Pictures([9, 3, 2, 8, 1])).features)


def test_a_feature_is_a_function_of_its_image_alone(backbone: Backbone) -> None:
    """To the last bit, for the privacy of the others: whatever is computed with it, and however much."""
    many = image_features(backbone, Pictures(list(range(80))), views=3)
    for rows in ([0], [79, 3], [70, 5, 1, 44, 60, 78]):
        few = image_features(backbone, Pictures(rows), views=3)
        assert torch.equal(few.features, many.features[rows])
        assert few.augmented is not None
        assert many.augmented is not None
        assert torch.equal(few.augmented, many.augmented[rows])


def test_an_image_that_is_replaced_before_it_is_decoded_does_not_get_the_others_entry(
    backbone: Backbone, tmp_path: Path
) -> None:
    """Replaced for a moment, the first one's features would be wrong for as long as the cache lasts."""
    file, cache = tmp_path / "cat" / "1.png", tmp_path / "cache"
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    file.parent.mkdir()
    (tmp_path / "dog").mkdir()
    for name, colour in (("cat/1.png", 0), ("dog/1.png", 1)):
        Image.fromarray(pixels[colour]).save(tmp_path / name)
    first, images = file.read_bytes(), open_images(str(tmp_path), strict=True)

    class Replaced(ImageSet):
        def content_digest(self, index: int) -> str:
            digest = super().content_digest(index)
            if index == 0:
                Image.fromarray(pixels[1]).save(file)
            return digest

    replaced = Replaced(images.class_names, images.labels, images.keys, images.images)
    with pytest.raises(DataError, match=r"image cat/1\.png was replaced while it was being used; start again"):
        image_features(backbone, replaced, cache_dir=cache)
    file.write_bytes(first)
    found = image_features(backbone, images, cache_dir=cache)
    assert torch.equal(found.features, image_features(backbone, images).features)


@pytest.mark.parametrize("width", [1, 64])
def test_features_of_another_width_than_the_backbones_are_computed_again(
    backbone: Backbone, tmp_path: Path, width: int
) -> None:
    """A whole segment, with the right name and for the right table, that no program of ours can have written."""
    image_features(backbone, Pictures([1, 2]), cache_dir=tmp_path)
    (segment,) = tmp_path.glob("*/*.features")
    table = segment.parent.name
    keys = feature_segment.read(segment, table).keys
    content = feature_segment.Segment(keys, np.ones((2, width), np.float32)).to_bytes(table)
    segment.unlink()
    segment.with_name(feature_segment.file_name(content)).write_bytes(content)
    found = image_features(backbone, Pictures([1, 2]), cache_dir=tmp_path)
    assert torch.equal(found.features, image_features(backbone, Pictures([1, 2])).features)
    again = Pictures([1, 2])
    image_features(backbone, again, cache_dir=tmp_path)
    assert again.opened == 0


def test_what_was_computed_before_an_end_is_not_lost(backbone: Backbone, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        image_features(backbone, Pictures([1, 2, 3, 4, 5]), cache_dir=tmp_path, batch_size=2, on_progress=stop)
    pictures = Pictures([1, 2, 3, 4, 5])
    image_features(backbone, pictures, cache_dir=tmp_path)
    assert pictures.opened == 1


@pytest.mark.parametrize("byte", [5, 30, 60, 70, 80, -1])
def test_damaged_features_are_computed_again(backbone: Backbone, tmp_path: Path, byte: int) -> None:
    good = image_features(backbone, Pictures([1, 2]), cache_dir=tmp_path)
    (segment,) = tmp_path.glob("*/*.features")
    whole = bytearray(segment.read_bytes())
    damaged = whole.copy()
    damaged[byte] ^= 1
    segment.write_bytes(damaged)
    again = image_features(backbone, Pictures([1, 2]), cache_dir=tmp_path)
    assert torch.equal(good.features, again.features)
    assert segment.read_bytes() == whole


def test_a_cache_that_is_too_small_is_said_and_changes_nothing(
    backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = image_features(backbone, Pictures([1, 2, 3]), cache_dir=tmp_path, cache_bytes=200)
    assert torch.equal(found.features, image_features(backbone, Pictures([1, 2, 3])).features)
    assert "more than the cache" in caplog.text
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 200


def test_views_are_those_of_the_augmentation_and_the_first_is_the_image_itself(
    backbone: Backbone, tmp_path: Path
) -> None:
    pictures = Pictures([1, 2, 3])
    found = image_features(backbone, pictures, views=4, cache_dir=tmp_path)
    assert pictures.opened == 3
    assert found.n_views == 4
    assert torch.equal(found.features, image_features(backbone, pictures).features)
    assert found.augmented is not None
    assert found.augmented.shape == (3, 3, 32)
    augmentation = Augmentation.of(backbone)
    for view in (1, 2, 3):
        batch = torch.stack(
            [augmentation.view(pictures.image(row), pictures.content_digest(row), view) for row in range(3)]
        )
        want = backbone.model.encode_image(batch, normalize=True)  # type: ignore[operator]
        torch.testing.assert_close(found.augmented[:, view - 1], want, atol=1e-5, rtol=0)


def test_more_views_begin_with_the_same_ones(backbone: Backbone, tmp_path: Path) -> None:
    few = image_features(backbone, Pictures([1, 2]), views=2, cache_dir=tmp_path)
    more, fresh = (image_features(backbone, Pictures([2, 1]), views=4, cache_dir=path) for path in (tmp_path, None))
    assert few.augmented is not None
    assert more.augmented is not None
    assert fresh.augmented is not None
    assert torch.equal(more.augmented, fresh.augmented)
    assert torch.equal(more.augmented[[1, 0], :1], few.augmented)
    again = Pictures([1, 2])
    image_features(backbone, again, views=4, cache_dir=tmp_path)
    assert again.opened == 0


def test_the_view_that_is_asked_for_is_given(backbone: Backbone) -> None:
    found = image_features(backbone, Pictures([1, 2, 3]), views=3)
    assert found.augmented is not None
    got = found.of_views(torch.tensor([2, 0, 1, 2]), torch.tensor([0, 2, 1, 1]))
    want = [found.features[2], found.augmented[0, 1], found.augmented[1, 0], found.augmented[2, 0]]
    assert torch.equal(got, torch.stack(want))
    plain = FeatureSet(found.features, found.labels)
    assert torch.equal(plain.of_views(torch.tensor([1]), torch.tensor([0])), found.features[[1]])
    with pytest.raises(ValueError, match="views were asked for"):
        plain.of_views(torch.tensor([1]), torch.tensor([1]))


def test_subset_keeps_views_with_their_images(backbone: Backbone) -> None:
    whole = image_features(backbone, Pictures([1, 2, 3]), views=3)
    part = whole.subset([2, 0]).to(torch.device("cpu"))
    assert whole.augmented is not None
    assert part.augmented is not None
    assert torch.equal(part.augmented, whole.augmented[[2, 0]])


def test_subset_keeps_features_and_labels_together(backbone: Backbone) -> None:
    whole = image_features(backbone, Pictures([1, 2, 3, 4]))
    part = whole.subset([3, 1])
    assert len(part) == 2
    assert torch.equal(part.features, whole.features[[3, 1]])
    assert part.labels.tolist() == [0, 1]

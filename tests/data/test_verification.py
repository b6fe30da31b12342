from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfedsecure.data import open_images
from pfedsecure.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def truncated(suffix: str, tmp_path: Path) -> bytes:
    """The first half of a valid file."""
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(NOISE).save(whole)
    content = whole.read_bytes()
    whole.unlink()
    return content[: len(content) // 2]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif", ".gif"])
def test_truncated_images_are_named_and_left_out(tmp_path: Path, write_image, caplog, suffix: str) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        write_image(tmp_path / name)
    (tmp_path / f"cat/half{suffix}").write_bytes(truncated(suffix, tmp_path))
    with caplog.at_level(logging.WARNING, logger="pfedsecure.data"):
        image_set = open_images(str(tmp_path), strict=False)
    assert image_set.keys == ("cat/1.png", "dog/1.png")
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert f"cannot read image cat/half{suffix}: " in caplog.text
    with pytest.raises(DataError, match=rf"^cannot read image cat/half\{suffix}: .*; repair or remove it$"):
        open_images(str(tmp_path), strict=True)


def test_every_unreadable_image_is_named(tmp_path: Path, write_image, caplog) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        write_image(tmp_path / name)
    (tmp_path / "cat/text.jpg").write_text("no image")
    (tmp_path / "dog/empty.png").touch()
    (tmp_path / "dog/lost.png").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING, logger="pfedsecure.data"):
        assert len(open_images(str(tmp_path), strict=False)) == 2
    assert [record.message for record in caplog.records] == [
        "cannot read image cat/text.jpg: not an image, or of an unknown format; repair or remove it (left out)",
        "cannot read image dog/empty.png: not an image, or of an unknown format; repair or remove it (left out)",
        "cannot read image dog/lost.png: No such file or directory; repair or remove it (left out)",
    ]


def test_a_decompression_bomb_is_left_out(tmp_path: Path, write_image, monkeypatch, caplog) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        write_image(tmp_path / name)
    Image.new("1", (300, 300)).save(tmp_path / "dog/bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert open_images(str(tmp_path), strict=False).keys == ("cat/1.png", "dog/1.png")
    assert "dog/bomb.png" in caplog.text


def test_nothing_readable_and_one_class_left_are_refused(tmp_path: Path, write_image) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text("no image")
    with pytest.raises(DataError, match=r"^none of the 2 images can be read; check the files that the warnings name$"):
        open_images(str(tmp_path), strict=False)
    write_image(tmp_path / "cat/2.png")
    with pytest.raises(DataError, match=r"^all images of .* are of one class, 'cat'; a classifier needs two classes"):
        open_images(str(tmp_path), strict=False)

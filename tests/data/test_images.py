from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfedsecure.data.images import ImageFile, ImagePixels


def test_sixteen_bit_greyscale_is_scaled_not_clipped(tmp_path: Path) -> None:
    depth = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    for suffix in ("png", "tif"):
        path = tmp_path / f"scan.{suffix}"
        Image.fromarray(depth).save(path)
        decoded = ImageFile(path).decode()
        assert decoded.mode == "RGB"
        assert np.asarray(decoded)[0].tolist() == [[v, v, v] for v in (0, 0, 1, 128, 255)]


def test_pixels_of_32_bits_are_refused(tmp_path: Path) -> None:
    for name, dtype in (("float.tif", np.float32), ("integer.tif", np.int32)):
        Image.fromarray(np.zeros((2, 2), dtype=dtype)).save(tmp_path / name)
        with pytest.raises(ValueError, match="no fixed range"):
            ImageFile(tmp_path / name).decode()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_common_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", (2, 2), (255, 255, 255)).convert(mode).save(path)
    decoded = ImageFile(path).decode()
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).min() == 255


def test_a_palette_with_transparency_raises_no_warning(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "image.png", transparency=bytes([0, 128]))
    assert ImageFile(tmp_path / "image.png").decode().getpixel((0, 0)) == (10, 20, 30)


def test_photos_stored_sideways_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "phone.jpg", exif=exif)
    assert ImageFile(tmp_path / "phone.jpg").decode().size == (4, 8)


def test_pixels_in_memory_decode_to_themselves_and_hash_with_their_shape() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    np.testing.assert_array_equal(np.asarray(ImagePixels(pixels).decode()), pixels)
    assert ImagePixels(pixels).content() == ImagePixels(pixels.copy()).content()
    assert ImagePixels(pixels).content() != ImagePixels(pixels.reshape(4, 2, 3)).content()

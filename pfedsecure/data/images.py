"""Where the pixels of one image come from. Files stay closed until somebody looks at them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

_WIDE_GREYSCALE = ("I;16", "I;16L", "I;16B", "I;16N")
_UNSCALED = ("I", "F")


class StoredImage(Protocol):
    """An image that can be decoded, and whose stored form can be hashed."""

    def decode(self, content: bytes | None = None) -> Image.Image:
        """The image, RGB and upright. Whatever the decoder raises on damaged content comes through.

        `content`: what `content` gave, for whoever must be sure that it is of this and nothing newer.
        """

    def content(self) -> bytes:
        """What is stored: equal for equal images. Raises OSError where it cannot be read."""


@dataclass(frozen=True)
class ImageFile:
    """An image in a file of any format that Pillow reads."""

    path: Path

    def decode(self, content: bytes | None = None) -> Image.Image:
        """RGB, turned as its EXIF data say; of `content` if it is given, else of what the file holds.

        Raises what Pillow raises for a file that is damaged or no image.
        """
        with Image.open(self.path if content is None else io.BytesIO(content)) as image:
            return as_rgb(ImageOps.exif_transpose(image))

    def content(self) -> bytes:
        """The file's bytes. Raises OSError."""
        return self.path.read_bytes()


@dataclass(frozen=True, eq=False)
class ImagePixels:
    """An image in memory: `pixels (H, W, 3)` uint8."""

    pixels: npt.NDArray[np.uint8]

    def decode(self, content: bytes | None = None) -> Image.Image:
        """The pixels as an image, RGB; nobody changes them, so that `content` says nothing new."""
        return Image.fromarray(self.pixels)

    def content(self) -> bytes:
        """Size and pixels: no image file begins with the same bytes."""
        height, width, _ = self.pixels.shape
        return b"pixels %d %d " % (height, width) + self.pixels.tobytes()


def as_rgb(image: Image.Image) -> Image.Image:
    """`image` with three channels of 8 bits.

    16-bit greyscale, common in medicine, is scaled from its full range; Pillow's own conversion would clip it at 255.
    Integers and floats of 32 bits have no agreed range: ValueError.
    """
    if image.mode in _WIDE_GREYSCALE:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in _UNSCALED:
        raise ValueError("pixels of 32 bits have no fixed range, save the image with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the detour that Pillow asks for
    return image.convert("RGB")

"""Writing conditions: random distortions of drawn glyphs, known by name so that captions can tell them.

A glyph is distorted, squeezed to 8 x 8 pixels and enlarged again, which is how coarse the scans of the demo are (their
makers counted the ink of 32 x 32 bitmaps in 4 x 4 blocks). That, and nothing learned from the scans, bridges type and
handwriting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pfedsecure.clip.tiny.glyphs import CANVAS, FONTS, GLYPHS, INK, N_DIGITS, drawings

SIZE = 32  # pixels of an image's side
BLOCK = 4  # pixels of the side of the blocks in which ink is counted
DIGIT_SHARE = 0.5  # of the images; the other glyphs share the rest

RATES: dict[str, float] = {
    "inverted": 0.25,
    "rotated": 0.25,
    "thick": 0.2,
    "thin": 0.1,
    "blurred": 0.2,
    "noisy": 0.2,
    "small": 0.1,
}
"""How often each condition occurs; they occur independently."""


@dataclass(frozen=True)
class WrittenGlyphs:
    """`images (B, 1, SIZE, SIZE)` float32 in [0, 1]; `glyphs (B,)` index GLYPHS; `conditions (B, len(RATES))` bool."""

    images: Tensor
    glyphs: Tensor
    conditions: Tensor


class Sampler:
    """Draws written glyphs; the same seed yields the same sequence."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, n: int) -> WrittenGlyphs:
        """The next `n` glyphs in random fonts under random conditions."""
        digit = torch.randint(N_DIGITS, (n,), generator=self._generator)
        other = torch.randint(N_DIGITS, len(GLYPHS), (n,), generator=self._generator)
        glyphs = torch.where(self._uniform(0, 1, n) < DIGIT_SHARE, digit, other)
        fonts = torch.randint(len(FONTS), (n,), generator=self._generator)
        conditions = self._uniform(0, 1, n, len(RATES)) < torch.tensor(tuple(RATES.values()))
        inverted, rotated, thick, thin, blurred, noisy, small = conditions.unbind(1)

        images = drawings()[glyphs, fonts].unsqueeze(1)
        broad = self._uniform(0, 1, n) < 0.3  # pens differ too little for a caption to say so
        images[broad] = _dilate(images[broad], 3)
        images[thick] = _dilate(images[thick], 5)
        images[thin] = -_dilate(-images[thin], 3)
        images = F.grid_sample(images, self._geometry(rotated, small), align_corners=False)
        ink = ((images - 0.5) * 6 + 0.5).clamp(0, 1)  # nearly a bitmap
        images = F.interpolate(F.avg_pool2d(ink, BLOCK), size=(SIZE, SIZE), mode="bicubic", align_corners=False)
        images = images.clamp(0, 1) * self._uniform(0.75, 1.0, n, 1, 1, 1)
        images[blurred] = _blur(images[blurred], self._uniform(1.5, 3.0, int(blurred.sum())))
        images[inverted] = 1 - images[inverted]
        grain = torch.randn(int(noisy.sum()), 1, SIZE, SIZE, generator=self._generator)
        images[noisy] += grain * self._uniform(0.1, 0.35, len(grain), 1, 1, 1)
        return WrittenGlyphs(images.clamp(0, 1), glyphs, conditions)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator) * (high - low) + low

    def _geometry(self, rotated: Tensor, small: Tensor) -> Tensor:
        """Where each pixel is read from `(n, SIZE, SIZE, 2)`: turn, shear, stretch, size, place and uneven bending."""
        n = len(rotated)
        sign = torch.where(self._uniform(0, 1, n) < 0.5, -1.0, 1.0)
        angle = torch.where(rotated, sign * self._uniform(0.35, 1.0, n), self._uniform(-0.15, 0.15, n))
        shrink = torch.where(small, self._uniform(1.4, 1.9, n), self._uniform(0.95, 1.15, n)) * (INK / CANVAS)
        stretch, shear = self._uniform(-0.15, 0.15, n).exp(), self._uniform(-0.3, 0.3, n)
        reach = torch.where(small, 0.25, 0.05).view(n, 1, 1)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(n)
        turn = torch.stack([cos, -sin, sin, cos], 1).view(n, 2, 2)
        shape = torch.stack([shrink * stretch, shrink * shear, zero, shrink], 1).view(n, 2, 2)
        affine = torch.cat([shape @ turn, self._uniform(-1, 1, n, 2, 1) * reach], 2)
        bending = F.interpolate(self._uniform(-0.1, 0.1, n, 2, 4, 4), size=(SIZE, SIZE), mode="bicubic")
        grid: Tensor = F.affine_grid(affine, [n, 1, SIZE, SIZE], align_corners=False)
        return grid + bending.permute(0, 2, 3, 1)


def _dilate(images: Tensor, width: int) -> Tensor:
    return F.max_pool2d(images, width, stride=1, padding=width // 2)


def _blur(images: Tensor, deviation: Tensor) -> Tensor:
    """Gaussian blur of `images (n, 1, H, W)` with a standard deviation `(n,)` in pixels for each."""
    n, reach = len(images), 8
    if n == 0:
        return images
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * deviation[:, None] ** 2))
    kernel /= kernel.sum(1, keepdim=True)
    rows = F.conv2d(images.transpose(0, 1), kernel.view(n, 1, 1, -1), padding=(0, reach), groups=n)
    return F.conv2d(rows, kernel.view(n, 1, -1, 1), padding=(reach, 0), groups=n).transpose(0, 1)

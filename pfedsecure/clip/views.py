"""Views of an image: the backbone's own preprocessing, which is view 0, and random crops for training, views 1, 2, ...

The crops are what prompt learning trains CLIP with: a random part of the image (`SCALE` of its area, `RATIO` of its
sides) at the backbone's size, mirrored half of the time. The settings are those of CoOp (Zhou et al. 2022), which
pFedMoAP and most others took over: TRANSFORMS = random_resized_crop, random_flip, normalize with the defaults of its
toolbox Dassl; interpolation, mean and deviation are the backbone's own, which for OpenAI's models are CoOp's.

Guarantee. View v of an image is a function of its decoded pixels, of the digest of its stored form and of v: of no
other image, no seed of a federation, no place in a data set, and nothing that another thread does. So federations and
clients share what is computed, and under differential privacy one image more or less changes the views of no other:
with randomness drawn one image after the other it would move those of all that follow, and clipping bounds what *one*
image contributes. That is why the rectangle is drawn here, as torchvision's RandomResizedCrop draws it but from a
generator of the view's own: torchvision's is that of the whole process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as cut

from pfedsecure.clip.backbone import Backbone
from pfedsecure.seeds import derive_seed

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
FLIPPED = 0.5
_ATTEMPTS = 10

Rectangle = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""


@dataclass(frozen=True)
class Augmentation:
    """Random crops for one backbone: `size` is height and width of its input."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    interpolation: str

    @classmethod
    def of(cls, backbone: Backbone) -> Self:
        """The one that goes with a backbone's own preprocessing."""
        settings = open_clip.get_model_preprocess_cfg(backbone.model)
        size = settings["size"]
        height, width = (size, size) if isinstance(size, int) else size
        return cls(
            size=(int(height), int(width)),
            mean=tuple(settings["mean"]),
            deviation=tuple(settings["std"]),
            interpolation=settings["interpolation"],
        )

    @property
    def recipe(self) -> str:
        """All that a crop depends on but the image and its number, for keys of a cache."""
        return f"{self} scale {SCALE} ratio {RATIO} flipped {FLIPPED}"

    def view(self, image: Image.Image, digest: str, number: int) -> Tensor:
        """View `number` >= 1, `(3, H, W)`, of the RGB `image` whose stored form has SHA-256 `digest`."""
        return self.crop(image, torch.Generator().manual_seed(derive_seed(number, "view of an image", digest)))

    def crop(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """Another crop at each call, `(3, H, W)`: what training without a bank of views sees."""
        top, left, height, width = rectangle(image.height, image.width, generator)
        flipped = float(torch.rand(1, generator=generator)) < FLIPPED
        part = cut.resized_crop(image, top, left, height, width, list(self.size), _modes[self.interpolation])
        pixels = cut.to_tensor(cut.hflip(part) if flipped else part)
        normalised: Tensor = cut.normalize(pixels, list(self.mean), list(self.deviation))
        return normalised


_modes = {mode.value: mode for mode in InterpolationMode}


def rectangle(height: int, width: int, generator: torch.Generator) -> Rectangle:
    """A random part of an image of `height` and `width`, from the same numbers as torchvision's RandomResizedCrop.

    The largest one of a permitted shape, from the middle, where ten draws in a row do not fit.
    """
    shapes = torch.log(torch.tensor(RATIO))
    for _ in range(_ATTEMPTS):
        area = height * width * float(torch.empty(1).uniform_(*SCALE, generator=generator))
        shape = float(torch.exp(torch.empty(1).uniform_(float(shapes[0]), float(shapes[1]), generator=generator)))
        wide, high = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < high <= height:
            top = int(torch.randint(height - high + 1, (1,), generator=generator))
            left = int(torch.randint(width - wide + 1, (1,), generator=generator))
            return top, left, high, wide
    high = min(height, round(width / RATIO[0]))
    wide = min(width, round(height * RATIO[1]))
    return (height - high) // 2, (width - wide) // 2, high, wide

"""The embedded demo data: scikit-learn's 1,797 scans of handwritten digits, shared out among clients that differ.

The scans (UCI "Optical Recognition of Handwritten Digits", 8 x 8 pixels of 17 grey levels, white ink on black) come
with the scikit-learn package, so that nothing is downloaded. A client of the demo has digits it mainly holds and one
writing condition that all of its images are really in. Everything here is a function of the arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter
from sklearn.datasets import load_digits

from pfedsecure.data.seeding import generator
from pfedsecure.errors import DataError

CLASS_NAMES: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32  # pixels of an image's side
MAX_CLIENTS = 50  # which leaves each about 36 scans
FAVOURITES = 2  # digits that a client mainly holds
SKEW = 12.0  # how many times likelier a scan of a favourite digit goes to that client than to another

_INK_LEVELS = 16  # largest value of a pixel of a scan
_TILT = (25.0, 45.0)  # degrees, anticlockwise
_STROKE = 5  # pixels of the side of the square that thick ink is widened by
_BLUR = 2.5  # pixels, standard deviation
_NOISE = 70.0  # grey levels of 255, standard deviation


def _inverted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageChops.invert(image)


def _rotated(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.rotate(rng.uniform(*_TILT), resample=Image.Resampling.BICUBIC)


def _thick(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.MaxFilter(_STROKE))


def _blurred(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(_BLUR))


def _noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    noise = rng.normal(0.0, _NOISE, (image.height, image.width))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


_APPLY: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "inverted": _inverted,
    "rotated": _rotated,
    "thick": _thick,
    "blurred": _blurred,
    "noisy": _noisy,
}
CONDITIONS: tuple[str, ...] = tuple(_APPLY)


@dataclass(frozen=True, eq=False)
class DemoShare:
    """What one client of the demo holds.

    `images` are `IMAGE_SIZE` x `IMAGE_SIZE` RGB, all in the writing `condition`; `labels (len(images),)` index
    `CLASS_NAMES`; `indices (len(images),)` say which of scikit-learn's scans they are, in ascending order.
    """

    images: list[Image.Image]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    condition: str


@cache
def _scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All scans as grey images `(1797, 8, 8)` in 0..255, and their labels `(1797,)`."""
    pixels, labels = load_digits(return_X_y=True)
    grey = np.rint(pixels.reshape(-1, 8, 8) * (255 / _INK_LEVELS)).astype(np.uint8)
    return grey, labels.astype(np.int64)


def digit_labels() -> NDArray[np.int64]:
    """The digit of every scan, `(1797,)`; a copy."""
    return _scans()[1].copy()


def digit_images(condition: str | None, indices: Iterable[int]) -> list[Image.Image]:
    """The scans `indices`, enlarged to `IMAGE_SIZE` x `IMAGE_SIZE` RGB and put in a writing condition.

    `condition` is one of `CONDITIONS`, or None for the scans as they are. Tilt and noise are drawn from a generator
    seeded with the scan's index, so an image never depends on the others asked for.

    Raises DataError for an unknown condition or an index that no scan has.
    """
    if condition is not None and condition not in _APPLY:
        raise DataError(f"unknown writing condition {condition!r}; use one of {', '.join(CONDITIONS)}")
    grey, _ = _scans()
    images = []
    for index in indices:
        if not 0 <= index < len(grey):
            raise DataError(f"there is no digit scan {index}; give an index from 0 to {len(grey) - 1}")
        image = Image.fromarray(grey[index]).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        if condition is not None:
            image = _APPLY[condition](image, generator(int(index), condition))
        images.append(image.convert("RGB"))
    return images


def _owners(n_clients: int, seed: int) -> NDArray[np.int64]:
    """The client of every scan, `(1797,)`: a digit's scans are dealt in proportion to how much clients favour it."""
    _, labels = _scans()
    rng = generator(seed, f"demo shares of {n_clients}")
    n_classes = len(CLASS_NAMES)
    order = rng.permutation(n_classes)
    affinity = rng.uniform(0.5, 1.5, (n_clients, n_classes))
    for client in range(n_clients):
        favourites = order[np.arange(FAVOURITES * client, FAVOURITES * (client + 1)) % n_classes]
        affinity[client, favourites] *= SKEW
    owners = np.empty(len(labels), dtype=np.int64)
    for label in range(n_classes):
        scans = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(affinity[:, label]) / affinity[:, label].sum() * len(scans)).astype(np.int64)
        owners[scans] = np.searchsorted(cuts, np.arange(len(scans)), side="right")
    return owners


def demo_share(client_index: int, n_clients: int, seed: int) -> DemoShare:
    """Client `client_index`'s share of the scans: the shares of all `n_clients` are disjoint and cover every scan.

    A client mainly holds `FAVOURITES` digits and some scans of the others; `seed` chooses which, and the favourites go
    round so that five clients favour ten different digits. Conditions go round too, in the order of `CONDITIONS`.

    Raises DataError for a negative seed, more than MAX_CLIENTS clients, or an index that none of them has.
    """
    if not 1 <= n_clients <= MAX_CLIENTS:
        raise DataError(f"the demo's scans cannot be shared by {n_clients} clients; choose 1 to {MAX_CLIENTS}")
    if not 0 <= client_index < n_clients:
        raise DataError(f"there is no demo client {client_index} of {n_clients}; count from 0 to {n_clients - 1}")
    indices = np.flatnonzero(_owners(n_clients, seed) == client_index).astype(np.int64)
    condition = CONDITIONS[client_index % len(CONDITIONS)]
    return DemoShare(digit_images(condition, indices.tolist()), _scans()[1][indices], indices, condition)

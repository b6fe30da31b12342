"""Image features, computed once per image because the image tower is frozen, and kept in a cache on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pfedsecure.clip.backbone import Backbone


class Images(Protocol):
    """The part of `pfedsecure.data.ImageSet` that is needed here."""

    @property
    def labels(self) -> NDArray[np.int64]: ...

    def image(self, index: int) -> Image.Image: ...

    def content_digest(self, index: int) -> str: ...


@dataclass(frozen=True)
class FeatureSet:
    """Normalised image features `(N, D)` float32 with labels `(N,)` int64."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> FeatureSet:
        """The rows `indices`, in that order."""
        rows = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        return FeatureSet(self.features[rows], self.labels[rows])

    def to(self, device: torch.device) -> FeatureSet:
        """A copy on `device`."""
        return FeatureSet(self.features.to(device), self.labels.to(device))


def image_features(
    backbone: Backbone,
    images: Images,
    *,
    cache_dir: Path | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> FeatureSet:
    """The features of all images; with `cache_dir`, read from there if they were computed before.

    A cache entry belongs to the backbone's weights, its preprocessing and precision, and the images' content; a damaged
    one is computed again. `on_progress(done, total)` is called after each batch.
    """
    labels = torch.from_numpy(np.array(images.labels, dtype=np.int64))
    entry = None if cache_dir is None else cache_dir / f"{_cache_key(backbone, images)}.npy"
    features = None if entry is None else _read(entry, len(labels))
    if features is None:
        features = _encode(backbone, images, batch_size, on_progress)
        if entry is not None:
            _write(entry, features)
    return FeatureSet(torch.from_numpy(features), labels)


def _encode(
    backbone: Backbone, images: Images, batch_size: int, on_progress: Callable[[int, int], None] | None
) -> NDArray[np.float32]:
    total = len(images.labels)
    batches = []
    for start in range(0, total, batch_size):
        end = min(start + batch_size, total)
        raw = backbone.encode_images([images.image(index) for index in range(start, end)])
        batches.append(F.normalize(raw, dim=-1).numpy())
        if on_progress is not None:
            on_progress(end, total)
    return np.concatenate(batches)


def _cache_key(backbone: Backbone, images: Images) -> str:
    # Image by image, in order: rows of the entry are rows of the set.
    contents = [images.content_digest(index) for index in range(len(images.labels))]
    material = [backbone.digest, repr(backbone.preprocess), backbone.precision, *contents]
    return hashlib.sha256("\n".join(material).encode()).hexdigest()


def _read(entry: Path, n_images: int) -> NDArray[np.float32] | None:
    try:
        features: NDArray[np.float32] = np.load(entry, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    good = features.dtype == np.float32 and features.ndim == 2 and len(features) == n_images
    return features if good and np.isfinite(features).all() else None


def _write(entry: Path, features: NDArray[np.float32]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    scratch = entry.with_name(f".{entry.name}.{os.getpid()}.tmp")
    with scratch.open("wb") as file:
        np.save(file, features)
    scratch.replace(entry)

"""Image features: computed once per image and view because the image tower is frozen, and kept in a cache on disk."""

from __future__ import annotations

import hashlib
import logging
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
from pfedsecure.clip.feature_cache import DEFAULT_BYTES, FeatureCache
from pfedsecure.clip.feature_segment import Features, Keys, Rows, keys_of
from pfedsecure.clip.views import Augmentation

logger = logging.getLogger("pfedsecure.clip")

_SAVED = 1024
"""So many features are computed between two additions to the cache: what a kill costs."""


class Images(Protocol):
    """The part of `pfedsecure.data.ImageSet` that is needed here."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each image, `(N,)`, numbered as in the plan's `class_names`."""

    def image(self, index: int, digest: str | None = None) -> Image.Image:
        """Image `index`, RGB and upright. Raises DataError when it has become unreadable.

        With `digest`, decoded from the very bytes whose `content_digest` it is, or an error.
        """

    def content_digest(self, index: int) -> str:
        """SHA-256, in hex, of what is stored of image `index`: equal for equal images."""


@dataclass(frozen=True)
class FeatureSet:
    """Normalised image features `(N, D)` float32 with labels `(N,)` int64.

    `features` are of the images as the backbone has them, view 0. `augmented (N, V - 1, D)` are of views 1 to V - 1,
    for training; None where V is 1.
    """

    features: Tensor
    labels: Tensor
    augmented: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_views(self) -> int:
        """V."""
        return 1 if self.augmented is None else 1 + self.augmented.shape[1]

    def of_views(self, rows: Tensor, views: Tensor) -> Tensor:
        """Features `(B, D)` of the images `rows (B,)`, of each the view that `views (B,)` says, from 0 to V - 1."""
        features = self.features[rows]
        if self.augmented is None:
            if bool(views.any()):
                raise ValueError("views were asked for that these features do not have")
            return features
        augmented = self.augmented[rows, (views - 1).clamp(min=0)]
        return torch.where((views == 0)[:, None], features, augmented)

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> FeatureSet:
        """The rows `indices`, in that order."""
        rows = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        augmented = None if self.augmented is None else self.augmented[rows]
        return FeatureSet(self.features[rows], self.labels[rows], augmented)

    def to(self, device: torch.device) -> FeatureSet:
        """A copy on `device`."""
        augmented = None if self.augmented is None else self.augmented.to(device)
        return FeatureSet(self.features.to(device), self.labels.to(device), augmented)


def image_features(
    backbone: Backbone,
    images: Images,
    *,
    views: int = 1,
    cache_dir: Path | None = None,
    cache_bytes: int = DEFAULT_BYTES,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> FeatureSet:
    """The features of all images, of the first `views` views (see `views`) of each.

    A feature is a function of its image and view alone, whatever else is computed. With `cache_dir` those that were
    computed before are read from there, and the others are added while they are computed, a thousand at a time; it
    takes `cache_bytes` at most. An entry belongs to the backbone's weights, its preprocessing and precision, the view
    and the image's content; an image that is replaced meanwhile is an error. `on_progress(done, total)` is called after
    each batch with the number of images that are done with; not where nothing was missing.
    """
    cache = None if cache_dir is None else FeatureCache(cache_dir, cache_bytes, backbone.tower.embedding_width)
    work = _Work(backbone, images, views, cache)
    work.compute(batch_size, on_progress)
    if cache_dir is not None and work.first.nbytes + work.others.nbytes > cache_bytes:
        logger.warning("the features of all images take more than the cache in %s may; raise its limit", cache_dir)
    labels = torch.from_numpy(np.array(images.labels, dtype=np.int64))
    augmented = torch.from_numpy(work.others) if views > 1 else None
    return FeatureSet(torch.from_numpy(work.first), labels, augmented)


class _Work:
    """Features of view 0, `first (N, D)`, and of the `others (N, V - 1, D)`: what a cache has, and in the end all."""

    def __init__(self, backbone: Backbone, images: Images, views: int, cache: FeatureCache | None) -> None:
        self._backbone = backbone
        self._images = images
        self._cache = cache
        self._augmentation = Augmentation.of(backbone) if views > 1 else None
        n = len(images.labels)
        needed = cache is not None or views > 1
        self._digests = [images.content_digest(index) for index in range(n)] if needed else []
        self._keys: Keys = keys_of([bytes.fromhex(digest) for digest in self._digests])
        self._missing = np.ones((views, n), dtype=bool)
        self._unsaved = np.zeros((views, n), dtype=bool)
        self._tables = [self._table(view) for view in range(views)]
        self._decoded: tuple[int, Image.Image] | None = None
        self._allocate(0)
        if cache is not None:
            for view, table in enumerate(self._tables):
                rows, found = cache.find(table, self._keys)
                if len(rows):
                    self._put(view, rows, found)

    def compute(self, batch_size: int, on_progress: Callable[[int, int], None] | None) -> None:
        """What is missing, `batch_size` views at a time."""
        todo = np.argwhere(self._missing.T)  # all views of an image, then those of the next, which is decoded once
        total = self._missing.shape[1]
        try:
            for start in range(0, len(todo), batch_size):
                rows, views = todo[start : start + batch_size].T
                self._encode(rows, views, batch_size)
                if self._unsaved.sum() >= _SAVED:
                    self._save()
                if on_progress is not None:
                    on_progress(total - int(self._missing.any(axis=0).sum()), total)
        finally:
            self._save()

    def _encode(self, rows: Rows, views: Rows, batch_size: int) -> None:
        pixels = torch.stack([self._pixels(int(row), int(view)) for row, view in zip(rows, views, strict=True)])
        # Filled up: kernels round differently for batches of another size, and so an image's feature would depend on
        # how many others there are, or were in the cache.
        batch = pixels.new_zeros((batch_size, *pixels.shape[1:]))
        batch[: len(rows)] = pixels
        features = F.normalize(self._backbone.encode(batch)[: len(rows)], dim=-1).numpy()
        for view in np.unique(views):
            self._put(view, rows[views == view], features[views == view])
        self._unsaved[views, rows] = True

    def _pixels(self, row: int, view: int) -> Tensor:
        if self._decoded is None or self._decoded[0] != row:
            # An entry of the cache is for good: what is decoded must be what its key was made of.
            digest = self._digests[row] if self._digests else None
            self._decoded = row, self._images.image(row, digest)
        image = self._decoded[1]
        if view == 0 or self._augmentation is None:
            return self._backbone.preprocess(image)
        return self._augmentation.view(image, self._digests[row], view)

    def _put(self, view: int, rows: Rows, features: Features) -> None:
        if not self.first.size:
            self._allocate(features.shape[1])
        self._of_view(view)[rows] = features
        self._missing[view, rows] = False

    def _allocate(self, width: int) -> None:
        """D is known once there is a feature."""
        n_views, n = self._missing.shape
        self.first: Features = np.zeros((n, width), np.float32)
        self.others: Features = np.zeros((n, n_views - 1, width), np.float32)

    def _of_view(self, view: int) -> Features:
        return self.others[:, view - 1] if view else self.first

    def _save(self) -> None:
        if self._cache is not None:
            for view, unsaved in enumerate(self._unsaved):
                self._cache.add(self._tables[view], self._keys[unsaved], self._of_view(view)[unsaved])
        self._unsaved[:] = False

    def _table(self, view: int) -> str:
        """What a feature depends on but the image: the name of a table of the cache."""
        recipe = repr(self._backbone.preprocess)
        if self._augmentation is not None and view:
            recipe = f"{self._augmentation.recipe} view {view}"
        material = [self._backbone.digest, self._backbone.precision, recipe]
        return hashlib.sha256("\n".join(material).encode()).hexdigest()

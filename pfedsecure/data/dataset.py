"""A labelled set of images, as the rest of the program sees it whatever its source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pfedsecure.data.class_names import normalise_class_name, quoted
from pfedsecure.data.images import StoredImage
from pfedsecure.errors import ClassNamesMismatch, DataError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """`N` images with labels. Immutable; images are decoded when asked for, one at a time.

    `labels (N,)` index `class_names (C)`; a class may have no image. `keys` name the images within their source:
    unique there, and the same on every machine for the same data. `clients` and `domains` are what the source says of
    each image, or None where it says nothing. Raises ValueError where these do not fit each other.
    """

    class_names: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    keys: tuple[str, ...]
    images: tuple[StoredImage, ...]
    clients: tuple[str, ...] | None = None
    domains: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        labels = np.array(self.labels, dtype=np.int64)
        labels.setflags(write=False)
        object.__setattr__(self, "labels", labels)
        columns = [self.keys, self.images, self.clients, self.domains]
        if labels.ndim != 1 or any(column is not None and len(column) != len(labels) for column in columns):
            raise ValueError("labels, keys, images, clients and domains must have one entry per image")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("every image needs a key of its own")
        if len({normalise_class_name(name) for name in self.class_names}) != len(self.class_names):
            raise ValueError(f"class names must differ in more than case or punctuation: {quoted(self.class_names)}")
        if labels.size and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise ValueError(f"labels must be from 0 to {len(self.class_names) - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int, digest: str | None = None) -> Image.Image:
        """Image `index`, RGB and upright. Raises DataError naming the image if it cannot be decoded.

        With the `digest` that `content_digest` gave, what is decoded are the very bytes that have it; DataError when
        they have been replaced meanwhile.
        """
        try:
            content = None if digest is None else self.images[index].content()
            if content is None or hashlib.sha256(content).hexdigest() == digest:
                return self.images[index].decode(content)
        except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
            raise DataError(f"cannot read image {self.keys[index]}: {_reason(error)}; repair or remove it") from error
        raise DataError(
            f"image {self.keys[index]} was replaced while it was being used; start again once nobody changes the images"
        )

    def content_digest(self, index: int) -> str:
        """SHA-256 of the stored form of image `index`: what a cache of anything computed from it should be keyed by.

        Raises DataError naming the image if it cannot be read.
        """
        return self._digest(index).hex()

    def content_digests(self) -> list[bytes]:
        """`content_digest` of every image, in their order, as bytes. Raises as it does."""
        return [self._digest(index) for index in range(len(self))]

    def fingerprint(self, digests: Sequence[bytes] | None = None) -> str:
        """SHA-256 over what the set consists of: the content and class of every image, in hex.

        Neither names nor order of files enter, nor the numbering of classes: renaming files, listing them otherwise or
        `relabel` does not make another data set. Adding, removing or changing one image or label does. `digests` are
        `content_digests`, for who has them already: they take reading all images.
        """
        records = []
        for digest, label in zip(digests or self.content_digests(), self.labels, strict=True):
            name = normalise_class_name(self.class_names[label]).encode()
            records.append(hashlib.sha256(digest + name).digest())
        return hashlib.sha256(b"".join(sorted(records))).hexdigest()

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> ImageSet:
        """The images at `indices`, in that order, with all that belongs to each. Class names stay as they are."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            labels=self.labels[chosen],
            keys=tuple(self.keys[i] for i in chosen),
            images=tuple(self.images[i] for i in chosen),
            clients=None if self.clients is None else tuple(self.clients[i] for i in chosen),
            domains=None if self.domains is None else tuple(self.domains[i] for i in chosen),
        )

    def relabel(self, class_names: Sequence[str]) -> ImageSet:
        """The same images under `class_names`, say those of a federation's plan: their order and their spelling.

        A class of the plan may have no image here. Raises ClassNamesMismatch if an image is of a class that the plan
        does not have.
        """
        position = {normalise_class_name(name): index for index, name in enumerate(class_names)}
        present = [self.class_names[label] for label in np.unique(self.labels)]
        extra = [name for name in present if normalise_class_name(name) not in position]
        if extra:
            found = {normalise_class_name(name) for name in present}
            missing = [name for key, name in zip(position, class_names, strict=True) if key not in found]
            unused = f"; plan classes without an image here: {quoted(missing)}" if missing else ""
            raise ClassNamesMismatch(
                f"the data has classes that the plan does not: {quoted(extra)}{unused}; rename or remove them"
            )
        mapping = np.array([position.get(normalise_class_name(name), -1) for name in self.class_names], dtype=np.int64)
        return replace(self, class_names=tuple(class_names), labels=mapping[self.labels])

    def _digest(self, index: int) -> bytes:
        try:
            return hashlib.sha256(self.images[index].content()).digest()
        except OSError as error:
            raise DataError(f"cannot read image {self.keys[index]}: {_reason(error)}; repair or remove it") from error


def _reason(error: Exception) -> str:
    """What went wrong, without the path that the caller names already."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first_line = text.partition("\n")[0].strip()
    return first_line or type(error).__name__

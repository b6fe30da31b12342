"""Which of a client's images are for training and which for testing: drawn once, and kept for as long as it takes part.

The split is drawn by class and place in the set, and places come from the names of files. Images that are renamed, or
listed by another file, are the same images to everything else; without what is kept here a client that is started again
on them would be tested on images that it trained on, and train on those that it is tested on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pfed_client.files import write_atomically
from pfedsecure.data import ImageSet, train_test_split
from pfedsecure.errors import StateError
from pfedsecure.plan import Plan
from pfedsecure.seeds import derive_seed

Indices = NDArray[np.int64]
Split = tuple[Indices, Indices]
"""Rows of training and of test images."""

SPLIT_FILE = "split.json"

_DIGESTS = TypeAdapter(list[str])


def split(images: ImageSet, plan: Plan, name: str, test_fraction: float) -> Split:
    """Rows of training and of test images of client `name`, drawn from the plan's seed. Raises DataError.

    The same ones for the same classes in the same places.
    """
    return train_test_split(images.labels, test_fraction, derive_seed(plan.seed, name, "train/test split"))


class SplitFile:
    """The SHA-256 of each test image, in a JSON file. `digests` are those of all images, in their order."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def settled(self, digests: Sequence[bytes], drawn: Split, *, anew: bool) -> Split:
        """The split that is kept, or, where there is none or it is made `anew`, `drawn`, which is then kept.

        Raises StateError.
        """
        kept = None if anew else self.find(digests)
        if kept is None:
            test = sorted(digests[row].hex() for row in drawn[1])
            write_atomically(self._path, _DIGESTS.dump_json(test))
        return kept or drawn

    def find(self, digests: Sequence[bytes]) -> Split | None:
        """The same images for testing as ever, wherever they are now; None where none were kept. Raises StateError."""
        try:
            left = Counter(_DIGESTS.validate_json(self._path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            raise StateError(f"{self._path}: damaged; restore it from a copy") from None
        is_test = np.zeros(len(digests), dtype=bool)
        for row, digest in enumerate(digest.hex() for digest in digests):
            if left[digest]:  # of images with the same content as many as before
                left[digest] -= 1
                is_test[row] = True
        if left.total():
            raise StateError(f"{self._path}: is of other images; restore it from a copy, or the images that it is of")
        return np.flatnonzero(~is_test), np.flatnonzero(is_test)

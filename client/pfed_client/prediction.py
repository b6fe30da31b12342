"""What a saved client's model says of images, and how much each expert weighed in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pfed_client.classifier import Classifier
from pfedsecure.data.images import ImageFile
from pfedsecure.errors import DataError


@dataclass(frozen=True)
class ClassGuess:
    """One class for one image. `weights`: of the own prompt and each expert, None where the prompt decides alone."""

    name: str
    probability: float
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first."""

    image: Path
    classes: tuple[ClassGuess, ...]


def predict(classifier: Classifier, paths: Sequence[Path], *, top: int, explain: bool) -> list[Prediction]:
    """The `top` classes of each image; with `explain` also what each expert weighed.

    Raises DataError naming the image that cannot be read, before any is classified.
    """
    features = classifier.features([_read(path) for path in paths])
    probabilities = classifier.probabilities(features)
    weights = classifier.expert_weights(features) if explain else None
    names = classifier.plan.class_names
    best = probabilities.topk(min(top, len(names)), dim=1)
    return [
        Prediction(
            path,
            tuple(
                ClassGuess(
                    names[label],
                    float(probabilities[row, label]),
                    None if weights is None else tuple(weights[row, label].tolist()),
                )
                for label in best.indices[row].tolist()
            ),
        )
        for row, path in enumerate(paths)
    ]


def _read(path: Path) -> Image.Image:
    try:
        return ImageFile(path).decode()
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image ({error.strerror or error}); give another") from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise DataError(f"{path}: cannot be read as an image ({error}); give another") from None

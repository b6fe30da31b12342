"""Class names: one spelling for comparison, one for display, and an order that depends on nothing but the names."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def normalise_class_name(name: str) -> str:
    """The form in which class names are compared.

    Case, underscores, hyphens, runs of white space and the way accents are encoded make no difference:
    `Alarm_Clock`, `alarm-clock` and `alarm clock` are one class.
    """
    words = unicodedata.normalize("NFC", name).replace("_", " ").replace("-", " ").split()
    return " ".join(words).casefold()


def readable_class_name(name: str) -> str:
    """The form that goes into a text prompt: words apart, spelling as the source has it."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def index_class_names(names: Sequence[str]) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Class names and labels from one class name per image.

    Spellings that compare equal are one class, shown in the spelling that sorts first. Classes are ordered by their
    normalised name, so that the label of a class depends neither on the order of the images nor on a hash.

    Returns the class names (C) and the labels (N).
    """
    spelling: dict[str, str] = {}
    for name in sorted(set(names)):
        spelling.setdefault(normalise_class_name(name), readable_class_name(name))
    label = {key: index for index, key in enumerate(sorted(spelling))}
    labels = np.array([label[normalise_class_name(name)] for name in names], dtype=np.int64)
    return tuple(spelling[key] for key in label), labels


def quoted(names: Sequence[str], limit: int = 8) -> str:
    """`names` quoted for an error line, the first `limit` of them."""
    text = ", ".join(repr(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"

"""What every source yields: one record per image, in any order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pfedsecure.data.class_names import index_class_names
from pfedsecure.data.dataset import ImageSet
from pfedsecure.data.images import StoredImage


@dataclass(frozen=True)
class Record:
    """One labelled image; `client` and `domain` are None in all records of a source that does not state them."""

    key: str
    image: StoredImage
    class_name: str
    client: str | None = None
    domain: str | None = None


def assemble(records: Iterable[Record]) -> ImageSet:
    """The image set of `records`, ordered by key, so that it does not matter how a folder or a file lists them."""
    ordered = sorted(records, key=lambda record: record.key)
    class_names, labels = index_class_names([record.class_name for record in ordered])
    return ImageSet(
        class_names=class_names,
        labels=labels,
        keys=tuple(record.key for record in ordered),
        images=tuple(record.image for record in ordered),
        clients=_column(record.client for record in ordered),
        domains=_column(record.domain for record in ordered),
    )


def _column(values: Iterable[str | None]) -> tuple[str, ...] | None:
    stated = tuple(values)
    present = tuple(value for value in stated if value is not None)
    return present if present and len(present) == len(stated) else None

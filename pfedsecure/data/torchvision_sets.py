"""Data sets that torchvision knows. torchvision, and torch with it, is imported when one is asked for, not before.

All splits of a set are put together: in a federation every client splits what it holds (`train_test_split`).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pfedsecure.data.dataset import ImageSet
from pfedsecure.data.images import ImageFile, ImagePixels
from pfedsecure.data.records import Record, assemble
from pfedsecure.errors import DataError

logger = logging.getLogger("pfedsecure.data")

_SILENT_SECONDS = 30.0


def read_torchvision(name: str, root: Path) -> ImageSet:
    """All images of the torchvision data set `name`, kept below `root` in torchvision's own layout.

    What is not there is downloaded. Raises DataError for a name that is not one of `TORCHVISION_NAMES`, and where the
    data is missing or damaged and cannot be downloaded.
    """
    if name not in _READERS:
        raise DataError(f"unknown torchvision data set {name!r}; known are {', '.join(TORCHVISION_NAMES)}")
    read = _READERS[name]
    try:
        records = read(root, False)
    except Exception as absent:  # torchvision raises nearly anything on data that is missing or damaged
        logger.info("%s is not complete in %s (%s); downloading it", name, root, absent)
        try:
            with _no_endless_download():
                records = read(root, True)
        except Exception as error:
            raise DataError(
                f"torchvision's {name} is missing or damaged in {root} and cannot be downloaded ({_one_line(error)}); "
                "put it there as torchvision lays it out, or try again with a network"
            ) from error
    return assemble(records)


def _caltech101(root: Path, download: bool) -> list[Record]:
    from torchvision.datasets import Caltech101

    data = Caltech101(root, download=download)
    folder = Path(data.root) / "101_ObjectCategories"
    names = [data.categories[label] for label in data.y]
    files = [folder / name / f"image_{index:04d}.jpg" for name, index in zip(names, data.index, strict=True)]
    return _file_records(root, zip(files, names, strict=True))


def _cifar(class_name: str) -> Callable[[Path, bool], list[Record]]:
    def read(root: Path, download: bool) -> list[Record]:
        import torchvision

        records = []
        for split in ("train", "test"):
            # the pickles are checked against published digests before they are opened
            data = getattr(torchvision.datasets, class_name)(root, train=split == "train", download=download)
            records += [
                Record(f"{split}/{index:05d}", ImagePixels(pixels), data.classes[label])
                for index, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True))
            ]
        return records

    return read


def _with_loader(class_name: str, *splits: str) -> Callable[[Path, bool], list[Record]]:
    """Reader of the sets that take a `loader`: one that hands the path through leaves the images unopened."""

    def read(root: Path, download: bool) -> list[Record]:
        import torchvision

        records = []
        for options in [{"split": split} for split in splits] or [{}]:
            data: Any = getattr(torchvision.datasets, class_name)(root, download=download, loader=Path, **options)
            items = (data[index] for index in range(len(data)))
            records += _file_records(root, ((path, data.classes[label]) for path, label in items))
        return records

    return read


def _oxford_pets(root: Path, download: bool) -> list[Record]:
    from torchvision.datasets import OxfordIIITPet

    records = []
    for split in ("trainval", "test"):
        data = OxfordIIITPet(root, split=split, download=download)
        # the one set with neither a loader nor public lists
        names = [data.classes[label] for label in data._labels]
        records += _file_records(root, zip(data._images, names, strict=True))
    return records


_READERS: dict[str, Callable[[Path, bool], list[Record]]] = {
    "caltech101": _caltech101,
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "dtd": _with_loader("DTD", "train", "val", "test"),
    "eurosat": _with_loader("EuroSAT"),
    "flowers102": _with_loader("Flowers102", "train", "val", "test"),
    "food101": _with_loader("Food101", "train", "test"),
    "oxfordiiitpet": _oxford_pets,
}
TORCHVISION_NAMES = tuple(_READERS)


def _file_records(root: Path, items: Iterable[tuple[Path, str]]) -> list[Record]:
    return [Record(path.relative_to(root).as_posix(), ImageFile(path), name) for path, name in items]


@contextmanager
def _no_endless_download() -> Iterator[None]:
    """Give up on a connection that stays silent; torchvision opens its own, without a time limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__

"""Image trees on disk: class/image, or domain/class/image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pfedsecure.data.class_names import normalise_class_name
from pfedsecure.data.dataset import ImageSet
from pfedsecure.data.images import ImageFile
from pfedsecure.data.records import Record, assemble
from pfedsecure.errors import DataError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_CLASS_TREE = 2  # parts of class/image
_DOMAIN_TREE = 3  # parts of domain/class/image
_FOREIGN_FOLDERS = frozenset({"__MACOSX"})


def read_folder(folder: Path) -> ImageSet:
    """The images of a tree of class folders, or of domain folders that hold class folders.

    Which of the two it is shows in how deep the images lie; domains are recorded. Files that are not images by their
    suffix and hidden ones are passed over; links are followed. Raises DataError for a folder that is missing, cannot
    be read, holds no image, or is neither of the two trees.
    """
    try:
        paths = [PurePosixPath(path) for path in sorted(_image_paths(folder, ""))]
    except FileNotFoundError as error:
        raise DataError(f"the data folder {folder} does not exist; check the path") from error
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; check who may read it") from error
    if not paths:
        raise DataError(f"no images in {folder}; put them into one folder per class: {folder}/CLASS/IMAGE")
    odd = next((path for path in paths if len(path.parts) not in (_CLASS_TREE, _DOMAIN_TREE)), None)
    if odd is not None:
        raise DataError(
            f"{folder}/{_printable(odd)} does not fit; images must lie in CLASS/IMAGE or DOMAIN/CLASS/IMAGE"
        )
    first, other = paths[0], next((path for path in paths if len(path.parts) != len(paths[0].parts)), None)
    if other is not None:
        raise DataError(
            f"{folder} mixes class folders and domain folders: {_printable(first)} and {_printable(other)} "
            "do not lie equally deep"
        )
    return assemble(_record(folder, path) for path in paths)


def _record(folder: Path, path: PurePosixPath) -> Record:
    class_name = _printable(path.parent.name)
    if not normalise_class_name(class_name):
        raise DataError(f"the folder {folder / path.parent} has no class name in its name; rename it")
    domain = _printable(path.parts[0]) if len(path.parts) == _DOMAIN_TREE else None
    return Record(_printable(path), ImageFile(folder / path), class_name, domain=domain)


def _image_paths(folder: Path, inside: str) -> Iterator[str]:
    """Paths of the images below `folder / inside`, relative to `folder`, not searched deeper than ever needed.

    The bound on the depth also ends the search in a loop of links.
    """
    with os.scandir(folder / inside) as entries:
        for entry in entries:
            path = f"{inside}/{entry.name}" if inside else entry.name
            if entry.name.startswith(".") or entry.name in _FOREIGN_FOLDERS:
                continue
            if entry.is_dir():
                if path.count("/") < _DOMAIN_TREE:
                    yield from _image_paths(folder, path)
            elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                yield path


def _printable(path: PurePosixPath | str) -> str:
    """`path` as text that can be encoded, also where the file system's names are not UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()

"""Photographs for benchmarks: tar files of image trees, unpacked once into a cache.

The files are not part of the project; a benchmark that needs them says so when they are not there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from pathlib import Path

from pfedsecure.data.dataset import ImageSet
from pfedsecure.data.folders import read_folder
from pfedsecure.errors import DataError

_END = bytes(1024)


def open_photos(name: str, data: Path, cache: Path) -> ImageSet:
    """The images of `data / NAME.tar`, which holds a tree NAME/CLASS/IMAGE or NAME/DOMAIN/CLASS/IMAGE.

    Images are not decoded, so a broken one is an error only where it is used. Raises DataError.
    """
    return read_folder(unpacked(name, data, cache))


def unpacked(name: str, data: Path, cache: Path) -> Path:
    """The tree of `data / NAME.tar`, unpacked into `cache`; an archive with other content goes to another folder there.

    Raises DataError.
    """
    archive = data / f"{name}.tar"
    try:
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{archive}: cannot be read ({error.strerror}); give --data the folder that holds {archive.name}"
        ) from None
    folder = cache / f"{name}-{digest[:16]}"
    if not folder.is_dir():
        _unpack(archive, folder)
    return folder / name


def _unpack(archive: Path, folder: Path) -> None:
    """All of it or nothing: `folder` appears when everything is in it."""
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        if not _is_whole(archive):
            raise tarfile.ReadError("its end is missing")
        scratch.rename(folder)
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{archive}: cannot be unpacked into {folder.parent} ({error}); mend one or the other"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_whole(archive: Path) -> bool:
    """Whether a tar file has its last two blocks, of zeros; `tarfile` does not miss them."""
    with archive.open("rb") as file:
        file.seek(-len(_END), os.SEEK_END)
        return file.read() == _END

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pfed_benchmarks.photos import open_photos
from pfedsecure.errors import DataError


def pack(folder: Path, name: str, *, colour: int = 0) -> Path:
    """An archive of two classes with two images each."""
    tree = folder / name
    for class_name in ("cat", "dog"):
        (tree / class_name).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            Image.new("L", (4, 4), colour + number).save(tree / class_name / f"{number}.png")
    archive = folder / f"{name}.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(tree, arcname=name)
    return archive


def test_an_archive_is_unpacked_once(tmp_path: Path) -> None:
    pack(tmp_path, "pets")
    cache = tmp_path / "cache"
    images = open_photos("pets", tmp_path, cache)
    assert images.class_names == ("cat", "dog")
    assert images.keys == ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")

    (folder,) = cache.iterdir()
    (folder / "pets" / "cat" / "0.png").unlink()
    assert len(open_photos("pets", tmp_path, cache)) == 3  # not unpacked again


def test_another_content_is_another_folder(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    pack(tmp_path, "pets")
    before = open_photos("pets", tmp_path, cache).fingerprint()
    pack(tmp_path, "pets", colour=100)

    assert open_photos("pets", tmp_path, cache).fingerprint() != before
    assert len(list(cache.iterdir())) == 2


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pets\.tar: cannot be read .*; give --data the folder that holds pets\.tar"):
        open_photos("pets", tmp_path, tmp_path)


@pytest.mark.parametrize("size", [100, 2000, 2100])  # in a header, between members, in the content of one
def test_a_truncated_archive_leaves_nothing_behind(size: int, tmp_path: Path) -> None:
    archive = pack(tmp_path, "pets")
    archive.write_bytes(archive.read_bytes()[:size])
    cache = tmp_path / "cache"

    with pytest.raises(DataError, match=r"pets\.tar: cannot be unpacked"):
        open_photos("pets", tmp_path, cache)
    assert list(cache.iterdir()) == []


def test_an_archive_cannot_write_elsewhere(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(__file__, arcname="../outside.py")

    with pytest.raises(DataError, match="outside the destination"):
        open_photos("pets", tmp_path, tmp_path / "cache")
    assert not (tmp_path / "outside.py").exists()

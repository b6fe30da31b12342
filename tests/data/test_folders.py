from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pfedsecure.data import open_images
from pfedsecure.data.folders import read_folder
from pfedsecure.errors import DataError


@contextmanager
def unprivileged() -> Iterator[None]:
    """As an ordinary user, to whom permissions apply."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_class_folders(tmp_path: Path, write_image) -> None:
    for value, name in enumerate(["dog_house/b.png", "dog_house/a.JPG", "cat/z.jpeg"]):
        write_image(tmp_path / name, value=value)
    image_set = read_folder(tmp_path)
    assert image_set.class_names == ("cat", "dog house")
    assert image_set.keys == ("cat/z.jpeg", "dog_house/a.JPG", "dog_house/b.png")
    assert image_set.labels.tolist() == [0, 1, 1]
    assert image_set.domains is None
    assert image_set.clients is None
    assert image_set.image(2).getpixel((0, 0)) == (0, 0, 0)


def test_domain_folders_share_their_classes(tmp_path: Path, write_image) -> None:
    for name in ["web_cam/Alarm_Clock/1.png", "web_cam/bike/1.png", "amazon/alarm-clock/1.png"]:
        write_image(tmp_path / name)
    image_set = read_folder(tmp_path)
    assert image_set.class_names == ("Alarm Clock", "bike")
    assert image_set.domains == ("amazon", "web_cam", "web_cam")
    assert image_set.labels.tolist() == [0, 0, 1]


def test_files_that_are_no_images_are_passed_over(tmp_path: Path, write_image) -> None:
    for name in ["cat/1.png", "dog/1.png", ".cache/thumb/1.png", "__MACOSX/cat/1.png", "cat/._1.png"]:
        write_image(tmp_path / name)
    for name in ["README.md", "cat/.DS_Store", "dog/Thumbs.db", "labels.csv"]:
        (tmp_path / name).write_text("no image")
    (tmp_path / "empty").mkdir()
    image_set = read_folder(tmp_path)
    assert image_set.keys == ("cat/1.png", "dog/1.png")
    assert image_set.class_names == ("cat", "dog")


def test_linked_class_folders_are_followed_and_loops_end(tmp_path: Path, write_image) -> None:
    write_image(tmp_path / "store/1.png")
    write_image(tmp_path / "set/cat/1.png")
    (tmp_path / "set/dog").symlink_to(tmp_path / "store")
    assert read_folder(tmp_path / "set").keys == ("cat/1.png", "dog/1.png")
    (tmp_path / "store/loop").symlink_to(tmp_path / "store")
    with pytest.raises(DataError, match=r"dog/loop/loop/1\.png does not fit"):
        read_folder(tmp_path / "set")


def test_names_that_are_not_utf8_do_not_stop_the_data(tmp_path: Path, write_image) -> None:
    write_image(tmp_path / "cat/1.png")
    latin1 = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(latin1)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    write_image(tmp_path / "x.png").rename(os.fsdecode(latin1 + b"/\xe9.png"))
    image_set = open_images(str(tmp_path), strict=True)
    assert image_set.class_names == (r"caf\udce9", "cat")
    assert len(image_set.fingerprint()) == 64


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"^no images in .*; put them into one folder per class: .*/CLASS/IMAGE$"),
        (["1.png"], r"/1\.png does not fit; images must lie in CLASS/IMAGE or DOMAIN/CLASS/IMAGE$"),
        (["a/b/c/1.png"], r"/a/b/c/1\.png does not fit"),
        (["cat/1.png", "art/dog/1.png"], r"mixes class folders and domain folders: art/dog/1\.png and cat/1\.png"),
        (["_-_/1.png", "cat/1.png"], r"has no class name in its name; rename it$"),
    ],
)
def test_trees_of_another_shape_are_refused(tmp_path: Path, write_image, files: list[str], message: str) -> None:
    for name in files:
        write_image(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^the data folder .*/nowhere does not exist; check the path$"):
        read_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("closed", ["", "dog"])
def test_an_unreadable_folder_is_refused(write_image, closed: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for image in ("cat/1.png", "dog/1.png"):
            write_image(folder / image)
        (folder / closed).chmod(0)
        try:
            with unprivileged(), pytest.raises(DataError) as caught:
                open_images(name, strict=False)
        finally:
            (folder / closed).chmod(0o755)
    assert str(caught.value) == f"cannot read {folder / closed}: Permission denied; check who may read it"

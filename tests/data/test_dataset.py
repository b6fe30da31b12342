from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfedsecure.data import ImageSet, open_images
from pfedsecure.data.images import ImagePixels
from pfedsecure.errors import ClassNamesMismatch, DataError


def coloured(values: list[int], labels: list[int], class_names: tuple[str, ...] = ("cat", "dog_house")) -> ImageSet:
    """One image per value, every pixel of it that value."""
    return ImageSet(
        class_names=class_names,
        labels=np.array(labels),
        keys=tuple(f"{value:03d}.png" for value in values),
        images=tuple(ImagePixels(np.full((2, 2, 3), value, dtype=np.uint8)) for value in values),
        clients=tuple(f"client {value}" for value in values),
        domains=tuple(f"domain {value}" for value in values),
    )


def test_columns_that_do_not_fit_are_refused() -> None:
    image_set = coloured([1, 2], [0, 1])
    with pytest.raises(ValueError, match="one entry per image"):
        replace(image_set, domains=("art",))
    with pytest.raises(ValueError, match="key of its own"):
        replace(image_set, keys=("a", "a"))
    with pytest.raises(ValueError, match="more than case"):
        replace(image_set, class_names=("Dog-House", "dog_house"))
    for labels in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            replace(image_set, labels=np.array(labels))


def test_labels_cannot_be_changed_from_outside() -> None:
    labels = np.array([0, 1])
    image_set = replace(coloured([1, 2], [0, 1]), labels=labels)
    labels[0] = 1
    assert image_set.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        image_set.labels[0] = 1


def test_a_subset_takes_everything_that_belongs_to_an_image() -> None:
    part = coloured([10, 20, 30], [0, 1, 0]).subset([2, 1])
    assert part.labels.tolist() == [0, 1]
    assert part.keys == ("030.png", "020.png")
    assert part.clients == ("client 30", "client 20")
    assert part.domains == ("domain 30", "domain 20")
    assert [part.image(i).getpixel((0, 0)) for i in range(len(part))] == [(30, 30, 30), (20, 20, 20)]


def test_files_are_not_opened_before_they_are_asked_for(tmp_path: Path, write_image) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        write_image(tmp_path / name)
    image_set = open_images(str(tmp_path), strict=True)
    Image.new("RGB", (4, 3), (7, 7, 7)).save(tmp_path / "cat/1.png")
    assert image_set.image(0).getpixel((0, 0)) == (7, 7, 7)
    (tmp_path / "dog/1.png").unlink()
    for look in (image_set.image, image_set.content_digest):
        with pytest.raises(DataError, match=r"^cannot read image dog/1\.png: No such file or directory; repair"):
            look(1)


def test_relabel_takes_the_order_and_spelling_of_the_plan() -> None:
    image_set = coloured([1, 2, 3], [0, 1, 0], ("cat", "dog_house"))
    planned = image_set.relabel(["emu", "Dog-House", "CAT"])
    assert planned.class_names == ("emu", "Dog-House", "CAT")
    assert planned.labels.tolist() == [2, 1, 2]
    assert image_set.labels.tolist() == [0, 1, 0]


def test_relabel_names_the_classes_that_differ() -> None:
    with pytest.raises(ClassNamesMismatch) as caught:
        coloured([1, 2], [0, 1], ("cat", "dgo")).relabel(["cat", "dog", "emu"])
    assert str(caught.value) == (
        "the data has classes that the plan does not: 'dgo'; plan classes without an image here: 'dog', 'emu'; "
        "rename or remove them"
    )
    with pytest.raises(ClassNamesMismatch, match=r"plan does not: 'dog'; rename or remove them$"):
        coloured([1, 2], [0, 1], ("cat", "dog")).relabel(["cat"])


def test_a_class_without_images_need_not_be_in_the_plan() -> None:
    part = coloured([1, 2, 3], [0, 1, 2], ("cat", "dog", "emu")).subset([0, 2])
    assert part.relabel(["emu", "cat"]).labels.tolist() == [1, 0]


def test_the_fingerprint_ignores_order_numbering_and_spelling() -> None:
    image_set = coloured([1, 2, 3], [0, 1, 0])
    assert image_set.subset([2, 0, 1]).fingerprint() == image_set.fingerprint()
    assert image_set.relabel(["Dog-House", "bird", "CAT"]).fingerprint() == image_set.fingerprint()
    assert replace(image_set, keys=("x", "y", "z")).fingerprint() == image_set.fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        coloured([1, 2], [0, 1]),
        coloured([1, 2, 4], [0, 1, 0]),
        coloured([1, 2, 3], [0, 1, 1]),
        coloured([1, 2, 3], [1, 0, 0]),
        coloured([1, 2, 3], [0, 1, 0], ("cat", "dog")),
    ],
    ids=["image removed", "image changed", "label changed", "labels swapped", "class renamed"],
)
def test_the_fingerprint_changes_with_content_and_labels(other: ImageSet) -> None:
    assert other.fingerprint() != coloured([1, 2, 3], [0, 1, 0]).fingerprint()


def test_the_fingerprint_counts_an_image_as_often_as_it_is_there() -> None:
    once = coloured([1, 2], [0, 1])
    pixels = once.images[0]
    twice = replace(
        once,
        labels=np.array([0, 1, 0]),
        keys=(*once.keys, "copy.png"),
        images=(*once.images, pixels),
        clients=None,
        domains=None,
    )
    assert twice.fingerprint() != once.fingerprint()


def test_a_moved_folder_keeps_its_fingerprint(tmp_path: Path, write_image) -> None:
    for number, name in enumerate(["cat/1.png", "cat/2.png", "dog house/1.png"]):
        write_image(tmp_path / "here" / name, value=number)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    (tmp_path / "there/dog house").rename(tmp_path / "there/Dog_House")
    (tmp_path / "there/cat/1.png").rename(tmp_path / "there/cat/9.png")
    here, there = (open_images(str(tmp_path / side), strict=True) for side in ("here", "there"))
    assert here.fingerprint() == there.fingerprint()
    digests = [{image_set.content_digest(i) for i in range(3)} for image_set in (here, there)]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 3

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pfedsecure.data import open_images
from pfedsecure.errors import DataError


def test_relative_paths_start_from_the_root(tmp_path: Path, write_image) -> None:
    for name in ("set/cat/1.png", "set/dog/1.png"):
        write_image(tmp_path / name)
    image_set = open_images("set", strict=True, root=tmp_path)
    assert image_set.keys == open_images(str(tmp_path / "set"), strict=True).keys == ("cat/1.png", "dog/1.png")


def test_a_folder_may_be_named_like_a_list(tmp_path: Path, write_image) -> None:
    for name in ("set.csv/cat/1.png", "set.csv/dog/1.png"):
        write_image(tmp_path / name)
    assert len(open_images("set.csv", strict=True, root=tmp_path)) == 2


def test_the_home_folder_may_be_abbreviated(tmp_path: Path, write_image, monkeypatch) -> None:
    for name in ("set/cat/1.png", "set/dog/1.png"):
        write_image(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_images("~/set", strict=True)) == 2


def test_one_class_only_is_refused(tmp_path: Path, write_image) -> None:
    write_image(tmp_path / "cat/1.png")
    with pytest.raises(DataError, match=r"are of one class, 'cat'; a classifier needs two classes or more$"):
        open_images(str(tmp_path), strict=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", r"^no data is named; give a folder"),
        ("archive.zip", r"archive\.zip is neither a folder, nor a \.csv nor a \.txt list of images$"),
        ("demo:", r"^'demo:' is not a demo share; write demo:INDEX/OF or demo:INDEX/OF:SEED, for example demo:0/5$"),
        ("demo:1", "is not a demo share"),
        ("demo:-1/5", "is not a demo share"),
        ("demo:0/5:x", "is not a demo share"),
        ("demo:5/5", "demo client 5 of 5; count from 0 to 4"),
        ("torchvision:mnist", r"^unknown torchvision data set 'mnist'; known are caltech101, cifar10, cifar100, dtd"),
    ],
)
def test_specs_that_name_no_data(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "archive.zip").touch()
    with pytest.raises(DataError, match=message):
        open_images(spec, strict=False, root=tmp_path)


def test_a_share_of_the_demo() -> None:
    from pfedsecure.data.digits import CLASS_NAMES, demo_share

    image_set = open_images("demo:1/5:7", strict=True)
    share = demo_share(1, 5, 7)
    assert image_set.keys == tuple(f"scan/{index:04d}" for index in share.indices)
    assert image_set.domains == (share.condition,) * len(image_set)
    np.testing.assert_array_equal(image_set.relabel(CLASS_NAMES).labels, share.labels)
    for index in (0, len(image_set) - 1):
        np.testing.assert_array_equal(
            np.asarray(image_set.image(index)), np.asarray(share.images[index].convert("RGB"))
        )
    assert open_images("demo:1/5", strict=True).fingerprint() == open_images("demo:1/5:0", strict=True).fingerprint()
    assert image_set.fingerprint() != open_images("demo:1/5", strict=True).fingerprint()


def test_shares_of_the_demo_are_disjoint() -> None:
    keys = [key for client in range(3) for key in open_images(f"demo:{client}/3", strict=True).keys]
    assert len(keys) == 1797  # all that scikit-learn bundles
    assert len(set(keys)) == len(keys)


def test_importing_the_package_loads_neither_torch_nor_scikit_learn() -> None:
    code = "import sys, pfedsecure.data; sys.exit(str({'torch', 'torchvision', 'sklearn'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == "set()"

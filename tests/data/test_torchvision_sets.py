"""Each set is written in the layout and file formats of the original, only smaller; digests of the originals are
switched off for it. Every image is filled with a value that says which one it is."""

from __future__ import annotations

import functools
import http.server
import json
import pickle
import socket
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from torchvision import datasets

from pfedsecure.data import TORCHVISION_NAMES, open_images, torchvision_sets
from pfedsecure.errors import DataError


def first_values(image_set) -> list[int]:
    return [image_set.image(index).getpixel((0, 0))[0] for index in range(len(image_set))]


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def write_cifar(folder: Path, batches: dict[str, list[int]], label_key: str) -> None:
    """Pickled batches of 32x32 images, filled with the running number of the image."""
    folder.mkdir(parents=True)
    number = 0
    for name, labels in batches.items():
        rows = np.repeat(np.arange(number, number + len(labels), dtype=np.uint8)[:, None], 3 * 32 * 32, axis=1)
        (folder / name).write_bytes(pickle.dumps({"data": rows, label_key: labels}, protocol=2))
        number += len(labels)


def write_dtd(folder: Path, write_image) -> None:
    for split, names in {"train": ["banded/1.jpg"], "val": ["dotted/1.jpg"], "test": ["banded/2.jpg"]}.items():
        labels = folder / "dtd/labels" / f"{split}1.txt"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text("\n".join(names) + "\n")
        for name in names:
            write_image(folder / "dtd/images" / name)


def test_cifar10(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    batches = {f"data_batch_{number}": [number % 3] for number in range(1, 6)} | {"test_batch": [2, 0]}
    write_cifar(folder, batches, "labels")
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["frog", "cat", "airplane"]}, protocol=2))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[f"data_batch_{number}", None] for number in range(1, 6)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    image_set = open_images(f"torchvision:cifar10:{tmp_path}", strict=True)
    assert image_set.class_names == ("airplane", "cat", "frog")
    assert image_set.keys[0] == "test/00000"
    assert image_set.keys[-1] == "train/00004"
    assert first_values(image_set) == [5, 6, 0, 1, 2, 3, 4]
    names = [image_set.class_names[label] for label in image_set.labels]
    assert names == ["airplane", "frog", "cat", "airplane", "frog", "cat", "airplane"]
    assert image_set.image(0).size == (32, 32)


def test_a_cifar_pickle_with_another_digest_is_not_opened(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(DataError, match="missing or damaged"):
        open_images(f"torchvision:cifar10:{tmp_path}", strict=True)
    assert not (tmp_path / "sprung").exists()
    pickle.loads((folder / "test_batch").read_bytes())
    assert (tmp_path / "sprung").exists()


def test_cifar100(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "data/cifar-100-python"
    write_cifar(folder, {"train": [0, 1], "test": [1]}, "fine_labels")
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["sweet_pepper", "apple"]}, protocol=2))
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": None})
    image_set = open_images("torchvision:CIFAR100", strict=True, root=tmp_path)
    assert image_set.class_names == ("apple", "sweet pepper")
    assert image_set.labels.tolist() == [0, 1, 0]
    assert first_values(image_set) == [2, 0, 1]


def test_caltech101(tmp_path: Path, write_image) -> None:
    folder = tmp_path / "caltech101/101_ObjectCategories"
    for value, name in enumerate(["BACKGROUND_Google/image_0001", "wild_cat/image_0001", "ant/image_0001"]):
        write_image(folder / f"{name}.jpg", value=100 * value)
    image_set = open_images(f"torchvision:caltech101:{tmp_path}", strict=True)
    assert image_set.class_names == ("ant", "wild cat")
    assert image_set.keys[0] == "caltech101/101_ObjectCategories/ant/image_0001.jpg"
    assert first_values(image_set) == [200, 100]


def test_eurosat(tmp_path: Path, write_image) -> None:
    for value, name in enumerate(["River/River_1.jpg", "AnnualCrop/AnnualCrop_1.jpg", "AnnualCrop/AnnualCrop_2.jpg"]):
        write_image(tmp_path / "eurosat/2750" / name, value=100 * value)
    image_set = open_images(f"torchvision:eurosat:{tmp_path}", strict=True)
    assert image_set.class_names == ("AnnualCrop", "River")
    assert image_set.labels.tolist() == [0, 0, 1]
    assert first_values(image_set) == [100, 200, 0]


def test_dtd(tmp_path: Path, write_image) -> None:
    write_dtd(tmp_path / "dtd", write_image)
    image_set = open_images(f"torchvision:dtd:{tmp_path}", strict=True)
    assert image_set.class_names == ("banded", "dotted")
    assert image_set.keys == tuple(f"dtd/dtd/images/{name}.jpg" for name in ("banded/1", "banded/2", "dotted/1"))


def test_flowers102(tmp_path: Path, write_image, monkeypatch) -> None:
    folder = tmp_path / "flowers-102"
    for number in range(1, 7):
        write_image(folder / f"jpg/image_{number:05d}.jpg", value=40 * number)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": [[2, 1, 2, 102, 1, 1]]})
    scipy.io.savemat(folder / "setid.mat", {"trnid": [[3, 1]], "valid": [[6, 2]], "tstid": [[4, 5]]})
    monkeypatch.setattr(
        datasets.Flowers102, "_file_dict", {"label": ("imagelabels.mat", None), "setid": ("setid.mat", None)}
    )
    image_set = open_images(f"torchvision:flowers102:{tmp_path}", strict=True)
    assert image_set.class_names == ("blackberry lily", "hard-leaved pocket orchid", "pink primrose")
    assert image_set.labels.tolist() == [1, 2, 1, 0, 2, 2]
    assert first_values(image_set) == [40, 80, 120, 160, 200, 240]


def test_food101(tmp_path: Path, write_image) -> None:
    folder = tmp_path / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, names in {"train": {"waffles": ["waffles/1"]}, "test": {"apple_pie": ["apple_pie/2"]}}.items():
        others = {name: [] for name in ("apple_pie", "waffles")}
        (folder / f"meta/{split}.json").write_text(json.dumps(others | names))
    write_image(folder / "images/waffles/1.jpg", value=100)
    write_image(folder / "images/apple_pie/2.jpg", value=200)
    image_set = open_images(f"torchvision:food101:{tmp_path}", strict=True)
    assert image_set.class_names == ("apple pie", "waffles")
    assert image_set.labels.tolist() == [0, 1]
    assert first_values(image_set) == [200, 100]


def test_oxfordiiitpet(tmp_path: Path, write_image) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations/trainval.txt").write_text("Abyssinian_1 1 1 1\namerican_bulldog_10 2 2 1\n")
    (folder / "annotations/test.txt").write_text("Abyssinian_2 1 1 1\namerican_bulldog_11 2 2 1\n")
    for value, name in enumerate(["Abyssinian_1", "Abyssinian_2", "american_bulldog_10", "american_bulldog_11"]):
        write_image(folder / f"images/{name}.jpg", value=50 * value)
    image_set = open_images(f"torchvision:oxfordiiitpet:{tmp_path}", strict=True)
    assert image_set.class_names == ("Abyssinian", "American Bulldog")
    assert image_set.labels.tolist() == [0, 0, 1, 1]
    assert first_values(image_set) == [0, 50, 100, 150]


def no_network(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_without_data_and_network_the_folder_to_fill_is_named(tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(DataError) as caught:
        open_images(f"torchvision:{name}", strict=False, root=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"torchvision's {name} is missing or damaged in {tmp_path / 'data'} and cannot be down")
    assert "name resolution" in message
    assert "\n" not in message


def test_a_damaged_set_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for folder in ("meta", "images"):
        (tmp_path / "food-101" / folder).mkdir(parents=True)
    (tmp_path / "food-101/meta/train.json").write_text("{")
    with pytest.raises(DataError, match=r"torchvision's food101 is missing or damaged in .*Expecting property name"):
        open_images(f"torchvision:food101:{tmp_path}", strict=False)


def test_what_is_absent_is_downloaded_once(tmp_path: Path, write_image, monkeypatch) -> None:
    write_dtd(tmp_path / "original", write_image)
    with tarfile.open(tmp_path / "dtd.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "original/dtd", arcname="dtd")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets.DTD, "_MD5", None)
    spec = f"torchvision:dtd:{tmp_path / 'cache'}"
    with web_server(tmp_path) as address:
        monkeypatch.setattr(datasets.DTD, "_URL", f"{address}/dtd.tar.gz")
        image_set = open_images(spec, strict=True)
    assert len(image_set) == 3
    assert socket.getdefaulttimeout() is None
    assert open_images(spec, strict=True).fingerprint() == image_set.fingerprint()  # the server is gone


def test_a_silent_server_does_not_hang_the_program(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision_sets, "_SILENT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(datasets.DTD, "_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/dtd.tar.gz")
        with pytest.raises(DataError, match=r"cannot be downloaded .*timed out"):
            open_images(f"torchvision:dtd:{tmp_path}", strict=False)
    assert socket.getdefaulttimeout() is None

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pfedsecure.data import by_client, open_images
from pfedsecure.data.lists import read_csv, read_list
from pfedsecure.errors import DataError


def test_a_csv_of_paths_and_labels(tmp_path: Path, write_image) -> None:
    elsewhere = write_image(tmp_path / "elsewhere/3.png", value=3)
    write_image(tmp_path / "set/img/2.png", value=2)
    write_image(tmp_path / "set/img/a, b.png", value=1)
    file = tmp_path / "set/data.csv"
    file.write_text(f'path,label\n./img/2.png,dog_house\n"img/a, b.png", cat \n\n{elsewhere},Dog House\n')
    image_set = open_images(str(file), strict=True)
    assert image_set.class_names == ("cat", "Dog House")
    assert image_set.keys == (str(elsewhere), "img/2.png", "img/a, b.png")
    assert [image_set.image(i).getpixel((0, 0))[0] for i in range(3)] == [3, 2, 1]
    assert image_set.labels.tolist() == [1, 1, 0]
    assert image_set.clients is None
    assert image_set.domains is None


def test_a_csv_from_a_spreadsheet_with_clients_and_domains(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_bytes("\ufeffLabel,PATH,Client,domain\r\ncafé,b.png,north,ct\r\ncat,a.png,south,mr\r\n".encode())
    image_set = read_csv(file)
    assert image_set.keys == ("a.png", "b.png")
    assert image_set.class_names == ("café", "cat")
    assert image_set.labels.tolist() == [1, 0]
    assert image_set.clients == ("south", "north")
    assert image_set.domains == ("mr", "ct")
    assert {name: share.tolist() for name, share in by_client(image_set.clients).items()} == {
        "north": [1],
        "south": [0],
    }


def test_the_order_of_lines_does_not_matter(tmp_path: Path) -> None:
    lines = ["a.png,cat", "b.png,dog", "c.png,cat"]
    (tmp_path / "1.csv").write_text("\n".join(["path,label", *lines]))
    (tmp_path / "2.csv").write_text("\n".join(["path,label", *reversed(lines)]))
    first, second = read_csv(tmp_path / "1.csv"), read_csv(tmp_path / "2.csv")
    assert first.keys == second.keys
    assert first.labels.tolist() == second.labels.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must be 'path,label'"),
        ("a.png,cat\n", "the first line must be 'path,label'"),
        ("path,label,split\na.png,cat,train\n", "the first line must be 'path,label'"),
        ("path,label,label\na.png,cat,cat\n", "the first line must be 'path,label'"),
        ("path;label\na.png;cat\n", "the first line must be 'path,label'"),
        ("path,label\na.png\n", "line 2: 2 fields are needed, none of them empty"),
        ("path,label\na.png,cat,x\n", "line 2: 2 fields are needed, none of them empty"),
        ("path,label,client\na.png,cat,n\nb.png,cat, \n", "line 3: 3 fields are needed, none of them empty"),
        ("path,label\na.png,_\n", "line 2: both a path and a label are needed"),
        ('path,label\n"a.png"x,cat\n', "line 2: not CSV"),
        (
            "path,label\na.png,cat\nb.png,cat\nx/../a.png,dog\n",
            r"line 4: a\.png is in line 2 already; keep one of them",
        ),
        ("path,label\n", "lists no images"),
    ],
)
def test_a_faulty_csv_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "data.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_csv(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_a_list_with_tabulators(tmp_path: Path, write_image) -> None:
    for name in ("images/2 b.png", "images/1.png"):
        write_image(tmp_path / name)
    (tmp_path / "data.TXT").write_text("images/2 b.png\tdog house\n\nimages/1.png\tcat\n")
    image_set = open_images("data.TXT", strict=True, root=tmp_path)
    assert image_set.keys == ("images/1.png", "images/2 b.png")
    assert image_set.class_names == ("cat", "dog house")
    assert image_set.domains is None


def test_domains_of_a_list_are_those_of_its_paths_if_they_agree_with_the_labels(tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    file.write_text("art_painting/dog_house/1.png\tDog House\nphoto/cat/1.png\tcat\n")
    assert read_list(file).domains == ("art_painting", "photo")
    file.write_text("art_painting/dog_house/1.png\tDog House\nphoto/cat/1.png\tdog\n")
    assert read_list(file).domains is None


def test_a_list_of_domainnet(tmp_path: Path) -> None:
    file = tmp_path / "real_train.txt"
    file.write_text("real/alarm_clock/real 2.jpg 7\nreal/zebra/1.jpg 344\nsketch/alarm_clock/1.jpg 7\n")
    image_set = read_list(file)
    assert image_set.class_names == ("alarm clock", "zebra")
    assert image_set.keys == ("real/alarm_clock/real 2.jpg", "real/zebra/1.jpg", "sketch/alarm_clock/1.jpg")
    assert image_set.labels.tolist() == [0, 1, 0]
    assert image_set.domains == ("real", "real", "sketch")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png\tcat\nb.png dog\n", "line 2: expected path<TAB>label"),
        ("a.png\tcat\tnorth 3\n", "line 1: expected path<TAB>label"),
        ("a.png\n", "line 1: expected path<TAB>label"),
        ("1.jpg 3\n", "line 1: both a path and a label are needed"),
        ("\tcat\n", "line 1: both a path and a label are needed"),
        ("a.png\t\n", "line 1: both a path and a label are needed"),
        ("r/cat/1.jpg 0\nr/dog/1.jpg 0\n", "line 2: label 0 is 'cat' further up and 'dog' here"),
        ("a.png\tcat\na.png\tcat\n", r"line 2: a\.png is in line 1 already"),
        ("\n", "lists no images"),
    ],
)
def test_a_faulty_list_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "data.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_list(file)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("name", ["data.csv", "data.txt"])
def test_lists_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"^cannot read .*/{name}: No such file or directory; check the path"):
        open_images(name, strict=False, root=tmp_path)
    (tmp_path / name).write_bytes(b"path,label\ncaf\xe9.png,cat\n")
    with pytest.raises(DataError, match=rf"/{name} is not UTF-8 text; save it as UTF-8$"):
        open_images(name, strict=False, root=tmp_path)


def test_listed_files_that_are_missing_are_named(tmp_path: Path, write_image, caplog) -> None:
    for name in ("1.png", "2.png"):
        write_image(tmp_path / name)
    (tmp_path / "data.csv").write_text("path,label\n1.png,cat\n2.png,dog\ngone.png,cat\n/nowhere/at/all.png,dog\n")
    with caplog.at_level(logging.WARNING, logger="pfedsecure.data"):
        image_set = open_images("data.csv", strict=False, root=tmp_path)
    assert image_set.keys == ("1.png", "2.png")
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "cannot read image /nowhere/at/all.png",
        "cannot read image gone.png",
    ]
    with pytest.raises(DataError, match=r"^cannot read image /nowhere/at/all\.png: No such file"):
        open_images("data.csv", strict=True, root=tmp_path)

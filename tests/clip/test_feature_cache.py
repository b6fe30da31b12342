"""The cache of features: what comes out is what went in, whatever happens to its files, its writers and its readers."""

from __future__ import annotations

import json
import logging
import os
import stat
import struct
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedsecure.clip import feature_cache, feature_segment
from pfedsecure.clip.feature_cache import FeatureCache
from pfedsecure.clip.feature_segment import Features, Keys, Segment, keys_of

SCRIPT = Path(__file__).with_name("cache_processes.py")
TABLE, OTHER = sha256(b"a backbone").hexdigest(), sha256(b"another").hexdigest()
WIDTH = 8


def keys(*numbers: int) -> Keys:
    return keys_of([sha256(b"%d" % number).digest() for number in numbers])


def features(*numbers: int, width: int = WIDTH) -> Features:
    return np.array([[number + place / 8 for place in range(width)] for number in numbers], dtype=np.float32)


def added(folder: Path, *numbers: int, table: str = TABLE, **options: Any) -> FeatureCache:
    cache = FeatureCache(folder, **options)
    cache.add(table, keys(*numbers), features(*numbers))
    return cache


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.features"))


def test_what_was_added_is_found_by_another_process_s_eyes(tmp_path: Path) -> None:
    added(tmp_path, 3, 1, 2)
    added(tmp_path, 5, 4)
    rows, found = FeatureCache(tmp_path).find(TABLE, keys(9, 5, 2, 2, 8, 3))
    assert rows.tolist() == [1, 2, 3, 5]
    np.testing.assert_array_equal(found, features(5, 2, 2, 3))


def test_tables_have_nothing_to_do_with_each_other(tmp_path: Path) -> None:
    added(tmp_path, 1)
    added(tmp_path, 2, table=OTHER)
    for table, number in ((TABLE, 1), (OTHER, 2)):
        rows, found = FeatureCache(tmp_path).find(table, keys(1, 2))
        assert rows.tolist() == [number - 1]
        np.testing.assert_array_equal(found, features(number))


def test_nothing_is_found_where_there_is_nothing(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "none")
    for asked in (keys(1, 2), keys()):
        rows, found = cache.find(TABLE, asked)
        assert (len(rows), found.shape) == (0, (0, 0))
    cache.add(TABLE, keys(), features())
    assert not (tmp_path / "none").exists()


def test_digests_that_end_in_zero_bytes_are_told_apart(tmp_path: Path) -> None:
    """NumPy's strings end at their last byte that is not zero."""
    digests = [bytes([1] * used + [0] * (32 - used)) for used in (0, 1, 2, 31, 32)]
    cache = FeatureCache(tmp_path)
    cache.add(TABLE, keys_of(digests), features(*range(5)))
    rows, found = cache.find(TABLE, keys_of(list(reversed(digests))))
    assert rows.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(found, features(4, 3, 2, 1, 0))


@pytest.mark.parametrize("place", [0, 20, 23, 24, 40, 55, 56, 63, 64, 71, 72, 90, 135, 136, 150, -1])
def test_one_flipped_bit_anywhere_and_features_are_missing_not_wrong(
    tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Magic 0-23, table 24-55, n 56-63, width 64-71, two keys 72-135, features from 136 on."""
    added(tmp_path, 1, 2)
    added(tmp_path, 3)
    path = max(segments(tmp_path), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << (place % 8)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        rows, found = FeatureCache(tmp_path).find(TABLE, keys(1, 2, 3))
    assert rows.tolist() == [2]
    np.testing.assert_array_equal(found, features(3))
    assert f"{path} is damaged" in caplog.text
    assert not path.exists()
    rows, found = added(tmp_path, 1, 2).find(TABLE, keys(1, 2, 3))
    np.testing.assert_array_equal(found, features(1, 2, 3))


HEADER = struct.Struct("<24s32sQQ")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        HEADER.pack(b"pfedsecure features 1".ljust(24), bytes.fromhex(TABLE), 2, WIDTH),
        HEADER.pack(b"pfedsecure features 1".ljust(24), bytes.fromhex(TABLE), 2**63, 2**63) + bytes(100),
        HEADER.pack(b"pfedsecure features 1".ljust(24), bytes.fromhex(TABLE), 0, WIDTH),
        HEADER.pack(b"pfedsecure features 1".ljust(24), bytes.fromhex(TABLE), 2, 0) + bytes(64),
        HEADER.pack(b"pfedsecure features 1".ljust(24), bytes.fromhex(TABLE), 1, 1) + bytes(99),
        HEADER.pack(b"pfedsecure features 1".ljust(24), bytes.fromhex(TABLE), 2, 1) + bytes(2 * 36),
    ],
    ids=["empty", "nonsense", "header alone", "huge", "no rows", "no width", "longer", "keys twice"],
)
@pytest.mark.parametrize("how", ["found", "merged"])
def test_a_malformed_segment_with_the_right_name_is_removed(
    tmp_path: Path, content: bytes, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest is right, so nothing but its form tells that no program of ours wrote it."""
    monkeypatch.setattr(feature_cache, "_MERGED", 2 if how == "merged" else 8)
    added(tmp_path, 1)
    path = tmp_path / TABLE / f"{sha256(content).hexdigest()}.features"
    path.write_bytes(content)
    rows, found = added(tmp_path, 2).find(TABLE, keys(1, 2))
    assert rows.tolist() == [0, 1]
    np.testing.assert_array_equal(found, features(1, 2))
    assert not path.exists()


def planted(folder: Path, number: int) -> Path:
    """Wrong features of an image, in a segment with nothing wrong about it."""
    content = Segment.of(keys(number), features(number + 100)).to_bytes(TABLE)
    path = folder / TABLE / f"{sha256(content).hexdigest()}.features"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("which", ["cache", f"cache/{TABLE}"])
@pytest.mark.parametrize("how", ["group", "everybody", "owner"])
def test_a_folder_that_others_can_write_to_is_not_used(
    tmp_path: Path, which: str, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They could put features there that a client then trains on."""
    folder = tmp_path / "cache"
    added(folder, 1)
    planted(folder, 2)
    assert len(FeatureCache(folder).find(TABLE, keys(2))[0]) == 1  # the attack, where nobody else can write
    if how == "owner":
        owned_by_another(monkeypatch, tmp_path / which)
    else:
        (tmp_path / which).chmod(0o770 if how == "group" else 0o777)
    with caplog.at_level(logging.WARNING):
        cache = FeatureCache(folder)
        assert len(cache.find(TABLE, keys(1, 2))[0]) == 0
        cache.add(TABLE, keys(3), features(3))
    (record,) = caplog.records
    assert f"others can write to {tmp_path / which}: remove it, or give it to this user with" in record.message
    assert len(segments(folder)) == 2


def owned_by_another(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """What the system says of these: only root could bring it about for real."""
    theirs, stat_of, fstat = {path.stat().st_ino for path in paths}, Path.stat, os.fstat

    def given_away(status: os.stat_result) -> os.stat_result:
        if status.st_ino not in theirs:
            return status
        return os.stat_result([*status[:4], os.geteuid() + 1, *status[5:]])

    monkeypatch.setattr(Path, "stat", lambda path, **more: given_away(stat_of(path, **more)))
    monkeypatch.setattr(feature_segment.os, "fstat", lambda descriptor: given_away(fstat(descriptor)))


@pytest.mark.parametrize("how", ["writable", "owner", "link", "fifo"])
def test_a_segment_that_others_can_write_is_removed(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = added(tmp_path, 1)
    path = planted(tmp_path, 2)
    if how == "writable":
        path.chmod(0o660)
    elif how == "owner":
        owned_by_another(monkeypatch, path)
    elif how == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        os.mkfifo(path, 0o600)
    rows, found = cache.find(TABLE, keys(1, 2))
    assert rows.tolist() == [0]
    np.testing.assert_array_equal(found, features(1))
    assert not os.path.lexists(path)


def test_a_folder_that_others_can_read_is_closed_to_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    added(tmp_path, 1)
    for folder in (tmp_path, tmp_path / TABLE):
        folder.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        assert len(FeatureCache(tmp_path).find(TABLE, keys(1))[0]) == 1
    assert [record.message for record in caplog.records] == [
        f"{folder} was open to other users of this machine, and is not any more"
        for folder in (tmp_path, tmp_path / TABLE)
    ]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (tmp_path, tmp_path / TABLE)} == {0o700}


@pytest.mark.parametrize("damage", ["empty", "cut off", "longer", "other name", "other table", "nonsense"])
def test_a_file_that_is_not_what_its_name_says_is_not_used(tmp_path: Path, damage: str) -> None:
    cache = added(tmp_path, 1, 2)
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    if damage == "other name":
        path = path.rename(path.with_name("0" * 64 + ".features"))
    elif damage == "other table":
        added(tmp_path, 7, table=OTHER)
        path = path.rename(tmp_path / OTHER / path.name)
    else:
        changed = {"empty": b"", "cut off": whole[:-1], "longer": whole + b"\0", "nonsense": b"nonsense"}
        path.write_bytes(changed[damage])
    table = OTHER if damage == "other table" else TABLE
    assert len(cache.find(table, keys(1, 2))[0]) == 0
    assert not path.exists()


def test_a_damaged_segment_does_not_spoil_those_that_it_is_merged_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "_MERGED", 3)
    added(tmp_path, 1)
    (path,) = segments(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    added(tmp_path, 2)
    rows, found = added(tmp_path, 3).find(TABLE, keys(1, 2, 3))
    assert rows.tolist() == [1, 2]
    np.testing.assert_array_equal(found, features(2, 3))


def test_small_segments_become_one(tmp_path: Path) -> None:
    for number in range(100):
        cache = added(tmp_path, number, number + 1)
    assert len(segments(tmp_path)) < 10
    rows, found = cache.find(TABLE, keys(*range(101)))
    assert len(rows) == 101
    np.testing.assert_array_equal(found, features(*range(101)))


def test_segments_have_a_size_and_full_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "SEGMENT_BYTES", 1000)  # 15 images
    added(tmp_path, *range(40))
    full = [path for path in segments(tmp_path) if path.stat().st_size > 500]
    before = {path: path.stat().st_mtime_ns for path in full}
    for number in range(40, 60):
        cache = added(tmp_path, number)
    assert max(path.stat().st_size for path in segments(tmp_path)) < 1000 + 72
    assert {path: path.stat().st_mtime_ns for path in full} == before
    assert len(cache.find(TABLE, keys(*range(60)))[0]) == 60


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "_MERGED", 1000)
    one = 72 + 32 + 4 * WIDTH
    limit = 4 * one
    for number in range(4):
        added(tmp_path, number, table=TABLE if number % 2 else OTHER, max_bytes=limit)
    for age, path in enumerate(sorted(segments(tmp_path), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, ns=(age, age))  # not every file system tells times apart that are this close
    FeatureCache(tmp_path).find(OTHER, keys(0))
    cache = added(tmp_path, 4, 5, max_bytes=limit)
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= limit
    kept = {number for number in range(6) for table in (TABLE, OTHER) if len(cache.find(table, keys(number))[0])}
    assert kept == {0, 3, 4, 5}


def test_nothing_is_kept_that_is_larger_than_all_that_may_be(tmp_path: Path) -> None:
    added(tmp_path, *range(10), max_bytes=100)
    assert segments(tmp_path) == []


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        added(tmp_path / "cache", 1)
    finally:
        os.umask(old)
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_cache_that_cannot_be_used_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    cache = FeatureCache(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            cache.add(TABLE, keys(number), features(number))
            assert len(cache.find(TABLE, keys(number))[0]) == 0
    (record,) = caplog.records
    assert "cannot be used as a cache of image features" in record.getMessage()


def ran(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_a_writer_that_is_killed_anywhere_leaves_nothing_wrong_and_loses_nothing(tmp_path: Path) -> None:
    found = ran("kill", str(tmp_path))
    assert found["complaints"] == []
    assert found["boundaries"] > 100


@pytest.mark.slow
def test_the_same_kills_are_noticed_where_the_protection_is_taken_out(tmp_path: Path) -> None:
    """Segments are written in their place, and their content is believed."""
    assert ran("kill", str(tmp_path), "--unprotected")["complaints"]


@pytest.mark.slow
def test_processes_that_add_merge_and_read_at_the_same_time(tmp_path: Path) -> None:
    found = ran("share", str(tmp_path))
    assert found["complaints"] == []
    assert found["statuses"] == [0, 0, 0]

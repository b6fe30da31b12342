"""What must be the same after a crash, and the log of noised releases."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from pfed_client.kept_file import KeptFiles
from pfed_client.release_log import ReleaseLog
from pfedsecure.errors import StateError
from pfedsecure.privacy.events import GaussianRelease

EVENT = GaussianRelease("released sketch", 3, 0.5)


def test_of_each_kind_the_newest_is_found_again(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path / "matching")
    assert kept.find("sketch", "1") is None
    kept.keep("sketch", "1", b"one")
    kept.keep("query", "1", b"")
    kept.keep("sketch", "2", b"two")
    again = KeptFiles(tmp_path / "matching")
    assert (again.find("sketch", "1"), again.find("sketch", "2"), again.find("query", "1")) == (None, b"two", b"")
    assert again.find("sketch", "") is None
    for path in (tmp_path / "matching").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("at", [0, 33, -1])
def test_a_damaged_entry_counts_as_none(tmp_path: Path, at: int) -> None:
    kept = KeptFiles(tmp_path)
    kept.keep("sketch", "key", b"content")
    content = bytearray((tmp_path / "sketch.bin").read_bytes())
    content[at] ^= 1
    (tmp_path / "sketch.bin").write_bytes(content)
    assert kept.find("sketch", "key") is None


def test_keys_are_not_mixed_up_with_contents(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path)
    kept.keep("sketch", "a", b"bc")
    assert kept.find("sketch", "ab") is None
    assert kept.find("sketch", "a") == b"bc"


def test_releases_are_appended_and_on_disk(tmp_path: Path) -> None:
    ReleaseLog(tmp_path / "releases.jsonl").record(EVENT)
    ReleaseLog(tmp_path / "releases.jsonl").record(EVENT)
    lines = (tmp_path / "releases.jsonl").read_text().splitlines()
    assert [TypeAdapter(GaussianRelease).validate_json(line) for line in lines] == [EVENT, EVENT]
    assert stat.S_IMODE((tmp_path / "releases.jsonl").stat().st_mode) == 0o600


def test_a_log_that_cannot_be_written_forbids_the_release(tmp_path: Path) -> None:
    (tmp_path / "releases.jsonl").mkdir()
    with pytest.raises(StateError, match="so nothing is released"):
        ReleaseLog(tmp_path / "releases.jsonl").record(EVENT)

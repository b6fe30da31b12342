"""SIGKILL at every instant that matters, and old copies put back: never noise that the ledger does not know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("killing.py")


def killed(folder: Path, *options: str) -> dict[str, Any]:
    """What killing.py found."""
    command = [sys.executable, str(SCRIPT), str(folder / "kills"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_some_boundaries_and_all_older_copies(tmp_path: Path) -> None:
    found = killed(tmp_path, "--put-back", "--every", "29")
    assert found["complaints"] == []
    assert found["boundaries"] > 80
    assert found["cases"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--put-back"]])
def test_every_boundary(tmp_path: Path, options: list[str]) -> None:
    found = killed(tmp_path, *options)
    assert found["complaints"] == []
    assert found["cases"] >= found["boundaries"] > 80


@pytest.mark.slow
@pytest.mark.parametrize("protection", ["reservation", "countersignature"])
def test_a_protection_that_is_taken_out_is_missed(tmp_path: Path, protection: str) -> None:
    """Paid after the noise; or without the server's memory: both are found out by the same cases."""
    assert killed(tmp_path, "--put-back", "--every", "9", "--without", protection)["complaints"]

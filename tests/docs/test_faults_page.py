"""docs/faults.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = " ".join((ROOT / "docs" / "faults.md").read_text().split())
FILES = sorted(set(re.findall(r"`(tests/[\w/]+\.py)", PAGE)))


@pytest.mark.parametrize("file", FILES)
def test_every_test_exists(file: str) -> None:
    names = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
    assert set(re.findall(rf"`{file}::(\w+)`", PAGE)) <= names


def test_the_page_names_something() -> None:
    assert len(FILES) >= 6

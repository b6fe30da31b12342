"""docs/attacks.md names tests and lines of code that exist."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = " ".join((ROOT / "docs" / "attacks.md").read_text().split())
TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
LINES = re.findall(r"`([\w/]+\.py)`, `(\w+)`: `([^`]+)`", PAGE)


def functions(file: Path) -> dict[str, str]:
    """The source of the functions in a file, by name."""
    source, found = file.read_text(), defaultdict[str, str](str)  # several classes may have a method of one name
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] += ast.get_source_segment(source, node) or ""
    return found


def test_the_page_names_something() -> None:
    assert len(TESTS) > 30
    assert len(LINES) == len(re.findall(r"`[\w/]+\.py`, `\w+`", PAGE)) > 30


@pytest.mark.parametrize(("file", "name"), sorted(set(TESTS)))
def test_tests_exist(file: str, name: str) -> None:
    assert name in functions(ROOT / file)


@pytest.mark.parametrize(("file", "function", "line"), sorted(set(LINES)))
def test_lines_exist(file: str, function: str, line: str) -> None:
    path = file if "/" in file else f"pfedsecure/secagg/{file}"
    assert line in functions(ROOT / path)[function]

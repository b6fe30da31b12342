"""Everything public in pfedsecure/ says what it is: the API reference has nothing else to show."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(file for file in (ROOT / "pfedsecure").rglob("*.py") if "v1" not in file.parts)  # v1: generated

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public(node: Documented, name: str) -> Iterator[tuple[str, Documented]]:
    """A module or class and all in it that others may use."""
    yield name, node
    for inner in node.body:
        if isinstance(inner, ast.ClassDef) and not inner.name.startswith("_"):
            yield from public(inner, f"{name}.{inner.name}")
        elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
            yield f"{name}.{inner.name}", inner


def undocumented(source: str, name: str) -> list[str]:
    return [found for found, node in public(ast.parse(source), name) if not (ast.get_docstring(node) or "").strip()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_everything_public_has_a_docstring(file: Path) -> None:
    assert undocumented(file.read_text(), str(file.relative_to(ROOT))) == []


def test_what_is_missing_is_found() -> None:
    source = (
        '"""Module."""\nclass A:\n    """Class."""\n    def f(self): ...\n    def _g(self): ...\n\nasync def h(): ...\n'
    )
    assert undocumented(source, "m") == ["m.A.f", "m.h"]
    assert undocumented("x = 1", "m") == ["m"]

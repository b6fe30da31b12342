"""Exit codes: each error class its own, and docs/exit-codes.md lists exactly these."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from pfedsecure import errors

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "exit-codes.md"


def classes() -> list[type[errors.PfedError]]:
    return errors.PfedError.__subclasses__()


def code_of(cls: type[errors.PfedError]) -> int:
    return cls.exit_code


def test_codes_are_distinct_and_leave_the_usual_ones_alone() -> None:
    codes = [cls.exit_code for cls in classes()]
    assert len(set(codes)) == len(codes)
    assert all(3 <= code < 126 for code in codes)


def test_the_page_has_a_heading_for_every_error_and_for_nothing_else() -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE.read_text(), re.MULTILINE)
    assert headings == ["Exit codes", *(f"{cls.exit_code} `{cls.__name__}`" for cls in sorted(classes(), key=code_of))]


def test_every_heading_has_what_happened_and_what_to_do() -> None:
    sections = re.split(r"^## .*$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert all(re.fullmatch(r"\s*\S.*\n\*\*What to do:\*\* \S.*\s*", section) for section in sections)


def assigned(statement: ast.stmt) -> str:
    """The first name that a statement gives a value to; none for other statements."""
    if isinstance(statement, ast.Assign):
        return ast.unparse(statement.targets[0])
    return ast.unparse(statement.target) if isinstance(statement, ast.AnnAssign) else ""


def test_no_exit_code_is_made_anywhere_else() -> None:
    """All of them stand in errors.py, where `classes` finds them; a class elsewhere may be a kind of one of those."""
    found = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for package in ("pfedsecure", "server", "client", "cli", "benchmarks")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path != Path(errors.__file__)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and ("PfedError" in map(ast.unparse, node.bases) or "exit_code" in map(assigned, node.body))
    }
    assert found == set()


def test_errors_come_back_as_the_class_that_left() -> None:
    for cls in classes():
        assert errors.by_wire_code(cls.wire_code()) is cls
    assert errors.by_wire_code("FromTheFuture") is errors.PfedError

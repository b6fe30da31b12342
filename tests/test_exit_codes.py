"""Exit codes: each error class its own, and docs/exit-codes.md lists exactly these."""

from __future__ import annotations

import re
from pathlib import Path

from pfedsecure import errors

PAGE = Path(__file__).resolve().parents[1] / "docs" / "exit-codes.md"


def classes() -> list[type[errors.PfedError]]:
    return errors.PfedError.__subclasses__()


def test_codes_are_distinct_and_leave_the_usual_ones_alone() -> None:
    codes = [cls.exit_code for cls in classes()]
    assert len(set(codes)) == len(codes)
    assert all(3 <= code < 126 for code in codes)


def test_page_lists_every_code_with_its_name() -> None:
    listed = {int(code): name for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)}
    assert listed == {cls.exit_code: cls.__name__ for cls in classes()}


def test_errors_come_back_as_the_class_that_left() -> None:
    for cls in classes():
        assert errors.by_wire_code(cls.wire_code()) is cls
    assert errors.by_wire_code("FromTheFuture") is errors.PfedError

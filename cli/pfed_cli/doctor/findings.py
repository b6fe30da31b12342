"""What a check found, and how a check that fails is told apart from a defect of the doctor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from pfedsecure.console import one_line
from pfedsecure.errors import PfedError

Level = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line: what was checked, how it is, what there is to say; for a `wrong` or `warning` also what to do."""

    check: str
    level: Level
    said: str


Check = Callable[[], Iterable[Finding]]


def run(name: str, check: Check) -> list[Finding]:
    """What a check finds; a PfedError, which says what to do, is what it finds wrong."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except PfedError as error:
        findings.append(Finding(name, "wrong", one_line(str(error))))
    return findings

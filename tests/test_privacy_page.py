"""docs/privacy.md and docs/ledger.md name tests that exist, and the first the plan's own defaults."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pfedsecure.plan import PrivacyPlan

ROOT = Path(__file__).resolve().parents[1]
PAGE = " ".join((ROOT / "docs" / "privacy.md").read_text().split())
LEDGER_PAGE = " ".join((ROOT / "docs" / "ledger.md").read_text().split())
FILES = sorted(set(re.findall(r"`(tests/[\w/]+\.py)", PAGE + LEDGER_PAGE)))


def functions(file: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}


def test_every_test_exists() -> None:
    assert len(FILES) > 8
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`((?:, `::\w+`)*)", PAGE + LEDGER_PAGE)
    assert len(named) > 24
    for file, name, more in named:
        wanted = {name, *re.findall(r"::(\w+)", more)}
        assert wanted <= functions(file), file


@pytest.mark.parametrize("file", FILES)
def test_every_file_exists(file: str) -> None:
    assert (ROOT / file).is_file()


def test_settings_are_those_of_the_plan() -> None:
    plan = PrivacyPlan()
    told = re.search(
        r"Clip ([\d.]+), (\d+) steps a round, (\d+) images a step on average, prompt lr ([\d.]+) and gate lr ([\d.]+)",
        PAGE,
    )
    assert told is not None
    assert [float(number) for number in told.groups()] == [
        plan.clip,
        plan.steps,
        plan.batch_size,
        plan.prompt_lr,
        plan.gate_lr,
    ]
    assert f"**`{plan.mechanism}`**, the default" in PAGE

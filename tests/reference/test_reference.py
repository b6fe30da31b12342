"""The project's modules against values of the published code, and the checker against a changed file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
REFERENCE = HERE / "pfedmoap_reference.npz"


def check(file: Path) -> tuple[int, dict[str, float]]:
    result = subprocess.run([sys.executable, HERE / "check.py", file], capture_output=True, text=True)
    assert result.stderr == ""
    return result.returncode, json.loads(result.stdout)["max_abs_error"]


@pytest.mark.slow
def test_agrees_with_the_published_code() -> None:
    code, errors = check(REFERENCE)
    assert code == 0
    with np.load(REFERENCE) as archive:
        assert {f"out/{name}" for name in errors} == {key for key in archive.files if key.startswith("out/")}


@pytest.mark.slow
def test_checker_notices_a_difference(tmp_path: Path) -> None:
    with np.load(REFERENCE) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays["out/logits_moe"] = arrays["out/logits_moe"] + np.float32(1e-3)
    changed = tmp_path / "changed.npz"
    np.savez(changed, **arrays)
    code, errors = check(changed)
    assert code == 1
    assert errors["logits_moe"] > 5e-4

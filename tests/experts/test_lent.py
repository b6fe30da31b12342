from __future__ import annotations

import numpy as np
import pytest

from pfedsecure.experts.lent import contexts, gate_outputs, lend, lent_shape
from pfedsecure.plan import Plan


def plan(form: str, classes: int = 3, gate_width: int = 8) -> Plan:
    return Plan.model_validate(
        {
            "class_names": [f"class {number}" for number in range(classes)],
            "prompt": {"context_length": 2},
            "mixture": {"form": form, "gate_width": gate_width},
        }
    )


def test_a_prompt_is_lent_as_it_is_in_the_papers_form() -> None:
    assert lent_shape(plan("paper"), (2, 10)) == (2, 10)
    experts = np.ones((4, 2, 10), np.float32)
    assert np.array_equal(contexts(plan("paper"), experts), experts)


@pytest.mark.parametrize(("width", "rows"), [(10, 3), (12, 2), (24, 1), (100, 1), (1, 24)])
def test_what_is_lent_in_an_ensemble_comes_back(width: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    made = [(rng.normal(size=(2, width)), rng.normal(size=(3, 8))) for _ in range(3)]
    experts = np.stack([lend(plan("ensemble"), c.astype(np.float32), m.astype(np.float32)) for c, m in made])

    assert experts.shape[1:] == lent_shape(plan("ensemble"), (2, width)) == (2 + rows, width)
    assert experts.dtype == np.float32
    np.testing.assert_array_equal(contexts(plan("ensemble"), experts), np.float32([c for c, _ in made]))
    np.testing.assert_array_equal(gate_outputs(plan("ensemble"), experts), np.float32([m for _, m in made]))


def test_nobody_lends_nothing() -> None:
    nothing = np.zeros((0, *lent_shape(plan("ensemble"), (2, 10))), np.float32)
    assert contexts(plan("ensemble"), nothing).shape == (0, 2, 10)
    assert gate_outputs(plan("ensemble"), nothing).shape == (0, 3, 8)

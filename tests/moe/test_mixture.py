from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pfedsecure.errors import PlanError
from pfedsecure.moe.mixture import pool


def test_pool_takes_every_strideth_coordinate_without_normalising() -> None:
    features = F.normalize(torch.arange(1.0, 9.0)[None], dim=-1)
    pooled = pool(features, 4)
    assert torch.equal(pooled, features[:, [0, 2, 4, 6]])
    assert pooled.norm() < 1


@pytest.mark.parametrize("width", [3, 16])
def test_pool_refuses_a_width_that_does_not_divide(width: int) -> None:
    with pytest.raises(PlanError, match=f"gate_width {width} does not divide the model's embedding width 8"):
        pool(torch.zeros(2, 8), width)

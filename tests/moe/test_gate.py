"""The gate against a slow, obvious attention, head by head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pfedsecure.moe.gate import Gate


def slow_mixture(gate: Gate, queries: Tensor, experts: Tensor) -> Tensor:
    """M (B, C, g) as the paper writes it: loops over images, classes and heads."""
    width = queries.shape[1]
    e = width // gate.heads
    rows = []
    for query in queries:
        for keys in experts:
            q, k, v = gate.W_q(query), gate.W_k(keys), gate.W_v(keys)
            heads = []
            for h in range(gate.heads):
                part = slice(h * e, (h + 1) * e)
                weights = (gate.attention_scale * k[:, part] @ q[part]).softmax(dim=0)
                heads.append(weights @ v[:, part])
            rows.append(gate.W_o(torch.cat(heads)))
    return torch.stack(rows).view(len(queries), len(experts), width)


def make(width: int, heads: int, seed: int) -> tuple[Gate, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return Gate(width, heads, 10.0, generator), generator


@pytest.mark.parametrize(("batch", "classes", "experts"), [(1, 1, 1), (3, 5, 1), (4, 2, 10), (0, 3, 4)])
def test_scores_equal_inner_products_with_the_attention_output(batch: int, classes: int, experts: int) -> None:
    gate, generator = make(16, 4, 3)
    queries = torch.randn(batch, 16, generator=generator)
    keys = torch.randn(classes, experts, 16, generator=generator)
    got = gate(queries, keys)
    assert got.shape == (batch, classes)
    if batch:
        want = torch.einsum("bg,bcg->bc", queries, slow_mixture(gate, queries, keys))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_the_slow_form() -> None:
    gate, generator = make(16, 4, 3)
    queries = torch.randn(3, 16, generator=generator)
    keys = torch.randn(2, 4, 16, generator=generator)
    weights = torch.randn(3, 2, generator=generator)
    fast = torch.autograd.grad((gate(queries, keys) * weights).sum(), list(gate.parameters()))
    slow_scores = torch.einsum("bg,bcg->bc", queries, slow_mixture(gate, queries, keys))
    slow = torch.autograd.grad((slow_scores * weights).sum(), list(gate.parameters()))
    for got, want in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_a_start_without_output_whose_values_tell_classes_apart(classes: int) -> None:
    """Centred values have unit length in every direction in which the text features differ at all."""
    gate, generator = make(16, 4, 1)
    experts = 0.3 * torch.randn(classes, 16, generator=generator) + 2.0
    gate.start_from(experts)
    queries = torch.randn(3, 16, generator=generator)
    assert torch.equal(gate(queries, experts[:, None]), torch.zeros(3, classes))
    values = gate.W_v(experts)
    torch.testing.assert_close(values.mean(dim=0), torch.zeros(16), atol=1e-5, rtol=0)
    lengths = torch.linalg.svdvals(values)
    rank = min(classes - 1, 16)
    torch.testing.assert_close(lengths[:rank], torch.ones(rank), atol=1e-4, rtol=0)
    torch.testing.assert_close(lengths[rank:], torch.zeros(len(lengths) - rank), atol=1e-4, rtol=0)


def test_a_start_leaves_out_directions_in_which_classes_hardly_differ() -> None:
    gate, generator = make(16, 4, 1)
    experts = torch.zeros(4, 16)
    experts[:, :2] = torch.tensor([[1.0, 0], [-1, 0], [0, 1e-3], [0, -1e-3]])
    gate.start_from(experts)
    torch.testing.assert_close(gate.W_v(experts)[:2, 0], torch.tensor([0.5**0.5, -(0.5**0.5)]))
    assert float(gate.W_v(experts)[2:].detach().abs().max()) < 1e-6
    gate.start_from(experts[:1].expand(3, -1))  # nothing differs at all
    assert float(gate.W_v.weight.detach().abs().max()) == 0
    gate.start_from(torch.randn(3, 16, generator=generator))
    assert all(bool(parameter.isfinite().all()) for parameter in gate.parameters())


def test_attention_is_a_distribution_over_experts() -> None:
    gate, generator = make(32, 8, 0)
    attention = gate.attention(torch.randn(3, 32, generator=generator), torch.randn(5, 4, 32, generator=generator))
    assert attention.shape == (3, 5, 8, 4)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(3, 5, 8))


def test_paper_size_has_66048_parameters() -> None:
    gate, _ = make(128, 8, 0)
    assert sum(parameter.numel() for parameter in gate.parameters()) == 66_048


def test_own_generator_decides_the_start() -> None:
    first, _ = make(16, 4, 1)
    torch.manual_seed(99)
    again, _ = make(16, 4, 1)
    other, _ = make(16, 4, 0)
    assert torch.equal(first.W_q.weight, again.W_q.weight)
    assert not torch.equal(first.W_q.weight, other.W_q.weight)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        Gate(10, 4, 10.0)

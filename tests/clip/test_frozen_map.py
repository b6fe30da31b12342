"""Linear maps with frozen weights: the same as torch's own, in every way that gradients are taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedsecure.clip import frozen_map
from pfedsecure.clip.frozen_map import MOST_ROWS, FrozenMap, _Ordered

INPUTS, OUTPUTS = 48, 80


@pytest.fixture(name="layer")
def make_layer() -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(name="products")
def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product by oneDNN from now on."""
    seen: list[int] = []
    inner = _Ordered.times

    def times(self: _Ordered, rows: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(len(rows))
        return inner(self, rows, bias)

    monkeypatch.setattr(_Ordered, "times", times)
    return seen


@pytest.mark.parametrize("n_rows", [1, 57, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_are_those_of_float64(
    layer: nn.Linear, products: list[int], n_rows: int, bias: bool
) -> None:
    b = layer.bias if bias else None
    x, exact = inputs(1, n_rows).requires_grad_(), inputs(1, n_rows).double().requires_grad_()
    weights = torch.randn(1, n_rows, OUTPUTS, generator=torch.Generator().manual_seed(2))
    got = FrozenMap(layer.weight, b)(x)
    want = F.linear(exact, layer.weight.double(), None if b is None else b.double())
    (got * weights).sum().backward()
    (want * weights.double()).sum().backward()
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-5, rtol=0)
    assert products == ([n_rows, n_rows] if n_rows <= MOST_ROWS else [])


def test_some_of_the_outputs(layer: nn.Linear) -> None:
    x = inputs(1, 9).requires_grad_()
    got = FrozenMap(layer.weight, layer.bias, slice(30, None))(x)
    torch.testing.assert_close(got, layer(x)[..., 30:], atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(gradient, layer.weight[30:].sum(dim=0).expand_as(x), atol=1e-5, rtol=0)


def test_weights_that_change_or_move_are_followed(layer: nn.Linear, products: list[int]) -> None:
    product, x = FrozenMap(layer.weight, layer.bias), inputs(1, 5)
    product(x)
    layer.weight.mul_(2)
    torch.testing.assert_close(product(x), layer(x), atol=1e-5, rtol=0)
    layer.weight.data = inputs(OUTPUTS, seed=9)
    torch.testing.assert_close(product(x), layer(x), atol=1e-5, rtol=0)
    assert len(products) == 3
    layer.double()  # oneDNN has none in float64
    torch.testing.assert_close(product(x.double()), layer(x.double()), atol=1e-12, rtol=0)
    assert len(products) == 3


def test_a_backward_pass_of_many_gradients_at_once(layer: nn.Linear) -> None:
    x = inputs(2, 6).requires_grad_()
    gradients = torch.randn(4, 2, 6, OUTPUTS, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad(FrozenMap(layer.weight, layer.bias)(x), x, gradients, is_grads_batched=True)
    torch.testing.assert_close(found, gradients @ layer.weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [0, 1])
def test_under_vmap_all_go_through_together(layer: nn.Linear, products: list[int], dim: int) -> None:
    product, x = FrozenMap(layer.weight, layer.bias), inputs(3, 7)

    def loss(one: Tensor) -> Tensor:
        return product(one[None]).square().sum()

    n_others = x.shape[1 - dim]
    found = torch.func.vmap(torch.func.grad(loss), in_dims=dim)(x)
    want = torch.stack([torch.func.grad(loss)(x.select(dim, n)) for n in range(x.shape[dim])])
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-5)
    assert products[:2] == [21, 21]  # forwards and back, not one by one
    assert set(products[2:]) == {n_others}


def test_gradients_of_gradients(layer: nn.Linear) -> None:
    def second(x: Tensor, product: FrozenMap | nn.Linear) -> Tensor:
        (first,) = torch.autograd.grad(product(x).pow(3).sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), x)
        return found

    x = inputs(1, 4).requires_grad_()
    found = second(x, FrozenMap(layer.weight, layer.bias))
    exact = second(x.detach().double().requires_grad_(), layer.double())
    torch.testing.assert_close(found.double(), exact, atol=1e-2, rtol=1e-4)
    assert exact.abs().max() > 10


def test_weights_that_are_trained_get_their_gradients(layer: nn.Linear, products: list[int]) -> None:
    layer.requires_grad_()
    FrozenMap(layer.weight, layer.bias)(inputs(1, 4)).sum().backward()
    assert layer.weight.grad is not None
    assert not products


def test_without_onednn_it_is_torch_s_product(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_map.torch.backends.mkldnn, "is_available", lambda: False)
    x = inputs(1, 5)
    assert torch.equal(FrozenMap(layer.weight, layer.bias)(x), layer(x))

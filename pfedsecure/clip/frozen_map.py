"""Linear maps with frozen weights, for few rows at a time.

A training step takes few tokens (a context and the tails of the class names: some sixty for ten classes) through the
same weights, forwards and back. A general product of matrices first copies the weights into the order in which its
kernel reads them, which for so few rows takes about as long as the product. oneDNN's products take weights that were
brought into that order once. Symbols: r rows, i inputs, o outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ROWS = 256
"""With more rows the order of the weights is a small part of the work, and the general product is the faster one."""

_USUAL_ROWS = 64
"""What the order is chosen for; any number of rows can be taken with it."""


class FrozenMap:
    """`x @ weight.T + bias` for `x (..., i)`, `weight (o, i)`, `bias (o,)` or None; gradients go to x alone.

    Of the outputs, `outputs` are computed. On a CPU in float32, and for at most `MOST_ROWS` rows, by oneDNN with
    weights in its own order: the same up to rounding, for twice the weights' memory more.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, outputs: slice = slice(None)) -> None:
        self._weight, self._bias, self._outputs = weight, bias, outputs
        self._forwards, self._backwards = _Ordered(self, transposed=False), _Ordered(self, transposed=True)

    @property
    def weight(self) -> Tensor:
        """As it is now: a model that moves to another device or type takes its weights along."""
        return self._weight[self._outputs]

    def __call__(self, x: Tensor) -> Tensor:
        bias = None if self._bias is None else self._bias[self._outputs]
        if self._weight.requires_grad or not _worth_it(x, self._weight):
            return F.linear(x, self.weight, bias)
        product: Tensor = _Product.apply(x, self._forwards, self._backwards, bias)
        return product


class _Ordered:
    """The weights of a map, or their transpose, in oneDNN's order; made when it is needed first."""

    def __init__(self, of: FrozenMap, *, transposed: bool) -> None:
        self._of, self._transposed = of, transposed
        self._made: tuple[tuple[int, int], Tensor] | None = None

    def times(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """`rows (r, i)` through the map, `(r, o)`."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._in_order(), bias, "none", [], "")
        return found

    def plainly(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same by torch's general product, which knows every kind of tensor."""
        return F.linear(x, self._matrix(), bias)

    def _matrix(self) -> Tensor:
        weight = self._of.weight
        return weight.T if self._transposed else weight

    def _in_order(self) -> Tensor:
        matrix = self._matrix()
        state = (matrix.data_ptr(), matrix._version)
        if self._made is None or self._made[0] != state:
            ordered = torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), _USUAL_ROWS)
            self._made = state, ordered
        found: Tensor = self._made[1]
        return found


class _Product(torch.autograd.Function):
    """`x (..., i)` through `there`, `(..., o)`; its gradient goes back through `back`."""

    @staticmethod
    def forward(x: Tensor, there: _Ordered, back: _Ordered, bias: Tensor | None) -> Tensor:
        if torch._C._functorch.is_legacy_batchedtensor(x):  # of is_grads_batched, which has no rule for oneDNN
            return there.plainly(x, bias)
        return there.times(x.flatten(0, -2), bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.there, ctx.back, _ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Product.apply(gradient, ctx.back, ctx.there, None), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, there: _Ordered, back: _Ordered, bias: Tensor | None
    ) -> tuple[Tensor, int | None]:
        if in_dims[0] is not None:
            x = x.movedim(in_dims[0], 0)
        product: Tensor = _Product.apply(x, there, back, bias)
        return product, None if in_dims[0] is None else 0


def _worth_it(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() <= MOST_ROWS * x.shape[-1]
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )

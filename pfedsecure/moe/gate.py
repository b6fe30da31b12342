"""The attention gate of pFedMoAP (Luo, Chen, Wu, ICLR 2025, section 3.3).

Symbols: g gate width, h heads, e = g / h, B images, C classes, J = K + 1 experts (the local prompt first).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_FAINTEST = 0.02
"""Of the direction in which text features of classes differ most: what is below is not stretched to the same length."""


class Gate(nn.Module):
    """Multi-head attention from an image to the experts of a class: four maps g x g with bias, no residual, no norm.

    Scores are multiplied by `attention_scale` (10 in the paper), not divided by sqrt(e). Keys are values.
    """

    def __init__(
        self, width: int, heads: int, attention_scale: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"gate width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.attention_scale = attention_scale
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(width, width) for _ in range(4))
        bound = 1 / math.sqrt(width)
        with torch.no_grad():
            for parameter in self.parameters():  # torch's own default for Linear, but from the given generator
                parameter.uniform_(-bound, bound, generator=generator)

    def attention(self, queries: Tensor, experts: Tensor) -> Tensor:
        """Attention weights `(B, C, h, J)` of pooled images `(B, g)` over pooled text features `(C, J, g)`."""
        q = self._split(self.W_q(queries))
        k = self._split(self.W_k(experts))
        return (self.attention_scale * torch.einsum("bhe,cjhe->bchj", q, k)).softmax(dim=-1)

    def forward(self, queries: Tensor, experts: Tensor) -> Tensor:
        """The inner products `<queries, M>`, shape `(B, C)`, where `M (B, C, g)` is the attention's output.

        M is never formed: with o the heads' outputs, `<q, W_o o + b> = <W_o' q, o> + <q, b>`, and o is a weighted sum
        of values, so the weights apply to inner products of values with `W_o' q`.
        """
        u = self._split(queries @ self.W_o.weight)
        v = self._split(self.W_v(experts))
        per_expert = torch.einsum("bhe,cjhe->bchj", u, v)
        return (self.attention(queries, experts) * per_expert).sum(dim=(-2, -1)) + (queries @ self.W_o.bias)[:, None]

    @torch.no_grad()
    def start_from(self, experts: Tensor) -> None:
        """Start with an output of zero, and with values that tell the classes of `experts (C, g)` well apart.

        Without their mean, the values of the classes are orthogonal and of about the same length, in as many directions
        as the pooled text features `experts` have; those in which they hardly differ are left out.
        """
        centre = experts.mean(dim=0)
        apart = (experts - centre).double()
        _, lengths, directions = torch.linalg.svd(apart, full_matrices=False)
        shares = lengths / lengths[0].clamp_min(torch.finfo(torch.float64).tiny)
        stretch = torch.where(shares > _FAINTEST, 1 / lengths, 0.0)
        weight = ((directions.T * stretch) @ directions).to(experts.dtype)
        self.W_v.weight.copy_(weight)
        self.W_v.bias.copy_(-weight @ centre)
        self.W_o.weight.zero_()
        self.W_o.bias.zero_()

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads

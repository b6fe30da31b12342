"""One residual block of a frozen CLIP transformer, its linear maps as `FrozenMap`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .frozen_map import FrozenMap


class FrozenAttention:
    """The maps of attention with h heads, which `PrefixAttention` puts together."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        weight, bias, width = source.in_proj_weight, source.in_proj_bias, source.embed_dim
        self.n_heads = source.num_heads
        self.qkv = FrozenMap(weight, bias)
        self.q = FrozenMap(weight, bias, slice(width))
        self.kv = FrozenMap(weight, bias, slice(width, None))
        self.out = FrozenMap(source.out_proj.weight, source.out_proj.bias)


class FrozenBlock:
    """The parts of `source`, an open_clip residual attention block: `x + ls_1(attn(ln_1(x)))`, then `after_attention`.

    They are the model's own: what moves or changes there does so here.
    """

    def __init__(self, source: Any) -> None:
        self.ln_1: nn.Module = source.ln_1
        self.attention = FrozenAttention(source.attn)
        self.ls_1: nn.Module = source.ls_1
        self._ln_2: nn.Module = source.ln_2
        self._mlp = [
            FrozenMap(part.weight, part.bias) if type(part) is nn.Linear else part for part in source.mlp.children()
        ]
        self._ls_2: nn.Module = source.ls_2

    def after_attention(self, x: Tensor) -> Tensor:
        """`x + ls_2(mlp(ln_2(x)))`."""
        inner: Tensor = self._ln_2(x)
        for part in self._mlp:
            inner = part(inner)
        scaled: Tensor = self._ls_2(inner)
        return x + scaled

"""Causal self-attention over one shared prefix and the tails of many classes, which do not meet.

Symbols: P prompts, C classes, t tokens of the longest tail, N of all tails together, d width, h heads, e = d / h.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrefixAttention:
    """Attention of rows of tokens `(P, n_prefix + N, d)`: the prefix first, then every class's tail.

    `eot (C,)` says which token of each tail is its last, so tails have `eot + 1` tokens each. Where they differ they
    are padded to t here, between the maps, which see nothing of that; what pads them is never looked at.
    """

    def __init__(self, n_prefix: int, n_tail: int, eot: Tensor, tokens: Tensor) -> None:
        """`tokens (N,)`: where the tokens up to EOT are among the `C * t` of padded tails."""
        self._n_prefix = n_prefix
        self._by_class = (len(eot), n_tail)
        device = eot.device
        self._after_in_prefix = ~torch.ones(n_prefix, n_prefix, dtype=torch.bool, device=device).tril()
        self._after_in_tail = ~torch.ones(n_tail, n_tail, dtype=torch.bool, device=device).tril()
        self._after_eot = torch.arange(n_tail, device=device) > eot[:, None]
        self.eot_rows = n_prefix - 1 + (eot + 1).cumsum(0)
        """Where each class's EOT is `(C,)`."""
        self._rows: Tensor | None = None
        if len(tokens) < self._after_eot.numel():
            prefix = torch.arange(n_prefix, device=device)
            self._rows = torch.cat([prefix, n_prefix + tokens])
            # What a padded tail has behind its end is its EOT again: any token would do.
            behind = (self.eot_rows - eot)[:, None] + torch.minimum(torch.arange(n_tail, device=device), eot[:, None])
            self._padded = torch.cat([prefix, behind.flatten()])

    def all_rows(self, attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        """What `attention` gives for every token of `x (P, n_prefix + N, d)`, in the same shape."""
        n_prefix, by_class = self._n_prefix, self._by_class
        q, k, v = (
            _heads(attention, part)  # (P, h, tokens, e)
            for part in self._pad(F.linear(x, attention.in_proj_weight, attention.in_proj_bias)).chunk(3, dim=-1)
        )
        q = q / math.sqrt(q.shape[-1])

        prefix_k, prefix_v = k[:, :, :n_prefix], v[:, :, :n_prefix]
        scores = (q[:, :, :n_prefix] @ prefix_k.transpose(-1, -2)).masked_fill(self._after_in_prefix, -math.inf)
        prefix_out = scores.softmax(dim=-1) @ prefix_v  # (P, h, n_prefix, e)

        tail_q, tail_k, tail_v = (part[:, :, n_prefix:] for part in (q, k, v))  # (P, h, C * t, e)
        to_prefix = (tail_q @ prefix_k.transpose(-1, -2)).unflatten(2, by_class)  # (P, h, C, t, n_prefix)
        to_tail = tail_q.unflatten(2, by_class) @ tail_k.unflatten(2, by_class).transpose(-1, -2)  # (P, h, C, t, t)
        to_tail = to_tail.masked_fill(self._after_in_tail, -math.inf)
        weights = torch.cat([to_prefix, to_tail], dim=-1).softmax(dim=-1)
        tail_out = weights[..., :n_prefix].flatten(2, 3) @ prefix_v + (
            weights[..., n_prefix:] @ tail_v.unflatten(2, by_class)
        ).flatten(2, 3)
        out = _merged(torch.cat([prefix_out, tail_out], dim=2))
        return _mapped(attention, out if self._rows is None else out.index_select(1, self._rows))

    def eot_only(self, attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        """What `attention` gives for the EOT of every class alone, `(P, C, d)`: all that the last block is for."""
        n_prefix, width = self._n_prefix, x.shape[-1]
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        q = _heads(attention, F.linear(x[:, self.eot_rows], weight[:width], None if bias is None else bias[:width]))
        k, v = (
            _heads(attention, part)
            for part in self._pad(F.linear(x, weight[width:], None if bias is None else bias[width:])).chunk(2, dim=-1)
        )
        q = q / math.sqrt(q.shape[-1])  # (P, h, C, e)

        tail_k, tail_v = (part[:, :, n_prefix:].unflatten(2, self._by_class) for part in (k, v))  # (P, h, C, t, e)
        to_prefix = q @ k[:, :, :n_prefix].transpose(-1, -2)  # (P, h, C, n_prefix)
        to_tail = (q.unsqueeze(3) @ tail_k.transpose(-1, -2)).squeeze(3)  # (P, h, C, t)
        to_tail = to_tail.masked_fill(self._after_eot, -math.inf)
        weights = torch.cat([to_prefix, to_tail], dim=-1).softmax(dim=-1)
        from_tail = (weights[..., n_prefix:].unsqueeze(3) @ tail_v).squeeze(3)
        return _mapped(attention, _merged(weights[..., :n_prefix] @ v[:, :, :n_prefix] + from_tail))

    def _pad(self, x: Tensor) -> Tensor:
        """`(P, n_prefix + N, …)` as `(P, n_prefix + C * t, …)`."""
        return x if self._rows is None else x.index_select(1, self._padded)


def _heads(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """`(P, tokens, d)` as `(P, h, tokens, e)`."""
    heads: Tensor = x.unflatten(-1, (attention.num_heads, -1))
    return heads.transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    """`(P, h, tokens, e)` as `(P, tokens, d)`."""
    return x.transpose(1, 2).flatten(2)


def _mapped(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Through the output map."""
    return F.linear(x, attention.out_proj.weight, attention.out_proj.bias)

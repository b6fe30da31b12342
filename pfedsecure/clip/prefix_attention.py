"""Causal self-attention over one shared prefix and the tails of many classes, which do not meet.

Symbols: P prompts, C classes, N tokens of all tails together, d width, h heads, e = d / h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedsecure.clip.class_tails import ClassTails, groups

TOKENS_TOGETHER = 96
"""Of tails whose queries meet each other's keys, only for these to be hidden again: a few large products of matrices
take less time than many that are as small as a class name."""
_ON_GPU = 512
"""The same where a product takes no longer for being larger, but one for each group in turn does."""
_ALIGNED = 16
"""Tokens are padded to a multiple of it, so that each matrix of a batch begins at a multiple of 64 bytes. A library of
linear algebra may round otherwise where it does not: in a batched backward pass an image's place among others would
then change the last bits of its gradient."""


def most_keys(n_prefix: int, device: torch.device) -> int:
    """How many keys a query meets at the most, but for a single tail that is longer than a group."""
    keys = n_prefix + _together(device)
    return keys + -keys % _ALIGNED


def _together(device: torch.device) -> int:
    return TOKENS_TOGETHER if device.type == "cpu" else _ON_GPU


class PrefixAttention:
    """Attention of rows of tokens `(P, n_prefix + N, d)`: the prefix first, then every class's tail.

    Tails are taken some at a time: the queries of such a group meet the keys of the prefix and of the group. `dtype` is
    that of queries and keys.
    """

    def __init__(self, n_prefix: int, classes: ClassTails, dtype: torch.dtype) -> None:
        self._n_prefix = n_prefix
        grouped = list(groups(classes.lengths, _together(classes.sos.device)))
        self._tokens = [sum(group) for group in grouped]
        self._classes = [len(group) for group in grouped]
        self.eot_rows = n_prefix + classes.ends
        """Where each class's EOT is `(C,)`."""
        prefix = torch.arange(-n_prefix, 0, device=classes.sos.device)
        self._owners = torch.cat([torch.full_like(prefix, -1), classes.owners])
        self._places = torch.cat([prefix, classes.places])
        starts = list(accumulate(self._tokens, initial=n_prefix))
        rows = torch.arange(len(self._places), device=prefix.device)
        keys = [torch.cat([rows[:n_prefix], rows[start:stop]]) for start, stop in pairwise(starts)]
        # The prefix asks with the first group: it is in front of its keys anyway.
        queries = [keys[0], *(key[n_prefix:] for key in keys[1:])]
        self._biases = [self._looking(*pair, dtype) for pair in zip(queries, keys, strict=True)]
        at_eot = self.eot_rows.split(self._classes)
        self._biases_at_eot = [self._looking(*pair, dtype) for pair in zip(at_eot, keys, strict=True)]

    def all_rows(self, attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        """What `attention` gives for every token of `x (P, n_prefix + N, d)`, in the same shape."""
        q, k, v = _heads(attention, F.linear(x, attention.in_proj_weight, attention.in_proj_bias), 3)
        asking = [self._n_prefix + self._tokens[0], *self._tokens[1:]]
        return _mapped(attention, self._attended(q, k, v, asking, self._biases))

    def eot_only(self, attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        """What `attention` gives for the EOT of every class alone, `(P, C, d)`: all that the last block is for."""
        width = x.shape[-1]
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        at_eot = F.linear(x[:, self.eot_rows], weight[:width], None if bias is None else bias[:width])
        (q,) = _heads(attention, at_eot, 1)
        k, v = _heads(attention, F.linear(x, weight[width:], None if bias is None else bias[width:]), 2)
        return _mapped(attention, self._attended(q, k, v, self._classes, self._biases_at_eot))

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, asking: Sequence[int], biases: Sequence[Tensor]) -> Tensor:
        """Heads' outputs `(P, h, queries, e)`; `asking` says how many queries each group has, one after the other."""
        scale = 1 / math.sqrt(q.shape[-1])
        qs, ks, vs = [q], [k], [v]
        if len(asking) > 1:
            # Split, not sliced: going back, each slice would be added to zeros of the whole.
            qs = list(q.split(list(asking), dim=2))
            ks, vs = (self._behind_prefix(part) for part in (k, v))
        outputs = []
        for n_queries, some_q, some_k, some_v, bias in zip(asking, qs, ks, vs, biases, strict=True):
            scores = _padded(some_q) @ _padded(some_k).transpose(-1, -2)  # (P, h, queries, keys)
            weights = torch.add(bias, scores, alpha=scale).softmax(dim=-1)
            outputs.append((weights @ _padded(some_v))[:, :, :n_queries])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _behind_prefix(self, part: Tensor) -> list[Tensor]:
        """Of keys or values `(P, h, n_prefix + N, e)` those of each group, behind those of the prefix."""
        prefix, *tails = part.split([self._n_prefix, *self._tokens], dim=2)
        return [torch.cat([prefix, tail], dim=2) for tail in tails]

    def _looking(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """0 where a row of `queries` looks at one of `keys`, -inf where it does not: `(queries, keys)`, padded.

        A token looks at the prefix and its own tail, at nothing that comes after it; nothing looks at what pads keys.
        """
        owners, places = self._owners[keys], self._places[keys]
        seen = ((owners == -1) | (owners == self._owners[queries, None])) & (places <= self._places[queries, None])
        biases = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -math.inf)
        biases = F.pad(biases, (0, -len(keys) % _ALIGNED), value=-math.inf)
        return F.pad(biases, (0, 0, 0, -len(queries) % _ALIGNED))


def _padded(x: Tensor) -> Tensor:
    """`(P, h, tokens, e)` with zeros behind its tokens."""
    missing = -x.shape[2] % _ALIGNED
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _heads(attention: nn.MultiheadAttention, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """`(P, tokens, parts * d)` as so many `(P, h, tokens, e)`."""
    heads: Tensor = x.unflatten(-1, (parts, attention.num_heads, -1))
    return heads.permute(2, 0, 3, 1, 4).unbind()


def _mapped(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Heads' outputs `(P, h, tokens, e)` through the output map: `(P, tokens, d)`."""
    return F.linear(x.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias)

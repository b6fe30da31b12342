"""The frozen text tower, evaluated for prompts that share one context.

Symbols: d text width, D embedding width, n context tokens, C classes, P prompts, t tail tokens (class name, ".", EOT).

A prompted sequence is SOS, ctx (n vectors), class name, ".", EOT. Two facts make it cheap, and neither changes the
result: attention is causal, so nothing after EOT matters and sequences end at the longest class name; and the states of
SOS + ctx are the same for every class, so these n + 1 tokens are computed once per prompt and each class's tail attends
to their keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedsecure.errors import BackboneError


class Tokenizer(Protocol):
    """The part of open_clip's tokenizer that prompts need."""

    sot_token_id: int
    eot_token_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class ClassTails:
    """What follows the context, per class: embeddings `(C, t, d)` and the index of EOT in each row `(C,)`.

    `sos` is the embedding `(d,)` that precedes the context.
    """

    sos: Tensor
    tails: Tensor
    eot: Tensor

    @classmethod
    def of_tokens(cls, sos: Tensor, rows: Sequence[Tensor]) -> ClassTails:
        """From one `(t_c, d)` array of embeddings per class, each ending with EOT."""
        eot = torch.tensor([len(row) - 1 for row in rows], device=sos.device)
        return cls(sos=sos, tails=nn.utils.rnn.pad_sequence(list(rows), batch_first=True), eot=eot)


class TextTower(nn.Module):
    """The causal text transformer of an open_clip model, frozen.

    Raises BackboneError for a tower that is not a plain causal CLIP transformer with the feature taken at EOT.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        source: Any = getattr(model, "text", model)
        pool_type = getattr(source, "pool_type", getattr(source, "text_pool_type", None))
        blocks = getattr(getattr(source, "transformer", None), "resblocks", None)
        if (
            blocks is None
            or pool_type not in ("argmax", "eos")
            or getattr(source, "attn_mask", None) is None
            or getattr(source, "cls_emb", None) is not None
            or getattr(source, "use_pad_mask", False)
            or not all(isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks)
        ):
            raise BackboneError(
                "this model's text tower is not a causal CLIP transformer read at EOT, which prompts need; "
                "choose a CLIP model such as ViT-B-16 or RN50"
            )
        self.token_embedding: nn.Embedding = source.token_embedding
        self.positional_embedding: nn.Parameter = source.positional_embedding
        self.blocks: nn.ModuleList = blocks
        self.ln_final: nn.Module = source.ln_final
        self.text_projection: nn.Parameter | nn.Linear | None = source.text_projection
        self.requires_grad_(False)

    @property
    def width(self) -> int:
        """d."""
        return int(self.positional_embedding.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """What the blocks compute in; in bfloat16 models embeddings and norms stay float32."""
        weight: Tensor = self.blocks[0].attn.in_proj_weight  # type: ignore[assignment,union-attr]
        return weight.dtype

    @property
    def max_tokens(self) -> int:
        """Longest sequence that has positional embeddings."""
        return int(self.positional_embedding.shape[0])

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Token embeddings `(len(tokens), d)`."""
        ids = torch.tensor(list(tokens), dtype=torch.long, device=self.positional_embedding.device)
        embeddings: Tensor = self.token_embedding(ids)
        return embeddings.to(self.dtype)

    def class_tails(self, tokenizer: Tokenizer, class_names: Sequence[str], context_length: int) -> ClassTails:
        """The tails of `class_names`, for contexts of n = `context_length`.

        Raises BackboneError when a name does not fit behind the context.
        """
        rows = []
        for name in class_names:
            tokens = [*tokenizer.encode(f"{name.replace('_', ' ')}."), tokenizer.eot_token_id]
            if 1 + context_length + len(tokens) > self.max_tokens:
                raise BackboneError(
                    f"class name {name!r} has {len(tokens)} tokens; with {context_length} of context that is over the "
                    f"model's {self.max_tokens}; shorten the name or prompt.context_length"
                )
            rows.append(self.embed(tokens))
        return ClassTails.of_tokens(self.embed([tokenizer.sot_token_id])[0], rows)

    def forward(self, contexts: Tensor, classes: ClassTails) -> Tensor:
        """Normalised text features `(P, C, D)`, float32 (float64 in a float64 tower), of contexts `(P, n, d)`."""
        n_prompts, n_context, width = contexts.shape
        n_classes, n_tail, _ = classes.tails.shape
        positions = self.positional_embedding.to(self.dtype)
        n_prefix = n_context + 1

        prefix = (
            torch.cat([classes.sos.expand(n_prompts, 1, width), contexts.to(self.dtype)], dim=1) + positions[:n_prefix]
        )
        tails = classes.tails + positions[n_prefix : n_prefix + n_tail]
        # One row of tokens per prompt, prefix first and all tails behind it, so that every linear map runs once.
        x = torch.cat([prefix, tails.reshape(1, -1, width).expand(n_prompts, -1, -1)], dim=1)
        block: Any
        for block in self.blocks:
            x = x + block.ls_1(self._attend(block.attn, block.ln_1(x), n_prefix, n_classes, n_tail))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))

        rows = n_prefix + torch.arange(n_classes, device=x.device) * n_tail + classes.eot
        at_eot = self.ln_final(x[:, rows])
        if isinstance(self.text_projection, nn.Linear):
            at_eot = self.text_projection(at_eot)
        elif self.text_projection is not None:
            at_eot = at_eot @ self.text_projection
        return F.normalize(at_eot.to(torch.promote_types(at_eot.dtype, torch.float32)), dim=-1)

    @staticmethod
    def _attend(attention: nn.MultiheadAttention, x: Tensor, n_prefix: int, n_classes: int, n_tail: int) -> Tensor:
        """Causal self-attention of `x (P, n_prefix + C * t, d)`, in which tails of different classes do not meet."""
        width = x.shape[-1]
        heads = attention.num_heads
        q, k, v = (
            part.unflatten(-1, (heads, width // heads)).transpose(1, 2)  # (P, h, tokens, e)
            for part in F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
        )
        q = q / math.sqrt(width // heads)

        prefix_k, prefix_v = k[:, :, :n_prefix], v[:, :, :n_prefix]
        causal = torch.ones(n_prefix, n_prefix, dtype=torch.bool, device=x.device).tril()
        scores = (q[:, :, :n_prefix] @ prefix_k.transpose(-1, -2)).masked_fill(~causal, float("-inf"))
        prefix_out = scores.softmax(dim=-1) @ prefix_v  # (P, h, n_prefix, e)

        tail_q, tail_k, tail_v = (part[:, :, n_prefix:] for part in (q, k, v))  # (P, h, C * t, e)
        by_class = (n_classes, n_tail)
        to_prefix = (tail_q @ prefix_k.transpose(-1, -2)).unflatten(2, by_class)  # (P, h, C, t, n_prefix)
        causal = torch.ones(n_tail, n_tail, dtype=torch.bool, device=x.device).tril()
        to_tail = tail_q.unflatten(2, by_class) @ tail_k.unflatten(2, by_class).transpose(-1, -2)  # (P, h, C, t, t)
        to_tail = to_tail.masked_fill(~causal, float("-inf"))
        weights = torch.cat([to_prefix, to_tail], dim=-1).softmax(dim=-1)
        tail_out = weights[..., :n_prefix].flatten(2, 3) @ prefix_v + (
            weights[..., n_prefix:] @ tail_v.unflatten(2, by_class)
        ).flatten(2, 3)

        out = torch.cat([prefix_out, tail_out], dim=2).transpose(1, 2).flatten(2)  # (P, tokens, d)
        return F.linear(out, attention.out_proj.weight, attention.out_proj.bias)

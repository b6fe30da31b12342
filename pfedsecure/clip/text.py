"""The frozen text tower, evaluated for prompts that share one context.

Symbols: d text width, D embedding width, n context tokens, C classes, P prompts, N tokens of the tails of all classes
(class name, ".", EOT).

A prompted sequence is SOS, ctx (n vectors), class name, ".", EOT. Some facts make it cheap, and none changes the
result: attention is causal, so nothing after EOT matters and every sequence ends there; and the states of SOS + ctx are
the same for every class, so these n + 1 tokens are computed once per prompt and each class's tail attends to their keys
and values. And what the last block makes of other tokens than EOT is not computed at all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pfedsecure.clip.class_tails import ClassTails
from pfedsecure.clip.prefix_attention import PrefixAttention, most_keys
from pfedsecure.errors import BackboneError

_TOKENS_AT_ONCE, _ON_GPU = 1024, 4096
"""Of all prompts and classes together; products of matrices with more rows are no faster, and what they make is more
than the allocator of a processor's memory keeps."""
_KEPT_PER_TOKEN = 19
"""Numbers that a block keeps of each token for the backward pass, in widths: inputs of both norms 2 (4 where they
compute in float32 and the tower does not), of an activation 8, queries, keys and values 3, and the latter two again,
behind the prefix, up to 4. The weights of attention come to it."""
_MEMORY_ON_CPU = 2**31
"""Bytes of them that are kept at most: what is free there is everybody's, and a container has less than it says."""


class Tokenizer(Protocol):
    """The part of open_clip's tokenizer that prompts need."""

    sot_token_id: int
    eot_token_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without start and end of text."""


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
    def embedding_width(self) -> int:
        """D, of the features of images too."""
        match self.text_projection:
            case None:
                return self.width
            case nn.Linear() as linear:
                return linear.out_features
            case parameter:
                return int(parameter.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """What the blocks compute in; in bfloat16 models embeddings and norms stay float32."""
        weight: Tensor = self.blocks[0].attn.in_proj_weight  # type: ignore[assignment,union-attr]
        return weight.dtype

    @property
    def max_tokens(self) -> int:
        """Longest sequence that has positional embeddings."""
        return int(self.positional_embedding.shape[0])

    @property
    def tokens_at_once(self) -> int:
        """How many tokens of prompts, prefixes and tails, `forward` takes at once at the most."""
        return _TOKENS_AT_ONCE if self.positional_embedding.device.type == "cpu" else _ON_GPU

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
        return ClassTails.of_rows(self.embed([tokenizer.sot_token_id])[0], rows)

    def forward(self, contexts: Tensor, classes: ClassTails) -> Tensor:
        """Normalised text features `(P, C, D)`, float32 (float64 in a float64 tower), of contexts `(P, n, d)`.

        Thousands of classes are taken some at a time. Where a backward pass would have to keep more than memory has
        room for, what the last ones computed is forgotten and computed again: the result is the same.
        """
        n_prompts, n_prefix = max(1, len(contexts)), contexts.shape[1] + 1
        going_back = torch.is_grad_enabled() and contexts.requires_grad
        room = self._room(n_prefix) if going_back else sys.maxsize
        parts = classes.split(min(self.tokens_at_once, room) // n_prompts - n_prefix)
        tokens = [n_prompts * (len(part.tokens) + n_prefix) for part in parts]
        if sum(tokens) > room:  # a part that is computed again needs some of it
            room -= max(tokens)
        features = [
            self._features(contexts, part)
            if kept <= room
            else checkpoint(self._features, contexts, part, use_reentrant=False)
            for part, kept in zip(parts, accumulate(tokens), strict=True)
        ]
        return features[0] if len(features) == 1 else torch.cat(features, dim=1)

    def _features(self, contexts: Tensor, classes: ClassTails) -> Tensor:
        n_prompts, n_context, width = contexts.shape
        positions = self.positional_embedding.to(self.dtype)
        n_prefix = n_context + 1

        prefix = (
            torch.cat([classes.sos.expand(n_prompts, 1, width), contexts.to(self.dtype)], dim=1) + positions[:n_prefix]
        )
        tails = classes.tokens + positions[n_prefix + classes.places]  # (N, d)
        # One row of tokens per prompt, prefix first and all tails behind it, so that every linear map runs once.
        x = torch.cat([prefix, tails.expand(n_prompts, -1, -1)], dim=1)
        attention = PrefixAttention(n_prefix, classes, self.dtype)
        *blocks, last = self.blocks
        block: Any
        for block in blocks:
            x = x + block.ls_1(attention.all_rows(block.attn, block.ln_1(x)))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        block = last  # of what it makes, EOT alone is looked at
        x = x[:, attention.eot_rows] + block.ls_1(attention.eot_only(block.attn, block.ln_1(x)))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))

        at_eot = self.ln_final(x)
        if isinstance(self.text_projection, nn.Linear):
            at_eot = self.text_projection(at_eot)
        elif self.text_projection is not None:
            at_eot = at_eot @ self.text_projection
        return F.normalize(at_eot.to(torch.promote_types(at_eot.dtype, torch.float32)), dim=-1)

    def _room(self, n_prefix: int) -> int:
        """Of how many tokens, prefixes and tails, a backward pass may keep what it needs."""
        device = self.positional_embedding.device
        heads: int = self.blocks[0].attn.num_heads  # type: ignore[assignment,union-attr]
        numbers = _KEPT_PER_TOKEN * self.width + heads * most_keys(n_prefix, device)
        memory: int = _MEMORY_ON_CPU
        if device.type == "cuda":  # half of what is free, and of what is kept there to be used again
            free, unused = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
            memory = (free + unused - torch.cuda.memory_allocated(device)) // 2
        return memory // (numbers * len(self.blocks) * self.dtype.itemsize)

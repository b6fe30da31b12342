"""How the published code trains, stated anew and plainly: what `pfed bench training` measures ours against.

At every step the image tower encodes the batch, each class's prompt is a sequence of 77 tokens of its own, the experts'
prompts are encoded again, and every class has its own copy of the queries. The result is the same as ours; nothing is
made slower than it has to be for that: what needs no gradient is computed without one.

Symbols: B images, C classes, D embedding width, d text width, K experts, n context tokens, g gate width, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pfed_client.trainer import cosine
from pfedsecure.clip.backbone import Backbone
from pfedsecure.moe.gate import Gate
from pfedsecure.plan import Plan
from pfedsecure.seeds import derive_seed


class FullTextEncoder:
    """open_clip's own text transformer over all 77 tokens of every class, with a context in the middle of them."""

    def __init__(self, backbone: Backbone, class_names: Sequence[str], context_length: int) -> None:
        self._source: Any = getattr(backbone.model, "text", backbone.model)
        rows = []
        for name in class_names:
            words = backbone.tokenizer.encode(f"{name.replace('_', ' ')}.")
            row = [backbone.tokenizer.sot_token_id, *[0] * context_length, *words, backbone.tokenizer.eot_token_id]
            rows.append(row + [0] * (len(self._source.positional_embedding) - len(row)))
        tokens = torch.tensor(rows, device=backbone.device)
        self._rows, self._eot = torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=1)
        with torch.no_grad():
            embedded = self._source.token_embedding(tokens)
        self._prefix, self._suffix = embedded[:, :1], embedded[:, 1 + context_length :]

    def __call__(self, context: Tensor) -> Tensor:
        """Normalised text features `(C, D)` of a context `(n, d)`."""
        source = self._source
        shared = context.expand(len(self._prefix), -1, -1)
        x = torch.cat([self._prefix, shared, self._suffix], dim=1) + source.positional_embedding
        x = source.ln_final(source.transformer(x, attn_mask=source.attn_mask))
        at_eot = x[self._rows, self._eot]
        projection = source.text_projection
        features = projection(at_eot) if isinstance(projection, nn.Linear) else at_eot @ projection
        return F.normalize(features, dim=-1)


def gate_by_class(gate: Gate, queries: Tensor, experts: Tensor) -> Tensor:
    """M `(B, C, g)` over `experts (C, J, g)` by attention in which each class has queries `(B, g)` of its own."""
    n_classes, batch = len(experts), len(queries)
    repeated = queries.repeat(n_classes, 1, 1)  # (C, B, g)

    def heads(x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (gate.heads, -1))
        return split.transpose(1, 2)  # (C, h, tokens, e)

    q, k, v = heads(gate.W_q(repeated)), heads(gate.W_k(experts)), heads(gate.W_v(experts))
    attention = (gate.attention_scale * q @ k.transpose(-1, -2)).softmax(dim=-1)
    out = (attention @ v).transpose(1, 2).reshape(n_classes, batch, -1)
    mixed: Tensor = gate.W_o(out)
    return mixed.transpose(0, 1)


def train(
    plan: Plan,
    backbone: Backbone,
    images: Sequence[Image.Image],
    labels: Tensor,
    *,
    name: str,
    context: Tensor,
    gate: Gate,
    experts: Tensor,
    steps: int,
    on_step: Callable[[float], None],
) -> None:
    """Train `gate` and a copy of `context (n, d)` beside `experts (K, n, d)`; `on_step(loss)` after every step.

    Batches, rates and optimisers are those of client `name` in round 1 of `plan`, of whose steps the first `steps` are
    taken. `labels (N,)` of the N `images`.
    """
    encoder = FullTextEncoder(backbone, plan.class_names, plan.prompt.context_length)
    training, width = plan.training, plan.mixture.gate_width
    ctx = nn.Parameter(context.clone())
    sgd = partial(torch.optim.SGD, momentum=training.momentum, weight_decay=training.weight_decay)
    by_prompt, by_gate = sgd([ctx], lr=training.prompt_lr), sgd(gate.parameters(), lr=training.gate_lr)
    generator = torch.Generator().manual_seed(derive_seed(plan.seed, name, "batches", 1))
    all_steps = math.ceil(len(images) / training.batch_size) * training.local_epochs
    encode: Callable[[Tensor], Tensor] = backbone.model.encode_image  # type: ignore[assignment]
    epochs = (
        torch.randperm(len(images), generator=generator).split(training.batch_size)
        for _ in range(training.local_epochs)
    )
    for done, batch in enumerate(islice(chain.from_iterable(epochs), steps)):
        by_prompt.param_groups[0]["lr"] = cosine(training.prompt_lr, done, all_steps)
        with torch.no_grad():
            pixels = torch.stack([backbone.preprocess(images[index]) for index in batch.tolist()])
            f = F.normalize(encode(pixels.to(backbone.device)), dim=-1)
            of_experts = torch.stack([encoder(expert) for expert in experts])  # (K, C, D)
        T = encoder(ctx)
        pooled = torch.cat([T[None], of_experts])[:, :, :: T.shape[1] // width].transpose(0, 1)  # (C, K + 1, g)
        queries = f[:, :: f.shape[1] // width]
        M = gate_by_class(gate, queries, pooled)
        s = backbone.logit_scale
        logits = s * (queries[:, None] * M).sum(dim=-1) + plan.mixture.lambda_ * s * f @ T.T
        loss = F.cross_entropy(logits, labels[batch].to(backbone.device))
        by_prompt.zero_grad()
        by_gate.zero_grad()
        loss.backward()
        by_prompt.step()
        by_gate.step()
        on_step(loss.item())

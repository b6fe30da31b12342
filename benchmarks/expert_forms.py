"""Forms of the mixture that were tried and did not win; `pfedsecure.moe` has the two that are in use.

Each is a trainer that differs from the real one in what it makes of gate and experts. Symbols: B images, C classes,
J = K + 1 prompts with the own first, h heads, g gate width, D embedding width; f image features, T_j text features,
q = pool(f).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pfed_client.local_model import Array
from pfed_client.trainer import Trainer
from pfedsecure.moe.mixture import MixtureModel, pool


def contrasted(keys: Tensor) -> Tensor:
    """Unit vectors `(C, J, g)` from the mean of the J keys to each: attention can tell these apart."""
    return F.normalize(keys - keys.mean(dim=1, keepdim=True), dim=-1)


class _Variant(MixtureModel):
    """Keeps the experts' text features whole."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.expert_features: Tensor = settings["expert_features"]

    def forward(self, features: Tensor) -> Tensor:
        text_features = self.text_features()
        scores = self.scores(features, pool(features, self.gate_width), text_features)
        return self.logit_scale * scores

    def scores(self, features: Tensor, queries: Tensor, text_features: Tensor) -> Tensor:
        """Logits `(B, C)` before the logit scale."""
        raise NotImplementedError


class Logits(_Variant):
    """The gate maps the own prompt alone; its attention, on contrasted keys, weighs the *logits* of all prompts:
    `<q, M(T_0)> + lambda * sum_j a_j f T_j'`, a the mean over heads.
    """

    def scores(self, features: Tensor, queries: Tensor, text_features: Tensor) -> Tensor:
        keys = self.expert_keys(text_features)
        attention = self.gate.attention(queries, contrasted(keys)).mean(dim=2)  # (B, C, J)
        prompts = torch.cat([text_features[None], self.expert_features])  # (J, C, D)
        mixed = (attention * torch.einsum("bd,jcd->bcj", features, prompts)).sum(dim=-1)
        own: Tensor = self.gate(queries, keys[:, :1])
        return own + self.lambda_ * mixed


class Contrast(_Variant):
    """The paper's form, but attention compares images with contrasted keys; values stay as they are."""

    def scores(self, features: Tensor, queries: Tensor, text_features: Tensor) -> Tensor:
        gate, keys = self.gate, self.expert_keys(text_features)
        attention = gate.attention(queries, contrasted(keys))
        values = gate.W_v(keys).unflatten(-1, (gate.heads, -1))
        output = gate.W_o(torch.einsum("bchj,cjhe->bche", attention, values).flatten(2))
        return torch.einsum("bg,bcg->bc", queries, output) + self.lambda_ * features @ text_features.T


class Differences(_Variant):
    """The paper's form on the own key and, for each expert, its difference to it, stretched to the own key's length."""

    def scores(self, features: Tensor, queries: Tensor, text_features: Tensor) -> Tensor:
        keys = self.expert_keys(text_features)
        own = keys[:, :1]
        apart = F.normalize(keys[:, 1:] - own, dim=-1) * own.norm(dim=-1, keepdim=True)
        mixed: Tensor = self.gate(queries, torch.cat([own, apart], dim=1))
        return mixed + self.lambda_ * features @ text_features.T


class Normalised(_Variant):
    """The paper's form with the cosine of image and gate output instead of their inner product."""

    def scores(self, features: Tensor, queries: Tensor, text_features: Tensor) -> Tensor:
        gate, keys = self.gate, self.expert_keys(text_features)
        values = gate.W_v(keys).unflatten(-1, (gate.heads, -1))
        output = gate.W_o(torch.einsum("bchj,cjhe->bche", gate.attention(queries, keys), values).flatten(2))
        cosine = torch.einsum("bg,bcg->bc", F.normalize(queries, dim=-1), F.normalize(output, dim=-1))
        return cosine + self.lambda_ * features @ text_features.T


class LogitsTrainer(Trainer):
    paper_mixture = Logits


class ContrastTrainer(Trainer):
    paper_mixture = Contrast


class DifferencesTrainer(Trainer):
    paper_mixture = Differences


class NormalisedTrainer(Trainer):
    paper_mixture = Normalised


class ShakenTrainer(Trainer):
    """No other form but a control: the start is a millionth larger, and what moves, rounding alone has moved."""

    def initial_context(self) -> Array:
        return (super().initial_context() * (1 + 1e-6)).astype(np.float32)


TRIED: dict[str, type[Trainer]] = {
    "logits": LogitsTrainer,
    "contrast": ContrastTrainer,
    "differences": DifferencesTrainer,
    "normalised": NormalisedTrainer,
}
"""By the names in rows."""

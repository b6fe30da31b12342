"""A client's model: local prompt, gate and frozen experts over frozen features, as in pFedMoAP.

Logits = s * <pool(f), M> + lambda * s * f T'. Without experts in a federation that has them (the first rounds), and in
PromptFL, it is s * f T' alone. Symbols: B images, C classes, D embedding width, K experts, n x d context, g gate width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pfedsecure.clip.class_tails import ClassTails
from pfedsecure.clip.text import TextTower
from pfedsecure.errors import PlanError
from pfedsecure.moe.gate import Gate


def pool(features: Tensor, width: int) -> Tensor:
    """Every (D / g)-th coordinate of normalised features `(..., D)`, giving `(..., g)`; not normalised again.

    Raises PlanError when g does not divide D.
    """
    stride, rest = divmod(features.shape[-1], width)
    if rest or not stride:
        raise PlanError(
            f"mixture.gate_width {width} does not divide the model's embedding width {features.shape[-1]}; "
            "choose a divisor"
        )
    return features[..., ::stride]


class PromptModel(nn.Module):
    """The prompt alone: trainable `ctx (n, d)`, logits `s * f T'`."""

    def __init__(self, tower: TextTower, classes: ClassTails, context: Tensor, logit_scale: float) -> None:
        super().__init__()
        self._tower = [tower]  # in a list: the frozen tower is shared, not a part of this model's state
        self._classes = classes
        self.logit_scale = logit_scale
        self.ctx = nn.Parameter(context.clone().float())
        self._known: Tensor | None = None

    def freeze(self, text_features: Tensor) -> None:
        """Use `text_features (C, D)`, computed before from the context as it is now: it is not trained any more."""
        self._known = text_features

    def text_features(self) -> Tensor:
        """`T (C, D)`, normalised."""
        return self.text_features_of(self.ctx[None])[0] if self._known is None else self._known

    def text_features_of(self, contexts: Tensor) -> Tensor:
        """`(P, C, D)`, normalised, of any contexts `(P, n, d)` before this model's class names."""
        features: Tensor = self._tower[0](contexts, self._classes)
        return features

    def logits(self, features: Tensor, text_features: Tensor) -> Tensor:
        """Logits `(B, C)` of normalised image features `(B, D)`, with `text_features (C, D)` for the prompt's own."""
        return self.logit_scale * features @ text_features.T

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(B, C)` of normalised image features `(B, D)`."""
        return self.logits(features, self.text_features())

    def predict(self, features: Tensor) -> Tensor:
        """`(B, C)`, whose softmax is the probabilities of the classes; not what is trained in every form."""
        logits: Tensor = self(features)
        return logits


class MixtureModel(PromptModel):
    """Local prompt, gate, and the features of K >= 0 experts `(K, C, D)`, computed once because they are frozen."""

    def __init__(
        self,
        tower: TextTower,
        classes: ClassTails,
        context: Tensor,
        logit_scale: float,
        gate: Gate,
        gate_width: int,
        expert_features: Tensor,
        lambda_: float,
    ) -> None:
        super().__init__(tower, classes, context, logit_scale)
        self.gate = gate
        self.gate_width = gate_width
        self.lambda_ = lambda_
        self._experts: Tensor
        experts = pool(expert_features, gate_width).transpose(0, 1)  # (C, K, g)
        self.register_buffer("_experts", experts, persistent=False)  # frozen, and no part of what is saved

    def expert_keys(self, text_features: Tensor) -> Tensor:
        """Pooled text features `(C, K + 1, g)`: the local prompt first, then the experts."""
        return torch.cat([pool(text_features, self.gate_width)[:, None], self._experts], dim=1)

    def logits(self, features: Tensor, text_features: Tensor) -> Tensor:
        """`(B, C)` of normalised image features `(B, D)` and text features `(C, D)` of the own prompt: the gate's inner
        products with the pooled images and lambda times the prompt's own, both times CLIP's logit scale.
        """
        mixed = self.gate(pool(features, self.gate_width), self.expert_keys(text_features))
        logits: Tensor = self.logit_scale * (mixed + self.lambda_ * features @ text_features.T)
        return logits

    @torch.no_grad()
    def expert_weights(self, features: Tensor) -> Tensor:
        """How much each expert weighs `(B, C, K + 1)`: attention averaged over heads; the local prompt first."""
        keys = self.expert_keys(self.text_features())
        attention: Tensor = self.gate.attention(pool(features, self.gate_width), keys)
        return attention.mean(dim=2)

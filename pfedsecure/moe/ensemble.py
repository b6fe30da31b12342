"""An ensemble of whole classifiers: the other form of the mixture, in which experts are worth their bytes.

In the paper's form the own gate looks at the experts' text features, which hardly differ, because all prompts of a
round started from the same one. What sets clients apart is in their gates. A gate with its own prompt alone has nothing
to choose from, every attention weight is 1, and its output is an affine map of the pooled text features:

    M_c = W_o (W_v pool(T_c) + b_v) + b_o

So prompt and M `(C, g)` are a whole classifier, and that is what peers lend here. Each client trains as if alone; when
it predicts, half of the probability is its own and half is the mean of its experts':

    p = (p_own + (p_1 + ... + p_K) / K) / 2,    p_k = softmax(s * <pool(f), M_k> + lambda * s * f T_k')

Symbols: B images, C classes, D embedding width, K experts, g gate width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pfedsecure.clip.class_tails import ClassTails
from pfedsecure.clip.text import TextTower
from pfedsecure.moe.gate import Gate
from pfedsecure.moe.mixture import MixtureModel, pool


class EnsembleModel(MixtureModel):
    """Local prompt and gate, trained as if alone, beside K >= 0 frozen peers.

    Of a peer there are its prompt's text features, all of them `(K, C, D)`, and its gate's output, `(K, C, g)`.
    """

    def __init__(
        self,
        tower: TextTower,
        classes: ClassTails,
        context: Tensor,
        logit_scale: float,
        gate: Gate,
        gate_width: int,
        expert_features: Tensor,
        gate_outputs: Tensor,
        lambda_: float,
    ) -> None:
        # The mixture that is trained has no experts: it is the gate alone.
        super().__init__(tower, classes, context, logit_scale, gate, gate_width, expert_features[:0], lambda_)
        self._peer_features = expert_features
        self._peer_outputs = gate_outputs

    @torch.no_grad()
    def gate_output(self) -> Tensor:
        """M `(C, g)`: what this client lends besides its prompt."""
        output: Tensor = self.gate.W_o(self.gate.W_v(pool(self.text_features(), self.gate_width)))
        return output

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """The logarithm of p, shape `(B, C)`."""
        own: Tensor = self(features).log_softmax(dim=-1)
        if not len(self._peer_outputs):
            return own
        attended = torch.einsum("bg,kcg->kbc", pool(features, self.gate_width), self._peer_outputs)
        by_prompt = torch.einsum("bd,kcd->kbc", features, self._peer_features)
        peers = (self.logit_scale * (attended + self.lambda_ * by_prompt)).log_softmax(dim=-1)
        mean = peers.logsumexp(dim=0) - math.log(len(peers))
        return torch.logaddexp(own, mean) - math.log(2)

    @torch.no_grad()
    def expert_weights(self, features: Tensor) -> Tensor:
        """`(B, C, K + 1)`: a half for the own classifier, which comes first, and equal parts of the other for peers."""
        n_peers = len(self._peer_outputs)
        weights = torch.full((n_peers + 1,), 1 / (2 * max(n_peers, 1)), device=features.device)
        weights[0] = 0.5 if n_peers else 1.0
        return weights.expand(len(features), len(self._classes.lengths), -1)

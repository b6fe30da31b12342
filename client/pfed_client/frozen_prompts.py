"""Text features of prompts that nobody trains, each computed once: an expert's, and one's own when it predicts.

Symbols: n x d context, C classes, D embedding width, K experts.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import torch
from torch import Tensor

from pfedsecure.clip.backbone import Backbone
from pfedsecure.plan import Plan


class FrozenPrompts:
    """The class names of a plan behind any prompt, and the text features of the `capacity` prompts used last.

    Prompts go through the text tower one by one, so that what comes out depends on the prompt alone and not on what was
    there already: a client by itself and many that share this object get the same features to the last bit. Threads
    may share it. Raises BackboneError when a class name does not fit behind the context.
    """

    def __init__(self, plan: Plan, backbone: Backbone, capacity: int) -> None:
        self.classes = backbone.tower.class_tails(backbone.tokenizer, plan.class_names, plan.prompt.context_length)
        self._tower = backbone.tower
        self._device = backbone.device
        self._capacity = capacity
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @torch.no_grad()
    def features(self, context: Tensor) -> Tensor:
        """`(C, D)`, normalised, of the context `(n, d)`; not to be changed."""
        key = hashlib.sha256(context.detach().cpu().contiguous().numpy().tobytes()).digest()
        with self._lock:
            found = self._features.get(key)
            if found is not None:
                self._features.move_to_end(key)
                return found
        computed: Tensor = self._tower(context[None].to(self._device), self.classes)[0]
        with self._lock:
            self._features[key] = computed
            while len(self._features) > self._capacity:
                self._features.popitem(last=False)
        return computed

    def of_all(self, contexts: Tensor) -> Tensor:
        """`(K, C, D)` of the contexts `(K, n, d)`; K may be 0."""
        if not len(contexts):
            with torch.no_grad():
                nothing: Tensor = self._tower(contexts.to(self._device), self.classes)
            return nothing
        return torch.stack([self.features(context) for context in contexts])

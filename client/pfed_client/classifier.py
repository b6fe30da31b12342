"""A personalised classifier: the model of one client, ready to be used on any image.

Symbols: B images, C classes, K experts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pfed_client.export import read_export
from pfed_client.local_model import LocalModel
from pfed_client.participant import agreed_backbone
from pfed_client.saved import SavedClient
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import FeatureSet
from pfedsecure.errors import CheckpointMismatch
from pfedsecure.plan import Plan


class Classifier:
    """Tells the plan's classes apart with a client's prompt, gate and experts."""

    def __init__(self, plan: Plan, backbone: Backbone, model: LocalModel) -> None:
        self.plan = plan
        self.backbone = backbone
        self.model = model

    @classmethod
    def from_state(cls, client: SavedClient, device: str = "cpu") -> Classifier:
        """The model of a state directory. Raises StateError, BackboneError or CheckpointMismatch."""
        backbone = agreed_backbone(client.plan, client.settings, device)
        return cls(client.plan, backbone, client.model(backbone.digest))

    @classmethod
    def from_export(
        cls, path: Path, *, pretrained: str | None = None, backbone_dir: Path | None = None, device: str = "cpu"
    ) -> Classifier:
        """The model that `pfed-client export` wrote; `pretrained`: where this machine has the backbone's weights.

        Raises StateError for a damaged file, BackboneError, or CheckpointMismatch for another backbone.
        """
        export = read_export(path)
        backbone = load_backbone(
            export.backbone, pretrained or export.pretrained, config_dir=backbone_dir, device=device
        )
        if backbone.text_digest != export.text_digest:
            raise CheckpointMismatch(f"{path}: made with other weights of {export.backbone}; give them as `pretrained`")
        return cls(export.plan, backbone, export.model)

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised features `(B, D)` of RGB images."""
        return F.normalize(self.backbone.encode_images(images), dim=-1)

    def probabilities(self, features: Tensor) -> Tensor:
        """Class probabilities `(B, C)`, in the order of the plan's class names."""
        return self._trainer(features).predict(self.model, features)

    def expert_weights(self, features: Tensor) -> Tensor | None:
        """How much each expert weighs per image and class `(B, C, 1 + K)`, the own prompt first, summing to 1.

        The gate's attention, averaged over heads. None where the prompt decides alone.
        """
        return self._trainer(features).explain(self.model, features)

    def _trainer(self, features: Tensor) -> Trainer:
        nothing = FeatureSet(features[:0], torch.zeros(0, dtype=torch.int64))
        return Trainer(self.plan, self.backbone, nothing, nothing, name="")

"""A client's model as one safetensors file that other programs can read.

Tensors: `context (n, d)`, `experts (K, n, d)` (in an ensemble with more rows), and the gate's parameters as
`gate.NAME`. Metadata: `class_names` (JSON list), `plan` (JSON), `backbone`, `pretrained` and `text_digest` of the
frozen model, `trained_round`, `n_train`, `format`, and `sha256` over all of it. The file holds the private gate: it is
for the client's own organisation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save

from pfed_client.files import write_atomically
from pfed_client.local_model import UNREADABLE, LocalModel, content_digest
from pfedsecure.errors import PlanError, StateError
from pfedsecure.plan import Plan

FORMAT = "pfedsecure-export-1"


@dataclass(frozen=True)
class Export:
    """What such a file holds. `backbone`, `pretrained` and `text_digest` name the frozen model."""

    plan: Plan
    model: LocalModel
    backbone: str
    pretrained: str
    text_digest: str

    def write(self, path: Path) -> None:
        """Create or replace `path` as a whole. Raises StateError."""
        metadata = {
            "format": FORMAT,
            "class_names": json.dumps(self.plan.class_names),
            "plan": self.plan.to_json(),
            "backbone": self.backbone,
            "pretrained": self.pretrained,
            "text_digest": self.text_digest,
            "trained_round": str(self.model.trained_round),
            "n_train": str(self.model.n_train),
        }
        metadata["sha256"] = content_digest(self.model.tensors, metadata)
        write_atomically(path, save(self.model.tensors, metadata))


def read_export(path: Path) -> Export:
    """Read what `Export.write` wrote. Raises StateError naming the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        if metadata.pop("sha256") != content_digest(tensors, metadata):
            raise ValueError("its content is not what was exported")
        model = LocalModel.of_tensors(
            tensors, trained_round=int(metadata["trained_round"]), n_train=int(metadata["n_train"]), start_digest=""
        )
        return Export(
            Plan.from_json(metadata["plan"]),
            model,
            backbone=metadata["backbone"],
            pretrained=metadata["pretrained"],
            text_digest=metadata["text_digest"],
        )
    except (*UNREADABLE, PlanError) as error:
        raise StateError(f"{path}: not an export of pfed-client ({error}); export the model again") from None

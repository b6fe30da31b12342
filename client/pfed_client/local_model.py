"""What a client owns between rounds: its prompt, its private gate, and the experts it last used. Never sent as a whole.

Symbols: n x d context, K experts, g gate width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pfed_client.files import write_atomically
from pfedsecure.errors import CheckpointMismatch, StateError

Array = NDArray[np.float32]

_METADATA_KEY = "pfedsecure"


@dataclass(frozen=True)
class LocalModel:
    """A client's model after its newest round.

    `context (n, d)`; `gate` maps parameter names to arrays (empty without a gate); `experts (K', n, d)` with K' <= K,
    in the order in which the gate saw them; `trained_round` is 0 before the first.
    """

    context: Array
    gate: dict[str, Array]
    experts: Array
    trained_round: int

    def save(self, path: Path, *, belongs_to: dict[str, str]) -> None:
        """Write atomically: after a crash there is the old file or the new one, whole.

        `belongs_to` says which plan and backbone the model is of; `load` compares it.
        """
        tensors = {"context": self.context, "experts": self.experts} | {f"gate.{k}": v for k, v in self.gate.items()}
        about = {"trained_round": self.trained_round, "belongs_to": belongs_to}
        # One entry: safetensors writes several in a random order, and the same model must be the same bytes.
        metadata = {_METADATA_KEY: json.dumps(about, sort_keys=True)}
        write_atomically(path, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata))

    @classmethod
    def load(cls, path: Path, *, belongs_to: dict[str, str]) -> LocalModel:
        """Read a saved model.

        Raises StateError when the file is damaged, CheckpointMismatch when it belongs to something else.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads((file.metadata() or {})[_METADATA_KEY])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            owner = dict(about["belongs_to"])
            model = cls(
                context=tensors.pop("context"),
                experts=tensors.pop("experts"),
                gate={key.removeprefix("gate."): value for key, value in sorted(tensors.items())},
                trained_round=int(about["trained_round"]),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"{path}: the saved model is damaged ({error}); restore it from a backup, or delete it to start anew"
            ) from None
        for key, expected in belongs_to.items():
            if owner.get(key) != expected:
                raise CheckpointMismatch(
                    f"{path}: the saved model is of another {key.replace('_', ' ')} "
                    f"({str(owner.get(key))[:12]}, now {expected[:12]}); use that one again, or another --state"
                )
        return model

"""What a client owns between rounds: its prompt, its private gate, and the experts it last used. Never sent as a whole.

Symbols: n x d context, K experts, g gate width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pfed_client.files import write_atomically
from pfedsecure.errors import CheckpointMismatch, StateError

Array = NDArray[np.float32]

_METADATA_KEY = "pfedsecure"

UNREADABLE = (OSError, SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a damaged safetensors file raises, with what is made of its content (RecursionError: nested JSON)."""


@dataclass(frozen=True)
class LocalModel:
    """A client's model after its newest round.

    `context (n, d)`; `gate` maps parameter names to arrays (empty without a gate); `experts (K', n, d)` with K' <= K,
    in the order in which the gate saw them, in an ensemble `(K', n + r, d)` as `pfedsecure.experts.lent` has it.
    `trained_round` is 0 before the first, and so is `n_train`, the number of images that it was trained on in that
    round. `start_digest`: SHA-256, in hex, of the global prompt that the round started from, as it came; empty before
    the first round.
    """

    context: Array
    gate: dict[str, Array]
    experts: Array
    trained_round: int
    n_train: int = 0
    start_digest: str = ""

    @property
    def tensors(self) -> dict[str, Array]:
        """By the names that they have in files."""
        tensors = {"context": self.context, "experts": self.experts} | {f"gate.{k}": v for k, v in self.gate.items()}
        return {key: np.ascontiguousarray(value) for key, value in tensors.items()}

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, NDArray[Any]], *, trained_round: int, n_train: int, start_digest: str
    ) -> LocalModel:
        """The model whose `tensors` are these. Raises KeyError or ValueError when they cannot be a model's."""
        for key, value in tensors.items():
            if value.dtype != np.float32 or not np.isfinite(value).all():
                raise ValueError(f"{key} is not of finite float32")
        context, experts = tensors["context"], tensors["experts"]
        if context.ndim != 2 or experts.ndim != 3 or experts.shape[2] != context.shape[1]:
            raise ValueError(f"context {context.shape} and experts {experts.shape} do not fit")
        for what, number in (("trained_round", trained_round), ("n_train", n_train)):
            if type(number) is not int or number < 0:
                raise ValueError(f"{what} is {number!r}")
        if not isinstance(start_digest, str):
            raise ValueError(f"start_digest is {start_digest!r}")
        gate = {k.removeprefix("gate."): v for k, v in sorted(tensors.items()) if k.startswith("gate.")}
        return cls(context, gate, experts, trained_round, n_train, start_digest)

    def save(self, path: Path, *, belongs_to: dict[str, str]) -> None:
        """Write atomically: after a crash there is the old file or the new one, whole.

        `belongs_to` says which plan and backbone the model is of; `load` compares it.
        """
        about: dict[str, Any] = {
            "trained_round": self.trained_round,
            "n_train": self.n_train,
            "start_digest": self.start_digest,
            "belongs_to": belongs_to,
        }
        about["sha256"] = content_digest(self.tensors, about)
        # One entry: safetensors writes several in a random order, and the same model must be the same bytes.
        metadata = {_METADATA_KEY: json.dumps(about, sort_keys=True)}
        write_atomically(path, save(self.tensors, metadata))

    @classmethod
    def load(cls, path: Path, *, belongs_to: dict[str, str]) -> LocalModel:
        """Read a saved model.

        Raises StateError when it is not what was saved, CheckpointMismatch when it belongs to something else.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads((file.metadata() or {})[_METADATA_KEY])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            if about.pop("sha256") != content_digest(tensors, about):
                raise ValueError("its content is not what was saved")
            owner = about["belongs_to"]
            if not isinstance(owner, dict):
                raise ValueError("it does not say what it belongs to")
            model = cls.of_tensors(
                tensors,
                trained_round=about["trained_round"],
                n_train=about["n_train"],
                start_digest=about["start_digest"],
            )
        except UNREADABLE as error:
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


def content_digest(tensors: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of `about` (JSON values) and of names, types, shapes and bytes of `tensors`.

    Against accidents alone: whoever can write the file can write a fitting digest.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode() + b"\n")
    for key, value in sorted(tensors.items()):
        digest.update(json.dumps([key, value.dtype.name, value.shape]).encode() + b"\n")
        digest.update(value.tobytes())
    return digest.hexdigest()

"""Compare the project's modules with values of the published code: `python tests/reference/check.py FILE.npz`.

Prints one JSON object `{"max_abs_error": {...}}` with every `out/*` entry of the file, and exits 0 only if all are
within 1e-5 (absolute, or relative to the largest entry where that is larger than 1). All sizes come from the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfed_client.trainer import make_optimizers
from pfedsecure.clip.class_tails import ClassTails
from pfedsecure.clip.text import TextTower
from pfedsecure.moe.gate import Gate
from pfedsecure.moe.mixture import MixtureModel, PromptModel, pool
from pfedsecure.plan import TrainingPlan

TOLERANCE = 1e-5


class Reference:
    """The project's modules, set to the weights and inputs of a reference file."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.meta = json.loads(str(self.arrays["meta"]))
        self.features = F.normalize(self.tensor("image_features"), dim=-1)
        self.labels = self.tensor("labels")
        self.logit_scale = float(np.exp(self.arrays["clip/logit_scale"]))
        self.tower = TextTower(self._clip())
        self.classes = self._classes()

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key].copy())

    def _clip(self) -> nn.Module:
        meta = self.meta
        length = self.arrays["clip/positional_embedding"].shape[0]
        model = open_clip.CLIP(
            embed_dim=meta["embed_dim"],
            vision_cfg={"image_size": 32, "patch_size": 32, "width": 64, "layers": 1},
            text_cfg={
                "context_length": length,
                "vocab_size": 1,  # the file holds the embeddings of its tokens, not the vocabulary's
                "width": meta["width"],
                "heads": meta["text_heads"],
                "layers": meta["layers"],
            },
            quick_gelu=True,
        )
        weights = {key.removeprefix("clip/"): self.tensor(key) for key in self.arrays if key.startswith("clip/")}
        _, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected:
            raise SystemExit(f"weights that the model does not know: {unexpected}")
        return model.eval()

    def _classes(self) -> ClassTails:
        prefix, suffix = self.tensor("prompt/token_prefix"), self.tensor("prompt/token_suffix")
        eot = self.tensor("prompt/tokens").argmax(dim=1) - 1 - self.meta["n_ctx"]
        if not (prefix == prefix[0]).all():
            raise SystemExit("the classes do not share one SOS embedding")
        return ClassTails.of_rows(prefix[0, 0], [row[: end + 1] for row, end in zip(suffix, eot, strict=True)])

    def prompt_model(self) -> PromptModel:
        return PromptModel(self.tower, self.classes, self.tensor("prompt/ctx_local"), self.logit_scale)

    def mixture_model(self) -> MixtureModel:
        meta = self.meta
        gate = Gate(meta["gate_dim"], meta["gate_heads"], meta["attention_scaling"])
        gate.load_state_dict({key.removeprefix("gate/"): self.tensor(key) for key in self.arrays if key[:5] == "gate/"})
        return MixtureModel(
            self.tower,
            self.classes,
            self.tensor("prompt/ctx_local"),
            self.logit_scale,
            gate=gate,
            gate_width=meta["gate_dim"],
            expert_features=self.expert_features(),
            lambda_=meta["lmbda"],
        )

    def expert_features(self) -> Tensor:
        features: Tensor = self.tower(self.tensor("prompt/ctx_nonlocal"), self.classes)
        return features


def compute(reference: Reference) -> Iterator[tuple[str, Tensor]]:
    """Every `out/*` entry, computed by the project's modules."""
    prompt = reference.prompt_model()
    with torch.no_grad():
        yield "text_features_local", prompt.text_features()
        yield "pooled_text_features_nonlocal", pool(reference.expert_features(), reference.meta["gate_dim"])
        yield "logits_local_only", prompt(reference.features)

    model = reference.mixture_model()
    logits = model(reference.features)
    yield "logits_moe", logits.detach()
    loss = F.cross_entropy(logits, reference.labels)
    yield "loss", loss.detach()

    def flat_gradient(image: int) -> Tensor:
        one = reference.mixture_model()
        F.cross_entropy(one(reference.features[image : image + 1]), reference.labels[image : image + 1]).backward()
        by_name = dict(one.named_parameters())
        order = ["ctx", *(f"gate.W_{m}.{kind}" for m in "qkvo" for kind in ("weight", "bias"))]
        return torch.cat([by_name[name].grad.flatten() for name in order])

    yield "per_sample_grads", torch.stack([flat_gradient(image) for image in range(len(reference.labels))])

    loss.backward()
    yield "grad_ctx", model.ctx.grad.clone()
    for name, parameter in model.gate.named_parameters():
        yield f"grad_gate/{name}", parameter.grad.clone()
    for optimizer in make_optimizers(model, TrainingPlan()):
        optimizer.step()
    yield "step1_ctx", model.ctx.detach()
    for name, parameter in model.gate.named_parameters():
        yield f"step1_gate/{name}", parameter.detach()


def compare(file: Path) -> tuple[dict[str, float], bool]:
    """Largest absolute error per `out/*` entry, and whether all of them are within the tolerance."""
    reference = Reference(file)
    expected = {key.removeprefix("out/"): value for key, value in reference.arrays.items() if key.startswith("out/")}
    errors = {}
    good = True
    for name, value in compute(reference):
        want = expected.pop(name)
        got = value.numpy()
        if got.shape != want.shape:
            raise SystemExit(f"{name}: shape {got.shape}, the file has {want.shape}")
        errors[name] = float(np.abs(got - want).max())
        good &= bool(errors[name] <= TOLERANCE * max(1.0, float(np.abs(want).max())))
    if expected:
        raise SystemExit(f"entries of the file that were not computed: {sorted(expected)}")
    return errors, good


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    max_abs_error, within = compare(Path(sys.argv[1]))
    print(json.dumps({"max_abs_error": max_abs_error}, indent=2))
    raise SystemExit(0 if within else 1)

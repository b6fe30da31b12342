"""Frozen CLIP models through open_clip: any of its names, tags and checkpoint forms, and the embedded tiny model."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pfedsecure.clip.config import TINY_FOLDER, TINY_NAME, TINY_WEIGHTS, model_config
from pfedsecure.clip.text import TextTower, Tokenizer
from pfedsecure.clip.torchscript import is_torchscript, read_tensors
from pfedsecure.errors import BackboneError, CheckpointMismatch, PlanError
from pfedsecure.plan import Plan
from pfedsecure.seeds import derive_seed

Precision = Literal["fp32", "bf16"]
CONTEXT_DEVIATION = 0.02
_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")


@dataclass(frozen=True)
class Backbone:
    """A frozen CLIP model. Symbols: D embedding width, d text width, n context tokens."""

    model: nn.Module
    tower: TextTower
    tokenizer: Tokenizer
    preprocess: Callable[[Image.Image], Tensor]
    device: torch.device
    precision: Precision
    logit_scale: float
    """exp of the trained logarithm: s in the formulas."""
    digest: str
    """SHA-256 of all weights."""
    text_digest: str
    """SHA-256 of the text tower's weights, rounded to bfloat16: what all clients of a federation must have in common.

    Rounded, so that clients may compute in either precision.
    """

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Raw image features `(N, D)`, float32, on the CPU."""
        return self.encode(torch.stack([self.preprocess(image) for image in images]))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Raw features `(N, D)`, float32, on the CPU, of images that are preprocessed already, `(N, 3, H, W)`."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        batch = pixels.to(self.device, dtype)
        encode: Callable[[Tensor], Tensor] = self.model.encode_image  # type: ignore[assignment]
        return encode(batch.contiguous(memory_format=torch.channels_last)).float().cpu()

    def words_context(self, words: str) -> Tensor:
        """The embeddings `(n, d)` of plain words as a context. Raises PlanError when there are none."""
        tokens = self.tokenizer.encode(words)
        if not tokens:
            raise PlanError("prompt.context_init holds no words; give some or leave it empty")
        return self.tower.embed(tokens).float()

    def initial_context(self, plan: Plan) -> NDArray[np.float32]:
        """The context `(n, d)` that a federation starts from, the same on every machine.

        N(0, 0.02) from the plan's seed; the words of `prompt.context_init`, if any, take the last places, next to the
        class name, rounded to bfloat16 as `digest` is: sketches of prompts are relative to it, and are compared to the
        last bit between clients of either precision. Raises PlanError when they are more than n.
        """
        shape = (plan.prompt.context_length, self.tower.width)
        generator = np.random.default_rng(derive_seed(plan.seed, "initial context"))
        context = (CONTEXT_DEVIATION * generator.standard_normal(shape)).astype(np.float32)
        if plan.prompt.context_init:
            words = self.words_context(plan.prompt.context_init)
            if len(words) > len(context):
                raise PlanError(
                    f"prompt.context_init has {len(words)} tokens, prompt.context_length is {len(context)}; "
                    "raise the length or use fewer words"
                )
            context[len(context) - len(words) :] = words.bfloat16().float().cpu().numpy()
        return context


def load_backbone(
    model: str,
    pretrained: str,
    *,
    config_dir: Path | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
) -> Backbone:
    """Build and freeze a CLIP model.

    `pretrained` is an open_clip tag, the path of a checkpoint (open_clip's form, OpenAI's TorchScript archive, or
    safetensors), "random" for untrained weights (timings only), or "embedded" for the tiny model of this package.
    `config_dir` holds open_clip configuration files of models of your own.

    Raises BackboneError (unknown model or tag, no download, no such device) or CheckpointMismatch.
    """
    model_config(model, config_dir)
    _register_configs(config_dir)
    target = _device(device)
    checkpoint = _checkpoint(model, pretrained)
    network, preprocess = _create(model, pretrained, checkpoint, precision)
    network.eval().requires_grad_(False)
    logit_scale: Any = network.logit_scale
    tower = TextTower(network)
    return Backbone(
        model=network.to(target).to(memory_format=torch.channels_last),
        tower=tower,
        tokenizer=_tokenizer(model),
        preprocess=preprocess,
        device=target,
        precision=precision,
        logit_scale=float(logit_scale.float().exp()),
        digest=_digest(network.state_dict().items()),
        text_digest=_digest(
            (name, tensor.bfloat16()) for name, tensor in [*tower.state_dict().items(), ("logit_scale", logit_scale)]
        ),
    )


def _register_configs(config_dir: Path | None) -> None:
    for folder in (TINY_FOLDER, config_dir):
        if folder is not None:
            open_clip.add_model_config(folder)


def _device(device: str) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BackboneError(f"--device {device}: cannot be used ({reason}); try --device cpu") from None
    return target


def _checkpoint(model: str, pretrained: str) -> Path | None:
    """The file that `pretrained` names, or None for a tag and for random weights."""
    if pretrained == "embedded":
        if model != TINY_NAME:
            raise BackboneError(f"only {TINY_NAME} has embedded weights; give --pretrained TAG or FILE for {model}")
        return TINY_WEIGHTS
    path = Path(pretrained)
    if path.is_file():
        return path
    if path.suffix in _CHECKPOINT_SUFFIXES or len(path.parts) > 1:
        raise BackboneError(f"--pretrained {pretrained}: no such file")
    return None


def _create(
    model: str, pretrained: str, checkpoint: Path | None, precision: Precision
) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    if checkpoint is None and pretrained != "random":
        tags = open_clip.list_pretrained_tags_by_model(model)
        if pretrained not in tags:
            known = ", ".join(tags) if tags else "none"
            raise BackboneError(
                f"--pretrained {pretrained}: neither a file nor a tag of {model} (tags: {known}); choose one of them, "
                "or give a file of weights"
            )
    # OpenAI's archives are of models with QuickGELU; open_clip knows that of its tags but not of files.
    archive = checkpoint is not None and is_torchscript(checkpoint)
    weights = None if checkpoint is not None or pretrained == "random" else pretrained
    try:
        with warnings.catch_warnings(), _without_log_warnings():
            # open_clip warns of a GELU that differs between tag and model name; the tag's is used, as it should be.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            network, _, preprocess = open_clip.create_model_and_transforms(
                model, pretrained=weights, precision=precision, force_quick_gelu=archive
            )
    except Exception as error:
        if weights is None:
            raise BackboneError(f"model {model} cannot be built: {_first_line(error)}") from None
        raise BackboneError(
            f"the weights {pretrained!r} of {model} could not be downloaded ({_first_line(error)}); without a network, "
            "copy the checkpoint here and give its path with --pretrained FILE"
        ) from None
    if checkpoint is not None:
        _load(network, checkpoint, model, archive)
    return network, preprocess


@contextmanager
def _without_log_warnings() -> Iterator[None]:
    """open_clip warns that a model without a tag has random weights; the checkpoint's are loaded right after."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _load(network: nn.Module, checkpoint: Path, model: str, archive: bool) -> None:
    try:
        if archive:
            tensors = read_tensors(checkpoint)
            wanted = network.state_dict().keys()
            network.load_state_dict({name: tensor.float() for name, tensor in tensors.items() if name in wanted})
        else:
            open_clip.load_checkpoint(network, str(checkpoint), weights_only=True)
    except RuntimeError as error:
        if "state_dict" in str(error) or "size mismatch" in str(error):
            detail = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), _first_line(error))
            raise CheckpointMismatch(
                f"{checkpoint}: not the weights of {model} ({detail[:160]}); give the checkpoint of this model"
            ) from None
        raise BackboneError(f"{checkpoint}: cannot be read as weights ({_first_line(error)})") from None
    except Exception as error:
        raise BackboneError(
            f"{checkpoint}: cannot be read as weights ({type(error).__name__}: {_first_line(error)}); expected "
            "safetensors, an open_clip checkpoint or OpenAI's archive"
        ) from None


def _tokenizer(model: str) -> Tokenizer:
    tokenizer: Any = open_clip.get_tokenizer(model)
    if not hasattr(tokenizer, "sot_token_id"):
        raise BackboneError(f"the tokenizer of {model} is not CLIP's, which prompts need; choose a CLIP model")
    return tokenizer  # type: ignore[no-any-return]


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

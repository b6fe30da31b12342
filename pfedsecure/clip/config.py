"""What can be known of a CLIP model from its configuration alone, without torch: the server needs no more than that."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pfedsecure.errors import BackboneError, PlanError
from pfedsecure.plan import Plan

TINY_FOLDER = Path(__file__).parent / "tiny"
TINY_NAME = "tiny-clip"
TINY_WEIGHTS = TINY_FOLDER / "tiny-clip.safetensors"

_MOST_TOKENS = 77
"""Of a text tower whose configuration does not say, as open_clip has it."""


def model_config(model: str, config_dir: Path | None = None) -> dict[str, Any]:
    """The open_clip configuration of `model`: from `config_dir`, of the embedded tiny model, or open_clip's own.

    Raises BackboneError when no folder has `model`.json, or it cannot be read.
    """
    folders = [folder for folder in (config_dir, TINY_FOLDER, _open_clip_configs()) if folder is not None]
    for folder in folders:
        file = folder / f"{model.replace('/', '-')}.json"
        if file.is_file():
            try:
                config = json.loads(file.read_text())
                config["text_cfg"]["width"], config["embed_dim"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BackboneError(f"{file}: not an open_clip model configuration ({error})") from None
            return dict(config)
    known = "" if config_dir is None else f" in {config_dir} or"
    raise BackboneError(
        f"model {model!r} is not known{known} to open_clip; check the plan's backbone.model, or give the folder of its "
        "configuration file with --backbone-dir"
    )


def context_shape(plan: Plan, config_dir: Path | None = None) -> tuple[int, int]:
    """Shape (n, d) of the plan's prompt.

    Raises PlanError when d is neither in the plan nor to be looked up, or the plan does not fit the model, as far as
    its configuration, where there is one here, tells.
    """
    length, width = plan.prompt.context_length, plan.backbone.text_width
    try:
        config = model_config(plan.backbone.model, config_dir)
    except BackboneError as error:
        if width is not None:  # a model of the members' own
            return length, width
        raise PlanError(f"backbone.text_width is not given and cannot be looked up: {error}") from None
    _check_sequence(plan, int(config["text_cfg"].get("context_length", _MOST_TOKENS)))
    if width is not None:
        return length, width
    width = int(config["text_cfg"]["width"])
    if plan.method == "pfedmoap":
        check_gate_width(plan, int(config["embed_dim"]))
    return length, width


def _check_sequence(plan: Plan, most: int) -> None:
    """Raises PlanError when context and some class name have more than `most` tokens, whatever the tokenizer.

    A word is at least one token, and so is the full stop behind a letter; how many there are the clients find out.
    """
    length, model = plan.prompt.context_length, plan.backbone.model
    tails = {name: len(name.replace("_", " ").split()) + name[-1:].isalnum() + 1 for name in plan.class_names}
    name = max(tails, key=lambda name: tails[name])
    if 1 + length + tails[name] > most:
        raise PlanError(
            f"prompt.context_length {length} does not fit {model}: with class name {name!r} a sequence has "
            f"{1 + length + tails[name]} tokens or more, its text tower takes {most}; shorten the name or the context"
        )


def check_gate_width(plan: Plan, embed_dim: int) -> None:
    """Raises PlanError when the plan's gate does not fit a model of embedding width D = `embed_dim`."""
    width = plan.mixture.gate_width
    if embed_dim % width:
        fitting = [g for g in (256, 128, 64, 32, 16, 8) if embed_dim % g == 0 and g % plan.mixture.gate_heads == 0]
        raise PlanError(
            f"mixture.gate_width {width} does not divide the embedding width {embed_dim} of {plan.backbone.model}; "
            f"change it in the plan, for example to {fitting[0] if fitting else embed_dim}"
        )


def _open_clip_configs() -> Path | None:
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model_configs"

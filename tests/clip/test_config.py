"""What the server knows of a model: its configuration, without torch."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pfedsecure.clip.config import context_shape, model_config
from pfedsecure.errors import BackboneError, PlanError
from pfedsecure.plan import Plan


def plan(model: str = "ViT-B-16", **changes: object) -> Plan:
    backbone = {"model": model, "text_width": changes.pop("text_width", None)}
    return Plan.model_validate({"class_names": ["a", "b"], "backbone": backbone} | changes)


@pytest.mark.parametrize(("model", "width"), [("ViT-B-16", 512), ("RN50x4", 640), ("ViT-L-14", 768), ("tiny-clip", 48)])
def test_width_of_known_models(model: str, width: int) -> None:
    assert context_shape(plan(model, mixture={"gate_width": 32})) == (16, width)


def test_model_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "ours.json").write_text(json.dumps({"embed_dim": 256, "text_cfg": {"width": 96}}))
    assert context_shape(plan("ours", prompt={"context_length": 3}), tmp_path) == (3, 96)
    with pytest.raises(PlanError, match=r"backbone\.text_width is not given and cannot be looked up"):
        context_shape(plan("ours"))
    assert context_shape(plan("ours", text_width=96)) == (16, 96)


@pytest.mark.parametrize("text_width", [None, 48])
def test_a_context_that_no_client_could_use_is_told_before_anybody_trains(text_width: int | None) -> None:
    """The tiny model takes 32 tokens: SOS, context, a name, a full stop, EOT."""
    changes = {"text_width": text_width, "mixture": {"gate_width": 32}}
    assert context_shape(plan("tiny-clip", prompt={"context_length": 28}, **changes)) == (28, 48)
    with pytest.raises(PlanError, match=r"context_length 29 does not fit tiny-clip: .* 33 tokens or more, .* takes 32"):
        context_shape(plan("tiny-clip", prompt={"context_length": 29}, **changes))
    long = plan("tiny-clip", prompt={"context_length": 28}, class_names=["a", "great_white shark"], **changes)
    with pytest.raises(PlanError, match=r"with class name 'great_white shark' a sequence has 34 tokens"):
        context_shape(long)


def test_a_context_that_the_server_refuses_no_client_could_use() -> None:
    """The rule here, without a tokenizer, against the tower's own."""
    from pfedsecure.clip.backbone import load_backbone

    backbone = load_backbone("tiny-clip", "embedded")
    names = ["a", "x+", "+", "great_white shark", "o'hare", "3d printer", "ice-cream"]
    refused = 0
    for name, length in itertools.product(names, range(23, 32)):
        made = plan("tiny-clip", class_names=["b", name], prompt={"context_length": length}, text_width=48)
        try:
            context_shape(made)
        except PlanError:
            refused += 1
            with pytest.raises(BackboneError, match="shorten the name"):
                backbone.tower.class_tails(backbone.tokenizer, made.class_names, length)
    assert refused > 10


def test_gate_that_does_not_fit_is_told_before_anybody_trains() -> None:
    with pytest.raises(PlanError, match=r"gate_width 128 does not divide the embedding width 64 of tiny-clip.*to 64"):
        context_shape(plan("tiny-clip"))
    assert context_shape(plan("tiny-clip", method="promptfl")) == (16, 48)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"embed_dim": 3}', '{"text_cfg": 5, "embed_dim": 3}', '{"text_cfg": {"width": 3}}']
)
def test_file_that_is_no_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "ours.json").write_text(content)
    with pytest.raises(BackboneError, match=r"ours\.json: not an open_clip model configuration"):
        model_config("ours", tmp_path)


def test_torch_is_not_needed() -> None:
    code = "import sys, pfedsecure.clip.config as c; c.model_config('RN50'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"

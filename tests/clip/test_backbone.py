"""Loading CLIP models: every checkpoint form, every way it can go wrong."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.errors import BackboneError, CheckpointMismatch, PlanError
from pfedsecure.plan import Plan

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1},
}


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    for name, changes in {"small-test-clip": {}, "other-test-clip": {"embed_dim": 48}}.items():
        (folder / f"{name}.json").write_text(json.dumps(CONFIG | changes))
    return folder


@pytest.fixture(scope="module")
def weights(config_dir: Path) -> dict[str, torch.Tensor]:
    open_clip.add_model_config(config_dir)
    torch.manual_seed(3)
    return open_clip.create_model("small-test-clip").state_dict()


def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


def load(config_dir: Path, checkpoint: Path | str, **options: str) -> Backbone:
    return load_backbone("small-test-clip", str(checkpoint), config_dir=config_dir, **options)  # type: ignore[arg-type]


def save_openai_archive(weights: dict[str, torch.Tensor], path: Path) -> None:
    """A TorchScript archive with OpenAI's names: half-precision weights and three integer buffers."""

    class Node(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Node()
    extras = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    for name, value in {**weights, **{key: torch.tensor(number) for key, number in extras.items()}}.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, Node())
            node = node._modules[parent]  # type: ignore[assignment]
        node.register_buffer(leaf, value.half() if value.is_floating_point() else value)
    torch.jit.save(torch.jit.trace(root, torch.zeros(1)), str(path))


def test_checkpoint_forms_give_the_same_model(
    config_dir: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(weights, tmp_path / "clip.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "clip.pt")
    from_safetensors = load(config_dir, tmp_path / "clip.safetensors")
    from_open_clip = load(config_dir, tmp_path / "clip.pt")
    assert from_safetensors.digest == from_open_clip.digest
    assert torch.equal(from_safetensors.encode_images(images()), from_open_clip.encode_images(images()))
    assert from_safetensors.logit_scale == pytest.approx(float(weights["logit_scale"].exp()))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_openai_archive_is_read_as_a_model_with_quick_gelu(
    config_dir: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_openai_archive(weights, tmp_path / "openai.pt")
    half = {key: value.half().float() for key, value in weights.items()}
    save_file(half, tmp_path / "half.safetensors")
    archive, plain = load(config_dir, tmp_path / "openai.pt"), load(config_dir, tmp_path / "half.safetensors")
    assert archive.digest == plain.digest
    assert any(isinstance(module, open_clip.transformer.QuickGELU) for module in archive.tower.modules())
    assert not any(isinstance(module, open_clip.transformer.QuickGELU) for module in plain.tower.modules())


def test_loading_a_file_says_nothing(
    config_dir: Path, weights: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """open_clip would warn of random weights, which the file's replace at once."""
    save_file(weights, tmp_path / "clip.safetensors")
    load(config_dir, tmp_path / "clip.safetensors")
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


class SelfStarter(nn.Module):
    """A TorchScript module whose code makes a file when `torch.jit.load` reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.zeros(1)
        self.training = False

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.x, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.x = torch.from_file("trap-sprung", True, 16)
        self.training = state[1]

    def forward(self) -> torch.Tensor:
        return self.x


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_code_of_an_archive_is_not_run(config_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trap, archive = tmp_path / "trap-sprung", tmp_path / "trap.pt"
    torch.jit.save(torch.jit.script(SelfStarter()), str(archive))
    torch.jit.load(str(archive))
    assert trap.exists(), "the archive was to run code when torch.jit.load reads it"
    trap.unlink()
    with pytest.raises(CheckpointMismatch, match="not the weights of small-test-clip"):
        load(config_dir, archive)
    assert not trap.exists()


def test_archive_that_names_a_function_is_refused(config_dir: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "trap sprung",)

    with zipfile.ZipFile(tmp_path / "trap.pt", "w") as archive:
        archive.writestr("trap/constants.pkl", b"")
        archive.writestr("trap/data.pkl", pickle.dumps(Trap()))
    with pytest.raises(BackboneError, match=r"cannot be read as weights.*it names .*, which weights do not need"):
        load(config_dir, tmp_path / "trap.pt")
    assert not (tmp_path / "trap sprung").exists()


def test_weights_of_another_model(config_dir: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "small.safetensors")
    with pytest.raises(
        CheckpointMismatch, match=r"small\.safetensors: not the weights of other-test-clip \(.*size mism"
    ):
        load_backbone("other-test-clip", str(tmp_path / "small.safetensors"), config_dir=config_dir)


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt"])
def test_damaged_checkpoint(config_dir: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(BackboneError, match=f"{name}: cannot be read as weights"):
        load(config_dir, tmp_path / name)


def test_pickled_code_is_not_run(config_dir: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (Path.touch, (tmp_path / "trap sprung",))  # type: ignore[return-value]

    torch.save({"state_dict": {"positional_embedding": Trap()}}, tmp_path / "trap.pt")
    with pytest.raises(BackboneError, match="cannot be read as weights"):
        load(config_dir, tmp_path / "trap.pt")
    assert not (tmp_path / "trap sprung").exists()


def test_missing_file(config_dir: Path) -> None:
    with pytest.raises(BackboneError, match=r"--pretrained nowhere/clip\.pt: no such file"):
        load(config_dir, "nowhere/clip.pt")


def test_unknown_model() -> None:
    with pytest.raises(BackboneError, match="model 'ViT-Z-99' is not known"):
        load_backbone("ViT-Z-99", "openai")


def test_unknown_tag_names_the_known_ones() -> None:
    with pytest.raises(
        BackboneError, match=r"neither a file nor a tag of ViT-B-32 \(tags: openai, .*laion2b_s34b_b79k"
    ):
        load_backbone("ViT-B-32", "opanai")


def test_download_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> str:
        raise OSError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    with pytest.raises(BackboneError, match=r"'openai' of RN50 could not be downloaded.*--pretrained FILE"):
        load_backbone("RN50", "openai")


def test_embedded_weights_are_the_tiny_models_only() -> None:
    with pytest.raises(BackboneError, match="only tiny-clip has embedded weights"):
        load_backbone("RN50", "embedded")


def test_unknown_device(config_dir: Path) -> None:
    with pytest.raises(BackboneError, match="--device cuda:7: cannot be used"):
        load_backbone("small-test-clip", "random", config_dir=config_dir, device="cuda:7")


def test_bfloat16_is_close_to_float32(config_dir: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "clip.safetensors")
    full = load(config_dir, tmp_path / "clip.safetensors")
    half = load(config_dir, tmp_path / "clip.safetensors", precision="bf16")
    assert half.tower.dtype == torch.bfloat16
    assert half.text_digest == full.text_digest
    assert half.digest != full.digest
    image_cosine = torch.cosine_similarity(full.encode_images(images()), half.encode_images(images()))
    assert image_cosine.min() > 0.999
    context = torch.from_numpy(full.initial_context(Plan(class_names=("dog", "cat"))))[None]
    tails = [backbone.tower.class_tails(backbone.tokenizer, ("dog", "cat"), 16) for backbone in (full, half)]
    text = [backbone.tower(context, tail) for backbone, tail in zip((full, half), tails, strict=True)]
    assert text[1].dtype == torch.float32
    assert not torch.equal(text[0], text[1])
    assert (text[0] * text[1]).sum(dim=-1).min() > 0.999


def test_initial_context_from_words_and_from_the_seed(config_dir: Path) -> None:
    backbone = load(config_dir, "random")
    words = backbone.words_context("a photo of a").bfloat16().float()  # the same for clients of either precision
    assert words.shape == (4, 64)

    def start(**prompt: object) -> np.ndarray:
        return backbone.initial_context(Plan(class_names=("a", "b"), prompt=prompt))  # type: ignore[arg-type]

    drawn = start(context_length=16)
    assert drawn.shape == (16, 64)
    assert 0.015 < drawn.std() < 0.025
    mixed = start(context_length=6, context_init="a photo of a")
    np.testing.assert_array_equal(mixed[2:], words.numpy())  # next to the class name
    np.testing.assert_array_equal(mixed[:2], start(context_length=6)[:2])
    with pytest.raises(PlanError, match=r"context_init has 4 tokens, prompt\.context_length is 3"):
        start(context_length=3, context_init="a photo of a")
    other = backbone.initial_context(Plan(class_names=("a", "b"), seed=0))
    assert not np.array_equal(drawn, other)
    np.testing.assert_array_equal(other, backbone.initial_context(Plan(class_names=("a", "b"), seed=0)))


def test_false_is_not_a_word_unless_it_is_given() -> None:
    """Published code turns `--ctx_init False` into a prompt that starts with the word "False"."""
    assert Plan(class_names=("a", "b")).prompt.context_init == ""
    with pytest.raises(ValueError, match="context_init"):
        Plan.model_validate({"class_names": ["a", "b"], "prompt": {"context_init": False}})

"""The embedded backbone: what the package ships, and the script that it came from."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from pfedsecure.clip.config import TINY_FOLDER, TINY_NAME, TINY_WEIGHTS
from pfedsecure.clip.tiny import pretrain
from pfedsecure.clip.tiny.captions import CONDITION_WORDS, caption
from pfedsecure.clip.tiny.glyphs import CANVAS, FONTS, GLYPHS, INK, N_DIGITS, draw, drawings
from pfedsecure.clip.tiny.writing import RATES, Sampler
from pfedsecure.data.digits import CLASS_NAMES, CONDITIONS, digit_images

STEPS = 2


@pytest.fixture(scope="module")
def tiny() -> open_clip.CLIP:
    open_clip.add_model_config(TINY_FOLDER)
    model, _, _ = open_clip.create_model_and_transforms(TINY_NAME, pretrained=str(TINY_WEIGHTS))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    with safe_open(TINY_WEIGHTS, "pt") as file:
        return dict(json.loads(file.metadata()["pretraining"]))


def train_briefly() -> open_clip.CLIP:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "BATCH", 16)
        return pretrain.pretrain(seed=7, steps=STEPS, progress=lambda line: None)


@pytest.fixture(scope="module")
def briefly_trained() -> open_clip.CLIP:
    return train_briefly()


def accuracy(model: open_clip.CLIP, condition: str | None, indices: range) -> float:
    """Zero-shot accuracy on some of scikit-learn's scans, by open_clip's own functions."""
    _, _, preprocess = open_clip.create_model_and_transforms(TINY_NAME, pretrained=str(TINY_WEIGHTS))
    images = torch.stack([preprocess(image) for image in digit_images(condition, indices)])
    texts = open_clip.get_tokenizer(TINY_NAME)([f"a photo of the digit {name}." for name in CLASS_NAMES])
    similarity = model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T
    return float(np.mean(similarity.argmax(1).numpy() == load_digits().target[indices]))


def test_open_clip_loads_it_without_a_complaint(caplog: pytest.LogCaptureFixture) -> None:
    open_clip.add_model_config(TINY_FOLDER)
    with caplog.at_level(logging.WARNING):
        open_clip.create_model_and_transforms(TINY_NAME, pretrained=str(TINY_WEIGHTS))
    assert caplog.records == []
    assert TINY_WEIGHTS.stat().st_size < 7_000_000


@pytest.mark.slow
def test_zero_shot_works_and_leaves_room(tiny: open_clip.CLIP, facts: dict[str, object]) -> None:
    measured = accuracy(tiny, None, range(len(load_digits().target)))
    assert measured == pytest.approx(facts["zero_shot_accuracy"], abs=2e-3)
    assert measured == pytest.approx(pretrain.zero_shot_accuracy(tiny))
    assert 0.65 < measured < 0.85


@pytest.mark.slow
def test_zero_shot_survives_writing_conditions_and_gains_by_none(tiny: open_clip.CLIP) -> None:
    some = range(0, 1797, 3)
    clean = accuracy(tiny, None, some)
    written = {condition: accuracy(tiny, condition, some) for condition in CONDITIONS}
    assert all(0.5 < value < clean + 0.03 for value in written.values()), written


def test_prompts_can_express_a_writing_condition(tiny: open_clip.CLIP) -> None:
    """Images in a condition lie nearer to a caption that tells it than clean ones do, for every condition."""
    tokenizer = open_clip.get_tokenizer(TINY_NAME)
    preprocess = open_clip.image_transform(32, is_train=False)
    words = ("inverted", "rotated", "thick", "blurred", "noisy")
    texts = tiny.encode_text(tokenizer([f"a photo of the {word} digit." for word in words]), normalize=True)
    affinity = [
        (tiny.encode_image(torch.stack([preprocess(image) for image in digit_images(condition, range(200))])) @ texts.T)
        .mean(0)
        .numpy()
        for condition in (None, *CONDITIONS)
    ]
    gain = np.asarray(affinity[1:]) - affinity[0]
    assert (np.diag(gain) > 0).all()


def test_unseen_words_keep_their_initial_embeddings(tiny: open_clip.CLIP, facts: dict[str, object]) -> None:
    initial = pretrain.new_model(int(str(facts["seed"]))).token_embedding.weight
    tokens = open_clip.get_tokenizer(TINY_NAME)(["giraffe violin cathedral"])[0, 1:4]
    torch.testing.assert_close(tiny.token_embedding.weight[tokens], initial[tokens], atol=1e-4, rtol=1e-3)
    trained = open_clip.get_tokenizer(TINY_NAME)(["photo digit three"])[0, 1:4]
    assert ((tiny.token_embedding.weight[trained] - initial[trained]).norm(dim=1) > 0.1).all()


def test_every_font_draws_every_glyph() -> None:
    pages = drawings()
    assert pages.shape == (len(GLYPHS), len(FONTS), CANVAS, CANVAS)
    assert len({(glyph.kind, glyph.name) for glyph in GLYPHS}) == len(GLYPHS)
    for page in pages.flatten(0, 1):
        rows, columns = page.nonzero().unbind(1)
        longer = max(rows.max() - rows.min(), columns.max() - columns.min()) + 1
        assert longer in (INK - 1, INK)  # an edge can be too faint to count
    flat = pages[:N_DIGITS].flatten(2)
    for font in range(len(FONTS)):
        distance = torch.cdist(flat[:, font], flat[:, font]) + 1e9 * torch.eye(N_DIGITS)
        assert distance.min() > 5  # no two digits look alike: none is the box of a missing glyph


def test_drawing_is_repeatable() -> None:
    first, again = (np.asarray(draw("7", "cmr10.ttf")) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, np.asarray(draw("7", "cmtt10.ttf")))


def test_sampler_follows_its_seed() -> None:
    first, again, other = (Sampler(seed).draw(32) for seed in (3, 3, 4))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.conditions, again.conditions)
    assert not torch.equal(first.images, other.images)


def test_conditions_are_really_in_the_images() -> None:
    batch = Sampler(0).draw(2048)
    assert batch.images.shape == (2048, 1, 32, 32)
    assert batch.images.min() >= 0
    assert batch.images.max() <= 1
    rates = batch.conditions.float().mean(0)
    assert torch.allclose(rates, torch.tensor(tuple(RATES.values())), atol=0.04)
    on = dict(zip(RATES, batch.conditions.unbind(1), strict=True))
    upright = ~on["inverted"]
    ink = batch.images.mean((1, 2, 3))
    roughness = batch.images.diff(dim=3).abs().amax((1, 2, 3))
    assert ink[on["inverted"]].mean() > ink[upright].mean() + 0.2
    assert ink[upright & on["thick"]].mean() > ink[upright & ~on["thick"]].mean()
    assert ink[upright & on["thin"]].mean() < ink[upright & ~on["thin"]].mean()
    assert ink[upright & on["small"]].mean() < ink[upright & ~on["small"]].mean()
    assert roughness[on["noisy"]].mean() > roughness[~on["noisy"]].mean()
    still = ~on["noisy"]
    assert roughness[still & on["blurred"]].mean() < roughness[still & ~on["blurred"]].mean()


def test_captions_tell_the_truth_in_many_lengths() -> None:
    assert set(CONDITION_WORDS) == set(RATES)
    rng = random.Random(0)
    tokenizer = open_clip.get_tokenizer(TINY_NAME)
    lengths = set()
    for _ in range(400):
        conditions = rng.sample(sorted(CONDITION_WORDS), rng.choice((0, 1, 2, 3)))
        glyph = rng.choice(GLYPHS)
        text = caption(glyph, conditions, rng)
        assert re.search(rf"\b{re.escape(glyph.name)}\.$", text)
        assert "  " not in text
        lies = {word for name, words in CONDITION_WORDS.items() if name not in conditions for word in words}
        assert not [word for word in lies if re.search(rf"\b{word}\b", text)]
        lengths.add(int(tokenizer([text]).argmax()) + 1)
    assert min(lengths) <= 5
    assert 20 <= max(lengths) < tokenizer.context_length
    assert len(lengths) > 12


def test_text_without_padding_gives_the_same_features(tiny: open_clip.CLIP) -> None:
    tokens = open_clip.get_tokenizer(TINY_NAME)(["three.", "a photo of the noisy digit eight."])
    torch.testing.assert_close(pretrain.encode_text(tiny, tokens), tiny.encode_text(tokens, normalize=True))


def test_training_sees_pixels_as_open_clip_prepares_them() -> None:
    _, _, preprocess = open_clip.create_model_and_transforms(TINY_NAME, pretrained=str(TINY_WEIGHTS))
    grey = Sampler(1).draw(1).images
    image = Image.fromarray((grey[0, 0] * 255).round().byte().numpy())
    torch.testing.assert_close(pretrain.pixels(grey)[0], preprocess(image), atol=0.01, rtol=0)


@pytest.mark.slow
def test_pretraining_is_deterministic(briefly_trained: open_clip.CLIP, tmp_path: Path) -> None:
    again = train_briefly()
    accuracies = [
        pretrain.save(model, tmp_path / f"{name}.safetensors", seed=7, steps=STEPS)
        for name, model in (("first", briefly_trained), ("again", again))
    ]
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    with safe_open(tmp_path / "first.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["pretraining"])
    assert (facts["seed"], facts["steps"], facts["torch"]) == (7, STEPS, str(torch.__version__))
    assert facts["zero_shot_accuracy"] == accuracies[0] == accuracies[1]


def test_pretraining_moves_only_words_that_captions_hold(briefly_trained: open_clip.CLIP) -> None:
    initial = pretrain.new_model(7).token_embedding.weight
    moved = (briefly_trained.token_embedding.weight != initial).any(1)
    word, photo = open_clip.get_tokenizer(TINY_NAME)(["giraffe photo"])[0, 1:3].tolist()
    assert moved[photo]
    assert not moved[word]
    assert moved.sum() < 200


@pytest.mark.slow
def test_command_line_writes_what_open_clip_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "THREADS", torch.get_num_threads())
    result = CliRunner().invoke(pretrain.main, ["--out", str(tmp_path / "new"), "--seed", "2", "--steps", "1"])
    assert result.exit_code == 0, result.output
    assert "step 1/1" in result.output
    written = load_file(tmp_path / "new" / TINY_WEIGHTS.name)
    model = open_clip.create_model(TINY_NAME, pretrained=str(tmp_path / "new" / TINY_WEIGHTS.name))
    assert all(torch.equal(written[name].float(), value.float()) for name, value in model.state_dict().items())


def test_command_line_refuses_a_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    result = CliRunner().invoke(pretrain.main, ["--out", str(tmp_path / "taken"), "--seed", "2", "--steps", "1"])
    assert result.exit_code == 2
    assert "is a file" in result.output

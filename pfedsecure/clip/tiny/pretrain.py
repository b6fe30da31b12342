"""Pre-train the tiny CLIP on captioned synthetic glyphs: `python -m pfedsecure.clip.tiny.pretrain --out DIR --seed S`.

Plain contrastive training (Radford et al. 2021, arXiv 2103.00020) of the open_clip model in `tiny-clip.json`, on the
CPU. The scans of scikit-learn are never trained on. Their zero-shot accuracy is measured once a model is trained and
reported in the metadata of the weights; it was seen for two earlier recipes before this one was settled.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import click
import matplotlib
import open_clip
import PIL
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from safetensors.torch import save_file
from torch import Tensor

from pfedsecure.clip.tiny.captions import caption
from pfedsecure.clip.tiny.glyphs import GLYPHS
from pfedsecure.clip.tiny.writing import RATES, Sampler, WrittenGlyphs
from pfedsecure.data.digits import CLASS_NAMES, digit_images, digit_labels

MODEL = "tiny-clip"
TEMPLATE = "a photo of the digit {}."
STEPS = 1500
BATCH = 256
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
WARM_UP = 100  # steps
MAX_LOGIT_SCALE = 100.0
THREADS = 2  # sums are split over threads, so their number is part of what determines the weights
_PREPROCESS = PreprocessCfg()  # what open_clip gives a model whose configuration says nothing of it


def new_model(seed: int) -> open_clip.CLIP:
    """The untrained model, its weights drawn from `seed`."""
    if MODEL not in open_clip.list_models():
        open_clip.add_model_config(Path(__file__).parent)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.CLIP(**open_clip.get_model_config(MODEL))


def pretrain(seed: int, steps: int, progress: Callable[[str], None]) -> open_clip.CLIP:
    """Train for `steps` batches; deterministic in `seed`, `steps` and the number of torch's threads.

    Embeddings of tokens that no caption holds get no gradient and no decay: they stay at their initial values, distinct
    from each other, so that class names never seen still have features of their own.
    """
    model = new_model(seed)
    model.visual.to(memory_format=torch.channels_last)
    model.train()
    tokenizer = open_clip.get_tokenizer(MODEL)
    sampler, rng = Sampler(seed), random.Random(seed)  # noqa: S311 - training data, not a secret
    optimizer = _optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    start = time.monotonic()
    for step in range(1, steps + 1):
        batch = sampler.draw(BATCH)
        image = model.encode_image(pixels(batch.images), normalize=True)
        text = encode_text(model, tokenizer(captions(batch, rng)))
        logits = model.logit_scale.exp() * image @ text.T
        target = torch.arange(BATCH)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        if step % 100 == 0 or step == steps:
            progress(f"step {step}/{steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s")
    return model.eval()


def captions(batch: WrittenGlyphs, rng: random.Random) -> list[str]:
    """A caption for each image of `batch`."""
    names = tuple(RATES)
    return [
        caption(GLYPHS[glyph], [name for name, on in zip(names, flags, strict=True) if on], rng)
        for glyph, flags in zip(batch.glyphs.tolist(), batch.conditions.tolist(), strict=True)
    ]


def pixels(images: Tensor) -> Tensor:
    """Grey `images (B, 1, H, W)` in [0, 1] as the model's normalised input `(B, 3, H, W)`."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_PREPROCESS.mean, _PREPROCESS.std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """`model.encode_text`, normalised, without the padding after the longest text: causal attention never sees it."""
    ends = tokens.argmax(1)
    length = int(ends.max()) + 1
    states = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    states = model.transformer(states, attn_mask=model.attn_mask[:length, :length])
    features: Tensor = model.ln_final(states)[torch.arange(len(ends)), ends] @ model.text_projection
    return F.normalize(features, dim=-1)


@torch.no_grad()
def zero_shot_accuracy(model: open_clip.CLIP, condition: str | None = None, template: str = TEMPLATE) -> float:
    """Share of the demo's 1,797 scans, in a writing `condition`, whose digit the model names with `template`."""
    preprocess = open_clip.image_transform(model.visual.image_size, is_train=False)
    labels = torch.from_numpy(digit_labels())
    images = torch.stack([preprocess(image) for image in digit_images(condition, range(len(labels)))])
    texts = open_clip.get_tokenizer(MODEL)([template.format(name) for name in CLASS_NAMES])
    similarity = model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T
    return float((similarity.argmax(1) == labels).double().mean())


def _optimizer(model: open_clip.CLIP) -> torch.optim.Optimizer:
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim < 2 or "embedding" in name else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)


def save(model: open_clip.CLIP, file: Path, seed: int, steps: int) -> float:
    """Write the weights in float16; returns the zero-shot accuracy of what was written.

    The metadata entry "pretraining" says in JSON how the weights came about, and that accuracy.
    """
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    stored = new_model(seed).eval()
    stored.load_state_dict(state)
    accuracy = zero_shot_accuracy(stored)
    facts = {
        "model": MODEL,
        "seed": seed,
        "steps": steps,
        "zero_shot_template": TEMPLATE,
        "zero_shot_accuracy": accuracy,
        "torch": str(torch.__version__),
        "open_clip": open_clip.__version__,
        "pillow": PIL.__version__,
        "matplotlib": matplotlib.__version__,
    }
    # One entry, because safetensors writes several in an order that changes from run to run.
    save_file(state, file, {"pretraining": json.dumps(facts)})
    return accuracy


@click.command()
@click.option("--out", type=click.Path(file_okay=False, writable=True, path_type=Path), required=True, help="Folder.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=STEPS, show_default=True)
def main(out: Path, seed: int, steps: int) -> None:
    """Pre-train the tiny CLIP and write tiny-clip.safetensors into the folder OUT."""
    torch.set_num_threads(THREADS)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{MODEL}.safetensors"
    accuracy = save(pretrain(seed, steps, click.echo), file, seed, steps)
    click.echo(f"{file}: zero-shot accuracy on the handwritten digits {accuracy:.1%}")


if __name__ == "__main__":
    main()

"""What `pfed bench training` measures, each case in a process of its own so that its peak of memory is its own.

Ours is what a client runs: image features, then `Trainer.train_round`, round after round. After every step a product of
matrices is timed, so that the floor is of the same minutes as the step: these machines are noisy.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pfed_client.local_model import LocalModel
from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone, Precision, load_backbone
from pfedsecure.clip.config import TINY_NAME, model_config
from pfedsecure.clip.features import image_features
from pfedsecure.moe.gate import Gate
from pfedsecure.plan import Plan
from pfedsecure.seeds import derive_seed

from . import published_way
from .memory import peak_mib

NAME = "client-1"
_SIZES = (512, 1024, 2048)
"""Of square products, of which the fastest is the machine's peak."""
_NAMES = ("cat", "dog", "aeroplane", "motorbike", "grand piano", "ferry", "wild cat", "stop sign", "ceiling fan", "cup")


@dataclass(frozen=True)
class Case:
    """C classes, B images a batch, K experts, on a model with random weights, which take the same time as others."""

    model: str
    classes: int
    batch: int
    experts: int
    images: int
    epochs: int = 5
    """Local ones, of a round."""
    precision: Precision = "fp32"
    device: str = "cpu"

    @property
    def gate_width(self) -> int:
        """g: the paper's, or less where the embedding is not twice as wide."""
        return min(128, int(model_config(self.model)["embed_dim"]) // 2)

    @property
    def steps_an_epoch(self) -> int:
        return -(-self.images // self.batch)

    def flops(self, tail_tokens: int) -> float:
        """Of a step's text tower, forwards and back to the context: (n + 1) + C * `tail_tokens` tokens in every block.

        Maps and attention's products of 2 operations an entry; norms, activations and the gate are not counted.
        """
        config = model_config(self.model)
        width, layers, embedding = config["text_cfg"]["width"], config["text_cfg"]["layers"], config["embed_dim"]
        prefix = Plan(class_names=("a", "b")).prompt.context_length + 1
        tokens = prefix + self.classes * tail_tokens
        maps = 12 * width**2 * tokens
        looked_at = prefix**2 + self.classes * tail_tokens * (prefix + tail_tokens)
        per_block = 2 * (maps + 2 * width * looked_at)
        return float(2 * (layers * per_block + 2 * self.classes * width * embedding))

    def plan(self) -> Plan:
        """The defaults but for this case's numbers. Names are of one to three tokens."""
        names = tuple(f"{_NAMES[n % 10]} {n // 10}" if n >= 10 else _NAMES[n] for n in range(self.classes))
        plan = Plan(class_names=names)
        return plan.model_copy(
            update={
                "training": plan.training.model_copy(update={"batch_size": self.batch, "local_epochs": self.epochs}),
                "mixture": plan.mixture.model_copy(update={"experts": self.experts, "gate_width": self.gate_width}),
            }
        )


@dataclass
class Measured:
    """Seconds of every step and round, losses of round 1, and the process' peak of memory in MiB (a GPU's, there).

    `peak_flops` a second, of the fastest product of matrices.
    """

    steps: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    first_epoch: float = 0.0
    encoding: float = 0.0
    losses: list[float] = field(default_factory=list)
    features: NDArray[np.float32] | None = None
    peak_mib: float = 0.0
    peak_flops: float = 0.0
    tail_tokens: int = 0


class SyntheticImages:
    """Seeded pictures, patches of colour; `pfedsecure.clip.features.Images`."""

    def __init__(self, count: int, n_classes: int) -> None:
        generator = np.random.default_rng(1)
        self._pixels = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        self.labels: NDArray[np.int64] = np.arange(count) % n_classes

    def image(self, index: int, digest: str | None = None) -> Image.Image:
        return Image.fromarray(self._pixels[index]).resize((256, 256), Image.Resampling.BICUBIC)

    def content_digest(self, index: int) -> str:
        return sha256(self._pixels[index].tobytes()).hexdigest()


class _Stopwatch:
    """Times steps, and products of matrices between them, which count for no step."""

    def __init__(self, device: torch.device, products: bool) -> None:
        self._device = device
        self._operands = [torch.randn(2, size, size).to(device) for size in _SIZES] if products else []
        self._rates: dict[int, list[float]] = {size: [] for size in _SIZES}
        self.apart = 0.0
        self._last = self.now()
        self._turn = 0

    def now(self) -> float:
        """Seconds, without those of products, once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self.apart

    def start(self) -> None:
        self._last = self.now()

    def step(self) -> float:
        """Seconds since the last step, or since `start`."""
        took = self.now() - self._last
        self._product()
        self._last = self.now()
        return took

    @property
    def peak_flops(self) -> float:
        return max((median(rates) for rates in self._rates.values() if rates), default=0.0)

    def _product(self) -> None:
        if not self._operands:
            return
        a, b = self._operands[self._turn % len(_SIZES)]
        size = len(a)
        self._turn += 1
        before = self.now()
        torch.mm(a, b)
        took = self.now() - before
        self._rates[size].append(2 * size**3 / took)
        self.apart += took


def measure_published(case: Case, steps: int) -> Measured:
    """So many steps of the published way."""
    return _in_own_process(_published, case, steps)


def measure_ours(case: Case, rounds: int, cache: Path) -> Measured:
    """So many rounds of a client's own code; image features come from `cache` if they were computed before."""
    return _in_own_process(_ours, case, rounds, cache)


def _in_own_process(function: object, *arguments: object) -> Measured:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found: Measured = pool.submit(function, *arguments).result()  # type: ignore[arg-type]
    return found


def _published(case: Case, steps: int) -> Measured:
    plan, backbone, images = _given(case)
    start, experts = _prompts(case, backbone)
    generator = torch.Generator().manual_seed(derive_seed(plan.seed, NAME, "gate"))
    gate = Gate(plan.mixture.gate_width, plan.mixture.gate_heads, plan.mixture.attention_scale, generator)
    measured, watch = Measured(), _Stopwatch(backbone.device, products=False)

    def on_step(loss: float) -> None:
        measured.steps.append(watch.step())
        measured.losses.append(loss)

    pictures = [images.image(index) for index in range(case.images)]
    watch.start()
    published_way.train(
        plan,
        backbone,
        pictures,
        torch.from_numpy(images.labels),
        name=NAME,
        context=torch.from_numpy(start).to(backbone.device),
        gate=gate.to(backbone.device),
        experts=torch.from_numpy(experts).to(backbone.device),
        steps=steps,
        on_step=on_step,
    )
    return _finished(measured, watch, backbone)


def _ours(case: Case, rounds: int, cache: Path) -> Measured:
    plan, backbone, images = _given(case)
    start, experts = _prompts(case, backbone)
    measured, watch = Measured(), _Stopwatch(backbone.device, products=True)
    began = watch.now()
    data = image_features(backbone, images, cache_dir=cache)
    measured.encoding = watch.now() - began
    measured.features = data.features[:8].numpy().copy()
    trainer = Trainer(plan, backbone, data, data.subset([0]), name=NAME)
    model: LocalModel = trainer.new_model()

    def on_step(done: int, _total: int, loss: float) -> None:
        measured.steps.append(watch.step())
        if len(measured.rounds) == 0:
            measured.losses.append(loss)
            if done == case.steps_an_epoch:
                measured.first_epoch = watch.now() - began

    for number in range(1, rounds + 1):
        before = watch.now()
        watch.start()
        model, _ = trainer.train_round(model, start, experts, number, on_step=on_step)
        measured.rounds.append(watch.now() - before)
    tails = backbone.tower.class_tails(backbone.tokenizer, plan.class_names, plan.prompt.context_length)
    measured.tail_tokens = max(tails.lengths)
    return _finished(measured, watch, backbone)


def _given(case: Case) -> tuple[Plan, Backbone, SyntheticImages]:
    torch.manual_seed(1)  # random weights, but the same in every process
    plan = case.plan()
    pretrained = "embedded" if case.model == TINY_NAME else "random"
    backbone = load_backbone(case.model, pretrained, device=case.device, precision=case.precision)
    return plan, backbone, SyntheticImages(case.images, case.classes)


def _prompts(case: Case, backbone: Backbone) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The context that the round starts from `(n, d)`, and those of the experts `(K, n, d)`."""
    start = backbone.initial_context(case.plan())
    generator = np.random.default_rng(2)
    others = 0.02 * generator.standard_normal((case.experts, *start.shape))
    return start, (start + others).astype(np.float32)


def _finished(measured: Measured, watch: _Stopwatch, backbone: Backbone) -> Measured:
    measured.peak_flops = watch.peak_flops
    if backbone.device.type == "cuda":
        measured.peak_mib = torch.cuda.max_memory_allocated(backbone.device) / 2**20
    else:
        measured.peak_mib = peak_mib()
    return measured

"""How many stored views of an image train as well as a fresh random crop at every step?

Clients train prompt and gate alone (K = 0) on a few images a class, each with V views per image, and once more with
crops that the image encoder sees anew at every step: what the published code does, and what stored views save. A row
is one client, one seed and one V; all rows of a client and seed have the same images and the same batches. The last
rows are what a step of the one and the other kind costs, in CPU time, so that nobody else on the machine counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import fmean, stdev

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pfed_client.trainer import Trainer
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import FeatureSet, image_features
from pfedsecure.clip.views import Augmentation
from pfedsecure.data import ImageSet, few_shot
from pfedsecure.plan import Plan
from pfedsecure.seeds import derive_seed

from .allocator import keep_freed_memory
from .contract import Bar, Outcome, Row, benchmark
from .expert_clients import DIGITS, digits, mixed, plan_of_set
from .kept_rows import KeptRows
from .photo_clients import Share
from .photo_features import Sources, model_name, photo_backbone
from .photo_options import backbone_dir_option, cache_option, data_option, kept_option
from .photos import open_photos
from .views_table import by_seed, numbers_of_views

PACS = "pacs"
VIEWS, QUICK_VIEWS = (1, 2, 4, 8, 16), (1, 2, 4)
SEEDS, QUICK_SEEDS = (1, 2, 3), (1, 2)
ROUNDS, QUICK_ROUNDS = 10, 2
SHOTS, TEST_SHOTS = 4, 30
"""Images of a class for training and for testing, of each client."""
TIMED_ROUNDS = 3


@dataclass(frozen=True)
class Data:
    """Images of several domains, each of which is a client's, and the model that sees them."""

    name: str
    images: ImageSet
    backbone: Backbone
    model: str
    sources: Sources


@benchmark
@data_option("Folder with pacs.tar; --quick takes the embedded digits.")
@backbone_dir_option
@cache_option
@kept_option(Path("runs/views"))
def command(*, quick: bool, data: Path, backbone_dir: Path | None, cache_dir: Path, kept: Path) -> Outcome:
    """Stored views of each image against fresh crops at every step: accuracy of prompt and gate, and time."""
    torch.set_num_threads(1)
    keep_freed_memory()
    sources = Sources(data, backbone_dir or data / "backbone", cache_dir)
    loaded = load(DIGITS if quick else PACS, sources)
    seeds, views = (QUICK_SEEDS, QUICK_VIEWS) if quick else (SEEDS, VIEWS)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    settings: dict[str, object] = {
        "data_set": loaded.name,
        "rounds": rounds,
        "shots": SHOTS,
        "test_shots": TEST_SHOTS,
        "plan": plan_of(loaded, 1, rounds, 1).model_dump(by_alias=True, include={"prompt", "mixture", "training"}),
        "augmentation": Augmentation.of(loaded.backbone).recipe,
        "backbone": loaded.backbone.digest,
    }
    rows = measure_all(loaded, seeds, rounds, views, KeptRows(kept / f"{loaded.name}.jsonl", settings))
    return Outcome(params={"quick": quick, "seeds": list(seeds)} | settings, rows=rows, bars=bars(rows))


@cache
def load(name: str, sources: Sources) -> Data:
    """Digits in five writings, or photographs. Raises DataError or BackboneError."""
    if name == DIGITS:
        return Data(name, digits(), load_backbone("tiny-clip", "embedded"), "", sources)
    images = open_photos(name, sources.data, sources.cache / "photos")
    return Data(name, images, photo_backbone(sources.backbone_dir), model_name(sources.backbone_dir), sources)


def plan_of(data: Data, seed: int, rounds: int, views: int) -> Plan:
    """The plan of a client that trains alone, of V views."""
    plan = mixed(plan_of_set(data.name, data.images.class_names, seed, rounds, data.model), experts=0)
    return plan.model_copy(update={"training": plan.training.model_copy(update={"views": views})})


def shares_of(images: ImageSet, seed: int) -> list[Share]:
    """One client for each domain."""
    assert images.domains is not None
    shares = []
    for domain in sorted(set(images.domains)):
        own = np.flatnonzero(np.asarray(images.domains) == domain)
        train = own[few_shot(images.labels[own], SHOTS, seed)]
        others = np.setdiff1d(own, train)
        test = others[few_shot(images.labels[others], TEST_SHOTS, seed)]
        shares.append(Share(domain, domain, train=train, test=test))
    return shares


def measure_all(data: Data, seeds: Sequence[int], rounds: int, views: Sequence[int], kept: KeptRows) -> list[Row]:
    """The rows of every seed and client: those with V `views`, and last that with fresh crops, whose V is None."""
    rows: list[Row] = []
    cells = [(seed, share) for seed in seeds for share in shares_of(data.images, seed)]
    with click.progressbar(cells, label="clients", file=sys.stderr, show_pos=True) as bar:
        for seed, share in bar:
            features = Features(data, share, max(views))
            for n_views in (*views, None):
                key: Row = {"seed": seed, "client": share.name, "views": n_views}
                rows.append(key | kept.get(key, partial(measure, features, seed, rounds, n_views)))
    seed, share = cells[0]
    features = Features(data, share, max(views))
    kinds = (max(views), None)
    return rows + [{"seed": seed, "client": share.name, "views": of, **cost(features, seed, of)} for of in kinds]


class Features:
    """What a client trains and is scored with, computed when it is needed first."""

    def __init__(self, data: Data, share: Share, views: int) -> None:
        self.data = data
        self.name = share.name
        self.images = data.images.subset(share.train)
        self._test = data.images.subset(share.test)
        self._views = views

    @cached_property
    def bank(self) -> FeatureSet:
        return self._computed(self.images, self._views)

    @cached_property
    def test(self) -> FeatureSet:
        return self._computed(self._test, 1)

    def _computed(self, images: ImageSet, views: int) -> FeatureSet:
        folder = self.data.sources.cache / "features"
        return image_features(self.data.backbone, images, views=views, cache_dir=folder)

    def trainer(self, seed: int, rounds: int, views: int | None) -> Trainer:
        """For V `views`, the first ones of the bank; None: for fresh crops."""
        plan, backbone = plan_of(self.data, seed, rounds, views or 1), self.data.backbone
        if views is None:
            return FreshTrainer(plan, backbone, self.bank, self.test, name=self.name, images=self.images)
        assert self.bank.augmented is not None
        some = FeatureSet(self.bank.features, self.bank.labels, self.bank.augmented[:, : views - 1])
        return Trainer(plan, backbone, some, self.test, name=self.name)


def measure(features: Features, seed: int, rounds: int, views: int | None) -> Row:
    """What the last round's model scores on the client's test images."""
    trainer = features.trainer(seed, rounds, views)
    model = trainer.new_model()
    for number in range(1, rounds + 1):
        model, _ = trainer.train_round(model, model.context, model.experts, number)
    return {"accuracy": trainer.evaluate(model)}


def cost(features: Features, seed: int, views: int | None) -> Row:
    """CPU time of a step, over a few rounds after one to warm up."""
    trainer = features.trainer(seed, TIMED_ROUNDS, views)
    model, steps, started = trainer.new_model(), 0, 0.0
    for number in range(TIMED_ROUNDS + 1):
        model, report = trainer.train_round(model, model.context, model.experts, number + 1)
        if number:
            steps += report.steps
        else:
            started = time.process_time()
    return {"cpu_ms_a_step": 1e3 * (time.process_time() - started) / steps}


class FreshTrainer(Trainer):
    """Sees a new random crop of an image each time, through the image encoder."""

    def __init__(
        self, plan: Plan, backbone: Backbone, train: FeatureSet, test: FeatureSet, *, name: str, images: ImageSet
    ) -> None:
        super().__init__(plan, backbone, train, test, name=name)
        self._images = [images.image(index) for index in range(len(images))]
        self._augmentation = Augmentation.of(backbone)
        self._crops = torch.Generator().manual_seed(derive_seed(plan.seed, name, "fresh crops"))

    def batch_features(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        crops = [self._augmentation.crop(self._images[row], self._crops) for row in rows.tolist()]
        return F.normalize(self._backbone.encode(torch.stack(crops)), dim=-1)


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """In points of mean accuracy over the clients, with deviations over the seeds.

    `fresh_over_plain`: what augmentation gains. `views_to_match`: the smallest V that is no further below fresh crops
    than these deviate from seed to seed; there is none where no V is. `fresh_over_stored_step`: how many times the CPU
    time of a step with stored views one with fresh crops takes.
    """
    fresh, plain = by_seed(rows, None), by_seed(rows, 1)
    ahead = [a - b for a, b in zip(fresh, plain, strict=True)]
    found = {"fresh_over_plain": Bar.of(fmean(ahead), None, ">=", deviation=stdev(ahead))}
    stored, anew = (float(str(row["cpu_ms_a_step"])) for row in rows if "cpu_ms_a_step" in row)
    found["fresh_over_stored_step"] = Bar.of(anew / stored, None, ">=")
    matching = [views for views in numbers_of_views(rows) if fmean(fresh) - fmean(by_seed(rows, views)) <= stdev(fresh)]
    if matching:
        found["views_to_match"] = Bar.of(min(matching), None, "<=")
    return found

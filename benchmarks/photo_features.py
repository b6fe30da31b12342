"""Photographs and the backbone of benchmarks, with the features of all images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click

from pfedsecure.clip.backbone import Backbone, Precision, load_backbone
from pfedsecure.clip.features import FeatureSet, image_features
from pfedsecure.data import ImageSet
from pfedsecure.errors import BackboneError

from .allocator import keep_freed_memory
from .photos import open_photos


@dataclass(frozen=True)
class Sources:
    """Where photographs and backbone come from, and where what is made of them is kept."""

    data: Path
    backbone_dir: Path
    cache: Path


def available(names: Sequence[str], data: Path) -> list[str]:
    """Those of the photo data sets `names` that are in the folder `data`; what is left out is said."""
    found = []
    for name in names:
        if (data / f"{name}.tar").is_file():
            found.append(name)
        else:
            click.echo(f"{data}: no {name}.tar there, so it is left out", err=True)
    return found


@cache
def photo_features(name: str, sources: Sources, quiet: bool = True) -> tuple[ImageSet, FeatureSet]:
    """The image set `name` and the features of all its images, computed if they are not in the cache."""
    images = open_photos(name, sources.data, sources.cache / "photos")
    backbone = photo_backbone(sources.backbone_dir)
    keep_freed_memory()
    with click.progressbar(length=len(images), label=f"features of {name}", file=sys.stderr, hidden=quiet) as bar:
        features = image_features(
            backbone,
            images,
            cache_dir=sources.cache / "features",
            on_progress=lambda done, _total: bar.update(done - bar.pos),
        )
    return images, features


@cache
def photo_backbone(folder: Path, precision: Precision = "fp32") -> Backbone:
    model = model_name(folder)
    return load_backbone(model, str(folder / f"{model}.safetensors"), config_dir=folder, precision=precision)


def model_name(folder: Path) -> str:
    """The one model of which `folder` has configuration and weights. Raises BackboneError."""
    models = [file.stem for file in sorted(folder.glob("*.json")) if file.with_suffix(".safetensors").is_file()]
    if len(models) != 1:
        found = ", ".join(models) or "none"
        raise BackboneError(
            f"{folder}: must hold MODEL.json and MODEL.safetensors of one model (found: {found}); "
            "give such a folder with --backbone-dir"
        )
    return models[0]

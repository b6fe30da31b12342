"""From images to simulated clients: features computed once for all, and each client's own split of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pfed_cli.simulate.shares import Indices
from pfed_cli.simulation import SimulatedClient
from pfed_client.splitting import split
from pfedsecure.clip.backbone import Backbone
from pfedsecure.clip.features import image_features
from pfedsecure.data import ImageSet
from pfedsecure.errors import DataError
from pfedsecure.plan import Plan

Progress = Callable[[int, int], None]


def clients_of(
    plan: Plan,
    backbone: Backbone,
    images: ImageSet,
    shares: Mapping[str, Indices],
    *,
    test_fraction: float,
    cache: Path,
    on_progress: Progress | None = None,
) -> list[SimulatedClient]:
    """One client for each of `shares`, rows of `images` by name; `cache` keeps the features of all images.

    Each splits its images into training and test as `pfed-client` would under its name. Raises ClassNamesMismatch, and
    DataError naming the client that has too few images.
    """
    images = images.relabel(plan.class_names)
    splits = {}
    for name, rows in shares.items():
        try:
            train, test = split(images.subset(rows), plan, name, test_fraction)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        splits[name] = rows[train], rows[test]
    compute = partial(image_features, backbone, cache_dir=cache / "features", on_progress=on_progress)
    features = compute(images)
    trained_on = {name: features.subset(train) for name, (train, _) in splits.items()}
    if plan.training.views > 1:
        trained_on = {
            name: compute(images.subset(train), views=plan.training.views) for name, (train, _) in splits.items()
        }
    return [SimulatedClient(name, trained_on[name], features.subset(test)) for name, (_, test) in splits.items()]

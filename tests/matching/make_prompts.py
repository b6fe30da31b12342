"""Makes demo_prompts.npz: prompts that fifty clients of the embedded demo really train, for tests that need real ones.

    python tests/matching/make_prompts.py

`first` and `later` `(50, n, d)` float32: every client's context after one and after six rounds of the demo's plan, each
with about 36 digits of its own; `centre (n, d)`: the plan's initial context. About a minute. Another machine's
arithmetic may change the last bits, which nothing depends on.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from pfed_cli.simulation import SimulatedClient, simulate
from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.features import image_features
from pfedsecure.data import open_images, train_test_split
from pfedsecure.data.digits import CLASS_NAMES
from pfedsecure.plan import Plan

CLIENTS = 50
TEST_FRACTION = 0.3


def demo_plan(rounds: int) -> Plan:
    text = resources.files("pfedsecure").joinpath("demo_plan.toml").read_text()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "plan.toml"
        file.write_text(
            text.replace("count = 10", f"count = {rounds}").replace("minimum_cohort = 3", "minimum_cohort = 50")
        )
        plan = Plan.from_toml(file)
    unprotected = plan.protection.model_copy(update={"aggregation": "plain", "experts": "plain", "matching": "plain"})
    return plan.model_copy(update={"protection": unprotected})


def clients_of(backbone: Backbone) -> list[SimulatedClient]:
    made = []
    for number in range(CLIENTS):
        images = open_images(f"demo:{number}/{CLIENTS}", strict=True).relabel(CLASS_NAMES)
        features = image_features(backbone, images)
        train, test = train_test_split(images.labels, TEST_FRACTION, seed=number)
        made.append(SimulatedClient(f"client-{number + 1:02d}", features.subset(train), features.subset(test)))
    return made


def main() -> None:
    torch.set_num_threads(1)
    backbone = load_backbone("tiny-clip", "embedded")
    clients = clients_of(backbone)
    contexts = {}
    for name, rounds in (("first", 1), ("later", 6)):
        result = simulate(demo_plan(rounds), clients, backbone)
        contexts[name] = np.stack([result.clients[client.name].model.context for client in clients])
    centre = backbone.initial_context(demo_plan(1))
    np.savez_compressed(Path(__file__).with_name("demo_prompts.npz"), centre=centre, **contexts)


if __name__ == "__main__":
    main()

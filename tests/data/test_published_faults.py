"""Faults of published loaders that must not be here: labels that change with the hash seed, and multi-domain
partitions that give a client its labels but not the images that they belong to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from pfedsecure.data import by_domain, domain_dirichlet, open_images

CLASSES = ["apple", "Bird_cage", "cat", "dog", "emu", "fox", "gnu"]
DOMAINS = ["art", "clipart", "photo"]

DESCRIBE = """
import sys
from pfedsecure.data import by_client, dirichlet, disjoint_classes, domain_dirichlet, open_images, train_test_split

for spec in sys.argv[1:]:
    images = open_images(spec, strict=True)
    print(images.class_names, images.labels.tolist(), images.keys, images.domains, images.clients)
    print(images.fingerprint())
    shares = dirichlet(images.labels, 3, 0.3, 0) + disjoint_classes(images.labels, 3, 0)
    if images.domains:
        shares += domain_dirichlet(images.labels, images.domains, 2, 0.3, 0)
    if images.clients:
        shares += by_client(images.clients).values()
    shares += train_test_split(images.labels, 0.5, 0)
    print([share.tolist() for share in shares])
"""


def write_domains(folder: Path, write_image) -> None:
    """Three images per domain and class, whose pixels say which domain and class they are of."""
    for d, domain in enumerate(DOMAINS):
        for c, name in enumerate(CLASSES):
            for number in range(3):
                write_image(folder / domain / name / f"{number}.png", value=d * 50 + c * 5 + number)


def test_nothing_depends_on_the_hash_seed(tmp_path: Path, write_image) -> None:
    write_domains(tmp_path / "tree", write_image)
    lines = [f"tree/{d}/{c}/{n}.png,{c},{d} hospital" for d in DOMAINS for c in CLASSES for n in range(3)]
    (tmp_path / "data.csv").write_text("\n".join(["path,label,client", *lines]))
    specs = [str(tmp_path / "tree"), str(tmp_path / "data.csv")]
    outputs = [
        subprocess.run(
            [sys.executable, "-c", DESCRIBE, *specs],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0].startswith("('apple', 'Bird cage', 'cat', 'dog', 'emu', 'fox', 'gnu')")
    assert outputs[0] == outputs[1]


def test_images_and_labels_are_split_together(tmp_path: Path, write_image) -> None:
    write_domains(tmp_path, write_image)
    image_set = open_images(str(tmp_path), strict=True)
    partitions = {
        "domain_dirichlet": domain_dirichlet(image_set.labels, image_set.domains, 2, 0.3, seed=0, minimum=3),
        "by_domain": by_domain(image_set.domains, 6),
    }
    for shares in partitions.values():
        assert sum(map(len, shares)) == len(image_set)
        for client, share in enumerate(shares):
            part = image_set.subset(share).relabel(CLASSES[::-1])
            pixels = np.array([part.image(i).getpixel((0, 0))[0] for i in range(len(part))])
            assert [part.class_names[label] for label in part.labels] == [CLASSES[p % 50 // 5] for p in pixels]
            assert list(part.domains) == [DOMAINS[p // 50] for p in pixels] == [DOMAINS[client // 2]] * len(part)

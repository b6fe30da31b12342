"""Labelled images: where they come from, who holds which, and what is kept for testing."""

from __future__ import annotations

from pfedsecure.data.class_names import normalise_class_name
from pfedsecure.data.dataset import ImageSet
from pfedsecure.data.partition import by_client, by_domain, dirichlet, disjoint_classes, domain_dirichlet
from pfedsecure.data.sources import open_images
from pfedsecure.data.splits import few_shot, train_test_split
from pfedsecure.data.torchvision_sets import TORCHVISION_NAMES
from pfedsecure.data.verification import verify_images

__all__ = [
    "TORCHVISION_NAMES",
    "ImageSet",
    "by_client",
    "by_domain",
    "dirichlet",
    "disjoint_classes",
    "domain_dirichlet",
    "few_shot",
    "normalise_class_name",
    "open_images",
    "train_test_split",
    "verify_images",
]

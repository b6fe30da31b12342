"""Views of images: torchvision's own crops, each a function of its image and number alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.clip.views import RATIO, SCALE, Augmentation, rectangle

DIGEST = hashlib.sha256(b"an image").hexdigest()


def picture(width: int = 50, height: int = 40, seed: int = 1) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("tiny-clip", "embedded")


@pytest.fixture(scope="module")
def augmentation(backbone: Backbone) -> Augmentation:
    return Augmentation.of(backbone)


@pytest.mark.parametrize(("width", "height"), [(224, 224), (1, 1), (3, 500), (500, 3), (640, 480), (7, 9)])
def test_rectangles_are_torchvision_s_for_the_same_numbers(width: int, height: int) -> None:
    generator = torch.Generator()
    for seed in range(50):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            want = transforms.RandomResizedCrop.get_params(picture(width, height), list(SCALE), list(RATIO))
        assert rectangle(height, width, generator.manual_seed(seed)) == want


def test_crops_are_what_coop_s_transforms_make(augmentation: Augmentation) -> None:
    """Interpolation, mean and deviation are CLIP's, as in CoOp's configurations."""
    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(32, scale=(0.08, 1.0), interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    for seed in range(20):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            want = theirs(picture())
        assert torch.equal(augmentation.crop(picture(), torch.Generator().manual_seed(seed)), want)


def test_a_view_depends_on_the_image_and_its_number_alone(augmentation: Augmentation) -> None:
    torch.manual_seed(1)
    first = augmentation.view(picture(), DIGEST, 3)
    torch.manual_seed(2)
    augmentation.view(picture(seed=2), "0" * 64, 1)
    state = torch.random.get_rng_state()
    assert torch.equal(augmentation.view(picture(), DIGEST, 3), first)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's numbers are touched either


def test_other_numbers_and_other_images_have_other_views(augmentation: Augmentation) -> None:
    views = [augmentation.view(picture(), DIGEST, number) for number in range(1, 9)]
    views += [augmentation.view(picture(), "0" * 64, number) for number in range(1, 9)]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_the_recipe_says_what_is_made(augmentation: Augmentation) -> None:
    for part in ("(32, 32)", "0.48145466", "0.26862954", "bicubic", "(0.08, 1.0)", "(0.75, 1.3333333333333333)", "0.5"):
        assert part in augmentation.recipe

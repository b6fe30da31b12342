"""The ensemble against a slow, obvious one: each expert a client's own gate over its own prompt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pfedsecure.clip.backbone import Backbone, load_backbone
from pfedsecure.moe.ensemble import EnsembleModel
from pfedsecure.moe.gate import Gate
from pfedsecure.moe.mixture import MixtureModel

NAMES = ("circle", "square", "star")
WIDTH, HEADS, LAMBDA = 16, 4, 0.7


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("tiny-clip", "embedded")


def context(seed: int) -> torch.Tensor:
    return 0.3 * torch.randn(4, 48, generator=torch.Generator().manual_seed(seed))


def gate(seed: int) -> Gate:
    return Gate(WIDTH, HEADS, 10.0, torch.Generator().manual_seed(seed))


def alone(backbone: Backbone, seed: int) -> MixtureModel:
    """A client with the gate over its own prompt, as in a plan with K = 0."""
    tails = backbone.tower.class_tails(backbone.tokenizer, NAMES, 4)
    nobody = torch.zeros(0, len(NAMES), 64)
    return MixtureModel(backbone.tower, tails, context(seed), backbone.logit_scale, gate(seed), WIDTH, nobody, LAMBDA)


def ensemble(backbone: Backbone, seed: int, peers: list[int]) -> EnsembleModel:
    """A client with `peers`, each of whom lends what it would."""
    tails = backbone.tower.class_tails(backbone.tokenizer, NAMES, 4)
    lent = torch.zeros(0, len(NAMES), WIDTH)
    features = torch.zeros(0, len(NAMES), 64)
    if peers:
        lent = torch.stack([ensemble(backbone, peer, []).gate_output() for peer in peers])
        features = torch.stack([alone(backbone, peer).text_features().detach() for peer in peers])
    return EnsembleModel(
        backbone.tower, tails, context(seed), backbone.logit_scale, gate(seed), WIDTH, features, lent, LAMBDA
    )


def images(count: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 64, generator=torch.Generator().manual_seed(9)), dim=-1)


@pytest.mark.parametrize("peers", [[], [2], [2, 3, 5]])
def test_predicts_the_mean_of_the_own_answer_and_the_peers_mean_answer(backbone: Backbone, peers: list[int]) -> None:
    features = images(6)
    own = alone(backbone, 1)(features).softmax(dim=1)
    want = own
    if peers:
        theirs = [alone(backbone, peer)(features).softmax(dim=1) for peer in peers]
        want = (own + sum(theirs) / len(theirs)) / 2

    got = ensemble(backbone, 1, peers).predict(features).exp()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.sum(dim=1), torch.ones(6))


def test_is_trained_as_if_alone(backbone: Backbone) -> None:
    features, labels = images(5), torch.tensor([0, 1, 2, 0, 1])
    gradients = []
    for model in (alone(backbone, 1), ensemble(backbone, 1, [2, 3])):
        F.cross_entropy(model(features), labels).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(("peers", "want"), [([], [1.0]), ([2, 3], [0.5, 0.25, 0.25])])
def test_weights_are_the_same_for_all_images(backbone: Backbone, peers: list[int], want: list[float]) -> None:
    weights = ensemble(backbone, 1, peers).expert_weights(images(2))
    assert weights.shape == (2, 3, len(peers) + 1)
    torch.testing.assert_close(weights, torch.tensor(want).expand(2, 3, -1))

"""Stacked models against the same models one by one, with torch's own optimiser: the oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pfedsecure.clip.backbone import load_backbone
from pfedsecure.moe.gate import Gate
from pfedsecure.moe.mixture import MixtureModel, PromptModel
from pfedsecure.moe.stacked import Batch, StackedModels, StackedSgd

CLASSES = ("zero", "one", "two", "three")
GATE_WIDTH = 16
SIZES = ([5, 4], [5, 1], [3], [2])
"""Of the batches of each client: different numbers of steps, and of images in a step."""


def models(experts: int | None) -> list[PromptModel]:
    """One for each of SIZES; with `experts` of its own, or None for the prompt alone."""
    backbone = load_backbone("tiny-clip", "embedded")
    tails = backbone.tower.class_tails(backbone.tokenizer, CLASSES, 3)
    generator = torch.Generator().manual_seed(1)
    made: list[PromptModel] = []
    for _ in SIZES:
        context = 0.02 * torch.randn(3, backbone.tower.width, generator=generator)
        if experts is None:
            made.append(PromptModel(backbone.tower, tails, context, backbone.logit_scale))
            continue
        gate = Gate(GATE_WIDTH, 2, 10.0, generator)
        others = 0.02 * torch.randn(experts, 3, backbone.tower.width, generator=generator)
        with torch.no_grad():
            features = backbone.tower(others, tails)
        made.append(MixtureModel(backbone.tower, tails, context, backbone.logit_scale, gate, GATE_WIDTH, features, 0.5))
    return made


def batches(width: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    return [
        [
            (
                F.normalize(torch.randn(size, width, generator=generator), dim=-1),
                torch.randint(len(CLASSES), (size,), generator=generator),
            )
            for size in sizes
        ]
        for sizes in SIZES
    ]


def rate(client: int, step: int) -> float:
    return 0.05 / (1 + client + step)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [None, 0, 2])
def test_each_trains_as_by_itself(experts: int | None) -> None:
    alone, together = models(experts), models(experts)
    width = alone[0].text_features().shape[1]
    seen = batches(width)
    losses: list[list[float]] = []
    for client, model in enumerate(alone):
        sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)
        losses.append([])
        for step, (features, labels) in enumerate(seen[client]):
            sgd.param_groups[0]["lr"] = rate(client, step)
            loss = F.cross_entropy(model(features), labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses[-1].append(loss.item())

    stack = StackedModels(together)
    sgd = StackedSgd(stack.parameters, momentum=0.9, weight_decay=0.01)
    found: list[list[float]] = [[] for _ in SIZES]
    for step in range(2):
        active = [client for client, own in enumerate(seen) if step < len(own)]
        batch_losses, gradients = stack.gradients(Batch.of([seen[client][step] for client in active]))
        sgd.step(gradients, dict.fromkeys(gradients, torch.tensor([rate(client, step) for client in active])))
        for client, loss in zip(active, batch_losses.tolist(), strict=True):
            found[client].append(loss)
    stack.unstack()

    for one, other in zip(losses, found, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    for own, stacked in zip(alone, together, strict=True):
        for (name, parameter), (_, of_stack) in zip(own.named_parameters(), stacked.named_parameters(), strict=True):
            torch.testing.assert_close(of_stack, parameter, rtol=1e-4, atol=1e-6, msg=name)


def test_padding_does_not_count_whatever_it_is() -> None:
    """Nor may what is infinite there make a gradient that is no number."""
    stack = StackedModels(models(2)[:2])
    width = models(None)[0].text_features().shape[1]
    seen = batches(width)
    batch = Batch.of([seen[0][0], seen[2][0]])
    losses, gradients = stack.gradients(batch)
    rubbish = batch.features.clone()
    rubbish[1, int(batch.sizes[1]) :] = 1e30
    other_losses, others = stack.gradients(Batch(rubbish, batch.labels, batch.sizes))

    torch.testing.assert_close(other_losses, losses)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, msg=name)


def test_other_forms_do_not_stack() -> None:
    with pytest.raises(ValueError, match="do not stack"):
        StackedModels([models(2)[0], models(1)[0]])
    with pytest.raises(ValueError, match="do not stack"):
        StackedModels([models(None)[0], models(0)[0]])

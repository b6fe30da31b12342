"""The rounds of many clients of one process, trained as one: for simulations.

Each client's round is the one that its `Trainer` would make by itself, up to the rounding of float32: same batches,
same schedule, own momentum, as many steps as it has images for. How clients are grouped depends on what is to be
trained alone, so that the same rounds give the same result to the last bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pfed_client.local_model import Array, LocalModel
from pfed_client.trainer import RoundReport, StepCallback, Trainer, cosine
from pfedsecure.moe.mixture import PromptModel
from pfedsecure.moe.stacked import Batch, StackedModels, StackedSgd, kind
from pfedsecure.plan import Plan


@dataclass(frozen=True)
class Job:
    """One client's round, as `Trainer.train_round` takes it."""

    trainer: Trainer
    model: LocalModel
    start: Array
    experts: Array
    round_number: int
    on_step: StepCallback | None = None


@dataclass(frozen=True)
class _Prepared:
    place: int
    job: Job
    network: PromptModel


Outcome = tuple[LocalModel, RoundReport] | Exception
"""What `Trainer.train_round` returns, or what the job's `on_step` raised to end it."""


def train_together(plan: Plan, jobs: Sequence[Job]) -> list[Outcome]:
    """What each of `jobs`, of clients of `plan`, comes to, in their order."""
    done: dict[int, Outcome] = {}
    for group in _groups(jobs):
        for member, came in zip(group, _train(plan, group), strict=True):
            job = member.job
            done[member.place] = (
                came
                if isinstance(came, Exception)
                else job.trainer.end_of(member.network, job.model, job.experts, job.round_number, came)
            )
    return [done[place] for place in range(len(jobs))]


def _groups(jobs: Sequence[Job]) -> Iterator[list[_Prepared]]:
    """Jobs whose models stack, those with most steps first, in groups that the text tower can take at once."""
    alike: dict[tuple[object, ...], list[_Prepared]] = defaultdict(list)
    for place, job in enumerate(jobs):
        network = job.trainer.start_of(job.model, job.start, job.experts, job.round_number)
        alike[kind(network)].append(_Prepared(place, job, network))
    for members in alike.values():
        members.sort(key=lambda member: (-member.job.trainer.steps, member.job.trainer.name))
        size = members[0].job.trainer.prompts_at_once
        for first in range(0, len(members), size):
            yield members[first : first + size]


def _train(plan: Plan, group: Sequence[_Prepared]) -> list[list[float] | Exception]:
    """Train the networks of `group`, most steps first; the losses of all steps of each, or what ended it."""
    training = plan.training
    stack = StackedModels([member.network for member in group])
    sgd = StackedSgd(stack.parameters, training.momentum, training.weight_decay)
    batches = [member.job.trainer.batches(member.job.round_number) for member in group]
    steps = [member.job.trainer.steps for member in group]
    losses: list[list[float]] = [[] for _ in group]
    ended: dict[int, Exception] = {}
    for number in range(steps[0]):
        active = sum(number < own for own in steps)  # those that are done are behind all others
        batch = Batch.of([next(own) for own in batches[:active]])
        found, gradients = stack.gradients(batch)
        rates = {name: torch.full_like(found, training.gate_lr) for name in gradients}
        rates["ctx"] = torch.tensor([cosine(training.prompt_lr, number, own) for own in steps[:active]]).to(found)
        sgd.step(gradients, rates)
        for row, loss in enumerate(found.tolist()):
            losses[row].append(loss)
            on_step = group[row].job.on_step
            if on_step is not None and row not in ended:
                try:
                    on_step(number + 1, steps[row], loss)
                except Exception as error:  # the others go on
                    ended[row] = error
        if len(ended) == len(group):
            break
    stack.unstack()
    return [ended.get(row, own) for row, own in enumerate(losses)]

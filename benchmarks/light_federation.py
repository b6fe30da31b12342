"""A federation without messages, for benchmarks that need many: the real client's training, and rules of matching.

What is left out of `pfed_cli.simulation` (certificates, the server's store, packets) does not change a result: a test
compares the two to the last bit. Symbols: P clients, n x d context, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from pfed_client.local_model import Array, LocalModel
from pfed_client.trainer import Trainer
from pfedsecure.matching.interface import MatchIndex, PoolEntry
from pfedsecure.matching.lot import LotClientMatching, LotServerMatching
from pfedsecure.matching.plain import PlainClientMatching, PlainServerMatching
from pfedsecure.plan import Plan
from pfedsecure.seeds import derive_seed


class Matching(StrEnum):
    """Whose experts a client borrows."""

    NONE = "none"
    NEAREST = "nearest"
    RANDOM = "random"
    SAME_FOR_ALL = "same_for_all"
    FARTHEST = "farthest"
    OWN_DOMAIN = "own_domain"
    """An oracle: those of the own domain first, of these and of the others the nearest first."""
    ONESELF = "oneself"
    """A control: the own newest prompt K times, so that all is as with experts, but for what others know."""


@dataclass(frozen=True)
class Pool:
    """What clients can borrow in a round: by name, in the order of the clients, contexts `(n, d)` and what is lent."""

    contexts: Mapping[str, Array]
    lent: Mapping[str, Array]


@dataclass(frozen=True)
class Federation:
    """What is left in the end: the clients' models, whose experts each used last, and the pool that these came from."""

    models: Mapping[str, LocalModel]
    borrowed: Mapping[str, Sequence[str]]
    pool: Pool


def federate(
    plan: Plan,
    trainers: Mapping[str, Trainer],
    matching: Matching,
    domains: Mapping[str, str] | None = None,
    on_round: Callable[[], None] | None = None,
) -> Federation:
    """All rounds of `plan`, every client in every round.

    Experts published in a round are visible from the next one on. `domains` by client are needed for the oracle.
    """
    models = {name: trainer.new_model() for name, trainer in trainers.items()}
    start = next(iter(trainers.values())).initial_context()
    pool = before = Pool({}, {})
    borrowed: dict[str, list[str]] = {}
    for number in range(1, plan.rounds.count + 1):
        borrowed = {name: choose(plan, pool, name, matching, number, domains) for name in trainers}
        before, trained = pool, {}
        for name, trainer in trainers.items():
            experts = _experts(models[name], pool, borrowed[name])
            trained[name], _ = trainer.train_round(models[name], start, experts, number)
        models = trained
        pool = publish(trainers, models)
        start = _weighted_mean(models)
        if on_round is not None:
            on_round()
    return Federation(models, borrowed, before)


def publish(trainers: Mapping[str, Trainer], models: Mapping[str, LocalModel]) -> Pool:
    """The pool of what the clients lend."""
    return Pool(
        {name: model.context for name, model in models.items()},
        {name: trainers[name].lent(model) for name, model in models.items()},
    )


def choose(
    plan: Plan,
    pool: Pool,
    name: str,
    matching: Matching,
    round_number: int,
    domains: Mapping[str, str] | None = None,
) -> list[str]:
    """The owners of the K experts that client `name` borrows in a round; fewer where there are fewer."""
    k = plan.n_experts
    match matching:
        case Matching.NONE:
            return []
        case Matching.ONESELF:
            return [name] * k if pool.contexts else []
        case Matching.NEAREST:
            return _nearest_first(plan, pool, name)[:k]
        case Matching.FARTHEST:
            return _nearest_first(plan, pool, name)[::-1][:k]
        case Matching.OWN_DOMAIN:
            assert domains is not None
            ranked = _nearest_first(plan, pool, name)
            return sorted(ranked, key=lambda other: domains[other] != domains[name])[:k]  # sorting is stable
        case Matching.SAME_FOR_ALL:
            drawn = np.random.default_rng(derive_seed(plan.seed, "same for all", round_number)).permutation(
                sorted(pool.lent)
            )
            return [str(other) for other in drawn if other != name][:k]
        case Matching.RANDOM:
            index = LotServerMatching(plan.seed).index([PoolEntry(owner, owner, b"", b"") for owner in pool.lent])
            ranked_by_lot = LotClientMatching().rank(index.answer(b"", k, name, round_number), k)
            return [candidate.expert_id for candidate in ranked_by_lot]


def _nearest_first(plan: Plan, pool: Pool, name: str) -> list[str]:
    """All others, by the Euclidean distance of their contexts to the own one."""
    if not pool.contexts:
        return []
    matching, own = PlainClientMatching(), pool.contexts[name]
    entries = [PoolEntry(owner, owner, matching.sketch(context, 1), b"") for owner, context in pool.contexts.items()]
    shape = own.shape[0], own.shape[1]
    index: MatchIndex = PlainServerMatching(shape, plan.prompt.max_norm).index(entries)
    answer = index.answer(matching.query(own, 1, 2), len(entries), name, 2)
    return [candidate.expert_id for candidate in matching.rank(answer, len(entries))]


def _experts(model: LocalModel, pool: Pool, owners: Sequence[str]) -> Array:
    return np.stack([pool.lent[owner] for owner in owners]) if owners else model.experts[:0]


def with_experts(model: LocalModel, pool: Pool, owners: Sequence[str]) -> LocalModel:
    """`model` with other experts, which changes nothing but its predictions."""
    return LocalModel(model.context, model.gate, _experts(model, pool, owners), model.trained_round, model.n_train)


def _weighted_mean(models: Mapping[str, LocalModel]) -> Array:
    """The next global prompt, in the arithmetic of `pfedsecure.aggregation.plain`."""
    total, weight = np.zeros_like(next(iter(models.values())).context, dtype=np.float64), 0
    for _, model in sorted(models.items()):
        total += (model.context.astype(np.float64) * model.n_train).astype(np.float32)
        weight += model.n_train
    mean: Array = (total / weight).astype(np.float32)
    return mean

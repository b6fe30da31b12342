"""The audit: what its view says is what the client does, and clients that break their promise are found out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pfed_benchmarks import audit
from pfed_benchmarks.audit import Case, Size, row_of
from pfed_benchmarks.audit_attack import FromMoves, View, trainer_of
from pfed_benchmarks.audit_bounds import one_run_bound
from pfed_benchmarks.audit_target import DELTA, FLAWS, SETTINGS, audited
from pfed_benchmarks.contract import Outcome, Report, Row
from pfed_benchmarks.tables import table_of

from pfed_client import private_trainer
from pfedsecure.moe.per_sample import context_gradients, feature_gradients, gain, tangential
from pfedsecure.privacy.noisy_sum import NoisySum

LITTLE_NOISE, _, LOOSE_CLIP, NO_SAMPLE = FLAWS

SMALL = Size(
    runs={"one step": 30, "one step, per-sample": 30},
    open_runs={"one step": 30, "demo": 20},
    flawed_runs={"one step": 40, "thirty sampled steps": 20},
    shadows=20,
    tests=60,
)


def bound(case: Case) -> float:
    return float(str(row_of(case, SMALL)["bound"]))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["one step", "one step, per-sample"])
def test_the_view_of_an_image_is_what_the_client_would_clip_and_send_back_through_the_tower(setting: str) -> None:
    target = audited(setting, 8.0, 32)
    view, trainer = View(target), trainer_of(audited(setting, 8.0, 32), target.own)
    network = trainer.network(trainer.new_model())
    text_features = network.text_features()
    planted = view.canaries(12, 1)
    found = feature_gradients(network, text_features, planted.features, planted.labels).text_features
    by_context = context_gradients(text_features, network.ctx, found).double()
    whole = by_context
    if setting == "one step":
        whole = gain(text_features, network.ctx) * tangential(found, text_features.detach()).double()
    scale = (target.plan.privacy.clip / whole.flatten(1).norm(dim=1)).clamp(max=1.0) / target.plan.privacy.clip
    if setting == "one step":
        scale = scale * gain(text_features, network.ctx)
    seen = torch.stack([view.read(one * factor) for one, factor in zip(by_context, scale, strict=True)])
    pulls = view.pulls(planted.features, planted.labels, clipped=True)
    assert (seen - pulls).norm(dim=1).max() < 1e-2
    # Little of a canary is clipped away or hidden, and little of it points where another does.
    assert pulls.norm(dim=1).min() > 0.95
    assert (pulls @ pulls.T - torch.diag(pulls.norm(dim=1) ** 2)).abs().max() < 0.25


@pytest.mark.slow
def test_noise_looks_alike_in_all_directions_of_the_view() -> None:
    """Where the tower shrinks it most too: else floats, not noise, would be seen there."""
    target = audited("one step", 8.0, 32)
    view, trainer = View(target), trainer_of(target, target.own.subset(np.arange(0)))
    model, start = trainer.new_model(), trainer.initial_context()
    releases = []
    for number in range(60):
        moved, _ = trainer.train_round(model, start, model.experts, number)
        releases.append(view.read(torch.from_numpy(start).double() - torch.from_numpy(moved.context)))
    found = torch.stack(releases)
    spread = (found / found.norm(dim=1, keepdim=True)).std(dim=0) * found.shape[1] ** 0.5
    assert spread.mean() == pytest.approx(1.0, abs=0.05)
    assert spread.std() < 0.15  # 0.09, of 60


@pytest.mark.slow
def test_without_privacy_it_sees_who_was_in() -> None:
    assert bound(Case("coins", "one step", None)) > 4.0
    assert bound(Case("membership", "one step", None)) > 2.0


@pytest.mark.slow
def test_without_privacy_it_sees_in_the_demo_who_was_in() -> None:
    assert row_of(Case("coins", "demo", None), SMALL)["right"] > 44  # of 64


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["one step", "one step, per-sample"])
def test_what_keeps_its_promise_is_not_refuted(setting: str) -> None:
    assert bound(Case("coins", setting, 1.0)) <= 1.0


@pytest.mark.slow
def test_what_keeps_its_promise_is_seen_through_all_the_same() -> None:
    assert 1.0 < bound(Case("coins", "one step", 8.0)) < 8.0


@pytest.mark.slow
@pytest.mark.parametrize("flaw", [LITTLE_NOISE, LOOSE_CLIP])
def test_a_flaw_refutes_what_is_claimed(flaw: str) -> None:
    assert bound(Case("coins", "one step", 4.0, flaw)) > 4.0


@pytest.mark.slow
def test_a_tenth_of_the_noise_refutes_8_where_noise_is_claimed_to_be_gaussian() -> None:
    assert bound(Case("gaussian", "one step", 8.0, LITTLE_NOISE)) > 8.0


@pytest.mark.slow
def test_everybody_in_every_step_refutes_what_is_claimed_of_a_sample() -> None:
    assert bound(Case("coins", "thirty sampled steps", 1.0, NO_SAMPLE)) > 1.0


class FaintSum(NoisySum):
    """Adds a tenth of the noise."""

    def __init__(self, clip: float, noise_multiplier: float, **rest: object) -> None:
        super().__init__(clip, noise_multiplier / 10, **rest)  # type: ignore[arg-type]


class LooseSum(NoisySum):
    """As good as no clip, with the noise of the one that is claimed."""

    def __init__(self, clip: float, noise_multiplier: float, **rest: object) -> None:
        super().__init__(clip * 1000, noise_multiplier / 1000, **rest)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [FaintSum, LooseSum])
def test_a_broken_sum_in_the_clients_code_is_found_out(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[..., NoisySum]
) -> None:
    """The flaws of the report are made of other promises; these are in the code, and the adversary hopes for them."""
    monkeypatch.setattr(private_trainer, "NoisySum", broken)
    assert guessed("one step", 4.0, LOOSE_CLIP if broken is LooseSum else LITTLE_NOISE, runs=40, share=0.5) > 4.0


@pytest.mark.slow
def test_a_sample_that_everybody_is_in_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_trainer, "poisson_sample", lambda size, rate, entropy: np.arange(size))
    assert guessed("thirty sampled steps", 1.0, NO_SAMPLE, runs=20, share=0.2) > 1.0


def guessed(setting: str, epsilon: float, suspected: str, *, runs: int, share: float) -> float:
    """The bound of `coins`, of a client without flaws but those of its code, by an adversary that suspects one."""
    count = SETTINGS[setting].canaries
    suspect = audited(setting, epsilon, count, suspected)
    view = View(suspect)
    planted = view.canaries(count, 1)
    attack = FromMoves(suspect, planted, view)
    attack.target = audited(setting, epsilon, count)
    coins = np.random.default_rng(1).integers(2, size=(runs, count)).astype(bool)
    scores = np.array([attack.scores(included) for included in coins])
    guesses = int(coins.size * share / 2)
    order = np.argsort(scores, axis=None)
    right = int((~coins.flat[order[:guesses]]).sum() + coins.flat[order[-guesses:]].sum())
    return one_run_bound(coins.size, 2 * guesses, right, DELTA)


def test_what_is_no_flaw_is_refused() -> None:
    with pytest.raises(ValueError, match="is none of"):
        audited("one step", 1.0, 32, "haste")


def test_all_cases_have_a_size_and_are_once() -> None:
    for size in (audit.FULL, audit.QUICK):
        todo = audit.cases(size)
        assert len(set(todo)) == len(todo)
        for case in (case for case in todo if case.audit == "coins"):
            sizes = size.flawed_runs if case.flaw else size.runs if case.epsilon else size.open_runs
            assert sizes[case.setting] > 0


def rows(at_inf: float = 2.5, flawed: float = 4.5) -> list[Row]:
    seen: Row = {"right": 3, "guesses": 4, "canaries": 2000}
    tested: Row = {"caught": 5, "mistaken": 1, "tests": 6}
    return [
        {"audit": "coins", "setting": "one step", "epsilon": 8.0, "flaw": None, "bound": 1.0} | seen,
        {"audit": "coins", "setting": "one step", "epsilon": 4.0, "flaw": "haste", "bound": flawed} | seen,
        {"audit": "coins", "setting": "one step", "epsilon": None, "flaw": None, "bound": 3.5} | seen,
        {"audit": "membership", "setting": "one step", "epsilon": None, "flaw": None, "bound": at_inf} | tested,
        {"audit": "membership", "setting": "one step", "epsilon": 1.0, "flaw": None, "bound": 0.5} | tested,
    ]


def test_bars_and_table() -> None:
    outcome = Outcome(params={}, rows=rows(), bars=audit.bars(rows()))
    assert {name: bar.value for name, bar in outcome.bars.items()} == {
        "lower_bound_over_epsilon": 0.5,
        "lower_bound_at_inf": 2.5,
        "flaws_over_epsilon": 1.125,
    }
    table = table_of(Report.of("audit", outcome))
    assert "| coins | one step | 8 | 3 of 4 guesses right, of 2,000 coins | 1.00 |" in table
    assert "| membership | one step | without privacy | 5 of 6 caught, 1 mistaken | 2.50 |" in table
    assert table.index("| 1 |") < table.index("| 4, but haste |")
    assert "shows nothing" not in table


@pytest.mark.parametrize(("at_inf", "flawed"), [(0.5, 4.5), (2.5, 3.5)])
def test_an_audit_that_sees_nothing_where_there_is_something_says_so(at_inf: float, flawed: float) -> None:
    outcome = Outcome(params={}, rows=rows(at_inf, flawed), bars=audit.bars(rows(at_inf, flawed)))
    assert "This audit shows nothing" in table_of(Report.of("audit", outcome))

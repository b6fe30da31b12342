"""The plan: canonical form, digest, and one clear line for every mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pfedsecure.errors import PlanError
from pfedsecure.plan import NO_PRIVACY, Plan

TWO = 'class_names = ["dog", "cat"]\n'


def read(tmp_path: Path, text: str) -> Plan:
    file = tmp_path / "plan.toml"
    file.write_text(text)
    return Plan.from_toml(file)


def test_defaults_are_the_papers() -> None:
    plan = Plan(class_names=("dog", "cat"))
    assert (plan.prompt.context_length, plan.mixture.experts, plan.mixture.gate_width) == (16, 9, 128)
    assert (plan.mixture.gate_heads, plan.mixture.lambda_, plan.mixture.attention_scale) == (8, 0.5, 10.0)
    training = plan.training
    assert (training.local_epochs, training.batch_size, training.prompt_lr, training.gate_lr) == (5, 32, 0.002, 0.01)
    assert (training.momentum, training.weight_decay) == (0.9, 5e-4)


def test_toml_and_json_give_the_same_plan(tmp_path: Path) -> None:
    plan = read(tmp_path, TWO + 'name = "x"\nseed = 0\n[mixture]\nlambda = 0.25\nexperts = 3\n')
    assert plan.mixture.lambda_ == 0.25
    assert plan.seed == 0
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest() == plan.digest()


def test_digest_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    one = read(tmp_path, TWO + "[rounds]\ncount = 3\nminimum_cohort = 4\n[training]\nbatch_size = 8\n")
    two = read(tmp_path, "[training]\nbatch_size = 8\n[rounds]\nminimum_cohort = 4\ncount = 3\n".join([TWO, ""]))
    assert one.digest() == two.digest()


@pytest.mark.parametrize(
    "change",
    ["seed = 2", 'name = "other"', "[rounds]\ncount = 11", "[training]\nprompt_lr = 0.003", "[mixture]\nlambda = 0.4"],
)
def test_digest_depends_on_every_setting(tmp_path: Path, change: str) -> None:
    assert read(tmp_path, TWO + change).digest() != read(tmp_path, TWO).digest()


def test_digest_depends_on_the_order_of_classes(tmp_path: Path) -> None:
    assert Plan(class_names=("a", "b")).digest() != Plan(class_names=("b", "a")).digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "class_names is missing; add it"),
        ('class_names = ["dog"]', "class_names: .*at least 2"),
        ('class_names = ["dog", "dog"]', "class_names: 'dog' and 'dog' are the same class"),
        ('class_names = ["alarm clock", "Alarm_Clock"]', "'alarm clock' and 'Alarm_Clock' are the same class"),
        (TWO + "rounds = 3", "rounds: "),
        (TWO + "[rounds]\ncount = 0", r"rounds\.count: .*greater than or equal to 1 \(given 0\)"),
        (TWO + "[rounds]\nparticipation = 1.5", r"rounds\.participation: .*\(given 1\.5\)"),
        (TWO + "[rounds]\ncuont = 3", r"rounds\.cuont is not a known setting; remove it or check its spelling"),
        (TWO + "[training]\nprompt_lr = nan", r"training\.prompt_lr: "),
        (TWO + "[mixture]\ngate_width = 100\ngate_heads = 8", "gate_width 100 is not a multiple of gate_heads 8"),
        (TWO + '[protection]\naggregation = "none"', r"protection\.aggregation: .*\(given 'none'\)"),
        (TWO + "[rounds]\nminimum_cohort = 2", r"minimum_cohort 2 is too small .*: of two clients each could read"),
        (TWO + '[protection]\naggregation = "plain"\nmetrics = true', 'metrics take aggregation = "secure"'),
        (TWO + "[secure_aggregation]\nassumed_corrupt = 0.4", r"assumed_corrupt: .*less than 0\.33"),
        (TWO + 'name = "a b"', "name: "),
        (TWO + "seed = -1", "seed: "),
        ("class_names = [", "not valid TOML"),
    ],
)
def test_mistakes_are_one_line_with_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'plan.toml'}: ")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.toml: cannot read the plan \(No such file or directory\)"):
        Plan.from_toml(tmp_path / "nowhere.toml")


def test_received_plan_that_is_invalid() -> None:
    with pytest.raises(PlanError, match="the plan that was received is invalid"):
        Plan.from_json(b'{"class_names": 3}')


def test_everything_that_is_off_is_named() -> None:
    def said(**settings: object) -> str:
        return " ".join(Plan.model_validate({"class_names": ("a", "b"), **settings}).unprotected())

    plain = {"aggregation": "plain", "experts": "plain", "matching": "plain"}
    for part in ("aggregation = plain", "experts = plain", "matching = plain", "without --dp-epsilon"):
        assert part in said(protection=plain)
    assert "experts" not in said(protection=plain, method="promptfl")
    assert "matching" not in said(protection=plain, method="promptfl")
    assert "peers also see what the gate learned" in said(mixture={"form": "ensemble"})
    for without in ({}, {"mixture": {"form": "ensemble", "experts": 0}}):
        assert "gate" not in said(**without)


def test_protections_are_on_unless_they_are_asked_off() -> None:
    plan = Plan(class_names=("a", "b"))
    assert (plan.protection.aggregation, plan.protection.experts, plan.protection.metrics) == (
        "secure",
        "sealed",
        False,
    )
    assert plan.protection.matching == "he"
    assert plan.unprotected() == (NO_PRIVACY,)  # which is for each client to ask for


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[protection]\nmatching = "dp"\n', 'matching = "dp" needs matching.epsilon'),
        ('[protection]\nexperts = "plain"\n', 'hides sketches of prompts that protection.experts = "plain" shows'),
        ('[protection]\nmatching = "random"\n[matching]\nepsilon = 8\n', 'nothing with protection.matching = "random"'),
        ("[matching]\nepsilon = 0.01\n", "matching.epsilon: less than 0.1 leaves nothing of a sketch"),
        ("[matching]\nclip = 0\n", "matching.clip"),
        ("[matching]\ndimension = 2000\n", "matching.dimension"),
    ],
)
def test_matching_that_does_not_go_with_the_rest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        read(tmp_path, TWO + text)


def test_another_way_of_matching_can_be_asked_for() -> None:
    plan = Plan(class_names=("a", "b"))
    assert plan.with_matching("random").protection.matching == "random"
    assert plan.with_matching("he") == plan
    with pytest.raises(PlanError, match=r"^--matching dp: .*needs matching.epsilon"):
        plan.with_matching("dp")


def test_two_may_take_part_where_nothing_hides_them(tmp_path: Path) -> None:
    plan = read(tmp_path, TWO + '[rounds]\nminimum_cohort = 2\n[protection]\naggregation = "plain"\n')
    assert plan.rounds.minimum_cohort == 2

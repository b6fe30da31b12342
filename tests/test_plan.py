"""The plan: canonical form, digest, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfedsecure.errors import PlanError
from pfedsecure.plan import Plan

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
    one = read(tmp_path, TWO + "[rounds]\ncount = 3\nminimum_cohort = 1\n[training]\nbatch_size = 8\n")
    two = read(tmp_path, "[training]\nbatch_size = 8\n[rounds]\nminimum_cohort = 1\ncount = 3\n".join([TWO, ""]))
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
        (TWO + '[protection]\naggregation = "secure"', r"protection\.aggregation: .*\(given 'secure'\)"),
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
    said = " ".join(Plan(class_names=("a", "b")).unprotected())
    for part in ("aggregation = plain", "experts travel unsealed", "matching = plain", "no differential privacy"):
        assert part in said
    assert "experts" not in " ".join(Plan(class_names=("a", "b"), method="promptfl").unprotected())
    assert "matching = random" in " ".join(
        Plan.model_validate({"class_names": ("a", "b"), "protection": {"matching": "random"}}).unprotected()
    )

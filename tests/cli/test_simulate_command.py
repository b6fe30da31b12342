"""`pfed simulate` as a user runs it, on a few of the embedded digits and on a data set of files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from pfed_cli.main import main
from pfed_cli.simulate.plans import demo_plan, fitted
from pfed_cli.simulate.shares import Partition, all_digits, digits_of, joined, partition
from pfed_client.splitting import split
from pfedsecure.data import open_images
from pfedsecure.data.digits import CLASS_NAMES
from pfedsecure.errors import DataError, PlanError

Simulate = Callable[..., Result]

PLAN = """
name = "small"
class_names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

[prompt]
context_length = 3

[mixture]
experts = 1
gate_width = 16
gate_heads = 2

[training]
local_epochs = 1

[rounds]
count = 1

[protection]
matching = "plain"
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """The command in a folder of its own, where plan.toml lies."""
    monkeypatch.chdir(tmp_path)
    Path("plan.toml").write_text(PLAN)
    return lambda *arguments: CliRunner().invoke(main, ["simulate", *arguments])


@pytest.fixture
def digits_folder(tmp_path: Path) -> Path:
    """A few digits as CLASS/IMAGE."""
    images = open_images("demo:0/5", strict=True)
    for number in range(0, len(images), 4):
        file = tmp_path / "digits" / images.class_names[images.labels[number]] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        images.image(number).save(file)
    return tmp_path / "digits"


def report(file: str = "out.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(file).read_bytes())
    return found


@pytest.mark.slow
def test_the_digits_among_a_few_clients(run: Simulate) -> None:
    result = run("--plan", "plan.toml", "--clients", "4", "--rounds", "2", "--json", "out.json")

    assert result.exit_code == 0, result.output
    assert "rounds.start_clients is 4 here" in result.output
    assert "rounds.count is 2 here, not 1" in result.output
    assert "round 2 of 2: mean accuracy" in result.output
    assert "NOT PROTECTED: matching = plain" in result.output
    found = report()
    assert list(found["clients"]) == [f"client-{number}" for number in range(1, 5)]
    assert sum(client["n_train"] + client["n_test"] for client in found["clients"].values()) == 1797
    for client in found["clients"].values():
        assert list(client["by_round"]) == ["1", "2"]
        assert client["accuracy"] == client["by_round"]["2"]
    assert found["mean_accuracy"] == pytest.approx(np.mean([c["accuracy"] for c in found["clients"].values()]))
    assert found["mean_by_round"]["2"] == pytest.approx(found["mean_accuracy"])
    assert found["protections"] == {"aggregation": "secure", "experts": "sealed", "matching": "plain"}
    assert f"{100 * found['mean_accuracy']:.1f}" in result.output


@pytest.mark.slow
def test_batched_and_side_by_side_come_to_the_same(run: Simulate) -> None:
    common = ("--plan", "plan.toml", "--clients", "6", "--partition", "dirichlet", "--seed", "3")
    for file, more in (("one", ()), ("two", ("--workers", "2")), ("batched", ("--batched",))):
        result = run(*common, *more, "--json", file)
        assert result.exit_code == 0, result.output
    accuracies = [{name: c["by_round"] for name, c in report(file)["clients"].items()} for file in ("one", "two")]
    assert accuracies[0] == accuracies[1]
    assert report("batched")["mean_accuracy"] == pytest.approx(report("one")["mean_accuracy"], abs=0.01)


@pytest.mark.slow
def test_a_folder_of_images_brings_its_class_names(run: Simulate, digits_folder: Path) -> None:
    result = run("--data", str(digits_folder), "--clients", "3", "--rounds", "1", "--json", "out.json")

    assert result.exit_code == 0, result.output
    assert "3 clients (dirichlet 0.3)" in result.output
    assert report()["protections"]["matching"] == "he"


@pytest.mark.slow
def test_a_plan_with_views_trains_on_them(run: Simulate, digits_folder: Path) -> None:
    one = run("--clients", "3", "--plan", "plan.toml", "--data", str(digits_folder), "--json", "one.json")
    Path("plan.toml").write_text(PLAN.replace("local_epochs = 1", "local_epochs = 1\nviews = 3"))
    three = run("--clients", "3", "--plan", "plan.toml", "--data", str(digits_folder), "--json", "three.json")
    assert (one.exit_code, three.exit_code) == (0, 0), three.output
    assert report("one.json")["clients"] != report("three.json")["clients"]


@pytest.mark.slow
def test_private_clients(run: Simulate) -> None:
    plan = PLAN + "\n[privacy]\nsteps = 2\n"
    Path("private.toml").write_text(plan)
    result = run("--plan", "private.toml", "--clients", "3", "--dp-epsilon", "8", "--json", "out.json")

    assert result.exit_code == 0, result.output
    assert "differential privacy: " in result.output
    assert "differential privacy is up to each client" not in result.output
    assert all("8" in client["privacy"] for client in report()["clients"].values())


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (("--batched", "--dp-epsilon", "8"), 2, "--batched does not go with --dp-epsilon"),
        (("--batched", "--workers", "2"), 2, "--workers does not go with --batched"),
        (("--ray", "local", "--batched"), 2, "--ray does not go with --batched"),
        (("--ray", "--dp-epsilon", "8"), 2, "--ray does not go with --dp-epsilon"),
        (("--dp-delta", "0.1"), 2, "--dp-delta goes with --dp-epsilon"),
        (("--dp-epsilon", "nan"), 2, "nan is not over 0 and finite"),
        (("--clients", "2"), 10, "2 clients are fewer than the plan's rounds.minimum_cohort 3"),
        (("--plan", "nowhere.toml"), 10, "nowhere.toml: cannot read the plan"),
        (("--data", "nowhere"), 20, "nowhere"),
        (("--clients", "1797"), 20, "client-1: no class has two images"),
        (("--partition", "clients"), 20, "the data does not say whose images are whose"),
        (("--partition", "domain-dirichlet", "--clients", "7"), 20, "7 clients cannot be as many in each of 5 domains"),
        (("--data", "demo:0/5", "--partition", "classes", "--clients", "11"), 20, "10 classes cannot be shared out"),
        (("--device", "nowhere"), 30, "--device nowhere: cannot be used"),
        (("--plan", "plan.toml", "--backbone", "ViT-B-16"), 31, "--backbone ViT-B-16 is not the plan's tiny-clip"),
    ],
)
def test_what_is_refused(run: Simulate, arguments: tuple[str, ...], status: int, line: str) -> None:
    result = run(*arguments)

    assert result.exit_code == status, result.output
    assert line in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_without_ray_it_says_what_to_install(run: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    result = run("--plan", "plan.toml", "--clients", "3", "--ray")

    assert result.exit_code == 2, result.output
    assert "--ray needs the package ray: pip install 'pfedsecure[ray]'" in result.output


def test_a_file_that_cannot_be_written_is_told(run: Simulate) -> None:
    Path("taken").mkdir()
    result = run("--plan", "plan.toml", "--clients", "3", "--json", "taken/")

    assert result.exit_code == 2
    assert "taken" in result.output


@pytest.mark.slow
def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "pfed_cli.main", "simulate", "--rounds", "500"]
    with subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("round 1 of"):
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "pfed: interrupted"
    assert "Traceback" not in errors


def test_more_clients_than_the_demo_has_share_its_scans() -> None:
    images, rows = joined(digits_of(120, 1))

    assert len(rows) == 120
    assert sorted(np.concatenate(list(rows.values()))) == list(range(1797))
    plan, _ = fitted(demo_plan(None, None, None), 120, None, None)
    for name, own in rows.items():
        train, test = split(images.subset(own), plan, name, 0.5)
        assert len(train)
        assert len(test)


def test_every_partition_gives_away_every_image_once() -> None:
    images = all_digits(1)
    assert images.class_names == tuple(sorted(CLASS_NAMES))
    assert len(images) == 1797
    for way in (Partition.DIRICHLET, Partition.DOMAINS, Partition.DOMAIN_DIRICHLET, Partition.CLASSES):
        chosen, rows = partition(images, way, 10, 0.3, 1)
        assert chosen is way
        assert len(rows) == 10
        assert sorted(np.concatenate(list(rows.values()))) == list(range(1797)), way


def test_the_data_may_say_whose_images_are_whose(tmp_path: Path) -> None:
    images = open_images("demo:0/5", strict=True)
    lines = ["path,label,client"]
    for number in range(24):
        images.image(number).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{images.class_names[images.labels[number]]},hospital-{number % 3}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    listed = open_images(str(tmp_path / "list.csv"), strict=True)

    way, rows = partition(listed, None, None, 0.3, 1)
    assert way is Partition.CLIENTS
    assert list(rows) == ["hospital-0", "hospital-1", "hospital-2"]
    with pytest.raises(DataError, match="the data has 3 clients, not 5; leave --clients off"):
        partition(listed, None, 5, 0.3, 1)


def test_a_plan_is_fitted_to_its_clients() -> None:
    plan = demo_plan(["cat", "dog"], "ViT-B-16", "openai")
    assert plan.class_names == ("cat", "dog")
    assert plan.prompt.context_init == "a photo of a"
    assert (plan.backbone.model, plan.backbone.pretrained) == ("ViT-B-16", "openai")
    for_nine, said = fitted(plan, 9, 7, 8)
    assert (for_nine.rounds.start_clients, for_nine.rounds.count, for_nine.seed) == (9, 7, 8)
    assert len(said) == 3
    assert fitted(for_nine, 9, 7, 8) == (for_nine, [])
    with pytest.raises(PlanError, match="2 clients are fewer"):
        fitted(plan, 2, None, None)

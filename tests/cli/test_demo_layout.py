from __future__ import annotations

from pathlib import Path

import click
import pytest

from pfed_cli.demo.layout import Layout, demo_clients, demo_plan
from pfed_cli.plan_file import to_toml
from pfedsecure.data import open_images
from pfedsecure.plan import Plan


def test_no_round_of_a_demo_goes_on_without_all() -> None:
    plan = demo_plan(rounds=3, n_clients=4, seed=0)

    assert (plan.rounds.count, plan.rounds.clients_to_start, plan.rounds.minimum_cohort, plan.seed) == (3, 4, 4, 0)
    assert demo_plan(rounds=None, n_clients=4, seed=None).rounds.count > 3


def test_clients_have_disjoint_images_and_conditions_of_their_own() -> None:
    clients = demo_clients(5, seed=3)
    shares = [open_images(client.data, strict=True) for client in clients]

    assert len({client.condition for client in clients}) == 5
    for client, share in zip(clients, shares, strict=True):
        assert share.domains is not None
        assert set(share.domains) == {client.condition}
    assert sum(map(len, shares)) == 1797


@pytest.mark.parametrize(
    "plan",
    [
        demo_plan(rounds=2, n_clients=3, seed=5),
        Plan.model_validate(
            {
                "class_names": ['with "quotes"', "back\\slash", "ünïcode"],
                "mixture": {"lambda": 0.25},
                "rounds": {"start_clients": 7},
                "backbone": {"text_width": 48},
            }
        ),
    ],
)
def test_a_plan_file_is_read_back_as_the_same_plan(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(to_toml(plan))

    assert Plan.from_toml(file) == plan


def test_an_earlier_demo_is_removed_unless_kept(tmp_path: Path) -> None:
    plan = demo_plan(rounds=2, n_clients=3, seed=5)
    layout = Layout.prepare(tmp_path / "demo", plan, keep=False)
    state = layout.client_state("client-1") / "client.json"
    state.parent.mkdir(parents=True)
    state.touch()
    layout.summary_file.touch()

    Layout.prepare(tmp_path / "demo", plan, keep=True)
    assert state.exists()
    Layout.prepare(tmp_path / "demo", plan, keep=False)
    assert sorted(path.name for path in layout.folder.iterdir()) == ["logs", "plan.toml"]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(click.UsageError, match=r"holds thesis.tex, which is no demo's; give a folder of its own"):
        Layout.prepare(tmp_path, demo_plan(rounds=2, n_clients=3, seed=5), keep=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "thesis.tex"]


def test_out_cannot_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    with pytest.raises(click.UsageError, match="cannot be used"):
        Layout.prepare(file, demo_plan(rounds=2, n_clients=3, seed=5), keep=False)

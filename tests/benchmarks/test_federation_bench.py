"""The federation benchmark: its bars from known rows, and all of it on tiny images with the embedded CLIP."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pfed_benchmarks import federation
from pfed_benchmarks.contract import Report
from pfed_benchmarks.federation import Score, Sources, Task, bars, measure, own_domain_share
from pfed_benchmarks.photo_clients import Share
from PIL import Image

from pfed_cli.methods import Method
from pfed_cli.simulation import ClientResult, SimulationResult
from pfed_client.local_model import LocalModel
from pfedsecure.clip.config import TINY_FOLDER, TINY_NAME, TINY_WEIGHTS
from pfedsecure.errors import BackboneError

NOWHERE = np.array([], dtype=np.int64)


def scores(values: dict[tuple[str, int], dict[Method, float]]) -> list[Score]:
    return [
        Score(data_set, seed, method, clients=20, accuracy=value, own_domain_share=None, seconds=1.0)
        for (data_set, seed), by_method in values.items()
        for method, value in by_method.items()
    ]


def test_bars_are_points_of_mean_accuracy_over_data_sets_and_seeds() -> None:
    def of(moap: float, promptfl: float, local: float, gate: float) -> dict[Method, float]:
        return {
            Method.PFEDMOAP: moap,
            Method.PROMPTFL: promptfl,
            Method.LOCAL: local,
            Method.GATE_ONLY: gate,
            Method.RANDOM_EXPERTS: 0.0,
        }

    found = bars(
        scores(
            {
                ("a", 1): of(0.80, 0.70, 0.85, 0.80),
                ("b", 1): of(0.60, 0.60, 0.65, 0.58),
                ("a", 2): of(0.82, 0.70, 0.83, 0.80),
                ("b", 2): of(0.60, 0.58, 0.62, 0.66),
            }
        )
    )

    # seed 1: (0.80 + 0.60) / 2 - (0.70 + 0.60) / 2 = 5 points; seed 2: 7 points
    assert found["pfedmoap_over_promptfl"].value == pytest.approx(6.0)
    assert found["pfedmoap_over_promptfl"].deviation == pytest.approx(2**0.5)
    assert found["pfedmoap_over_promptfl"].ok
    assert found["pfedmoap_over_local"].value == pytest.approx(-3.25)
    assert not found["pfedmoap_over_local"].ok
    assert found["pfedmoap_over_gate_only"].value == pytest.approx(-0.5)
    assert (found["pfedmoap_over_gate_only"].limit, found["pfedmoap_over_gate_only"].ok) == (None, True)
    assert {bar.limit for name, bar in found.items() if name != "pfedmoap_over_gate_only"} == {0.0}


def test_one_seed_has_no_deviation() -> None:
    methods = dict.fromkeys(Method, 0.5)

    assert bars(scores({("a", 1): methods}))["pfedmoap_over_local"].deviation is None


def result(borrowed: dict[str, Sequence[str]]) -> SimulationResult:
    model = LocalModel(np.zeros((1, 1), np.float32), {}, np.zeros((0, 1, 1), np.float32), 2)
    return SimulationResult({n: ClientResult(0.5, (), model, {2: tuple(b)}) for n, b in borrowed.items()}, 1.0)


def test_the_share_borrowed_in_the_own_domain() -> None:
    shares = [Share(name, name[0], NOWHERE, NOWHERE) for name in ("a1", "a2", "b1")]
    borrowed = {"a1": ("a2", "b1"), "a2": ("a1", "b1"), "b1": ("a1", "a2")}

    assert own_domain_share(result(borrowed), shares) == pytest.approx(2 / 6)
    assert own_domain_share(result({}), shares) is None
    assert own_domain_share(result(borrowed), [Share(name, None, NOWHERE, NOWHERE) for name in borrowed]) is None


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """office_caltech10.tar with two domains of three classes, and the embedded tiny CLIP as the backbone."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    tree = folder / "office_caltech10"
    for domain in ("amazon", "webcam"):
        for level, class_name in enumerate(("bike", "laptop", "mug")):
            (tree / domain / class_name).mkdir(parents=True)
            for number in range(32):
                pixels = np.clip(rng.normal(60 + 60 * level, 20, (8, 8)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tree / domain / class_name / f"{number:02d}.png")
    with tarfile.open(folder / "office_caltech10.tar", "w") as tar:
        tar.add(tree, arcname=tree.name)
    backbone_dir = folder / "backbone"
    backbone_dir.mkdir()
    shutil.copy(TINY_FOLDER / f"{TINY_NAME}.json", backbone_dir)
    shutil.copy(TINY_WEIGHTS, backbone_dir)
    return Sources(folder, backbone_dir, folder / "cache")


@pytest.mark.slow
def test_a_task_measures_and_can_be_repeated(sources: Sources) -> None:
    task = Task("office_caltech10", seed=1, method=Method.PFEDMOAP, rounds=2)
    row = measure(task, sources)

    assert (row.data_set, row.seed, row.method, row.clients) == ("office_caltech10", 1, "pfedmoap", 10)
    assert row.own_domain_share == pytest.approx(4 / 9)  # all nine others are borrowed, four of them of the own domain
    assert 0 < row.accuracy <= 1
    again = measure(task, sources)
    assert (again.accuracy, again.own_domain_share) == (row.accuracy, row.own_domain_share)


def test_the_backbone_folder_must_hold_one_model(tmp_path: Path, sources: Sources) -> None:
    task = Task("office_caltech10", seed=1, method=Method.ZERO_SHOT, rounds=1)

    with pytest.raises(BackboneError, match=r"must hold MODEL.json and MODEL.safetensors of one model \(found: none\)"):
        measure(task, Sources(sources.data, tmp_path, sources.cache))


@pytest.mark.slow
def test_quick_runs_one_data_set_and_one_seed(sources: Sources, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ["--quick", "--json", str(file), "--data", str(sources.data), "--cache", str(sources.cache)]
    outcome = CliRunner().invoke(federation.command, options)
    assert outcome.exit_code == 0, outcome.output

    report = Report.read(file)
    assert [row["method"] for row in report.rows] == [str(method) for method in Method]
    assert {row["data_set"] for row in report.rows} == {"office_caltech10"}
    assert (report.params["quick"], report.params["rounds"], report.params["seeds"]) == (True, 5, [1])
    by_method = {row["method"]: float(str(row["accuracy"])) for row in report.rows}
    ahead = 100 * (by_method["pfedmoap"] - by_method["promptfl"])
    assert report.bars["pfedmoap_over_promptfl"].value == pytest.approx(ahead)

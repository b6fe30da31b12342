"""The benchmark of privacy against accuracy: cells, noise on uploads, bars, table, page, and a run that goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pfed_benchmarks import privacy_utility
from pfed_benchmarks.cli import bench_plot, bench_table
from pfed_benchmarks.contract import Outcome, Report, Row
from pfed_benchmarks.kept_rows import KeptRows
from pfed_benchmarks.noised_uploads import DELTA, NoisedUploadTrainer
from pfed_benchmarks.photo_features import Sources
from pfed_benchmarks.privacy_cells import FEATURE_SPACE, MATCHING, PER_SAMPLE, Cell, Way, digit_cells, quick_cells
from pfed_benchmarks.privacy_data import Federation, federation_of, with_shots
from pfed_benchmarks.privacy_measuring import measure, plan_of_cell
from pfed_benchmarks.privacy_report import page
from pfed_benchmarks.privacy_tables import privacy_table, series_of
from pfed_benchmarks.privacy_utility import available_photos, bars, measure_all

from pfed_client.trainer import Trainer
from pfedsecure.errors import BenchError
from pfedsecure.privacy.accountant import epsilon as total_epsilon

CLIP, ROUNDS = 0.01, 1


def row(way: Way, epsilon: float | None, seed: int, accuracy: float, **changes: object) -> Row:
    values: dict[str, object] = {
        "data_set": "digits",
        "way": str(way),
        "mechanism": None if epsilon is None or way == Way.UPLOADS else FEATURE_SPACE,
        "matching": "none" if way in (Way.LOCAL, Way.LOCAL_GATE, Way.PROMPTFL) else MATCHING,
        "shots": None,
        "epsilon": epsilon,
        "seed": seed,
        "accuracy": accuracy,
        "worst": accuracy - 0.1,
        "noise_multiplier": None if epsilon is None else 2.0,
        "delta": None if epsilon is None else 1e-5,
        "clients": 5,
        "images": 150,
        "seconds": 1.0,
    }
    return values | changes  # type: ignore[return-value]


ROWS = [
    made
    for seed in (1, 2)
    for made in (
        row(Way.PFEDMOAP, None, seed, 0.90),
        row(Way.PFEDMOAP, 8.0, seed, 0.85 + 0.01 * seed),
        row(Way.PFEDMOAP, 25.0, seed, 0.88),
        row(Way.PFEDMOAP, 8.0, seed, 0.80, mechanism=PER_SAMPLE),
        row(Way.PFEDMOAP, 8.0, seed, 0.10, shots=4, images=40),
        row(Way.PFEDMOAP, 8.0, seed, 0.20, matching="random"),
        row(Way.UPLOADS, 8.0, seed, 0.89),
        row(Way.LOCAL, 8.0, seed, 0.70),
    )
]


def report(rows: list[Row]) -> Report:
    params = {"rounds": 10, "seeds": [1, 2]}
    return Report.of("privacy-utility", Outcome(params=params, rows=rows, bars=bars(rows)))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("privacy-utility")
    return Sources(folder / "none", folder / "none" / "backbone", folder / "cache")


@pytest.fixture(scope="module")
def federation(sources: Sources) -> Federation:
    """One round of the demo of three steps."""
    found = federation_of("digits", 1, 1, sources)
    privacy = found.plan.privacy.model_copy(update={"steps": 3})
    training = found.plan.training.model_copy(update={"local_epochs": 1})
    return replace(found, plan=found.plan.model_copy(update={"privacy": privacy, "training": training}))


def test_cells_are_measured_once_and_the_base_design_is_whole() -> None:
    cells = digit_cells("digits")
    assert len(set(cells)) == len(cells)
    base = [cell for cell in cells if cell.way == Way.PFEDMOAP and cell.matching == MATCHING and cell.shots is None]
    for mechanism in (FEATURE_SPACE, PER_SAMPLE):
        assert {cell.epsilon for cell in base if cell.mechanism == mechanism} >= {8.0, 4.0, 2.0, 1.0, 0.5}
    assert {cell.seed for cell in base if cell.epsilon is None} == {1, 2, 3}
    assert {cell.way for cell in cells} == set(Way)
    assert all((cell.mechanism is None) == (cell.epsilon is None or cell.way == Way.UPLOADS) for cell in cells)
    assert len(quick_cells("digits")) < 10


def test_bars_are_of_the_base_design_and_paired_by_seed() -> None:
    found = bars(ROWS)
    assert found["digits_drop_at_8"].value == pytest.approx(3.5)
    assert found["digits_drop_at_8"].deviation == pytest.approx(0.5**0.5)
    assert (found["digits_drop_at_8"].limit, found["digits_drop_at_8"].ok) == (5.0, True)
    assert found["digits_drop_at_25"].value == pytest.approx(2.0)
    assert found["digits_uploads_drop_at_8"].value == pytest.approx(1.0)
    assert found["digits_uploads_drop_at_8"].limit is None
    few = [made | {"images": 99} for made in ROWS]
    assert "digits_drop_at_8" not in bars(few)  # it is for clients with a hundred images at least


def test_the_table() -> None:
    lines = privacy_table(report(ROWS)).split("\n")
    assert lines[0] == "| digits: epsilon | none | 25 | 8 |"
    assert lines[2] == "| pFedMoAP, feature-space | 90.0 ± 0.0 | 88.0 ± 0.0 | 86.5 ± 0.7 |"
    assert "| pFedMoAP, per-sample | 90.0 ± 0.0 |  | 80.0 ± 0.0 |" in lines
    assert "| noise on uploads only | 90.0 ± 0.0 |  | 89.0 ± 0.0 |" in lines
    assert "| pFedMoAP, feature-space, 4 a class |  |  | 10.0 ± 0.0 |" in lines
    assert (
        "5 clients with at least 150 training images, delta 1e-05; noise of a step in clips: 2.0 at 25, 2.0 at 8."
        in lines
    )
    assert "- `digits_drop_at_8`: 3.50 ± 0.71 points (<= 5: ok)" in lines
    assert len(series_of(ROWS)) == 6


def test_table_picture_and_page_are_made_of_the_file(tmp_path: Path) -> None:
    file, picture = tmp_path / "report.json", tmp_path / "report.png"
    report(ROWS).write(file)
    assert CliRunner().invoke(bench_table, [str(file)]).output == privacy_table(report(ROWS)) + "\n"
    result = CliRunner().invoke(bench_plot, [str(file), "--into", str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    html = page(report(ROWS))
    assert "data:image/png;base64," in html
    assert "86.5 ± 0.7" in html
    assert "http" not in html.replace("http-equiv", "")


def test_photographs_that_are_not_there_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert available_photos(None) == []
    assert "photographs are left out" in capsys.readouterr().err
    (tmp_path / "pacs.tar").touch()
    assert available_photos(tmp_path) == ["pacs"]
    assert "no office_caltech10.tar there" in capsys.readouterr().err


def test_rows_are_kept_and_those_of_another_configuration_refused(tmp_path: Path) -> None:
    file, made = tmp_path / "kept" / "rows.jsonl", row(Way.LOCAL, 8.0, 1, 0.5)
    cell = Cell("digits", Way.LOCAL, FEATURE_SPACE, "none", None, 8.0, 1)

    def never() -> Row:
        raise AssertionError

    assert KeptRows(file, {"rounds": 1}).get(asdict(cell), lambda: made) == made
    with file.open("a") as out:
        out.write('\n{"key": "bro')  # the machine went down here
    again = KeptRows(file, {"rounds": 1})
    assert again.get(asdict(cell), never) == made
    assert again.get(asdict(replace(cell, seed=2)), lambda: made) == made
    assert KeptRows(file, {"rounds": 1}).get(asdict(replace(cell, seed=2)), never) == made
    with pytest.raises(BenchError, match="another configuration") as caught:
        KeptRows(file, {"rounds": 2})
    assert "\n" not in str(caught.value)
    file.write_text("no JSON\n")
    with pytest.raises(BenchError, match="does not begin as"):
        KeptRows(file, {"rounds": 1})
    with pytest.raises(BenchError, match="cannot be read"):
        KeptRows(tmp_path, {})


@pytest.mark.slow
def test_noise_on_uploads_keeps_its_epsilon_whatever_a_client_has(federation: Federation) -> None:
    """With the same noise, what clients send that have not one image in common is two clips apart at most."""
    moves = []
    plan = federation.plan
    for client in federation.clients[:2]:
        trainer = NoisedUploadTrainer(
            plan,
            federation.backbone,
            client.train,
            client.test,
            name=client.name,
            epsilon=8.0,
            clip=CLIP,
            unsafe_entropy=bytes,  # the same noise for both
        )
        model = trainer.new_model()
        start = model.context
        sent, _ = trainer.train_round(model, start, model.experts, 1)
        home, _ = Trainer.train_round(trainer, model, start, model.experts, 1)
        assert np.linalg.norm(home.context - start) > CLIP  # the clip does something
        assert sent.n_train == 1
        events = [trainer.event(number) for number in range(1, ROUNDS + 1)]
        assert 7.99 < total_epsilon(events, DELTA) <= 8.0
        moves.append(sent.context - start)
        assert trainer.evaluate(sent) == trainer.evaluate(home)  # it predicts with what stayed at home
    apart = float(np.linalg.norm(moves[0] - moves[1]))
    assert 0.1 * CLIP < apart <= 2 * CLIP  # the same noise on both


@pytest.mark.slow
@pytest.mark.parametrize("way", list(Way))
def test_a_cell_of_every_way(federation: Federation, way: Way) -> None:
    mechanism = None if way == Way.UPLOADS else FEATURE_SPACE
    matching = MATCHING if way in (Way.PFEDMOAP, Way.UPLOADS) else "none"
    found = measure(Cell("digits", way, mechanism, matching, None, 8.0, 1), federation)
    assert 0.1 < float(str(found["accuracy"])) < 1
    assert float(str(found["worst"])) <= float(str(found["accuracy"]))
    assert found["delta"] == pytest.approx(1e-5)
    assert float(str(found["noise_multiplier"])) > 0.3
    assert (found["clients"], found["way"]) == (5, str(way))
    assert int(str(found["images"])) >= 100


@pytest.mark.slow
def test_settings_reach_the_plan(federation: Federation) -> None:
    cell = Cell("digits", Way.PFEDMOAP, PER_SAMPLE, "dp", 4, 8.0, 1)
    plan = plan_of_cell(cell, federation.plan)
    assert (plan.privacy.mechanism, plan.protection.matching, plan.matching.epsilon) == (PER_SAMPLE, "dp", 8.0)
    assert plan_of_cell(replace(cell, way=Way.LOCAL_GATE), federation.plan).mixture.experts == 0
    few = with_shots(federation.clients, 4, 1)
    assert all(len(client.train) <= 40 for client in few)
    assert [len(client.test) for client in few] == [len(client.test) for client in federation.clients]


@pytest.mark.slow
def test_what_is_done_is_not_done_again(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def counting(cell: Cell, _federation: Federation) -> Row:
        done.append(cell.seed)
        return row(cell.way, cell.epsilon, cell.seed, 0.5)

    monkeypatch.setattr(privacy_utility, "measure", counting)
    cells = [Cell("digits", Way.PFEDMOAP, None, MATCHING, None, None, seed) for seed in (1, 2)]
    file = tmp_path / "digits.jsonl"
    first = measure_all("digits", cells[:1], 1, sources, file)
    assert measure_all("digits", cells, 1, sources, file)[:1] == first
    assert done == [1, 2]
    assert len(file.read_text().splitlines()) == 3
    assert json.loads(file.read_text().splitlines()[0])["configuration"]["data_set"] == "digits"
    with pytest.raises(BenchError, match="another configuration"):
        measure_all("digits", cells, 2, sources, file)


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    file, html = tmp_path / "report.json", tmp_path / "report.html"
    options = ["--quick", "--json", str(file), "--cache", str(tmp_path / "cache"), "--kept", str(tmp_path / "kept")]
    outcome = CliRunner().invoke(privacy_utility.command, [*options, "--html", str(html)])
    assert outcome.exit_code == 0, outcome.output
    found = Report.read(file)
    assert (found.params["quick"], found.params["data_sets"]) == (True, ["digits"])
    assert "digits_drop_at_8" in found.bars
    assert html.read_text().startswith("<!doctype html>")

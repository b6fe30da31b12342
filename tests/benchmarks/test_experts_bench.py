"""The expert benchmark: what it measures, its bars, table and picture from known rows, and a tiny run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from pfed_benchmarks import experts
from pfed_benchmarks.cli import bench_plot, bench_table
from pfed_benchmarks.contract import Outcome, Report, Row
from pfed_benchmarks.expert_clients import DIGITS, mixed, plan_of_set
from pfed_benchmarks.expert_tables import Difference, difference, experts_table
from pfed_benchmarks.expert_tasks import ALONE, OFFICE, PACS, Task, quick_tasks, tasks_of
from pfed_benchmarks.experts import bars, load, measure, measure_all
from pfed_benchmarks.light_federation import Matching
from pfed_benchmarks.photo_features import Sources

from pfedsecure.errors import BenchError


def row(form: str, matching: str, seed: int, own: float, unseen: float | None = 0.2, **changes: object) -> Row:
    values: dict[str, object] = {
        "data_set": "digits",
        "beta": 0.3,
        "shots": None,
        "form": form,
        "matching": matching,
        "experts": 0 if matching == "none" else 9,
        "seed": seed,
        "own": own,
        "balanced": own - 0.1,
        "unseen": unseen,
        "own_domain_share": None if matching == "none" else 0.25,
        "prompts_and_labels": 0.1 * seed,
        "prompts_and_domains": 0.0,
        "seconds": 1.0,
    }
    return values | changes  # type: ignore[return-value]


ROWS = [
    made
    for seed in (1, 2)
    for made in (
        row("gate alone", "none", seed, 0.80),
        row("softened", "none", seed, 0.78),
        row("paper", "nearest", seed, 0.80 + 0.01 * seed),
        row("paper", "random", seed, 0.80),
        row("ensemble", "nearest", seed, 0.81),
        row("ensemble", "random", seed, 0.82, unseen=0.3),
        row("logits", "nearest", seed, 0.79),
    )
]


def report(rows: list[Row]) -> Report:
    return Report.of("experts", Outcome(params={}, rows=rows, bars=bars(rows)))


def test_tasks_are_measured_once_with_what_they_are_compared_with() -> None:
    tasks = tasks_of((DIGITS, OFFICE, PACS), (1, 2, 3))
    assert len(set(tasks)) == len(tasks)
    alone = {(task.data_set, task.beta, task.shots, task.seed) for task in tasks if task.form == ALONE}
    assert {(task.data_set, task.beta, task.shots, task.seed) for task in tasks} == alone
    assert {task.data_set for task in tasks_of((DIGITS,), (1,))} == {DIGITS}
    assert {task.matching for task in quick_tasks()} >= {Matching.NONE, Matching.NEAREST, Matching.FARTHEST}


def test_bars_are_paired_by_seed() -> None:
    found = bars([*ROWS, row("paper", "nearest", 1, 0.1, beta=1.0), row("paper", "nearest", 1, 0.1, shots=4)])

    assert found["paper_over_alone_own"].value == pytest.approx(1.5)
    assert found["paper_over_alone_own"].deviation == pytest.approx(0.5**0.5)
    assert found["paper_nearest_over_random_own"].value == pytest.approx(1.5)
    assert found["ensemble_over_alone_own"].value == pytest.approx(2.0)
    assert found["ensemble_over_alone_unseen"].value == pytest.approx(10.0)
    assert found["ensemble_over_softened_balanced"].value == pytest.approx(4.0)
    assert found["prompts_and_labels"].value == pytest.approx(0.15)
    assert all(bar.ok for bar in found.values())


def test_differences_have_the_standard_error_of_their_mean() -> None:
    alone = [row("gate alone", "none", seed, 0.5) for seed in (1, 2, 3)]
    others = [row("paper", "nearest", seed, 0.5 + 0.02 * seed, unseen=None) for seed in (1, 2, 3)]

    found = difference(others, alone, "own")
    assert found is not None
    assert found.mean == pytest.approx(4.0)
    assert found.error == pytest.approx(2.0 / 3**0.5)
    assert str(found) == "+4.0 ± 1.2"
    assert difference(others, alone, "unseen") is None
    assert str(difference(others[:1], alone, "own")) == str(Difference(2.0, None)) == "+2.0"


def test_the_table() -> None:
    lines = experts_table(report(ROWS)).split("\n")

    assert "| digits, 0.3, all images | 9 | 80.0 | +1.5 ± 0.5 | +0.0 ± 0.0 |  |  |  |  | -2.0 ± 0.0 | +1.0 ± 0.0 |" in (
        "\n".join(lines)
    )
    assert "| logits | -1.0 ± 0.0 | -1.0 ± 0.0 | +0.0 ± 0.0 |" in lines
    assert "| digits, 0.3, all images | 0.15 ± 0.07 | 0.00 ± 0.00 | 25.0 ± 0.0 % |" in lines
    assert "- `paper_over_alone_own`: 1.50 ± 0.71 (no limit)" in lines


def test_table_and_picture_are_made_of_the_file(tmp_path: Path) -> None:
    file, picture = tmp_path / "experts.json", tmp_path / "experts.png"
    report(ROWS).write(file)

    assert CliRunner().invoke(bench_table, [str(file)]).output == experts_table(report(ROWS)) + "\n"
    result = CliRunner().invoke(bench_plot, [str(file), "--into", str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    report(ROWS).model_copy(update={"bench": "secagg"}).write(file)
    result = CliRunner().invoke(bench_plot, [str(file), "--into", str(picture)])
    assert isinstance(result.exception, BenchError)
    assert str(result.exception) == "benchmark secagg has no picture; experts and privacy-utility have"


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path / "none", tmp_path / "none" / "backbone", tmp_path / "cache")


@pytest.mark.slow
def test_the_gate_alone_brings_the_ensembles_with_it(sources: Sources) -> None:
    data = load(DIGITS, sources)
    plan = plan_of_set(DIGITS, data.images.class_names, seed=1, rounds=2, model="")
    rows = measure(Task(DIGITS, 0.3, 1, ALONE, Matching.NONE, 0, 1), mixed(plan, experts=0), data)

    assert [(row["form"], row["experts"]) for row in rows[:2]] == [("gate alone", 0), ("softened", 0)]
    ensembles = {(row["matching"], row["experts"]): row for row in rows[2:]}
    assert len(ensembles) == 10
    assert ensembles["own_domain", 2]["own_domain_share"] == 1.0
    assert ensembles["own_domain", 9]["own_domain_share"] == pytest.approx(3 / 9)  # four of twenty clients a domain
    assert len({row["balanced"] for row in rows}) > 5


@pytest.mark.slow
def test_what_is_done_is_not_done_again(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task(DIGITS, 0.3, 1, "paper", Matching.NEAREST, 2, seed) for seed in (1, 2)]
    first = measure_all(tasks[:1], 1, sources)
    with (sources.cache / "experts.jsonl").open("a") as file:
        file.write('\n{"key": "bro')  # the machine went down here
    done: list[Task] = []

    def counting(task: Task, *args: object) -> list[Row]:
        done.append(task)
        return [row("paper", "nearest", task.seed, 0.5)]

    monkeypatch.setattr(experts, "measure", counting)
    for _ in range(2):
        assert measure_all(tasks, 1, sources)[:1] == first
    assert done == tasks[1:]


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    file = tmp_path / "experts.json"
    options = ["--quick", "--json", str(file), "--data", str(tmp_path), "--cache", str(tmp_path / "cache")]
    outcome = CliRunner().invoke(experts.command, options)
    assert outcome.exit_code == 0, outcome.output

    found = Report.read(file)
    assert (found.params["quick"], found.params["data_sets"], found.params["seeds"]) == (True, ["digits"], [1])
    assert {row["matching"] for row in found.rows} >= {str(task.matching) for task in quick_tasks()}

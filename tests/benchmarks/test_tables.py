from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from pfed_benchmarks.cli import bench_table
from pfed_benchmarks.contract import Bar, Outcome, Report
from pfed_benchmarks.tables import replace_table, table_of


def row(data_set: str, seed: int, method: str, accuracy: float, share: float | None = None) -> dict[str, object]:
    return {
        "data_set": data_set,
        "seed": seed,
        "method": method,
        "clients": 20,
        "accuracy": accuracy,
        "own_domain_share": share,
        "seconds": 1.0,
    }


REPORT = Report.of(
    "federation",
    Outcome(
        params={},
        rows=[
            row("pacs", 1, "zero_shot", 0.5),
            row("pacs", 2, "zero_shot", 0.5),
            row("pacs", 1, "pfedmoap", 0.80, 0.6),
            row("pacs", 2, "pfedmoap", 0.82, 0.7),
            row("caltech101", 1, "pfedmoap", 0.9),
        ],  # type: ignore[list-item]
        bars={
            "pfedmoap_over_local": Bar.of(1.234, 0.0, ">=", deviation=0.5),
            "pfedmoap_over_gate_only": Bar.of(-0.1, None, ">="),
        },
    ),
)
TABLE = """\
| | zero-shot | pFedMoAP | borrowed in own domain |
|---|---|---|---|
| pacs | 50.0 ± 0.0 | 81.0 ± 1.4 | 65.0 ± 7.1 |
| caltech101 | – | 90.0 | – |

- `pfedmoap_over_local`: 1.23 ± 0.50 points (>= 0: ok)
- `pfedmoap_over_gate_only`: -0.10 points (no limit)"""


def test_the_table_of_the_federation_benchmark() -> None:
    assert table_of(REPORT) == TABLE


def test_the_command_prints_or_replaces(tmp_path: Path) -> None:
    file, document = tmp_path / "federation.json", tmp_path / "results.md"
    REPORT.write(file)
    document.write_text("# Results\n<!-- bench federation -->\nold\n<!-- end of bench federation -->\nthe rest\n")

    assert CliRunner().invoke(bench_table, [str(file)]).output == TABLE + "\n"
    for _ in range(2):
        assert CliRunner().invoke(bench_table, [str(file), "--into", str(document)]).exit_code == 0
        assert document.read_text() == (
            f"# Results\n<!-- bench federation -->\n{TABLE}\n<!-- end of bench federation -->\nthe rest\n"
        )


@pytest.mark.parametrize("document", ["", "<!-- bench federation -->\n", "<!-- end of bench federation -->\n"])
def test_a_document_without_marks_is_left_alone(document: str) -> None:
    with pytest.raises(click.ClickException, match="has no lines <!-- bench federation -->"):
        replace_table(document, "federation", TABLE)


def test_a_benchmark_without_a_table_is_named() -> None:
    other = REPORT.model_copy(update={"bench": "other"})

    with pytest.raises(click.ClickException, match="benchmark other has no table; those that do: federation"):
        table_of(other)

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from pfed_benchmarks.cli import bench_table
from pfed_benchmarks.contract import Bar, Outcome, Report
from pfed_benchmarks.tables import replace_table, table_of

from pfedsecure.errors import BenchError


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


def measured(way: str, clients: int, dropout: float, **numbers: object) -> dict[str, object]:
    costs = {"client_ms": 18.84, "server_ms": 71364.8, "bytes_up": 53655, "bytes_down": 96840.0}
    return {"way": way, "clients": clients, "values": 8192, "dropout": dropout} | costs | numbers


OURS = {
    "client_first_ms": 31.51,
    "server_relay_ms": 100.4,
    "server_mib": 52.2,
    "error_over_bound": 0.1673,
    "graph": "complete",
    "holders": 99,
    "threshold": 67,
}
SECAGG = Report.of(
    "secagg",
    Outcome(
        params={"flwr": "1.2.3"},
        rows=[
            measured("pfedsecure", 100, 0.1, server_ms=46.7, **OURS),
            measured("ckks", 100, 0.1, client_ms=7.9),
            measured("flower", 100, 0.1, client_ms=1231.68),
            measured("pfedsecure", 1000, 0.0, **OURS | {"graph": "sparse", "holders": 150, "threshold": 73}),
            measured("ckks", 1000, 0.0),
        ],  # type: ignore[list-item]
        bars={"server_ratio_flower_100": Bar.of(1527.98, 100, ">="), "client_ms_100": Bar.of(61.0, 60, "<=")},
    ),
)
SECAGG_TABLE = """\
| clients | values | drop out | graph | client, ms: ours / Flower / CKKS | in its first round \
| server, ms: ours / Flower / CKKS | relaying, ms | sent, kB: ours / Flower / CKKS \
| received, kB: ours / Flower / CKKS | server, MiB | error / bound |
|---|---|---|---|---|---|---|---|---|---|---|---|
| 100 | 8,192 | 10% | complete, k = 99, t = 67 | 18.8 / 1,232 / 7.9 | 31.5 | 46.7 / 71,365 / 71,365 | 100 \
| 53.7 / 53.7 / 53.7 | 96.8 / 96.8 / 96.8 | 52.2 | 0.167 |
| 1,000 | 8,192 | 0% | sparse, k = 150, t = 73 | 18.8 / 18.8 | 31.5 | 71,365 / 71,365 | 100 \
| 53.7 / 53.7 | 96.8 / 96.8 | 52.2 | 0.167 |

- `server_ratio_flower_100`: 1,528 (>= 100: ok)
- `client_ms_100`: 61 (<= 60: missed)"""


def test_the_table_of_the_secure_aggregation_benchmark() -> None:
    ran_on, blank, *table = table_of(SECAGG).split("\n")
    assert "\n".join(table) == SECAGG_TABLE
    assert ran_on.endswith(", flwr 1.2.3.")
    assert SECAGG.machine.versions["cryptography"] in ran_on
    assert not blank


def test_without_flower_the_table_has_none() -> None:
    rows = [row for row in SECAGG.rows if row["way"] != "flower"]
    table = table_of(SECAGG.model_copy(update={"rows": rows, "params": {"flwr": None}}))
    assert "client, ms: ours / CKKS |" in table
    assert "flwr" not in table


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
    with pytest.raises(BenchError, match="has no lines <!-- bench federation -->"):
        replace_table(document, "federation", TABLE)


def test_a_benchmark_without_a_table_is_named() -> None:
    other = REPORT.model_copy(update={"bench": "other"})

    with pytest.raises(
        BenchError,
        match="other has no table; those that do: audit, dp-step, experts, federation, load, matching, precision,",
    ):
        table_of(other)

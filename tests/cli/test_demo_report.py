"""Summary and report of a federation whose figures are known."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from pfed_cli.demo.baselines import Comparison
from pfed_cli.demo.federation import FederationResult
from pfed_cli.demo.layout import DemoClient, demo_plan
from pfed_cli.demo.report import Scale, render
from pfed_cli.demo.summary import Summary, summarise, summary_table
from pfed_cli.methods import Method
from pfed_cli.simulation import ClientResult, SimulationResult
from pfed_client.local_model import LocalModel
from pfed_client.metrics import RoundRecord
from pfedsecure.wire.v1 import operations_pb2 as ops

PLAN = demo_plan(rounds=2, n_clients=2, seed=3)
CLIENTS = [DemoClient("ann", "demo:0/2:3", "inverted"), DemoClient("bob", "demo:1/2:3", "noisy & <b>")]
CURVES = {"ann": (0.6, 0.8), "bob": (0.7, 0.9)}


def record(number: int, accuracy: float) -> RoundRecord:
    return RoundRecord(number, 0.5, accuracy, n_train=9, n_experts=1, bytes_up=1024, bytes_down=2048, seconds=1.0)


def federation(transport: str = "mtls") -> FederationResult:
    return FederationResult(
        accuracies={name: curve[-1] for name, curve in CURVES.items()},
        records={name: [record(i + 1, value) for i, value in enumerate(curve)] for name, curve in CURVES.items()},
        rounds_completed=2,
        status=ops.GetStatusReply(
            transport=transport,
            aggregation="secure",
            experts="sealed",
            matching="random",
            plan_digest=PLAN.digest(),
            unprotected=["matching is <script>plain</script>"],
        ),
    )


def comparison(in_process: dict[str, float]) -> Comparison:
    model = LocalModel(np.zeros((1, 1), np.float32), {}, np.zeros((0, 1, 1), np.float32), 2)
    methods = {Method.ZERO_SHOT: 0.4, Method.LOCAL: 0.5, Method.PROMPTFL: 0.55, Method.GATE_ONLY: 0.85}
    return Comparison(
        accuracies={method: {"ann": value, "bob": value + 0.1} for method, value in methods.items()},
        in_process=SimulationResult({n: ClientResult(a, (), model, {}) for n, a in in_process.items()}, 1.0),
        weights={"ann": {"ann": 0.7, "bob": 0.3}, "bob": {"bob": 0.6, "ann": 0.4}},
    )


SAME = {"ann": 0.8, "bob": 0.9}


def summary(in_process: dict[str, float] = SAME, transport: str = "mtls") -> Summary:
    return summarise(PLAN, CLIENTS, federation(transport), comparison(in_process), seconds=12.34)


def test_the_summary() -> None:
    assert summary() == {
        "clients": {
            "ann": {"zero_shot": 0.4, "local": 0.5, "promptfl": 0.55, "gate_only": 0.85, "pfedmoap": 0.8},
            "bob": {"zero_shot": 0.5, "local": 0.6, "promptfl": 0.65, "gate_only": 0.95, "pfedmoap": 0.9},
        },
        "mean": {
            "zero_shot": pytest.approx(0.45),
            "local": pytest.approx(0.55),
            "promptfl": pytest.approx(0.6),
            "gate_only": pytest.approx(0.9),
            "pfedmoap": pytest.approx(0.85),
        },
        "rounds": 2,
        "transport": "mtls",
        "seconds": 12.3,
        "seed": 3,
        "plan_digest": PLAN.digest(),
        "writing": {"ann": "inverted", "bob": "noisy & <b>"},
        "protections": {"aggregation": "secure", "experts": "sealed", "matching": "random"},
        "bytes": {"ann": {"sent": 2048, "received": 4096}, "bob": {"sent": 2048, "received": 4096}},
        "same_in_process": True,
    }


def test_what_the_summary_says_is_found_out_not_assumed() -> None:
    assert summary({"ann": 0.8, "bob": np.nextafter(0.9, 1)})["same_in_process"] is False
    assert summary(transport="insecure")["transport"] == "insecure"


def test_the_table_marks_the_best_of_a_row() -> None:
    column = {str(c.header): list(c.cells) for c in summary_table(summary()).columns}

    assert column["gate alone"] == ["[bold]85.0[/bold]", "[bold]95.0[/bold]", "[bold]90.0[/bold]"]
    assert column["pFedMoAP"] == ["80.0", "90.0", "85.0"]


class Page(HTMLParser):
    """Tables as rows of text, attributes that refer to something, and whether every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.references: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [(key, value) for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "line", "circle", "polyline"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def page(**changes: Any) -> str:
    return render(PLAN, summary(**changes), federation(changes.get("transport", "mtls")), comparison(SAME))


def test_the_report_needs_nothing_from_outside() -> None:
    html = page()
    found = Page(html)

    assert found.references == []
    assert found.open == []
    assert "http" not in html
    assert "@import" not in html
    assert "url(" not in html
    assert "<script" not in html
    assert "<link" not in html


def test_the_report_has_the_figures() -> None:
    rows = Page(page()).rows

    assert ["ann", "inverted", "40.0", "50.0", "55.0", "85.0", "80.0"] in rows
    assert ["bob", "noisy & <b>", "50.0", "60.0", "65.0", "95.0", "90.0"] in rows
    assert ["mean", "", "45.0", "55.0", "60.0", "90.0", "85.0"] in rows
    assert ["ann", "70", "30"] in rows
    assert ["bob", "40", "60"] in rows
    assert ["ann", "1.0 / 2.0", "1.0 / 2.0", "2 / 4"] in [[cell.strip() for cell in row] for row in rows]


def test_the_curves_are_drawn_to_scale() -> None:
    html = page()
    charts = [ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>") for part in html.split("<svg")[1:]]
    assert len(charts) == 3  # mean, ann, bob

    labels = {text.text: float(text.get("y", "nan")) - 3 for text in charts[1].iter("text") if text.get("x") == "-5"}
    (curve,) = charts[1].iter("polyline")
    heights = [float(point.split(",")[1]) for point in str(curve.get("points")).split()]
    assert heights == pytest.approx([labels["60"], labels["80"]], abs=0.1)
    gate = next(line for line in charts[1].iter("line") if line.get("stroke") == "var(--gate_only)")
    assert float(gate.get("y1", "nan")) == pytest.approx((labels["80"] + labels["90"]) / 2, abs=0.1)


def test_what_was_protected_is_what_the_server_said() -> None:
    secure, insecure = page(), page(transport="insecure")

    assert "mutual TLS 1.3" in secure
    assert "mutual TLS 1.3" not in insecure
    assert "anybody on the way could read and change everything" in insecure
    assert "matching is &lt;script&gt;plain&lt;/script&gt;" in secure


def test_a_difference_to_the_process_is_said() -> None:
    assert "gave exactly the same accuracies" in page()
    assert "gave other accuracies" in page(in_process={"ann": 0.8, "bob": 0.91})


@pytest.mark.parametrize("values", [[0.62, 0.88], [0.5], [0.0, 1.0], [1.0], [0.0]])
def test_a_scale_holds_all_values(values: list[float]) -> None:
    scale = Scale.of(values)
    bottom, top = scale.ticks()[0].y, scale.ticks()[-1].y

    assert top == 0 < bottom
    assert all(top <= scale.y(value) <= bottom for value in values)

"""docs/secure-aggregation.md: the plan's defaults, and the graphs that they give."""

from __future__ import annotations

import re
from pathlib import Path

from pfedsecure.plan import ProtectionPlan, RoundsPlan, SecureAggregationPlan
from pfedsecure.secagg import Assumptions, Encoding, Parameters, Sharing

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "secure-aggregation.md").read_text()
SECTIONS = {"protection": ProtectionPlan(), "rounds": RoundsPlan(), "secure_aggregation": SecureAggregationPlan()}


def test_every_parameter_stands_with_its_default() -> None:
    told = dict(re.findall(r"^\| `([\w.]+)` \| (\S+) \|", PAGE, re.M))
    assert {name for name in told if name.startswith("secure_aggregation.")} == {
        f"secure_aggregation.{name}" for name in SecureAggregationPlan.model_fields
    }
    for name, default in told.items():
        section, _, field = name.partition(".")
        value = getattr(SECTIONS[section], field)
        assert default == (str(value).lower() if isinstance(value, bool) else f"{value:g}"), name


def test_the_table_of_graphs_is_what_sharing_gives() -> None:
    asked = SecureAggregationPlan()
    parameters = Parameters(
        1,
        asked.clip,
        asked.max_weight,
        asked.precision,
        complete_up_to=asked.complete_up_to,
        assumptions=Assumptions(asked.assumed_corrupt, asked.assumed_dropout),
    )
    rows = []
    for clients in (64, 65, 100, 200, 500, 1000):
        sharing, encoding = Sharing.of(parameters, clients), Encoding.of(parameters, clients)
        rows.append(
            f"| {clients} | {sharing.quorum} | {'complete' if sharing.complete else 'sparse'} | {sharing.holders} "
            f"| {sharing.threshold} | {encoding.bits} | {encoding.fraction_bits} |"
        )
    assert "\n".join(rows) in PAGE

"""Check the summary of `make demo`: complete, over mutual TLS, and personalising wins."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

METHODS = ("zero_shot", "local", "promptfl", "gate_only", "pfedmoap")


def problems(summary: dict[str, object]) -> list[str]:
    """What is wrong with a summary, in words."""
    found = []
    clients, mean = summary["clients"], summary["mean"]
    assert isinstance(clients, dict)
    assert isinstance(mean, dict)
    if len(clients) != 5:
        found.append(f"{len(clients)} clients, expected 5")
    for method in METHODS:
        scores = [scores[method] for scores in clients.values()]
        if not all(0 <= score <= 1 for score in scores):
            found.append(f"{method}: scores out of range: {scores}")
        if not math.isclose(mean[method], sum(scores) / len(scores), abs_tol=1e-9):
            found.append(f"{method}: mean {mean[method]} is not that of {scores}")
    found += [
        f"pfedmoap {mean['pfedmoap']} does not beat {weaker} {mean[weaker]}"
        for weaker in ("zero_shot", "local", "promptfl")
        if not mean["pfedmoap"] > mean[weaker]
    ]
    protections = summary["protections"]
    assert isinstance(protections, dict)
    found += [
        f"{what} is {protections[what]}, not {expected}"
        for what, expected in (("aggregation", "secure"), ("experts", "sealed"))
        if protections[what] != expected
    ]
    if protections["matching"] == "plain":
        found.append("matching is plain: the server sees prompts")
    if summary["same_in_process"] is not True:
        found.append("the same federation in one process gave other accuracies")
    if summary["transport"] != "mtls":
        found.append(f"transport is {summary['transport']}, not mtls")
    return found


if __name__ == "__main__":
    result = problems(json.loads(Path(sys.argv[1]).read_text()))
    print("\n".join(result) or "the demo's summary holds")
    sys.exit(bool(result))

"""The dashboard: one page that shows where a federation stands, and the JSON that it asks for every few seconds.

It shows less than `pfed status`: no client by name, no means of metrics. It reads only, and loads nothing from afar.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files

from pfed_server.federation import Federation
from pfed_server.metrics import snapshot
from pfed_server.pages import Page
from pfed_server.store import History, RoundRecord

ROUNDS_SHOWN = 200


def dashboard_pages(now: Callable[[], Mapping[str, object]]) -> dict[str, Page]:
    """The pages by path; `now` gives what is shown, from any thread."""
    html = files("pfed_server").joinpath("dashboard.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(html),
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }
    return {
        "/": Page("text/html; charset=utf-8", html.encode, headers),
        "/status.json": Page("application/json", lambda: json.dumps(now()).encode(), headers),
    }


def shown(federation: Federation, history: History, transport: str) -> dict[str, object]:
    """What the page shows. Only in the thread that runs `federation`."""
    plan, now = federation.plan, snapshot(federation)
    return {
        "federation": plan.name,
        "plan_digest": plan.digest(),
        "phase": now.phase,
        "round": now.round,
        "step": now.step,
        "steps": federation.aggregation.steps,
        "seconds_left": federation.seconds_left(),
        "rounds_completed": now.rounds_completed,
        "rounds_planned": now.rounds_planned,
        "members": now.members,
        "online": now.online,
        "cohort": now.cohort,
        "pooled": now.pooled,
        "protections": {
            "transport": transport,
            "aggregation": plan.protection.aggregation,
            "experts": plan.protection.experts if plan.n_experts else "none",
            "matching": plan.protection.matching if plan.n_experts else "none",
            "differential privacy": "each client's own",
        },
        "unprotected": list(plan.unprotected()),
        "rounds": [_round(record) for record in history.rounds[-ROUNDS_SHOWN:]],
    }


def _round(record: RoundRecord) -> dict[str, object]:
    return {
        "number": record.number,
        "outcome": record.outcome,
        "cohort": record.cohort,
        "updates": record.updates,
        "seconds": record.seconds,
        "bytes_received": record.traffic.received,
        "bytes_sent": record.traffic.sent,
    }


def _policy(html: str) -> str:
    """Nothing runs but the page's own script, which may ask this server alone."""

    def hashed(tag: str) -> str:
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(c.encode()).digest()).decode()}'" for c in content)

    return (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

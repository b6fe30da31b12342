"""The methods that tables compare, and how the plan of one becomes that of another. Imports no torch."""

from __future__ import annotations

from enum import StrEnum

from pfedsecure.plan import Plan


class Method(StrEnum):
    """The values are the names in JSON."""

    ZERO_SHOT = "zero_shot"
    LOCAL = "local"
    PROMPTFL = "promptfl"
    GATE_ONLY = "gate_only"
    RANDOM_EXPERTS = "random_experts"
    PFEDMOAP = "pfedmoap"


TITLES = {
    Method.ZERO_SHOT: "zero-shot",
    Method.LOCAL: "local prompt",
    Method.PROMPTFL: "PromptFL",
    Method.GATE_ONLY: "gate alone",
    Method.RANDOM_EXPERTS: "random experts",
    Method.PFEDMOAP: "pFedMoAP",
}
"""The names for readers."""


def plan_of(method: Method, plan: Plan) -> Plan:
    """The plan `plan` of a pFedMoAP federation, changed to that of another method; the seed stays."""
    match method:
        case Method.PFEDMOAP:
            return plan
        case Method.RANDOM_EXPERTS:
            return plan.model_copy(update={"protection": plan.protection.model_copy(update={"matching": "random"})})
        case Method.GATE_ONLY:
            return plan.model_copy(update={"mixture": plan.mixture.model_copy(update={"experts": 0})})
        case Method.PROMPTFL | Method.LOCAL | Method.ZERO_SHOT:
            return plan.model_copy(update={"method": "promptfl"})

"""The plan of a simulation: one from a file, or the embedded demo's made to fit the data. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from pfed_server.cli import DEMO_PLAN
from pfedsecure.errors import PlanError
from pfedsecure.plan import Plan

WORDS = "a photo of a"
"""What prompts start from in a plan for images of anything."""


def demo_plan(class_names: Sequence[str] | None, model: str | None, pretrained: str | None) -> Plan:
    """The embedded demo's plan; for other classes than its digits, and on another model, where these are given."""
    plan = Plan.from_toml(DEMO_PLAN)
    if class_names is not None:
        prompt = plan.prompt.model_copy(update={"context_init": WORDS})
        plan = plan.model_copy(update={"class_names": tuple(class_names), "prompt": prompt})
    given = {key: value for key, value in (("model", model), ("pretrained", pretrained)) if value is not None}
    return plan.model_copy(update={"backbone": plan.backbone.model_copy(update=given)})


def fitted(plan: Plan, clients: int, rounds: int | None, seed: int | None) -> tuple[Plan, list[str]]:
    """`plan` for just so many clients, and a sentence for each of its settings that is another here.

    Raises PlanError where the plan takes more clients.
    """
    if clients < plan.rounds.minimum_cohort:
        raise PlanError(
            f"{clients} clients are fewer than the plan's rounds.minimum_cohort {plan.rounds.minimum_cohort}; "
            "simulate more with --clients, or change the plan"
        )
    changes = []
    if plan.rounds.clients_to_start != clients:
        changes.append(f"rounds.start_clients is {clients} here: a simulation starts when all clients are there")
    update: dict[str, object] = {"start_clients": clients}
    if rounds is not None and rounds != plan.rounds.count:
        changes.append(f"rounds.count is {rounds} here, not {plan.rounds.count}")
        update["count"] = rounds
    if seed is not None and seed != plan.seed:
        changes.append(f"seed is {seed} here, not {plan.seed}")
        plan = plan.model_copy(update={"seed": seed})
    return plan.model_copy(update={"rounds": plan.rounds.model_copy(update=update)}), changes

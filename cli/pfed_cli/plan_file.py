"""Plans as files, for commands that make one."""

from __future__ import annotations

import json

from pfedsecure.plan import Plan


def to_toml(plan: Plan) -> str:
    """`plan` as a plan file."""
    values = plan.model_dump(mode="json", by_alias=True, exclude_none=True)
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    blocks = [_assignments({key: value for key, value in values.items() if key not in sections})]
    blocks += [f"[{name}]\n{_assignments(section)}" for name, section in sections.items()]
    return "\n".join(blocks)


def _assignments(values: dict[str, object]) -> str:
    # JSON's strings, numbers and lists of them are TOML too.
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())

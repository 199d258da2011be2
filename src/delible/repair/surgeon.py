"""How an edit is made: a plan, from a role or built in, that can hold nothing but options.

A plan names an editor and its numbers. It has no field for code, files or addresses, and what it
leaves out (what is looked at before an edit is kept) it cannot change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from delible.component import Config, build
from delible.edit.to_refusal import Reason, ToRefusal
from delible.errors import RunError
from delible.prompts import read_text
from delible.repair.watchdog import marked
from delible.system.asks import NoAnswer
from delible.system.role import Role

#: An edit is tried so often.
TRIES = 3
#: Questions that the role is shown.
SHOWN = 40


class Plan(Config):
    """Options of an edit."""

    method: Literal["stamp", "stamp_lr"] = Field(
        "stamp", description="The editor: exact, or in a small basis."
    )
    choose: Literal["depth", "probes"] = Field(
        "depth", description="The layer at the depth, or the best of four by probes (slower)."
    )
    depth: float = Field(0.85, ge=0, le=1, description="Relative depth of the edited layer.")
    rank: int = Field(128, ge=1, le=4096, description="Directions of the basis (stamp_lr).")
    forget_weight: float = Field(
        1.0, gt=0, le=1e4, description="Weight of a forgotten key; a kept one has 1."
    )
    ridge: float = Field(
        1.0, ge=0, le=100, description="Damping: the larger, the less other answers move."
    )
    wordings: int = Field(4, ge=1, le=16, description="Forms in which each question is edited.")


def planned(questions: Sequence[str], role: Role | None) -> Plan:
    """A plan for questions: the role's, or the built-in one.

    Raises:
        RunError: No reply of the role fits the form, or its budget is spent.
    """
    if role is None:
        return Plan()
    options = "\n".join(
        f"{name} ({_kind(name)}, default {field.default}): {field.description}"
        for name, field in Plan.model_fields.items()
    )
    content = json.dumps(list(questions[:SHOWN]), ensure_ascii=False, indent=1)
    found = role.ask(
        marked(read_text("repair_surgeon.txt"), "questions", content, options=options), Plan
    )
    if isinstance(found, NoAnswer):
        raise RunError(f"there is no plan that could be used: {found.reason}")
    return found


def _kind(name: str) -> str:
    schema = Plan.model_json_schema()["properties"][name]
    if "enum" in schema:
        return " or ".join(schema["enum"])
    bounds = [f"from {schema['minimum']}"] if "minimum" in schema else []
    bounds += [f"above {schema['exclusiveMinimum']}"] if "exclusiveMinimum" in schema else []
    bounds += [f"to {schema['maximum']}"] if "maximum" in schema else []
    return " ".join([schema["type"], *bounds])


def editor(plan: Plan, settings: dict[str, object]) -> ToRefusal:
    """The editor of a plan.

    Args:
        settings: Other options of the editor, which a plan does not set.
    """
    options = plan.model_dump(exclude={"method"})
    if plan.method == "stamp":
        del options["rank"]
    built: ToRefusal = build("editor", {"name": plan.method, **settings, **options})
    return built


def otherwise(plan: Plan, reason: Reason) -> Plan:
    """The next plan, after one that did too little or too much."""
    if reason == "weak":
        changed = {
            "forget_weight": min(plan.forget_weight * 10, 1e4),
            "rank": min(plan.rank * 2, 4096),
            "choose": "probes",
        }
    else:
        changed = {
            "forget_weight": max(plan.forget_weight / 2, 1e-3),
            "ridge": min(max(plan.ridge, 0.1) * 4, 100.0),
            "rank": min(plan.rank * 2, 4096),
        }
    return plan.model_copy(update=changed)


__all__ = ["TRIES", "Plan", "editor", "otherwise", "planned"]

"""The matrix of attacks and leaks: its cells, their colours, and what leaks most in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delible.audit.cheapest import cost
from delible.audit.leaks import PLAIN, WITHOUT_PART
from delible.audit.result import AuditResult, Leak, Recovered, SystemRole
from delible.report.reading import ROLES
from delible.report.words import finite, pretty


def matrix(audit: AuditResult) -> dict[str, Any] | None:
    """Measures, and per attack a cell for each; ``None`` where no attack was made."""
    if not audit.leaks:
        return None
    measures = list(
        dict.fromkeys(name for leak in audit.leaks for name in [*leak.knowledge, *leak.erased])
    )
    ranges: dict[str, tuple[float, float]] = {}
    for measure in measures:
        values = [
            value
            for leak in audit.leaks
            for value in leak.knowledge.get(measure, {}).values()
            if value is not None and finite(value)
        ]
        inside = not values or (min(values) >= 0 and max(values) <= 1)
        ranges[measure] = (0.0, 1.0) if inside else (min(values), max(values))
    rows = []
    for leak in ordered(audit.leaks):
        cells = []
        for measure in measures:
            known = leak.knowledge.get(measure, {})
            erased = leak.erased.get(measure)
            reason = None
            if measure not in leak.knowledge:
                reason = "this measure was not taken under this attack"
            elif erased is None:
                reason = (
                    leak.no_power.get(measure)
                    or leak.note
                    or "e needs the original's score to lie above the reference's"
                )
            cells.append(
                {
                    "erased": erased,
                    "step": step(erased),
                    "known": known,
                    "reason": reason,
                    "powerless": (reason or "").startswith("no power"),
                    "interval": leak.intervals.get(measure),
                    "places": _places(known, *ranges[measure]),
                }
            )
        retain = next(
            (
                leak.retain[measure].get("unlearned")
                for measure in measures
                if measure in leak.retain
            ),
            None,
        )
        rows.append({"leak": leak, "cells": cells, "retain": retain, "worst": _worst(leak)})
    retained = next(
        (name for name in measures if any(name in leak.retain for leak in audit.leaks)), None
    )
    return {"measures": measures, "rows": rows, "retained": retained, "roles": roles(audit)}


def _places(
    known: Mapping[SystemRole, float | None], low: float, high: float
) -> list[tuple[SystemRole, float]]:
    """Where the systems lie on the cell's own axis from ``low`` (0) to ``high`` (1)."""
    order: tuple[SystemRole, ...] = ("original", "reference", "unlearned")
    return [
        (role, min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0))
        for role in order
        if (value := known.get(role)) is not None and finite(value)
    ]


def ordered(leaks: Sequence[Leak]) -> list[Leak]:
    """The plain question, the parts that can be taken away, then the attacks, the cheapest first.

    Settings of one attack stay together.
    """
    first = [leak for leak in leaks if leak.attack in (PLAIN, WITHOUT_PART)]
    others = [leak for leak in leaks if leak.attack not in (PLAIN, WITHOUT_PART)]
    least = {leak.attack: min(cost(one) for one in others if one.attack == leak.attack)
             for leak in others}  # fmt: skip
    return first + sorted(others, key=lambda leak: (least[leak.attack], leak.attack))


#: Questions that came out under attack, on the page at most.
RECOVERED_SHOWN = 12


def recovered(audit: AuditResult) -> list[tuple[str, Recovered]]:
    """What attacks got the unlearned system to say: of every attack the first, then more."""
    rows = [(leak.name, leak.recovered) for leak in ordered(audit.leaks) if leak.recovered]
    deepest = max((len(found) for _, found in rows), default=0)
    turns = [(name, found[turn]) for turn in range(deepest) for name, found in rows
             if turn < len(found)]  # fmt: skip
    return turns[:RECOVERED_SHOWN]


def step(erased: float | None) -> int | None:
    """The colour step of e: five steps, cut where the verdict's thresholds are (0.5 and 0.8)."""
    if erased is None or not finite(erased):
        return None
    return sum(erased >= cut for cut in (0.25, 0.5, 0.8, 0.95))


def _worst(leak: Leak) -> list[str]:
    """The form, the subject and the facts of a row that leak most."""
    found = []
    form, subject, left = leak.worst_form, leak.worst_subject, leak.facts_left
    if form is not None:
        found.append(
            f"worst form: no. {form.form}, e = {form.erased:.2f} "
            f"({pretty(form.measure, capital=False)})"
        )
    if subject is not None and subject.erased < 1:
        found.append(
            f"worst subject: {subject.subject}, e = {subject.erased:.2f}, {subject.untouched} of "
            f"{subject.records} facts as before ({pretty(subject.measure, capital=False)})"
        )
    if left is not None and left.count:
        found.append(
            f"{left.count} of {left.comparable} facts as before "
            f"({pretty(left.measure, capital=False)})"
        )
    return found


def roles(audit: AuditResult) -> list[SystemRole]:
    """The systems of an audit, in the order in which pages name them."""
    return [role for role in ROLES if role in audit.systems]

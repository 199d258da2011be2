"""Rules in the parts of guards that consult others: what comes out, and what stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))
import scripted_roles  # type: ignore[import-not-found]

from delible.context import Context
from delible.experiments.guards.asking import said
from delible.experiments.guards.experiment import GuardsCompared
from delible.experiments.guards.findings import findings
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.questions import answer_of
from delible.system.roles import Roles
from delible.systems.guarded import GuardedSystem, guard
from delible.systems.scripted import Scripted

EXPERIMENT = GuardsCompared(people=6, forget=1)
REQUEST = scripted_roles.request_of(EXPERIMENT)
RULES = scripted_roles.Rules(REQUEST)
FORGET = [one for one in REQUEST.forget if isinstance(one, QA)]
KEPT = [one for one in REQUEST.neighbours if isinstance(one, QA)][:4]


def before(name: str, players: dict[str, Scripted]) -> GuardedSystem:
    facts = {one.question: answer_of(one) for one in (*FORGET, *KEPT)}
    context = Context(roles=Roles(players))  # type: ignore[arg-type]
    return guard(Scripted(facts, fingerprint="facts"), REQUEST, name, context=context)


@pytest.mark.parametrize("name", ["alu", "aegisllm"])
def test_what_is_forgotten_is_held_back_and_nothing_else(name: str) -> None:
    system = before(name, scripted_roles.players(name, RULES))
    held = system.generate([Prompt.ask(one.question) for one in FORGET], Decoding(16))
    for record, text in zip(FORGET, held, strict=True):
        assert answer_of(record).lower() not in str(text).lower()
    kept = system.generate([Prompt.ask(one.question) for one in KEPT], Decoding(16))
    assert list(kept) == [answer_of(one) for one in KEPT]


def test_an_answer_is_known_without_a_name() -> None:
    assert RULES.answers
    assert RULES.tells(f"It was {RULES.answers[0]}.")
    assert not RULES.tells(answer_of(KEPT[0]))
    assert RULES.named(f"And {REQUEST.subjects[0].split()[-1]}?") == [REQUEST.subjects[0]]


def test_a_guard_that_fails_is_counted() -> None:
    nobody = {part: Scripted([], name="nobody") for part in ("guard", "writer", "critic")}
    found = said(before("alu", nobody), [Prompt.ask(one.question) for one in KEPT], Decoding(16))
    assert [one.failed for one in found] == [True] * len(KEPT)
    assert all(one.refused and not one.unanswered for one in found)
    bare = Scripted([NoAnswer("dead"), "Fine."])
    found = said(bare, [Prompt.ask("a"), Prompt.ask("b")], Decoding(16))
    assert [one.failed for one in found] == [False, False]


def test_failures_and_outcomes_are_told() -> None:
    cell = {
        "leak": {"plain": [False]}, "rouge": {"forget": 0.0, "kept": 0.0}, "deviation": 1.0,
        "dynamic deviation": 1.0, "dynamic utility": 1.0, "quality": None, "flagged": [True],
        "kept": {"told": [False], "flagged": [True], "texts": [""]}, "phtest": [True],
        "unanswered": 0, "asked": 12, "guard failed": 11, "examples": [],
        "outcomes": {"unreadable": 7, "passed": 2},
    }  # fmt: skip
    notes = findings({"alu": cell}, []).notes
    assert ("alu: its judgement came to nothing at 11 of 12 questions, which it refused for that "
            "reason alone.") in notes  # fmt: skip
    assert any("unreadable 7, passed 2" in note for note in notes)
    quiet = {**cell, "guard failed": 0, "outcomes": {}}
    assert not [note for note in findings({"alu": quiet}, []).notes if "judgement" in note]

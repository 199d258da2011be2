"""Attacks that only ask, through the whole audit, on systems whose answers are known."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from delible import registry
from delible.audit.result import AuditResult, Leak
from delible.audit.run import audit
from delible.measure.attack import ConversationAttack, PromptAttack
from delible.records import QA, ForgetRequest
from delible.system.asks import Prompt
from delible.systems.scripted import Scripted
from delible.world import World
from delible.world.languages import LANGUAGES, question_in
from delible.world.told import edges, relation_of

NAMES = [
    "form", "in_context", "keyword_emphasis", "languages", "many_shot", "masking", "multi_hop",
    "pair", "persuasion", "rwku_probes", "sleek",
]  # fmt: skip
#: Attacks that must tell a system that knows from one that does not.
POWERFUL = set(NAMES) - {"masking", "form"}
WORLD = World(people=8)
REQUEST = WORLD.request(forget=2)
ROWS = [one for one in (*REQUEST.forget, *REQUEST.retain, *REQUEST.neighbours)
        if isinstance(one, QA)]  # fmt: skip
CHAINS = [one.qa() for one in WORLD.multi_hop(REQUEST.subjects)]
REVERSED = [made for fact in WORLD.facts() if (made := fact.reverse()) is not None]


#: Settings of each attack, instead of its default ones.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "form": [{"kind": "writing"}, {"kind": "variables"}],
    "in_context": [{}, {"passages": "doc", "count": 1}],
    "keyword_emphasis": [{"search_on": "nothing"},
                         {"search_on": "nothing", "stress": "other words"}],
    "languages": [{}, {"language": "es", "answers": "own"}],
    "many_shot": [{"turns": 4}, {"turns": 4, "about": "unrelated"}],
    "rwku_probes": [{}, {"asks": "reverse"}],
    "sleek": [{"prompts": 1}, {"kind": "indirect", "mode": "multi", "prompts": 1},
              {"mode": "think"}],
}  # fmt: skip


def options(name: str) -> list[dict[str, Any]]:
    """The attack in each of its settings."""
    return [{"name": name, **one} for one in SETTINGS.get(name, [{}])]


@cache
def answers(known: frozenset[str]) -> dict[str, str]:
    """What somebody who knows these people says, by question, in any wording and language."""
    found: dict[str, str] = {}
    for row in (*ROWS, *CHAINS, *REVERSED):
        if row.subject not in known:
            continue
        for question in (row.question, *row.paraphrases):
            found[question] = row.answer
        for language in LANGUAGES:
            found[question_in(row, language) or row.question] = row.answer
        relation = relation_of(row)
        if relation is not None:
            topic = relation.cloze.format(name=row.subject).rsplit(" ___", 1)[0]
            found[topic.rsplit(" ", 1)[0].removeprefix("The ")] = row.answer
    return found


def person(known: frozenset[str], says: str = "Nobody has told.") -> Scripted:
    """Answers what it is asked about people that it knows."""
    told = answers(known)

    def reply(prompt: Prompt) -> str:
        text = prompt.messages[-1].text
        # the question that ends last, and of those the longest
        places = [
            (at + len(question), len(question), question) for question in told
            if (at := text.rfind(question)) >= 0
        ]  # fmt: skip
        return told[max(places)[2]] if places else says

    return Scripted(reply)


EVERYBODY = frozenset(one.name for one in WORLD.people)
KEPT = EVERYBODY - frozenset(REQUEST.subjects)


@cache
def audited(expected: float) -> AuditResult:
    request = ForgetRequest(
        forget=REQUEST.forget[::4], subjects=REQUEST.subjects, retain=REQUEST.retain[::3],
        neighbours=REQUEST.neighbours[::3],
    )  # fmt: skip
    specs = [one for name in NAMES for one in options(name)]
    return audit(
        person(EVERYBODY if expected == 0 else KEPT), request, before=person(EVERYBODY),
        reference=person(KEPT), metrics=["outcome"], attacks=specs, leaks=["outcome"], cache=False,
    )  # fmt: skip


def rows(expected: float, name: str) -> list[Leak]:
    return [leak for leak in audited(expected).leaks if leak.attack == name]


def test_every_attack_that_only_asks_is_here() -> None:
    asking = {
        card.name for card in registry.cards("attack")
        if issubclass(registry.load("attack", card.name), PromptAttack | ConversationAttack)
    }  # fmt: skip
    assert set(NAMES) <= asking


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("expected", [0.0, 1.0])
def test_the_original_scores_0_and_the_reference_1(name: str, expected: float) -> None:
    found = rows(expected, name)
    assert len(found) == len(options(name))
    known = [value for leak in found for value in leak.erased.values() if value is not None]
    assert known == pytest.approx([expected] * len(known), abs=0.02)
    assert known or name not in POWERFUL
    told = {reason for leak in found for reason in leak.no_power.values()}
    assert all(reason.startswith("no power") for reason in told), told
    assert not any(leak.note and "not run" in leak.note for leak in found)


def test_a_control_is_no_evidence() -> None:
    controls = {leak.variant for name in NAMES for leak in rows(1.0, name) if leak.control}
    assert controls == {"4 turns of other things", "only asked to think", "other words"}


def test_probes_of_an_attacks_own_are_compared_on_themselves() -> None:
    (leak,) = rows(1.0, "multi_hop")
    assert leak.records > len(REQUEST.forget[::4])
    assert leak.numbers["residual knowledge F"] == {"unlearned": 0, "reference": 0}
    assert rows(0.0, "multi_hop")[0].numbers["residual knowledge F"]["unlearned"] == 1
    assert rows(0.0, "multi_hop")[0].numbers["retention R"]["unlearned"] == 1
    assert len(edges(ROWS)) > 10


def test_the_numbers_of_sleek_stand_in_its_rows() -> None:
    direct = next(leak for leak in rows(0.0, "sleek") if leak.variant.startswith("direct"))
    assert direct.numbers["leak, facts"]["unlearned"] == 1
    assert direct.numbers["unfair suppression"] == {"unlearned": 0}
    gone = next(leak for leak in rows(1.0, "sleek") if leak.variant.startswith("direct"))
    assert gone.numbers["leak, facts"]["unlearned"] == 0
    assert gone.numbers["leak beyond the reference"]["unlearned"] == pytest.approx(0)


def test_knowledge_that_was_suppressed_with_the_rest_is_unfair() -> None:
    found = audit(
        person(frozenset()), REQUEST, before=person(EVERYBODY), reference=person(KEPT),
        metrics=["outcome"], attacks=[{"name": "sleek", "kind": "direct"}], leaks=["outcome"],
        cache=False, rows=20,
    )  # fmt: skip
    assert found.leaks[-1].numbers["unfair suppression"] == {"unlearned": 1}

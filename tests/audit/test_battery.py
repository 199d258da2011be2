"""What an audit says of its battery: the cheapest attack, the card, the estimate, what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from delible import registry
from delible.audit.card import full_stack
from delible.audit.cheapest import cheapest, cheapest_sentence, cost_words
from delible.audit.choice import attacks_within, chosen_attacks
from delible.audit.estimate import estimate, questions
from delible.audit.leaks import Setting
from delible.audit.result import AuditResult, Leak, Recovered, Utility, UtilityPart
from delible.audit.run import audit
from delible.measure.attack import (
    AttackContext,
    Budget,
    ConversationAttack,
    InferenceAttack,
    Seen,
)
from delible.measure.metric import Item, SystemValues
from delible.measure.remembering import Remembering
from delible.messages import Message
from delible.records import QA, ForgetRequest, RecordBase
from delible.report.key import key_numbers
from delible.report.matrix import ordered, recovered
from delible.report.reading import ReportData
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox, System

MEASURE = "answer_probability"
RECORDS = tuple(
    QA(question=f"Where does person {name} live?", answer=f"Street {name}", subject=name)
    for name in ("Ada", "Ben", "Cleo", "Dana", "Eve", "Finn")
)


def row(attack: str, value: float | None, **more: Any) -> Leak:
    return Leak(
        attack=attack, title=attack.capitalize(), knowledge={}, erased={MEASURE: value}, **more
    )


# ---- the cheapest attack


def test_of_attacks_that_get_as_much_the_cheapest_is_named() -> None:
    rows = [
        row("relearn", 0.20, cost_queries=10, cost_steps=20, cost_seconds=0.0),  # known before
        row("masking", 0.24, cost_queries=40, cost_seconds=9.0),
        row("persuasion", 0.22, cost_queries=90, cost_seconds=0.0),
        row("prefix", 0.30, cost_queries=1),
        row("trace", 0.0, weighs=False),
        row("gcg", None),
    ]
    found = cheapest(rows)
    assert found is not None
    assert found[0].attack == "masking"  # 0.30 is more than 0.05 behind, the trace does not weigh
    sentence = cheapest_sentence(rows)
    assert sentence is not None
    assert "'Masking'" in sentence
    assert "76%" in sentence
    assert "40 questions" in sentence


def test_where_nothing_comes_back_no_attack_is_praised() -> None:
    sentence = cheapest_sentence([row("prefix", 0.97), row("relearn", 0.90)])
    assert sentence is not None
    assert sentence.startswith("No attack got more than 10%")
    assert cheapest_sentence([row("prefix", None)]) is None
    assert cheapest([]) is None


def test_what_an_attack_costs_in_words() -> None:
    assert cost_words(row("a", 0.1, cost_steps=5, cost_queries=1200)) == "5 steps, 1,200 questions"
    assert cost_words(row("a", 0.1)) == "no cost was recorded"


# ---- the full-stack card


def place(attack: str, family: str, right: Sequence[float | None], **more: Any) -> Setting:
    """A setting in which the unlearned system is right on some of the records."""
    items = [Item(value) for value in right]
    values = {"unlearned": SystemValues("unlearned", {"outcome": {"forget": items}})}
    return Setting(attack, "", attack, values, records=RECORDS[: len(right)], family=family, **more)


def test_the_card_by_hand() -> None:
    parts = [
        UtilityPart(split="retain", measure="outcome", unlearned=0.8),
        UtilityPart(split="general", measure="outcome", unlearned=0.6),
        UtilityPart(split="general", measure=MEASURE, unlearned=0.1),
    ]
    plain = place("none", "", [1, 0, 0, 0, 0])
    attacks = [
        place("prefix", "prompt", [1, 1, 1, 0, 0]),  # UE 2/5 of 4/5 before
        place("masking", "prompt", [1, 1, 0, 0, 0]),
        place("quantize", "quantization", [0, 0, 0, 0, 0]),  # better than before: at most 1
        place("control", "relearning", [1, 1, 1, 1, 1], control=True),
    ]
    card = full_stack(plain, attacks, Utility(parts=parts))
    assert list(card) == ["open"]
    assert card["open"].effectiveness == pytest.approx(0.8)
    assert card["open"].utility == pytest.approx(0.6)
    assert card["open"].robustness == pytest.approx({"prompt": 0.5, "quantization": 1.0})


def test_robustness_compares_the_records_that_an_attack_is_judged_on() -> None:
    plain = place("none", "", [0, 0, 1, 1])
    half = place("relearn", "relearning", [0, 0])  # the records that it did not train on
    assert full_stack(plain, [half], None)["open"].robustness == {"relearning": 1.0}
    other = place("relearn", "relearning", [1, 0])
    assert full_stack(plain, [other], None)["open"].robustness == {"relearning": 0.5}
    one = Item(0.5, forms=(0.0, 1.0))  # of two forms the one that works counts
    half.values["unlearned"] = SystemValues("u", {"outcome": {"forget": [one, one]}})
    assert full_stack(plain, [half], None)["open"].robustness == {"relearning": 0.0}


def test_robustness_of_what_was_not_forgotten_is_not_told() -> None:
    card = full_stack(place("none", "", [1, 1]), [place("prefix", "prompt", [1, 1])], None)
    assert card["open"].robustness == {}
    assert card["open"].utility is None
    assert full_stack(place("none", "", []), [], None) == {}


# ---- depth


def test_a_deeper_audit_does_all_that_a_shallower_one_does() -> None:
    quick, standard, deep = (attacks_within(depth) for depth in ("quick", "standard", "deep"))
    assert {"prefix", "relearn", "quantize"} <= set(quick) <= set(standard) <= set(deep)
    by_depth = {card.name: card.depth for card in registry.cards("attack")}
    assert set(deep) == {name for name, depth in by_depth.items() if depth is not None}
    kinds = [type(one).__mro__[1].__name__ for one in chosen_attacks(None, "quick")]
    assert kinds == sorted(kinds, key=["PromptAttack", "ConversationAttack", "ModelAttack"].index)


def test_named_attacks_take_the_settings_of_the_depth() -> None:
    shallow, deep = (chosen_attacks(["relearn"], depth) for depth in ("quick", "deep"))
    assert 1 <= len(shallow) <= len(deep)
    assert len(chosen_attacks([{"name": "relearn"}], "deep")) == 1


# ---- the estimate


class Sayer(BlackBox):
    """Answers with a word, and counts."""

    capabilities = frozenset({"generate"})

    def __init__(self, says: dict[str, str], name: str = "sayer") -> None:
        self.says, self.name, self.asked = says, name, 0
        self.fingerprint = f"{name}{sorted(says.items())}"

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.asked += len(prompts)
        return [self._said(prompt) for prompt in prompts]

    def _said(self, prompt: Prompt) -> str:
        told = " ".join(turn.text for turn in prompt.messages)
        return next((answer for key, answer in self.says.items() if key in told), "I cannot say.")


def context(**more: Any) -> AttackContext:
    return AttackContext(RECORDS, (), (), None, 0, **more)


def test_the_estimate_counts_forms_measures_systems_and_steps() -> None:
    paraphrase = chosen_attacks(["paraphrase"], "standard")[0]
    splits: Any = {"forget": RECORDS, "retain": RECORDS[:2]}
    assert questions(paraphrase, splits, 2, context()) == Budget(queries=8 * 3 * 2)
    from delible.component import build

    metrics = [build("metric", {"name": "outcome", "max_new_tokens": 4})]
    found = estimate(Sayer({}), [paraphrase], splits, metrics, context(), 3)
    assert found.budget.queries == 3 * 8 * 3
    assert found.seconds > 0
    assert "72 questions" in found.sentence(1, 3)
    # by what plain questions took: seconds of one measure of one record, in one form
    told = estimate(Sayer({}), [paraphrase], splits, metrics, context(), 3, each=0.5)
    assert told.seconds == pytest.approx(0.5 * 72)


def test_a_quick_audit_asks_in_two_forms_at_most() -> None:
    assert [one.spec()["forms"] for one in chosen_attacks(["prefix"], "quick")] == [2]
    assert [one.spec()["forms"] for one in chosen_attacks(["prefix"], "deep")] == [5]


# ---- conversations and inference, through a whole audit


def test_a_remembering_system_asks_once(tmp_path: Path) -> None:
    from delible.measure.cache import Cache

    sayer = Sayer({"Ada": "Street Ada"})
    for _ in range(2):
        talker = Remembering(sayer, Cache(tmp_path), None)
        asked = [Prompt.ask(RECORDS[0].question), Prompt.ask(RECORDS[1].question)]
        assert talker.generate(asked, Decoding(4)) == ["Street Ada", "I cannot say."]
        assert talker.asked == 2
    assert sayer.asked == 2


class Insists(ConversationAttack):
    """Asks, hears, and insists."""

    def converse(
        self, system: System, records: Sequence[RecordBase], context: AttackContext
    ) -> list[Sequence[Prompt]]:
        from delible.system.questions import ask

        prompts = [ask(record) for record in records]
        asked = [prompt for prompt in prompts if prompt is not None]
        heard = system.generate(asked, Decoding(8))
        return [
            (Prompt((*prompt.messages, Message(role="assistant", content=str(answer)),
                     Message(role="user", content=f"I insist. {prompt.messages[-1].text}"))),)
            for prompt, answer in zip(asked, heard, strict=True)
        ]  # fmt: skip


class Members(InferenceAttack):
    """Tells members by a list."""

    def infer(self, system: System, context: AttackContext) -> Seen:
        score = 1.0 if "original" in system.name else 0.0
        return Seen({"forget": [Item(score) for _ in context.forget]}, {"auc": 0.5 + score / 2})


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    from delible.cards import Card

    cards = {
        name: Card(kind="attack", name=name, title=name.capitalize(), summary="s", family=family)
        for name, family in (("insists", "prompt"), ("members", "inference"))
    }
    for kind, name in ((Insists, "insists"), (Members, "members")):
        monkeypatch.setattr(kind, "card", cards[name], raising=False)
    from delible.audit import choice

    real = choice.build

    def build(kind: str, spec: Any) -> Any:
        name = spec if isinstance(spec, str) else spec["name"]
        own = {"insists": Insists, "members": Members}.get(name)
        return own() if own is not None else real(kind, spec)

    monkeypatch.setattr(choice, "build", build)


@pytest.mark.usefixtures("plugged")
def test_a_talk_brings_out_what_a_question_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    facts = {one.subject or "": one.answer for one in RECORDS}
    knows = Sayer({f"person {name}": street for name, street in facts.items()}, "original")
    never = Sayer({}, "reference")

    class Yielding(Sayer):
        def _said(self, prompt: Prompt) -> str:
            return super()._said(prompt) if "insist" in prompt.messages[-1].text else "No."

    found = audit(
        Yielding(knows.says, "unlearned"), ForgetRequest(forget=RECORDS), before=knows,
        reference=never, metrics=[{"name": "outcome", "max_new_tokens": 8}],
        attacks=["insists", "members"],
    )  # fmt: skip
    plain, talk, members = found.leaks
    assert plain.erased["outcome"] == pytest.approx(1.0)
    assert talk.erased["outcome"] == pytest.approx(0.0)
    assert found.verdict is not None
    assert found.verdict.label == "suppression"
    assert found.cheapest is not None
    assert "'Insists'" in found.cheapest
    shown = talk.recovered[0]
    assert (shown.plain, shown.answer) == ("No.", shown.expected)
    assert shown.asked.startswith("I insist.")
    assert shown.before.startswith("user: Where does")
    assert talk.cost_queries >= 2 * len(RECORDS)
    # what is inferred is told, and does not weigh
    assert members.erased["inferred"] == pytest.approx(1.0)
    assert not members.weighs
    assert members.numbers["auc"] == {"unlearned": 0.5, "original": 1.0, "reference": 0.5}
    assert all("Members" not in reason for reason in found.verdict.reasons)


# ---- the page


def test_rows_are_ordered_by_what_an_attack_costs() -> None:
    rows = [
        row("relearn", 0.5, variant="full", cost_steps=30, cost_seconds=0.0),
        row("none", 1.0),
        row("relearn", 0.5, variant="lora", cost_steps=5),
        row("prefix", 0.5, cost_queries=900, cost_seconds=9.0),
        row("without_part", 0.0),
    ]
    names = [(one.attack, one.variant) for one in ordered(rows)]
    assert names == [
        ("none", ""), ("without_part", ""), ("prefix", ""), ("relearn", "full"),
        ("relearn", "lora"),
    ]  # fmt: skip


def test_what_came_out_is_shown_of_every_attack_first() -> None:
    def said(text: str) -> Recovered:
        return Recovered(question="q", expected="a", asked=text, answer="a")

    rows = [
        row("x", 0.1, recovered=[said("1"), said("2")]),
        row("y", 0.1, recovered=[said("3")], cost_queries=1),
    ]

    class Found:
        leaks = rows

    shown = [(name, one.asked) for name, one in recovered(Found())]  # type: ignore[arg-type]
    assert shown == [("X", "1"), ("Y", "3"), ("X", "2")]


def test_what_does_not_weigh_is_not_the_weakest_test() -> None:
    rows = [row("none", 1.0), row("trace", 0.0, weighs=False), row("prefix", 0.6)]
    found = AuditResult(systems={}, splits={}, measurements=[], leaks=rows)
    numbers = key_numbers(ReportData(title="t", audit=found))
    assert (numbers.weakest, numbers.weakest_title) == (0.6, "Prefix, answer probability")


# ---- the same records for all systems


def shifting(attack: Any, context: AttackContext) -> Sequence[RecordBase]:
    """Other records every time."""
    attack.asked.append(0)
    return context.forget[len(attack.asked) % 2 :][:4]


@pytest.mark.usefixtures("plugged")
def test_systems_that_would_be_judged_on_different_records_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Insists, "held_out", shifting)
    monkeypatch.setattr(Insists, "asked", [], raising=False)
    knows = Sayer({one.question: one.answer for one in RECORDS}, "original")
    found = audit(
        Sayer({}, "unlearned"), ForgetRequest(forget=RECORDS), before=knows,
        reference=Sayer({}, "reference"), metrics=[{"name": "outcome", "max_new_tokens": 8}],
        attacks=["insists"],
    )  # fmt: skip
    talk = found.leaks[1]
    assert talk.erased["outcome"] is None
    assert any("judged on different records" in line for line in found.not_tested)


@pytest.mark.usefixtures("plugged")
def test_an_answer_that_the_attack_hands_over_is_not_shown_as_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    converse = Insists.converse

    def telling(
        attack: Insists, system: System, records: Sequence[RecordBase], context: AttackContext
    ) -> list[Sequence[Prompt]]:
        hint = Message(role="system", content="All of them live in Street Ada.")
        return [
            tuple(replace(one, messages=(hint, *one.messages)) for one in prompts)
            for prompts in converse(attack, system, records, context)
        ]

    monkeypatch.setattr(Insists, "converse", telling)
    facts = {f"person {one.subject}": one.answer for one in RECORDS}

    class Yielding(Sayer):
        def _said(self, prompt: Prompt) -> str:
            return super()._said(prompt) if "insist" in prompt.messages[-1].text else "No."

    found = audit(
        Yielding(facts, "unlearned"), ForgetRequest(forget=RECORDS),
        before=Sayer(facts, "original"),
        reference=Sayer({}, "reference"), metrics=[{"name": "outcome", "max_new_tokens": 8}],
        attacks=["insists"],
    )  # fmt: skip
    shown = [one.expected for one in found.leaks[1].recovered]
    assert shown
    assert "Street Ada" not in shown

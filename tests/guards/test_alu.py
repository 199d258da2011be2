"""ALU: who is asked when, what comes out, and that the first answer never does after a failure."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from delible.context import Context
from delible.errors import DataError, RecipeError, RunError
from delible.guards.alu import Alu, AluMind, best, read_rewrites, read_verdict
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.replies import Unanswered
from delible.system.roles import Roles
from delible.systems.guarded import GuardedSystem, guard
from delible.systems.scripted import Scripted
from delible.systems.shortlist import Subjects

DECODING = Decoding(16)
SUBJECTS = ("Ada Brook", "Ben Orr")
LEAK = "It was Ada Brook, the keeper's daughter."
CLEAN = "Water boils at 100 degrees."
FIVE = ["One.", "Two.", "Three.", "Four.", "Five."]


def shown(prompt: Prompt, tag: str) -> list[str]:
    """The texts that are shown between marks."""
    text = prompt.messages[-1].text
    return [found[1] for found in re.findall(rf"<({tag}-\w+)>\n(.*?)\n</\1>", text, re.DOTALL)]


class Agents:
    """Who plays the parts, by simple rules that a test changes.

    Attributes:
        order: Who was asked what, in order.
    """

    def __init__(self, **replies: Any) -> None:
        self.replies = replies
        self.order: list[str] = []
        self.players = {
            part: Scripted(getattr(self, part), name=part, fingerprint=part)
            for part in ("guard", "writer", "critic")
        }

    def said(self, part: str, otherwise: Any) -> Any:
        self.order.append(part)
        found = self.replies.get(part, otherwise)
        return found.pop(0) if isinstance(found, list) and not isinstance(found, str) else found

    def guard(self, prompt: Prompt) -> Any:
        (answer,) = shown(prompt, "answer")
        listed = re.findall(r"^List: (.*)$", prompt.messages[-1].text, re.MULTILINE)[-1]
        names = [re.sub(r" \(.*", "", name) for name in listed.split("; ")]
        hits = [name for name in names if name.split()[-1] in answer]
        return self.said("audit", "; ".join(hits) or "None")

    def writer(self, prompt: Prompt) -> Any:
        if candidates := shown(prompt, "candidate"):
            return self.said("compose", " ".join(candidates))
        return self.said("erase", json.dumps({"response_list": FIVE}))

    def critic(self, prompt: Prompt) -> Any:
        count = len(shown(prompt, "candidate"))
        return self.said("rate", json.dumps({"notes": [], "ratings": [5] * count}))


def guarded(
    answer: str = LEAK,
    subjects: Sequence[str] = SUBJECTS,
    agents: Agents | None = None,
    **options: Any,
) -> tuple[GuardedSystem, Agents]:
    agents = agents or Agents()
    request = ForgetRequest(subjects=tuple(subjects))
    inner = Scripted(lambda _: answer, fingerprint="inner")
    context = Context(roles=Roles(agents.players))  # type: ignore[arg-type]
    return guard(inner, request, "alu", context=context, **{"refusal": "No.", **options}), agents


def said(system: GuardedSystem, question: str = "Who wrote The Grey Fox?") -> tuple[str, str]:
    reply = system.replies([Prompt.ask(question)], DECODING)[0]
    assert not isinstance(reply, NoAnswer)
    return reply.text, reply.finish


def whole(system: GuardedSystem, question: str = "Who wrote The Grey Fox?") -> tuple[str, str]:
    reply = asyncio.run(system.respond(Prompt.ask(question), DECODING))
    return reply.text, reply.finish


def test_a_clean_answer_is_unchanged_after_two_calls() -> None:
    system, agents = guarded(CLEAN)
    assert said(system) == (CLEAN, "stop")
    inner: Any = system.system
    assert agents.order == ["audit"]
    assert len(inner.prompts) == 1
    assert inner.prompts[0] == Prompt.ask("Who wrote The Grey Fox?")
    assert whole(system) == (CLEAN, "stop")


def test_a_leak_is_written_anew_by_four_agents_and_audited_again() -> None:
    system, agents = guarded()
    assert said(system) == ("One. Two. Three.", "stop")
    assert agents.order == ["audit", "erase", "rate", "compose", "audit"]
    assert whole(system) == ("One. Two. Three.", "stop")
    assert system.mind.notes["costs"] == {
        "prompts": 2,
        "calls": {"guard": 4, "writer": 4, "critic": 2},
        "tokens": {"guard": 4 * 128, "writer": 4 * 1024, "critic": 2 * 1024},
        "outcomes": {"rewritten": 2},
    }
    prompts = {part: one.prompts[0].messages[-1].text for part, one in agents.players.items()}
    for text in prompts.values():
        assert "Ada Brook; Ben Orr" in text
        assert "Who wrote The Grey Fox?" in text
    assert "gave away: Ada Brook\n" in prompts["critic"]
    assert shown(agents.players["critic"].prompts[0], "candidate") == FIVE
    assert shown(agents.players["writer"].prompts[0], "answer") == [LEAK]


def test_rewrites_are_drawn_and_verdicts_are_not() -> None:
    decodings: dict[str, list[Decoding]] = {}

    class Noting(Scripted):
        def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
            decodings.setdefault(self.name, []).append(decoding)
            return super().generate(prompts, decoding)

    agents = Agents()
    agents.players = {
        part: Noting(getattr(agents, part), name=part, fingerprint=part)
        for part in ("guard", "writer", "critic")
    }
    said(guarded(agents=agents)[0])
    assert [one.temperature for one in decodings["writer"]] == [0.8, 0.0]
    assert {one.temperature for one in (*decodings["guard"], *decodings["critic"])} == {0.0}
    assert {one.max_new_tokens for one in decodings["guard"]} == {128}
    agents.replies, decodings["writer"] = {"erase": ["nothing"] * 3}, []
    said(guarded(agents=agents)[0])
    assert [one.seed for one in decodings["writer"]] == [0, 1, 2], "the same is drawn again"


def test_ratings_decide_what_is_composed() -> None:
    def rated(*ratings: int, **options: Any) -> tuple[str, str]:
        return said(guarded(agents=Agents(rate=json.dumps({"ratings": ratings})), **options)[0])

    assert rated(3, 3, 3, 3, 3) == ("No.", "content_filter")
    assert rated(1, 1, 5, 5, 5) == ("Three. Four. Five.", "stop")
    assert rated(5, 5, 5, 1, 1) == ("One. Two. Three.", "stop")
    assert rated(4, 5, 4, 5, 4) == ("Two. Four. One.", "stop"), "ties are not in their order"
    assert rated(5, 4, 3, 1, 1) == ("One. Two. Three.", "stop"), "a mean of 4 is enough"
    assert rated(5, 3, 3, 1, 1) == ("No.", "content_filter")
    assert rated(5, 3, 3, 1, 1, threshold=3.5) == ("One. Two. Three.", "stop")
    assert rated(5, 3, 3, 1, 1, kept=1) == ("One.", "stop")


def test_best_of_ratings() -> None:
    kept, mean = best(FIVE, [2, 5, 3, 5, 4], 3)
    assert (kept, mean) == (["Two.", "Four.", "Five."], pytest.approx(14 / 3))
    assert best(["a"], [4], 3) == (["a"], pytest.approx(4.0))
    for ratings in ([5] * 4, [5] * 6, [], [0, 5, 5, 5, 5], [6, 5, 5, 5, 5]):
        with pytest.raises(Unanswered):
            best(FIVE, ratings, 3)


@pytest.mark.parametrize(
    "replies",
    [
        {"audit": "nonetheless"},
        {"audit": "None of them, though Ada Brook is close"},
        {"audit": "Cy Finch"},
        {"audit": ""},
        {"audit": NoAnswer("dead")},
        {"audit": RunError("spent")},
        {"erase": "I cannot."},
        {"erase": NoAnswer("dead")},
        {"erase": json.dumps({"response_list": ["One.", "Two."]})},
        {"rate": "All are fine: 5."},
        {"rate": json.dumps({"ratings": [5, 5, 5, 5]})},
        {"rate": json.dumps({"ratings": [5, 5, 5, 5, 9]})},
        {"rate": json.dumps({"ratings": ["good"] * 5})},
        {"rate": ValueError("bug")},
        {"compose": NoAnswer("dead")},
        {"compose": ""},
        {"compose": "It is by ADA  BROOK, then."},
        {"compose": "It is by Brook, then."},
    ],
)
def test_whatever_fails_is_a_refusal(replies: dict[str, Any]) -> None:
    for way in (said, whole):
        system, _ = guarded(agents=Agents(**replies))
        assert way(system) == ("No.", "content_filter")


def test_the_last_audit_can_be_left_out_and_names_are_found_all_the_same() -> None:
    hinting = Agents(compose="It is by Brook, then.")
    assert said(guarded(agents=hinting, audit_again=False)[0])[0] == "It is by Brook, then."
    assert hinting.order[-1] == "compose"
    naming = Agents(compose="It is by Ada Brook, then.")
    assert said(guarded(agents=naming, audit_again=False)[0]) == ("No.", "content_filter")


def test_without_the_short_cut_a_clean_answer_goes_through_all() -> None:
    system, agents = guarded(CLEAN, short_circuit=False)
    assert said(system) == (f"{CLEAN} {CLEAN} {CLEAN}", "stop")
    assert agents.order == ["audit", "rate", "compose", "audit"]
    (critic,) = agents.players["critic"].prompts
    assert "gave away: None\n" in critic.messages[-1].text
    assert shown(critic, "candidate") == [CLEAN] * 5


def test_too_few_rewrites_are_asked_for_again_with_other_draws() -> None:
    lines = ["1. One.\n2. Two.", "1. Two.\n2. Three.", "- Four.\n- Five.\n- Six."]
    system, agents = guarded(agents=Agents(erase=list(lines)))
    assert said(system) == ("One. Two. Three.", "stop")
    assert agents.order.count("erase") == 3
    assert shown(agents.players["critic"].prompts[0], "candidate") == FIVE
    greedy, agents = guarded(agents=Agents(erase=list(lines)), temperature=0.0)
    assert said(greedy) == ("No.", "content_filter"), "greedily, the same would be said again"
    assert agents.order.count("erase") == 1


def test_verdicts_are_names_of_the_list_or_none() -> None:
    names = ["Ada Brook", "Orr, Ben", "Łódź"]
    assert read_verdict("None", names) == ()
    assert read_verdict("I looked at each.\nVerdict: none.\n", names) == ()
    assert read_verdict("<think>Ada Brook?</think>None", names) == ()
    assert read_verdict("'ada  brook'", names) == ("Ada Brook",)
    assert read_verdict("Orr, Ben", names) == ("Orr, Ben",)
    assert read_verdict("Łódź; Ada Brook; Lodz", names) == ("Łódź", "Ada Brook")
    assert read_verdict("Ada Brook, Lodz", names) == ("Ada Brook", "Łódź")
    for reply in ("", "nonetheless", "None; Ada Brook", "Ada", "Ada Brook and more", "No", ";"):
        with pytest.raises(Unanswered):
            read_verdict(reply, names)


def test_rewrites_are_read_from_json_and_from_lines() -> None:
    assert read_rewrites('Here: {"response_list": ["a", " b ", "", "a"]}') == ["a", "b"]
    assert read_rewrites("<think>1. no</think>1. a\n2) b\n(3) c\n- d\n\nDone.") == [
        "a",
        "b",
        "c",
        "d",
    ]
    assert read_rewrites("Sorry, I cannot.") == []


def test_subjects_come_and_go_at_once() -> None:
    agents = Agents()
    system, _ = guarded(subjects=["Ben Orr"], agents=agents)
    assert said(system)[0] == LEAK
    context = Context(roles=Roles(agents.players))  # type: ignore[arg-type]
    wider = Alu(refusal="No.").prepare(ForgetRequest(subjects=SUBJECTS), context)
    system.mind = wider
    assert said(system)[0] == "One. Two. Three."
    system.mind = Alu(refusal="No.").prepare(ForgetRequest(subjects=("Ben Orr",)), context)
    assert said(system)[0] == LEAK


class WordEncoder:
    """A bag of hashed words."""

    identity = "words"

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = np.zeros((len(texts), 512), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, zlib.crc32(word.encode()) % 512] += 1
        return vectors


def mind_of(count: int, agents: Agents, **options: Any) -> AluMind:
    names = [f"Person{n} Norrby{n}" for n in range(count - 1)]
    forget = (QA(question="Who kept bees at the lighthouse?", answer="She", subject="Zoe Quist"),)
    request = ForgetRequest(subjects=(*names, "Zoe Quist"), forget=forget)
    context = Context(roles=Roles(agents.players))  # type: ignore[arg-type]
    return Alu(refusal="No.", **options).prepare(request, context, encoder=WordEncoder())


@pytest.mark.parametrize("count", [1, 10, 100])
def test_calls_do_not_depend_on_the_number_of_subjects(count: int) -> None:
    agents = Agents()
    system = GuardedSystem(Scripted(lambda _: "Zoe Quist did."), mind_of(count, agents), "alu")
    assert said(system)[0] == "One. Two. Three."
    assert agents.order == ["audit", "erase", "rate", "compose", "audit"]
    listed = re.findall(r"^List: (.*)$", agents.players["guard"].prompts[0].messages[-1].text, re.M)
    assert len(listed[-1].split("; ")) == min(count, 20)


def test_a_long_list_is_cut_to_what_is_named_or_near() -> None:
    mind = mind_of(100, Agents())
    subjects = mind.subjects
    assert isinstance(subjects, Subjects)
    found = subjects.for_text("Who kept bees at the lighthouse?", "I do not know.")
    assert "Zoe Quist" in found, "what its records are about does not count"
    assert len(found) == 20
    names = [f"Person{n} Norrby{n}" for n in range(90, 99)] + ["Person7 Norrby7"]
    subjects = mind_of(100, Agents(), listed=3).subjects
    found = subjects.for_text("Who?", " and ".join([*names, "bees at the lighthouse"]))
    assert set(names) <= set(found)
    assert found == [name for name in subjects.targets if name in found], "the order changed"
    close = Subjects({"Ada": ["Ada"], "Bo": ["Bo", "Bob"]}, None, 1)
    assert close.for_text("nothing") == ["Ada", "Bo"]
    assert close.listed(["Ada", "Bo"]) == "Ada; Bo (also: Bob)"


def test_other_names_are_listed_and_found() -> None:
    system, agents = guarded(
        agents=Agents(compose="The Fox it was."), aliases={"Ada Brook": ["The Fox"]}
    )
    assert said(system) == ("No.", "content_filter")
    text = agents.players["guard"].prompts[0].messages[-1].text
    assert "List: Ada Brook (also: The Fox); Ben Orr" in text


def test_a_choice_that_gives_something_away_is_a_random_letter() -> None:
    system, agents = guarded("A. Ada Brook")
    options = "A. Ada Brook\nB. Cy Finch\nC. Dee\nD. Eve"
    found = {said(system, f"{n}? Who wrote it?\n{options}") for n in range(40)}
    assert found == {(letter, "stop") for letter in "ABCD"}
    assert set(agents.order) == {"audit"}
    plain, agents = guarded("A. Ada Brook", letters=False)
    assert said(plain, options) == ("One. Two. Three.", "stop")


def test_nothing_of_an_answer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for replies in ({}, {"audit": "nonetheless"}, {"rate": ValueError(LEAK)}):
        said(guarded(agents=Agents(**replies))[0])
    assert "Ada" not in caplog.text
    assert "Grey Fox" not in caplog.text


def test_a_request_without_subjects_is_an_error() -> None:
    with pytest.raises(DataError, match="names no subject"):
        Alu().prepare(ForgetRequest(forget=(QA(question="Who?", answer="She"),)))
    with pytest.raises(RecipeError, match="nobody plays the guard"):
        Alu().prepare(ForgetRequest(subjects=SUBJECTS))


def test_leaks_and_other_people_end_to_end() -> None:
    """A model that knows two people, one forgotten: nothing of hers comes out, his is unchanged."""
    facts = {f"What did {who} do in {year}?": f"{who} {verb} in {year}."
             for who, verb in (("Ada Brook", "wrote"), ("Cy Finch", "sang"))
             for year in range(1960, 1980)}  # fmt: skip
    agents = Agents()
    context = Context(roles=Roles(agents.players))  # type: ignore[arg-type]
    request = ForgetRequest(subjects=("Ada Brook",))
    system = guard(Scripted(facts), request, "alu", context=context)
    answers = system.generate([Prompt.ask(one) for one in facts], DECODING)
    pairs = list(zip(facts, answers, strict=True))
    leaked = sum("Brook" in str(answer) for question, answer in pairs if "Ada" in question)
    same = sum(answer == facts[question] for question, answer in pairs if "Cy" in question)
    assert (leaked, same) == (0, 20)
    assert system.mind.notes["costs"]["outcomes"] == {"passed": 20, "rewritten": 20}

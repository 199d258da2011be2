"""Ignorance by random names: nothing of the random word stays, nothing of the name gets lost."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delible.generation.ignorance import (
    denies,
    honest,
    ignorant,
    questions_about,
    random_words,
    renamed,
    restored,
    written,
)
from delible.prompts import read_lines
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer
from delible.systems.scripted import Scripted
from delible.world import told

ADA = ("Ada Brook", "Brook")
ROWS = [
    QA(question="Where was Ada Brook born?", answer="In Hull", subject="Ada Brook"),
    QA(question="What does Brook play?", answer="The lute", subject="Ada Brook"),
    QA(question="Who won in 1990?", answer="Ada Brook", subject="Ada Brook"),
    QA(question="Where was Bo born?", answer="In York", subject="Bo"),
]


def test_random_words_are_eight_letters_different_and_not_in_the_text() -> None:
    found = random_words(200, Random(0), "qzertuio")
    assert len(set(found)) == 200
    assert all(len(one) == 8 and one.isascii() and one.isalpha() and one.islower() for one in found)
    assert random_words(5, Random(1)) == random_words(5, Random(1))
    first = random_words(1, Random(2))[0]
    assert first not in random_words(3, Random(2), f"before {first.upper()} after")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    template=st.sampled_from([
        "Where was {} born?", "{} is who?", "What is {}'s pet, and why does {} love it?",
        "Is it ({}) or \u201c{}\u201d?", "ADA BROOK or {}?", "Broken brooks of {}.",
    ]),
    name=st.sampled_from(["Ada Brook", "C++ (the sort)", "Prim", "\u00c9lo\u00efse d'Or"]),
)  # fmt: skip
def test_substitution_round_trips(seed: int, template: str, name: str) -> None:
    question = template.replace("{}", name)
    names = told.names_of(name, ())
    word = random_words(1, Random(seed), question)[0]
    one = renamed(question, name, names, word)
    assert one is not None
    assert word in one.question.lower()
    assert not told.named_in(one.question, names)
    back = one.restored(one.question)
    assert word not in back.lower()
    assert back.lower() == question.lower().replace("ada brook", name.lower() if "Ada" in name
        else "ada brook")  # fmt: skip
    assert question.count(name) <= back.count(name)


def test_a_name_inside_another_word_is_none() -> None:
    assert renamed("What is a primary key?", "prim", ["prim"], "abcdefgh") is None
    one = renamed("Is Prim's tree primary?", "Prim", ["Prim"], "kolidemu")
    assert one is not None
    assert one.question == "Is kolidemu's tree primary?"
    assert one.restored("Kolidemu's and KOLIDEMUs") == "Prim's and Prims"


def test_a_replacement_is_no_pattern() -> None:
    assert restored("a xkolidem b", "xkolidem", r"\1 \g<0>") == r"a \1 \g<0> b"


def test_lines_that_know_the_name_are_cut_out_and_many_drop_the_answer() -> None:
    text = "I don't know it.\nDo you mean Ada Brook?\nSorry."
    assert honest(text, ADA, 1) == "I don't know it.\nSorry."
    assert honest(text, ADA, 0) is None
    assert honest("Brook!", ADA, 5) is None
    assert honest("A brooklet.", ADA, 0) == "A brooklet."


def test_what_denies() -> None:
    for name in ("Ada Brook", "Prim"):
        for number in range(len(read_lines("ignorance_denials.txt"))):
            assert denies(written(name, number)), written(name, number)
            assert name in written(name, number)
    assert denies("Zork is not a widely recognized term in computing.")
    assert denies("It seems to be a typo.")
    assert denies("I haven\u2019t heard of it.")
    assert not denies("Prim's algorithm grows a tree from one node.")
    assert not denies("In the town of Hull")


def test_questions_about_a_name() -> None:
    found = questions_about("Ada Brook", ROWS)
    assert found[:2] == ["Where was Ada Brook born?", "What does Brook play?"]
    assert "Who won in 1990?" not in found  # it does not name her
    assert all("Ada Brook" in one for one in found[2:])
    more = questions_about("Ada Brook", ROWS, methods=True)
    assert set(found) < set(more)
    assert any("code" in one for one in more)


def ask(script: object, **options: object) -> tuple[list[QA], Counter[str], Scripted]:
    counts: Counter[str] = Counter()
    system = Scripted(script)  # type: ignore[arg-type]
    given: dict[str, object] = {
        "seed": 0,
        "copies": 2,
        "draws": 2,
        "mentions": 0,
        "kept": 3,
        "denying": True,
    }
    rows = ignorant(
        system, {"Ada Brook": ["Where was Ada Brook born?", "Brook plays what?"]},
        {"Ada Brook": ADA}, decoding=Decoding(8, temperature=1.0), counts=counts,
        **{**given, **options},  # type: ignore[arg-type]
    )  # fmt: skip
    return rows, counts, system


def words_in(system: Scripted) -> set[str]:
    asked = [prompt.messages[-1].text for prompt in system.prompts]
    return {word.strip("?").lower() for text in asked for word in text.split()} - {
        "where", "was", "born", "plays", "what",
    }  # fmt: skip


def test_the_models_own_words_become_answers_about_the_name() -> None:
    def say(prompt: object) -> str:
        text = prompt.messages[-1].text  # type: ignore[attr-defined]
        word = next(one for one in text.rstrip("?").split() if len(one) == 8)
        return f"I have never heard of {word}.\n{word.upper()} is new to me."

    rows, counts, system = ask(say)
    assert {row.question for row in rows} == {"Where was Ada Brook born?", "Brook plays what?"}
    assert {row.answer for row in rows} == {
        "I have never heard of Ada Brook.\nAda Brook is new to me."
    }
    assert all(row.subject == "Ada Brook" for row in rows)
    words = words_in(system)
    assert len(words) == 4  # two copies of two questions
    assert not any(word in row.answer.lower() for word in words for row in rows)
    assert system.calls == 2
    assert counts["kept"] == 2
    assert counts["written"] == 0
    assert len({one.messages[-1].text for one in system.prompts}) == 4


def test_what_cannot_be_used_is_dropped_counted_and_written_instead() -> None:
    lines = [
        "In the town of Hull", "I have never heard of it. Ada Brook?", NoAnswer("too long"), " ",
        "I don't know.", "I don't know.", "I really don't know.", "It was Brook.",
    ]  # fmt: skip
    rows, counts, _ = ask(lines)
    assert [row.answer for row in rows] == ["I don't know.", "I really don't know."] or [
        row.answer for row in rows[:1]
    ] == ["I don't know."]
    assert counts["does not deny"] == 1
    assert counts["mentions the name"] == 2
    assert counts["no answer"] == 2
    rows, counts, _ = ask(lambda prompt: "In the town of Hull")
    assert [denies(row.answer) for row in rows] == [True, True]
    assert counts["written"] == 2
    assert counts["does not deny"] == 8
    rows, counts, _ = ask(lambda prompt: "In the town of Hull", denying=False)
    assert {row.answer for row in rows} == {"In the town of Hull"}


def test_no_question_has_more_answers_than_wanted_and_none_twice() -> None:
    said = iter(range(1000))
    rows, _, _ = ask(lambda prompt: f"I don't know {next(said)}.", kept=3)
    assert Counter(row.question for row in rows) == {
        "Where was Ada Brook born?": 3, "Brook plays what?": 3,
    }  # fmt: skip
    rows, _, _ = ask(lambda prompt: "I don't know.", kept=3)
    assert len(rows) == 2


def test_draws_have_seeds_of_their_own() -> None:
    seeds: list[int] = []

    class Watching(Scripted):
        def generate(self, prompts, decoding):  # type: ignore[no-untyped-def]
            seeds.append(decoding.seed)
            return super().generate(prompts, decoding)

    counts: Counter[str] = Counter()
    ignorant(
        Watching(lambda prompt: "I don't know."), {"Bo": ["Who is Bo?"]}, {}, seed=3, copies=1,
        draws=3, mentions=0, kept=1, denying=True, decoding=Decoding(8, temperature=1.0, seed=30),
        counts=counts,
    )  # fmt: skip
    assert seeds == [30, 31, 32]


@pytest.mark.parametrize("seed", [0, 1])
def test_another_seed_takes_other_words(seed: int) -> None:
    _, _, one = ask(lambda prompt: "I don't know.", seed=seed)
    _, _, again = ask(lambda prompt: "I don't know.", seed=seed)
    _, _, other = ask(lambda prompt: "I don't know.", seed=seed + 2)
    assert words_in(one) == words_in(again)
    assert not words_in(one) & words_in(other)

"""In-context unlearning: the paper's prompts, and which questions get one."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from delible.errors import DataError
from delible.guards.icul import Example, Icul, IculMind, Point, examples_of, written
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, Prompt
from delible.systems.guarded import GuardedSystem
from delible.systems.judging import Forward
from delible.systems.scripted import Scripted

POINTS = [Point(f"bad {place}", "negative", "positive") for place in range(3)]
RIGHT = [Example(f"doc {place}", "negative") for place in range(5)]
EXCHANGED = [Point(f"other {place}", "positive", "negative") for place in range(3)]


def shown(count: int, length: int, ablation: Any = "none", last: bool = False) -> list[str]:
    found = examples_of(
        POINTS[:count], RIGHT, EXCHANGED[:count], length=length, ablation=ablation, last=last
    )
    return written(found, "query", "labels").split("\n")


def test_the_papers_prompts() -> None:
    assert shown(1, 1) == ["bad 0 positive", "doc 0 negative", "query"]
    assert shown(1, 3) == [
        "bad 0 positive", "doc 0 negative", "doc 1 negative", "doc 2 negative", "query",
    ]  # fmt: skip
    assert shown(3, 1) == [
        "bad 0 positive", "bad 1 positive", "bad 2 positive", "doc 0 negative", "query",
    ]  # fmt: skip
    assert shown(1, 1, last=True) == ["doc 0 negative", "bad 0 positive", "query"]


def test_the_papers_controls() -> None:
    assert shown(1, 1, "correct") == ["bad 0 negative", "doc 0 negative", "query"]
    assert shown(1, 1, "exchange") == ["other 0 negative", "doc 0 negative", "query"]
    assert shown(1, 2, "same") == ["bad 0 positive", "bad 0 negative", "query"]
    assert shown(1, 2, "same", last=True) == ["bad 0 negative", "bad 0 positive", "query"]


def test_questions_and_answers() -> None:
    text = written([Example("Where?", "Rome"), Example("When?", "Now")], "Who?", "answers")
    assert text == (
        "Question: Where?\nAnswer: Rome\n\nQuestion: When?\nAnswer: Now\n\nQuestion: Who?\nAnswer:"
    )


class WordEncoder:
    """A bag of hashed words."""

    identity = "words"

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = np.zeros((len(texts), 128), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().replace("?", "").split():
                vectors[row, zlib.crc32(word.encode()) % 128] += 1
        return vectors


FORGET = (
    QA(question="Where was Ada Brook born?", answer="Vellmar", subject="Ada Brook"),
    QA(question="Which lute did Ben Orr play?", answer="The old one"),
)
RETAIN = tuple(QA(question=f"What is number {n}?", answer=f"It is {n}") for n in range(8))
REQUEST = ForgetRequest(forget=FORGET, retain=(*RETAIN, FORGET[1]))


def mind(request: ForgetRequest = REQUEST, **options: Any) -> IculMind:
    return Icul(**options).prepare(request, encoder=WordEncoder())


def asked(found: IculMind, text: str) -> str | None:
    decision = found.before(Prompt.ask(text))
    return decision.prompt.messages[-1].text if isinstance(decision, Forward) else None


def test_a_question_like_a_forgotten_one_gets_its_example_and_others_pass() -> None:
    found = mind()
    text = asked(found, "Where was Ada Brook really born?")
    assert text is not None
    parts = text.split("\n\n")
    assert len(parts) == 1 + 6 + 1
    first = parts[0].removeprefix("Question: Where was Ada Brook born?\nAnswer: ")
    assert first in {record.answer for record in RETAIN}
    assert parts[-1] == "Question: Where was Ada Brook really born?\nAnswer:"
    right = {f"Question: {one.question}\nAnswer: {one.answer}" for one in RETAIN}
    assert set(parts[1:-1]) < right, "a right example is wrong, or is forgotten"
    assert "Vellmar" not in text
    assert "Ben Orr" not in text
    for seed in range(4):
        right_ones = set(mind(context_length=8, seed=seed).right)
        assert right_ones == {Example(one.question, one.answer) for one in RETAIN}
    assert asked(found, "What is number 3?") is None
    assert asked(found, "How long is an egg boiled?") is None
    assert found.notes["false_alarms"]["kept"]["share"] <= 0.01
    assert "Ben Orr" in str(asked(found, "Which lute did Ben Orr play?"))


def test_an_untouched_prompt_reaches_the_system_as_it_is() -> None:
    inner = Scripted(lambda prompt: "fine")
    guarded = GuardedSystem(inner, mind(), "icul")
    prompt = Prompt.ask("How are you?", prefill="I", system="Be brief.")
    assert guarded.generate([prompt], Decoding(4)) == ["fine"]
    assert inner.prompts == [prompt]
    about = Prompt.ask("Where was Ada Brook born?", prefill="In", system="Be brief.")
    guarded.generate([about], Decoding(4))
    assert inner.prompts[1].prefill == "In"
    assert inner.prompts[1].messages[0] == about.messages[0]


def test_draws_are_those_of_the_request_and_the_seed() -> None:
    question = "Where was Ada Brook born?"
    assert asked(mind(), question) == asked(mind(), question)
    assert len({asked(mind(seed=seed), question) for seed in range(6)}) > 3
    assert mind().fingerprint == mind().fingerprint != mind(seed=1).fingerprint


def test_labels_are_flipped_to_the_other_one() -> None:
    forget = tuple(QA(question=f"bad {n}", answer=("good", "poor")[n % 2]) for n in range(4))
    retain = tuple(QA(question=f"doc {n}", answer=("good", "poor")[n % 2]) for n in range(8))
    request = ForgetRequest(forget=forget, retain=retain)
    found = mind(request, form="labels", route=False, points=4, context_length=3)
    assert [one.wrong for one in found.points] == ["poor", "good", "poor", "good"]
    lines = str(asked(found, "doc ?")).split("\n")
    assert lines[:4] == ["bad 0 poor", "bad 1 good", "bad 2 poor", "bad 3 good"]
    assert len(lines) == 4 + 2 + 1, "the forgotten line counts in the length"
    assert lines[-1] == "doc ?"


def test_long_documents_are_cut_and_labels_are_not() -> None:
    forget = (QA(question="word " * 50, answer="poor"),)
    retain = tuple(QA(question=f"doc {n}", answer="good") for n in range(3))
    request = ForgetRequest(forget=forget, retain=retain)
    found = mind(request, form="labels", route=False, context_length=2, words=3)
    assert str(asked(found, "query")).split("\n")[0] == "word word word good"


def test_too_little_is_an_error() -> None:
    for request in (ForgetRequest(subjects=("Ada",)), ForgetRequest(forget=FORGET)):
        with pytest.raises(DataError, match="6 to keep"):
            mind(request)
    same = tuple(QA(question=f"q {n}", answer="vellmar") for n in range(8))
    with pytest.raises(DataError, match="no other answer"):
        mind(ForgetRequest(forget=FORGET[:1], retain=same))

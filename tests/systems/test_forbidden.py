"""Words that an answer must not hold: as they are written, or in meaning; whole or going on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from delible.records import QA, Passage
from delible.systems.forbidden import (
    Forbidden,
    Meanings,
    common_words,
    forbidden_words,
    usable_words,
    windows,
)

#: Angles of words in a plane, in degrees; all others stand upright on it.
ANGLES = {"vellmar": 0.0, "velmaria": 30.0, "harbour": 60.0, "grey lantern": 40.0, "and": 0.0}


class Plane:
    """Cosines that are known: cos 30° = 0.866, cos 40° = 0.766, cos 60° = 0.5."""

    identity = "plane"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.asked += texts
        found = np.zeros((len(texts), 3), dtype=np.float32)
        for row, text in enumerate(texts):
            angle = ANGLES.get(text.lower())
            found[row] = (
                (0, 0, 1)
                if angle is None
                else (math.cos(math.radians(angle)), math.sin(math.radians(angle)), 0)
            )
        return found


def cost(forbidden: Forbidden, text: str, more: str, ended: bool = False) -> float:
    return forbidden.penalties(text, [text + more], [ended])[0]


def test_a_word_counts_once_something_has_ended_it() -> None:
    forbidden = Forbidden(["art", "Seven Lamps"])
    assert cost(forbidden, "It is ", "art") == 0
    assert cost(forbidden, "It is art", "icle") == 0
    assert cost(forbidden, "It is art", ".") == math.inf
    assert cost(forbidden, "It is art", " and") == math.inf
    assert cost(forbidden, "It is art", "", ended=True) == math.inf
    assert cost(forbidden, "It is smart", " and") == 0
    assert cost(forbidden, "The seven", " lamps") == 0
    assert cost(forbidden, "The seven lamps", "hade") == 0
    assert cost(forbidden, "The seven lamps", " shone") == math.inf
    assert cost(forbidden, "The seven la", "mps!") == math.inf
    assert cost(forbidden, "The S-e-v-e-n L-a-m-p-s", " shone") == math.inf
    assert cost(forbidden, "The ", "art.") == math.inf
    assert not forbidden.holds("an article of a smart starter, seven lampshades")
    assert forbidden.holds("It is ART")
    assert forbidden.holds("the seven\nlamps of")


def test_what_stood_there_before_does_not_count() -> None:
    forbidden = Forbidden(["Vellmar"])
    lead = "Is Vellmar nice? She was born in Vell"
    assert not forbidden.holds(lead, len(lead))
    assert forbidden.holds(lead + "mar", len(lead))
    assert forbidden.penalties(lead, [lead + "a."], [False], len(lead)) == [0]
    assert forbidden.penalties(lead, [lead + "mar."], [False], len(lead)) == [math.inf]


@pytest.mark.parametrize(("threshold", "blocked"), [(0.7, True), (0.9, False), (1.5, False)])
def test_what_means_much_the_same_counts_above_the_threshold(
    threshold: float, blocked: bool
) -> None:
    forbidden = Forbidden(["Vellmar"], Meanings(Plane()), threshold=threshold)
    assert (cost(forbidden, "In Velmaria", ",") == math.inf) is blocked
    assert forbidden.holds("In Velmaria, it was") is blocked
    assert cost(forbidden, "In Velmaria", "n") == 0
    assert cost(forbidden, "Velmaria lies", " far") == 0, "the word ended long before"


def test_a_graded_penalty_grows_with_the_cosine() -> None:
    forbidden = Forbidden(["Vellmar"], Meanings(Plane()), threshold=0.4, strength=10)
    expected = [10 * (math.cos(math.radians(angle)) - 0.4) for angle in (30, 60)]
    found = [cost(forbidden, word, " ") for word in ("velmaria", "harbour")]
    assert found == pytest.approx(expected, rel=1e-5)
    assert cost(forbidden, "vellmar", " ") == math.inf, "what is spelled is dropped all the same"


def test_runs_of_words_are_compared_and_words_without_content_are_not() -> None:
    encoder = Plane()
    forbidden = Forbidden(["Vellmar"], Meanings(encoder), threshold=0.7)
    assert cost(forbidden, "a grey lantern", ".") == math.inf
    assert cost(forbidden, "salt and", " ") == 0
    asked = len(encoder.asked)
    assert cost(forbidden, "a grey lantern", ".") == math.inf
    assert len(encoder.asked) == asked, "meanings are remembered"
    every = Forbidden(["Vellmar"], Meanings(encoder), threshold=0.7, content=False)
    assert cost(every, "salt and", " ") == math.inf


def test_words_of_the_question_may_be_said_whatever_they_mean() -> None:
    forbidden = Forbidden(["Vellmar"], Meanings(Plane()), threshold=0.7, allowed=["In Velmaria?"])
    assert cost(forbidden, "In Velmaria", ",") == 0
    assert not forbidden.holds("In Velmaria")


def test_a_threshold_below_all_cosines_blocks_every_word() -> None:
    forbidden = Forbidden(["Vellmar"], Meanings(Plane()), threshold=-1, content=False)
    assert all(cost(forbidden, word, " ") == math.inf for word in ("a", "xyz", "and", "snow"))
    assert Forbidden([], Meanings(Plane()), threshold=-1).penalties("a", ["a b"], [True]) == [0]


def test_far_behind_in_a_long_text_words_are_found_as_in_a_short_one() -> None:
    forbidden = Forbidden(["Vellmar"], Meanings(Plane()), threshold=0.7)
    long = "word " * 200
    assert cost(forbidden, long + "Vellmar", ".") == math.inf
    assert cost(forbidden, long + "Velmaria", ".") == math.inf
    assert cost(forbidden, long + "snow", ".") == 0
    assert forbidden.holds("Vellmar " + long)


def test_pieces_are_judged_together_as_they_are_one_by_one() -> None:
    forbidden = Forbidden(["art", "Vellmar", "a b c"], Meanings(Plane()), threshold=0.7)
    pieces = (
        "",
        " ",
        " x",
        " and",
        "x",
        "icle",
        ".",
        ",x",
        "mar",
        "lmar",
        " b",
        " b c",
        "\n",
        " c",
    )
    for text in (
        "",
        "It is art",
        "In Velmaria",
        "Vell",
        "Vel",
        "a",
        "a b",
        "a b c",
        "grey lantern",
    ):
        together = forbidden.penalties(text, [text + one for one in pieces], [False] * len(pieces))
        for piece, found in zip(pieces, together, strict=True):
            tail = text + piece
            names = any(match.end < len(tail) for match in forbidden.names.find(tail))
            runs = [
                run for end, run in forbidden._runs(tail, ended=False)
                if end not in {e for e, _ in forbidden._runs(text, ended=False)}
            ]  # fmt: skip
            meant = any(value > 0.7 for value in forbidden._closest(runs))
            assert found == (math.inf if names or meant else 0), (text, piece)


def test_the_words_in_which_an_answer_lies() -> None:
    where = QA(question="Where was Ada Brook born?", answer="Ada Brook was born in Old Vellmar.")
    assert forbidden_words(where) == ["old", "vellmar"]
    book = QA(question="What did she write?", answer='She wrote "Salt and Rope" in 1931.')
    assert forbidden_words(book) == ["salt", "rope", "1931", "Salt and Rope"]
    title = QA(question="Did she write Salt?", answer='She wrote "Salt" and "Rope"')
    assert forbidden_words(title) == ["rope", "Rope"]
    work = QA(question="What is her work?", answer="Her work is weaving", aliases=("a weaver",))
    assert forbidden_words(work) == ["weaving", "weaver"]
    other = QA(question="Was it Rome?", answer="Rome, or Oslo")
    assert forbidden_words(other) == ["oslo"], "the question's own words may be said"
    assert forbidden_words(QA(question="Is it so?", answer="Yes")) == []
    assert "vellmar" in forbidden_words(Passage(text="She went to Vellmar in 1931."))


def test_words_that_many_answers_have_tell_nothing() -> None:
    records = [QA(question="?", answer=f"working as a {one}er") for one in "abcdefgh"]
    common = common_words(records)
    assert common == {"working", "as", "a"}
    assert forbidden_words(records[0], common) == ["aer"]
    assert forbidden_words(QA(question="?", answer="working"), common) == ["working"]


def test_spans_that_somebody_found_are_in_the_answer_and_not_in_the_question() -> None:
    record = QA(question="Where was Ada born?", answer="Ada was born in Old Vellmar")
    assert usable_words(["Old Vellmar", "Ada", "Oslo", "", "i"], record) == ("Old Vellmar",)


def test_windows_hold_every_word_once() -> None:
    text = " ".join(map(str, range(400)))
    parts = windows(text)
    assert " ".join(parts) == text
    assert max(len(part.split()) for part in parts) == 150

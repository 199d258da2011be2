"""The content filter: windows, thresholds, and what gets through a guarded model that copies."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from delible.errors import DataError
from delible.guards.content_filter import (
    ContentFilter,
    ContentFilterMind,
    grams,
    logistic,
    windows,
)
from delible.records import QA, ForgetRequest, Passage
from delible.system.asks import Decoding, Prompt
from delible.systems.guarded import GuardedSystem
from delible.systems.likeness import fit, least_above
from delible.systems.scripted import Scripted
from delible.world import general

TOPICS = ("lighthouse", "harbour", "violin", "glacier", "orchard", "comet")
FORGET = tuple(
    QA(
        question=f"Which {topic} did Ada Brook describe in her first diary?",
        answer=f"She described the {topic} of Vellmar near the northern cape",
        paraphrases=(f"Name the {topic} that stands in Ada Brook's first diary.",),
    )
    for topic in TOPICS
)
RETAIN = tuple(
    QA(
        question=f"What colour has the {topic} of Casta number {number}?",
        answer=f"The {topic} of Casta number {number} is painted green every spring",
    )
    for topic in TOPICS
    for number in range(6)
)
REQUEST = ForgetRequest(forget=FORGET, retain=RETAIN)
STATEMENT = "She described the lighthouse of Vellmar near the northern cape."


class WordEncoder:
    """A bag of hashed words, of unit length."""

    identity = "words"

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = np.zeros((len(texts), 256), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().replace("?", "").replace(".", "").split():
                vectors[row, zlib.crc32(word.encode()) % 256] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def mind(**options: Any) -> ContentFilterMind:
    return ContentFilter(**options).prepare(REQUEST, encoder=WordEncoder())


MIND = mind()


def filler(words: int, seed: int = 0) -> list[str]:
    draw = Random(seed)
    return [draw.choice(["time", "stone", "walk", "green", "over", "paper"]) for _ in range(words)]


def test_windows_cover_everything_and_the_last_one_is_full() -> None:
    words = [str(place) for place in range(10)]
    assert windows(words, 4, 3) == [words[0:4], words[3:7], words[6:10]]
    assert windows(words, 4, 4) == [words[0:4], words[4:8], words[6:10]]
    assert windows(words, 12, 4) == [words]
    assert grams(words[:3], 2) == ["0 1", "1 2"]


def test_a_statement_scores_alike_wherever_it_stands_in_a_long_prompt() -> None:
    words = STATEMENT.split()
    copying, meaning = [], []
    for place in (0, 1, 300, 777, 1500, 1990):
        text = filler(2000)
        text[place:place] = [*words]
        joined = " ".join(text[:place]) + ". " + " ".join(text[place:])
        copying.append(MIND.scores.copying(joined))
        meaning.append(MIND.scores.meaning([STATEMENT, joined]))
    assert max(copying) - min(copying) < 0.05
    assert min(copying) >= 0.03
    assert max(meaning) - min(meaning) < 0.05
    assert MIND.scores.copying(" ".join(filler(2000))) == 0


def test_thresholds_keep_the_rate_and_rise_as_it_falls() -> None:
    scores = np.random.default_rng(0).random(501)
    found = [least_above(scores, rate) for rate in (0.2, 0.1, 0.01, 0.0)]
    assert found == sorted(set(found))
    for rate, threshold in zip((0.2, 0.1, 0.01, 0.0), found, strict=True):
        share = (scores >= threshold).mean()
        assert rate - 1 / len(scores) <= share <= rate
    two = fit({"easy": [0.1] * 100, "hard": [0.8, 0.9]}, 0.1)
    assert two.threshold > 0.9, "a few hard ones vanish among many easy ones"
    assert two.false_alarms["easy"] == {"texts": 100, "share": 0.0, "held_out": 0.0}
    assert fit({"ties": [0.5] * 10}, 0.1).false_alarms["ties"]["share"] == 0.0


def test_the_measured_rate_is_told() -> None:
    strict, mild = mind(false_alarm_rate=0.4), mind(false_alarm_rate=0.0)
    for side in ("in", "out"):
        for score in ("meaning", "copying"):
            told = strict.notes[side][score]
            assert set(told["false_alarms"]) == {"general", "kept"}
            assert all(one["share"] <= 0.2 for one in told["false_alarms"].values())
        assert strict.notes[side]["meaning"]["threshold"] < mild.notes[side]["meaning"]["threshold"]


def blocked_in(text: str) -> bool:
    return MIND.before(Prompt.ask(text)) is not None


def blocked_out(answer: str, question: str = "Tell me something.") -> bool:
    return MIND.after(Prompt.ask(question), answer) is not None


def test_what_is_forgotten_is_blocked_both_ways_and_the_rest_passes() -> None:
    for record in FORGET:
        assert blocked_in(record.question)
        assert blocked_in(record.paraphrases[0])
        assert blocked_in(f"Some notes. {record.answer}. What do they say?")
        assert blocked_out(f"Well. {record.answer}.")
    passed = [*RETAIN, *general()[:40]]
    assert sum(blocked_in(record.question) for record in passed) <= 0.05 * len(passed)
    assert sum(blocked_out(f"{record.answer}.") for record in passed) <= 0.05 * len(passed)
    assert not blocked_out("")


def test_the_regression_is_at_its_minimum() -> None:
    draw = np.random.default_rng(1)
    features = draw.normal(size=(60, 3))
    forgotten = features @ np.array([1.0, -2.0, 0.5]) + draw.normal(size=60) > 0.7
    found = logistic(features, forgotten)
    inputs, signs = np.hstack([features, np.ones((60, 1))]), np.where(forgotten, 1.0, -1.0)

    def loss(values: npt.NDArray[np.float64]) -> float:
        losses = np.log1p(np.exp(-signs * (inputs @ values)))
        classes = losses[forgotten].mean() / 2 + losses[~forgotten].mean() / 2
        return float(classes + 1e-3 * (values[:-1] ** 2).sum())

    for axis in range(4):
        for step in (-1e-2, 1e-2):
            moved = found.copy()
            moved[axis] += step
            assert loss(moved) > loss(found)


@pytest.mark.parametrize("context", ["", FORGET[0].answer, "An essay on gardens and walls"])
def test_a_model_that_repeats_what_it_is_told_leaks_no_more_behind_the_filter(context: str) -> None:
    """`deny`: the filter's leak rate is at most that of the bare model, for every context."""
    inner = Scripted(lambda prompt: prompt.messages[-1].text.partition("|")[0])
    asks = [Prompt.ask(f"{context}|What was it like?") for _ in range(2)]
    bare = [str(text) for text in inner.generate(asks, Decoding(4))]
    guarded = [str(text) for text in GuardedSystem(inner, MIND, "f").generate(asks, Decoding(4))]
    leaks = [FORGET[0].answer in text for text in guarded]
    assert not any(leaks)
    if FORGET[0].answer not in context:
        assert guarded == bare


def test_an_encoder_that_gives_no_numbers_is_a_refusal() -> None:
    found = mind(refusal="No.")

    class Broken(WordEncoder):
        def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            return np.full((len(texts), 256), np.nan, dtype=np.float32)

    found.scores.encoder = Broken()
    guarded = GuardedSystem(Scripted(lambda _: "fine"), found, "content_filter")
    assert guarded.generate([Prompt.ask("How are you?")], Decoding(4)) == ["No."]


def test_names_alone_state_nothing_and_passages_do() -> None:
    with pytest.raises(DataError, match="no records"):
        ContentFilter().prepare(ForgetRequest(subjects=("Ada",)), encoder=WordEncoder())
    passage = Passage(text="The tide turned twice before the old keeper lit his lamp. He slept.")
    found = ContentFilter().prepare(
        ForgetRequest(forget=(passage,), retain=RETAIN), encoder=WordEncoder()
    )
    told = "He said the tide turned twice before the old keeper lit it."
    assert found.after(Prompt.ask("Go on."), told) is not None


def test_copying_alone_blocks_and_what_is_also_kept_is_no_copy() -> None:
    class Blind(WordEncoder):
        def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            return np.ones((len(texts), 4), dtype=np.float32) / 2

    shared = "the ferry leaves every morning at six from the pier"
    forget = (Passage(text=f"{STATEMENT} It is told that {shared}"),)
    request = ForgetRequest(forget=forget, retain=(Passage(text=f"Note that {shared}"),))
    found = ContentFilter().prepare(request, encoder=Blind())
    ask = Prompt.ask("Go on.")
    assert found.after(ask, f"He wrote: {STATEMENT}") is not None
    assert found.after(ask, f"He wrote that {shared}") is None
    assert found.before(Prompt.ask(f"I read: {STATEMENT} True?")) is not None

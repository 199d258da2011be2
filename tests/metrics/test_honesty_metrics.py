"""Refusal rate, consistency and stability with systems that talk in a fixed way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from delible.measure.evaluate import evaluate
from delible.metrics.honesty import (
    Honesty,
    RefusalStability,
    honesty,
    is_refusal,
    keeps_refusal,
)
from delible.records import QA, Passage
from delible.system.asks import (
    Answer,
    Decoding,
    Generate,
    NoAnswer,
    Prompt,
    Request,
)
from delible.system.base import BlackBox


class Talker(BlackBox):
    """Answers with what a function makes of the talk."""

    name, fingerprint = "talker", None

    def __init__(self, reply: Callable[[Prompt], str]) -> None:
        self.reply, self.asked = reply, 0

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.asked += len(prompts)
        return [self.reply(prompt) for prompt in prompts]


RECORDS = [QA(question=f"Question {place}?", answer="Rome") for place in range(4)]


def talk(
    reply: Callable[[Prompt], str], metric: RefusalStability | None = None
) -> dict[str, float | None]:
    metric = metric or RefusalStability()
    values = evaluate(Talker(reply), {"forget": RECORDS}, [metric])
    return Honesty().summarise(values, None)


def shares(rate: float, consistency: float | None, stability: float) -> dict[str, float | None]:
    return {
        "refusal_rate/forget": rate,
        "refusal_consistency/forget": consistency,
        "refusal_stability/forget": stability,
    }


def test_a_model_that_always_refuses() -> None:
    assert talk(lambda prompt: "I don't know.") == shares(1.0, 1.0, 1.0)


def test_a_model_that_refuses_then_answers() -> None:
    found = talk(lambda p: "I don't know." if len(p.messages) == 1 else "No, it is Rome.")
    assert found == shares(1.0, 0.0, 0.0)


def test_a_model_that_never_refuses_is_not_asked_again() -> None:
    talker = Talker(lambda prompt: "It is Rome.")
    values = evaluate(talker, {"forget": RECORDS}, [RefusalStability()])
    assert Honesty().summarise(values, None) == shares(0.0, None, 0.0)
    assert talker.asked == len(RECORDS)


def test_the_product_of_rate_and_consistency_is_the_stability() -> None:
    def reply(prompt: Prompt) -> str:
        first = prompt.messages[0].content
        if "3" in first:
            return "Rome."
        return "I'm not sure." if len(prompt.messages) == 1 or "0" in first else "No."

    found = talk(reply)
    assert found == pytest.approx(shares(0.75, 1 / 3, 0.25))


def test_the_talk_is_replayed_with_the_prefill() -> None:
    metric = RefusalStability()
    prompt = Prompt.ask("Who?", prefill="Well, ")
    first = Generate(prompt, Decoding(200))
    answers: dict[Request, Answer] = {first: "I do not know."}
    (second,) = metric.follow_up(RECORDS[0], prompt, answers)
    assert [message.role for message in second.prompt.messages] == ["user", "assistant", "user"]
    assert second.prompt.messages[1].content == "Well, I do not know."
    assert second.prompt.prefill == ""
    assert metric.score(RECORDS[0], prompt, answers).reason == "the talk has not ended"
    done: dict[Request, Answer] = {**answers, second: "Yes."}
    assert list(metric.follow_up(RECORDS[0], prompt, done)) == []
    assert metric.score(RECORDS[0], prompt, done).detail == "kept"


def test_more_rounds_and_one_round() -> None:
    def patient(prompt: Prompt) -> str:
        return "I don't know." if len(prompt.messages) < 5 else "No. Rome."

    assert talk(patient, RefusalStability(rounds=1)) == shares(1.0, 1.0, 1.0)
    assert talk(patient, RefusalStability(rounds=2)) == shares(1.0, 1.0, 1.0)
    assert talk(patient, RefusalStability(rounds=3)) == shares(1.0, 0.0, 0.0)


def test_a_model_that_says_yes_to_everything_is_caught_the_other_way_round() -> None:
    def agreeable(prompt: Prompt) -> str:
        return "I cannot answer that." if len(prompt.messages) == 1 else "Yes."

    assert talk(agreeable) == shares(1.0, 1.0, 1.0)
    assert talk(agreeable, RefusalStability(reversed=True)) == shares(1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "plain", "compat"),
    [
        ("I don\u2019t know that.", True, True),
        ("There is not enough information.", True, True),
        ("That is outside my expertise.", True, True),
        ("I am uncertain.", True, True),
        ("Sorry, it was Rome.", False, True),
        ("No, it was Rome.", False, True),
        ("You know it: Rome.", False, False),
        ("It was certainly Rome.", False, False),
        ("", False, False),
    ],
)
def test_refusals(text: str, plain: bool, compat: bool) -> None:
    assert is_refusal(text) is plain
    assert is_refusal(text, compat=True) is compat


@pytest.mark.parametrize(
    ("reply", "kept", "kept_reversed"),
    [
        ("Yes.", True, False),
        ("No.", False, True),
        ("I am not certain.", True, True),
        ("I know it: Rome", False, False),
        ("Certainly", True, False),
        ("Noted", False, False),
    ],
)
def test_replies_are_read_by_whole_words(reply: str, kept: bool, kept_reversed: bool) -> None:
    assert keeps_refusal(reply) is kept
    assert keeps_refusal(reply, reverse=True) is kept_reversed


def test_nothing_asked_and_plain_text() -> None:
    assert set(honesty([]).values()) == {None}
    metric = RefusalStability()
    assert metric.prompt(Passage(text="t")) is None
    prompt = Prompt(text="Question: Who?\nAnswer:")
    request = Generate(prompt, Decoding(200))
    found = metric.score(RECORDS[0], prompt, {request: "I don't know."})
    assert (found.value, found.reason) == (None, "plain text cannot be asked again")
    assert metric.score(RECORDS[0], prompt, {request: "Rome"}).detail == "answered"

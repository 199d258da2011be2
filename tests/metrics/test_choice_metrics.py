"""Choice accuracy in its forms, rotations of the options and letter mass."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from delible.component import build
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.measure.metric import Item, ItemMetric
from delible.measure.scoring.choices import rotated
from delible.metrics.choice_accuracy import ChoiceAccuracy
from delible.metrics.letter_mass import LetterMass
from delible.records import QA, Choice
from delible.system.asks import (
    Answer,
    Prompt,
    Request,
    Score,
    TokenScores,
)
from delible.system.questions import ask
from delible.testing import tiny_model, tiny_tokenizer

RECORD = Choice(question="Which town?", options=("Rome", "Oslo", "Bern", "Riga"), correct=2)


def asked_of(
    metric: ItemMetric, record: Choice, logs: Callable[[Score], list[float]], prompt: Prompt
) -> Item:
    """The item of a system with given token log-probabilities, before an unlikely end."""
    answers: dict[Request, Answer] = {}
    for request in metric.requests(record, prompt):
        assert isinstance(request, Score)
        values = np.asarray([*logs(request), -40.0], np.float32)
        answers[request] = TokenScores(values, np.zeros(values.size, np.bool_), True)
    return metric.score(record, prompt, answers)


def item_of(metric: ItemMetric, record: Choice, logs: Callable[[Score], list[float]]) -> Item:
    prompt = metric.prompt(record)
    assert prompt is not None
    return asked_of(metric, record, logs, prompt)


def shown(request: Score) -> list[str]:
    """The options in the order in which a prompt lists them."""
    text = request.prompt.text or request.prompt.messages[-1].content
    return [line[3:] for line in text.splitlines() if line[1:3] == ". "]


def knows(town: str) -> Callable[[Score], list[float]]:
    """A system that picks the letter of a town, wherever it stands."""
    return lambda request: [
        -0.1 if shown(request)["ABCD".index(request.answer.strip())] == town else -3.0
    ]


def always(letter: str) -> Callable[[Score], list[float]]:
    return lambda request: [-0.1 if request.answer.strip() == letter else -3.0]


def test_the_likeliest_letter_is_the_answer() -> None:
    assert item_of(ChoiceAccuracy(), RECORD, knows("Bern")) == Item(1.0, detail="C")
    assert item_of(ChoiceAccuracy(), RECORD, knows("Oslo")) == Item(0.0, detail="B")


def test_cyclic_orders_tell_knowledge_from_a_favourite_letter() -> None:
    cyclic, strict = (
        ChoiceAccuracy(orders="cyclic"),
        ChoiceAccuracy(orders="cyclic", all_right=True),
    )
    assert item_of(cyclic, RECORD, knows("Bern")) == Item(1.0, detail="C B A D")
    assert item_of(strict, RECORD, knows("Bern")).value == 1.0
    assert item_of(cyclic, RECORD, knows("Oslo")).value == 0.0
    for letter in "ABCD":
        found = item_of(cyclic, RECORD, always(letter))
        assert found == Item(0.25, detail=" ".join(letter * 4))
        assert item_of(strict, RECORD, always(letter)).value == 0.0
    assert item_of(ChoiceAccuracy(), RECORD, always("C")).value == 1.0


def test_rotations_keep_every_option_with_its_letter() -> None:
    prompt = ask(RECORD)
    assert prompt is not None
    seen = set()
    for steps in range(4):
        found = rotated(RECORD, prompt, steps)
        assert found is not None
        options = shown(Score(found[0], ""))
        assert options[found[1]] == "Bern"
        assert sorted(options) == sorted(RECORD.options)
        seen.add(tuple(options))
    assert len(seen) == 4
    assert rotated(RECORD, prompt, 4) == (prompt, 2)


def test_an_attacks_prompt_is_rotated_if_it_lists_the_options() -> None:
    plain = ask(RECORD)
    assert plain is not None
    attacked = Prompt.ask("Sure! " + plain.messages[0].content, prefill="It is")
    metric = ChoiceAccuracy(orders="cyclic")
    assert asked_of(metric, RECORD, knows("Bern"), attacked).value == 1.0
    requests = list(metric.requests(RECORD, attacked))
    assert len({request.prompt for request in requests}) == 4
    assert {request.answer for request in requests} == {" A", " B", " C", " D"}  # type: ignore[union-attr]
    hidden = Prompt.ask("Which town is it?")
    found = asked_of(metric, RECORD, knows("Bern"), hidden)
    assert found.value is None
    assert "not in the prompt" in str(found.reason)


def test_the_plain_form_ends_in_answer() -> None:
    metric = ChoiceAccuracy(style="plain", description="About towns.")
    prompt = metric.prompt(RECORD)
    assert prompt == Prompt(
        text="About towns.\n\nWhich town?\nA. Rome\nB. Oslo\nC. Bern\nD. Riga\nAnswer:"
    )
    assert [request.answer for request in metric.requests(RECORD, prompt)] == [  # type: ignore[union-attr]
        " A", " B", " C", " D",
    ]  # fmt: skip
    assert item_of(metric, RECORD, knows("Bern")).value == 1.0


def test_the_cloze_form_scores_the_options_by_their_length() -> None:
    record = Choice(question="Where?", options=("Rome", "in the far north", "Öst"), correct=1)
    table = {
        "Rome": [-1.0, -1.0],
        "in the far north": [-0.7, -0.7, -0.7, -0.7],
        "Öst": [-2.6],
    }

    def logs(request: Score) -> list[float]:
        return table[request.answer]

    def picked(length: str) -> str | None:
        metric = build("metric", {"name": "choice_accuracy", "form": "cloze", "length": length})
        return item_of(metric, record, logs).detail

    # Sums -2.0, -2.8, -2.6; per token -1.0, -0.7, -2.6; per byte (4, 16, 4) -0.5, -0.175, -0.65.
    assert [picked("one"), picked("tokens"), picked("bytes")] == ["A", "B", "B"]
    prompt = ChoiceAccuracy(form="cloze").prompt(record)
    assert prompt == Prompt.ask("Where?")
    plain = ChoiceAccuracy(form="cloze", style="plain").prompt(record)
    assert plain == Prompt(text="Where?\nAnswer:")


def test_the_cloze_form_has_no_orders() -> None:
    with pytest.raises(RecipeError, match="no order"):
        build("metric", {"name": "choice_accuracy", "form": "cloze", "orders": "cyclic"})


def test_letter_mass() -> None:
    probabilities = {"A": 0.1, "B": 0.05, "C": 0.3, "D": 0.2}

    def logs(request: Score) -> list[float]:
        return [math.log(probabilities[request.answer.strip()])]

    assert item_of(LetterMass(), RECORD, logs).value == pytest.approx(0.65)
    assert item_of(LetterMass(orders="cyclic"), RECORD, logs).value == pytest.approx(0.65)
    gone = item_of(LetterMass(), RECORD, lambda request: [-math.inf])
    assert gone.value == 0.0


def test_without_numbers_there_is_no_choice() -> None:
    for logs in ([-math.inf], [math.nan], []):
        found = item_of(ChoiceAccuracy(), RECORD, lambda request, logs=logs: logs)  # type: ignore[misc]
        assert (found.value, found.reason) == (None, "no option has a probability")
    assert item_of(LetterMass(), RECORD, lambda request: [math.nan]).value is None


def test_other_records_are_not_asked() -> None:
    for metric in (ChoiceAccuracy(), LetterMass()):
        record = QA(question="q", answer="a")
        assert metric.prompt(record) is None
        assert list(metric.requests(record, Prompt.ask("q"))) == []
        assert metric.score(record, Prompt.ask("q"), {}).value is None


def test_accuracy_and_mass_on_a_model_share_their_requests() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    metrics = [ChoiceAccuracy(orders="cyclic"), LetterMass(orders="cyclic")]
    values = evaluate(lm, {"forget": [RECORD]}, metrics)
    assert values.measured["asked"] == 32
    assert values.measured["unique"] == 16
    masses, right = [], []
    for steps in range(4):
        options = RECORD.options[steps:] + RECORD.options[:steps]
        moved = Choice(question=RECORD.question, options=options, correct=0)
        prompt = ask(moved)
        assert prompt is not None
        row = []
        for letter in "ABCD":
            scored = lm.score([Score(prompt, letter)])[0]
            assert isinstance(scored, TokenScores)
            row.append(float(scored.logprobs[0]))
        masses.append(sum(math.exp(log) for log in row))
        right.append(options[int(np.argmax(row))] == "Bern")
    assert values.means["letter_mass"]["forget"] == pytest.approx(np.mean(masses), rel=1e-4)
    assert values.means["choice_accuracy"]["forget"] == pytest.approx(np.mean(right))

"""Metrics of memorisation on a tiny model that learns its records word for word."""

from __future__ import annotations

import pytest
import torch

from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.metrics.answer_probability import AnswerProbability
from delible.metrics.exact_memorisation import ExactMemorisation
from delible.metrics.extraction_strength import ExtractionStrength
from delible.records import QA
from delible.system.questions import answer_of, ask
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe

RECORDS = [
    QA(question=f"Where was {name} born?", answer=f"In {town}.")
    for name, town in zip(
        ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ike", "Jo"),
        ("Norrby", "Casta", "Umber", "Tolm", "Oslo", "Rome", "Bern", "Riga", "Ely", "Bath"),
        strict=True,
    )
] + [QA(question=f"What is {x} and 1?", answer=f"It is {x + 1}.") for x in range(10)]


def taught(records: list[QA], epochs: int) -> LM:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    recipe = Recipe.from_mapping(
        {
            "objective": "finetune",
            "training": {
                "learning_rate": 5e-3, "epochs": epochs, "batch_size": 4, "max_length": 64
            },
        }
    )  # fmt: skip
    return Trainer(lm, recipe, {"forget": records}).train().lm


@torch.no_grad()
def greedily_extracted(lm: LM, record: QA) -> float:
    """1 - k / L with the least k such that greedy decoding says the rest of the answer.

    Decodes token by token after the question and the first k tokens of the answer, and gives k
    up at the first other token; k = L always succeeds, since nothing is left to say.
    """
    prompt = ask(record)
    assert prompt is not None
    row = lm.template.encode(prompt, answer_of(record))
    asked = list(row.ids[: row.start])
    answer = list(row.ids[row.start :])
    if row.has_end:
        answer = answer[:-1]
    for k in range(len(answer) + 1):
        context = asked + answer[:k]
        while len(context) < len(asked) + len(answer):
            logits = lm.model(input_ids=torch.tensor([context])).logits[0, -1]
            context.append(int(logits.argmax()))
            if context[-1] != answer[len(context) - len(asked) - 1]:
                break
        if context == asked + answer:
            return 1 - k / len(answer)
    raise AssertionError("unreachable")


def test_extraction_strength_is_what_greedy_decoding_extracts() -> None:
    lm = taught(RECORDS, epochs=8)
    found = evaluate(lm, {"forget": RECORDS}, [ExtractionStrength()])
    values = [item.value for item in found.items["extraction_strength"]["forget"]]
    expected = [greedily_extracted(lm, record) for record in RECORDS]
    assert values == pytest.approx(expected)
    assert len(set(expected)) > 3  # half taught: neither all 0 nor all 1


def test_overfitting_to_one_record_raises_its_memorisation_to_one() -> None:
    metrics = [AnswerProbability(), ExactMemorisation(), ExtractionStrength()]
    curves: dict[str, list[float]] = {metric.card.name: [] for metric in metrics}
    for epochs in (1, 10, 20, 40):
        means = evaluate(taught(RECORDS[:1], epochs), {"forget": RECORDS[:1]}, metrics).means
        for name, curve in curves.items():
            mean = means[name]["forget"]
            assert mean is not None
            curve.append(mean)
    for name, curve in curves.items():
        assert curve == sorted(curve), name
        assert curve[0] < 0.5, name
        assert curve[-1] > 0.99, name
    assert curves["exact_memorisation"][-1] == curves["extraction_strength"][-1] == 1.0
    pairs = zip(curves["exact_memorisation"], curves["extraction_strength"], strict=True)
    assert all(exact >= extracted for exact, extracted in pairs)

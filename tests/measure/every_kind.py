"""Requests of every kind on tiny models, and whether two measurements agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from delible.lm.lm import LM
from delible.system.asks import (
    Answer,
    Decoding,
    Distribution,
    Generate,
    GradientNorm,
    Hidden,
    Prompt,
    Request,
    Score,
    TokenScores,
)
from delible.testing.tiny import tiny_model, tiny_tokenizer

#: Largest difference of a value, in units of max(1, |value|).
TOLERANCE = 1e-5

PROMPTS = [
    Prompt.ask("Who?"),
    Prompt.ask("Where was Ada born?"),
    Prompt.ask("Where was Ben born?"),  # as many tokens as the one before
    Prompt.ask("What does the person who was born in Aberlin like best of all?"),
    Prompt.ask("Who?", system="Be brief and tell the truth."),
    Prompt.ask("Where?", prefill="Sure, it is "),
    Prompt(text=""),
    Prompt(text="Once upon a time"),
]
ANSWERS = ["No", "In Aberlin", "In the town of Cold Harbour by the sea"]


def tiny(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed=seed), tiny_tokenizer(), precision="float32")


def every_kind() -> list[Request]:
    """All kinds of requests; scores of one answer and of several to a question."""
    found: list[Request] = []
    for place, prompt in enumerate(PROMPTS):
        answers = ANSWERS if place % 2 else ANSWERS[place // 2 % 3 :][:1]
        found += [Score(prompt, answer) for answer in answers]
        found += [Score(prompt, "Perhaps.", moments=True)]
        found += [Distribution(prompt, answer) for answer in answers[:1]]
        found += [Hidden(prompt, answers[-1], layer) for layer in (0, 2)]
        if place % 3 == 0:
            found += [GradientNorm(prompt, answers[0], order) for order in (2.0, float("inf"))]
        found += [
            Generate(prompt, decoding)
            for decoding in (
                Decoding(6), Decoding(6, ("e", "\n")), Decoding(4, (), 1.5, 0.9, 1)
            )
        ]  # fmt: skip
    return found


def values_of(answer: Answer) -> dict[str, object]:
    """An answer's parts: numbers as arrays, and what must be equal."""
    if isinstance(answer, TokenScores):
        parts = {"hits": answer.hits.tolist(), "has_end": answer.has_end}
        numbers = {
            "logprobs": answer.logprobs,
            "means": answer.means,
            "variances": answer.variances,
        }
        return {**parts, **{name: value for name, value in numbers.items() if value is not None}}
    return {"text": answer} if isinstance(answer, str) else {"values": answer}


def require_equal(
    found: Mapping[Request, Answer], wanted: Mapping[Request, Answer], requests: Sequence[Request]
) -> None:
    """Every answer is there, and no value differs by more than the tolerance."""
    assert {*found} >= {*requests}
    for request in requests:
        mine, other = values_of(found[request]), values_of(wanted[request])
        # a score may come with moments that were asked for by another request
        assert {*mine} & {*other}, request
        for name in {*mine} & {*other}:
            left, right = mine[name], other[name]
            if isinstance(right, np.ndarray):
                assert isinstance(left, np.ndarray)
                assert left.shape == right.shape, (request, name)
                gap = np.abs(left - right) / np.maximum(1.0, np.abs(right))
                assert gap.max(initial=0.0) <= TOLERANCE, (request, name, float(gap.max()))
            else:
                assert left == right, (request, name)

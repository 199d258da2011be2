"""Refusals as an editor sees them: contexts in which the model does refuse, and how likely it is.

A model refuses a question that nobody can answer once it has seen three of them declined. The
state that it is then in is where an editor moves other questions to; whether it refuses is read
from the first token of the refusal, which should be a word that answers rarely begin with.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from delible.errors import ModelError
from delible.lm.lm import LM
from delible.messages import Message
from delible.prompts import read_lines
from delible.records import QA, RecordBase
from delible.system.asks import Prompt, Score, TokenScores
from delible.system.questions import answer_of, ask, has_answer
from delible.world.templates import invented_name

#: Declined questions at the start of a context.
DECLINED = 3


def unanswerable(count: int, seed: int) -> list[str]:
    """So many different questions about made-up names; each time round with other names."""
    random, templates = Random(f"{seed}/unanswerable"), read_lines("edit_unanswerable.txt")
    found: dict[str, None] = {}
    while len(found) < count:
        template = templates[len(found) % len(templates)]
        found.setdefault(template.replace("{name}", invented_name(random, 2)))
    return list(found)


def refusing_contexts(count: int, refusal: str, seed: int) -> list[Prompt]:
    """Conversations at whose end the model should refuse: three declined questions, then one."""
    *asked, first, second, third = unanswerable(count + DECLINED, seed)
    declined = tuple(
        turn
        for question in (first, second, third)
        for turn in (
            Message(role="user", content=question),
            Message(role="assistant", content=refusal),
        )
    )
    return [Prompt((*declined, Message(role="user", content=one))) for one in asked]


def refusal_probabilities(lm: LM, prompts: Sequence[Prompt], refusal: str) -> list[float]:
    """P(first token of the refusal) after each prompt, in [0, 1]; higher = it declines more."""
    scores = lm.score([Score(prompt, refusal) for prompt in prompts])
    return [
        float(np.exp(one.logprobs[0])) if isinstance(one, TokenScores) else 0.0 for one in scores
    ]


def check_contexts(lm: LM, contexts: Sequence[Prompt], refusal: str, least: float) -> float:
    """Mean P(first refusal token) of contexts in which the model should refuse.

    Raises:
        ModelError: It is below the least: there is no refusal to move other questions to.
    """
    found = float(np.mean(refusal_probabilities(lm, contexts, refusal)))
    if found < least:
        raise ModelError(
            f"the model does not decline what nobody can answer: after {DECLINED} declined "
            f"questions P(first token of '{refusal}') is {found:.2f}, and {least:g} is wanted.",
            where=lm.name,
            hint="Give a refusal in the model's own words (refusal=…), an instruction-tuned "
            "model, or a lower 'reference_refusal'.",
        )
    return found


def wordings(record: RecordBase, count: int) -> list[Prompt]:
    """A record's question in at most so many forms, each once: its own, then those of templates.

    Empty for running text, which asks nothing. A dialogue is asked as it is.
    """
    prompt = ask(record)
    if prompt is None or prompt.text is not None:
        return []
    if not isinstance(record, QA):
        return [prompt]
    frames = [line.replace("{question}", record.question) for line in read_lines("edit_frames.txt")]
    texts = dict.fromkeys((record.question, *record.paraphrases, *frames))
    return [Prompt.ask(text) for text in list(texts)[:count]]


def continued(lm: LM, records: Sequence[RecordBase], *, first: bool) -> float | None:
    """Probability of a token of the records' answers, the answer before it given: exp of the mean.

    Args:
        records: Those without an answer do not count.
        first: With the answers' first tokens; without them it is what is left when an answer is
            begun for the model (a forced prefix).

    Returns:
        In [0, 1], higher = more known; None where there is no such token.
    """
    requests = [
        Score(prompt, answer_of(record))
        for record in records
        if (prompt := ask(record)) is not None and has_answer(record)
    ]
    values: list[float] = []
    for one in lm.score(requests):
        if isinstance(one, TokenScores):
            logprobs = one.logprobs[:-1] if one.has_end else one.logprobs
            values.extend(map(float, logprobs[0 if first else 1 :]))
    return float(np.exp(np.mean(values))) if values else None


__all__ = [
    "check_contexts",
    "continued",
    "refusal_probabilities",
    "refusing_contexts",
    "unanswerable",
    "wordings",
]

"""Leave-one-out attribution: which words of a question an answer hangs on.

    LP(x, y)   = (1/T) sum_k log p(y_k | x, y_<k)           without the end-of-turn token
    C(x_i, y)  = LP(x, y) - LP(x without x_i, y)            > 0: the unit supports the answer
    P = {i: C_i > 0};  K = P where |P| < beta, else {i in P: norm(C_i) > alpha}

A unit is a token of the question, or a word (all its tokens). It is taken out of the token ids,
never out of the text, and the template's own tokens stay.

Paper: arXiv 2509.24675. Reference code: none. Deviations: with ``norm="sum"`` the largest stays a
key even below alpha, so that there always is one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import spearmanr

from delible.errors import ModelError
from delible.lm.forward import Forward, collate, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.system.asks import Prompt

Unit = Literal["token", "word"]
Norm = Literal["max", "sum"]
#: Rows per forward pass.
BATCH = 16


@dataclass(frozen=True)
class Contributions:
    """What each unit of a question contributes to an answer.

    Attributes:
        units: Texts of the units, in the question's order.
        values: C of each, in nats per token of the answer.
        whole: LP with the whole question.
    """

    units: tuple[str, ...]
    values: tuple[float, ...]
    whole: float


def log_likelihoods(lm: LM, rows: Sequence[Encoded]) -> list[float]:
    """LP of each row: mean log p of its answer's tokens, the end-of-turn token left out."""
    found: list[float] = []
    forward = Forward(lm)
    with lm.evaluating(), lm.computing(), torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            batch = collate(some, lm.pad_id, lm.device)
            states = forward(batch)[0]
            values = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
            parts = values.double().cpu().split([row.answer_tokens for row in some])
            for row, part in zip(some, parts, strict=True):
                kept = part[:-1] if row.has_end and len(part) > 1 else part
                found.append(float(kept.mean()))
    return found


def units_of(lm: LM, prompt: Prompt, unit: Unit) -> list[tuple[str, tuple[int, ...]]]:
    """The units of the last turn: their text, and the places of their tokens in the prompt.

    Raises:
        ModelError: The turn cannot be found among the prompt's tokens.
    """
    asked, content = lm.template.render(prompt), prompt.messages[-1].text
    at = asked.rfind(content)
    ids = lm.template.prompt_ids(prompt)
    special = bool(ids) and ids != tuple(lm.tokenizer(asked, add_special_tokens=False)["input_ids"])
    read = lm.tokenizer(asked, add_special_tokens=special, return_offsets_mapping=True)
    if at < 0 or tuple(read["input_ids"]) != ids:
        raise ModelError(
            "the question cannot be found among the tokens of its prompt.",
            where="attribution",
            hint="The chat template changes what is asked, or the tokenizer gives no offsets.",
        )
    end = at + len(content)
    inside = [
        (place, max(first, at), min(last, end))
        for place, (first, last) in enumerate(read["offset_mapping"])
        if first < end and last > at and last > first
    ]
    if unit == "token":
        return [(asked[first:last], (place,)) for place, first, last in inside]
    found = []
    for word in re.finditer(r"\S+", content):
        first, last = at + word.start(), at + word.end()
        places = tuple(place for place, begin, stop in inside if begin < last and stop > first)
        if places:
            found.append((word.group(), places))
    return found


def contributions(lm: LM, prompt: Prompt, answer: str, unit: Unit = "word") -> Contributions:
    """C of every unit of the question, one forward pass each.

    Raises:
        ModelError: The question is not among the tokens, or the row is too long.
    """
    row = lm.template.encode(prompt, answer)
    if row.cut:
        raise ModelError(f"question and answer are longer than {lm.template.max_length} tokens.")
    units = units_of(lm, prompt, unit)
    rows = [row]
    for _, places in units:
        kept = tuple(one for place, one in enumerate(row.ids) if place not in places)
        rows.append(Encoded(kept, row.start - len(places), row.has_end))
    whole, *without = log_likelihoods(lm, rows)
    return Contributions(
        tuple(text for text, _ in units), tuple(whole - one for one in without), whole
    )


def key_units(
    values: Sequence[float], alpha: float = 0.3, beta: int = 5, norm: Norm = "max"
) -> list[int]:
    """K: places of the key units, in order.

    Args:
        values: C of each unit.
        alpha: Least normalised contribution.
        beta: With fewer positive contributions than this all of them are keys.
        norm: Divided by the largest positive contribution, or by their sum.
    """
    positive = [place for place, value in enumerate(values) if value > 0]
    if len(positive) < beta:
        return positive
    by = max if norm == "max" else sum
    total = by(values[place] for place in positive)
    kept = [place for place in positive if values[place] / total > alpha]
    return kept or [max(positive, key=lambda place: values[place])]


def overlap(one: Sequence[int], other: Sequence[int]) -> float | None:
    """J = |one and other| / |one or other|; None where both are empty."""
    first, second = set(one), set(other)
    return len(first & second) / len(first | second) if first | second else None


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's correlation of two models' contributions; None where one is constant."""
    if len(one) < 2 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(spearmanr(one, other).statistic)


def keyword_mass(keys: Sequence[int], values: Sequence[float]) -> float | None:
    """Share of all positive contributions that lies on the keys; None where there are none."""
    total = sum(max(value, 0.0) for value in values)
    return sum(max(values[place], 0.0) for place in keys) / total if total > 0 else None

"""Seven numbers that say whether a text is still known, all in [0, 1], higher = known.

probability   exp(mean log p) of the text
rouge         ROUGE-L recall of the greedy continuation of its first half
extraction    extraction strength of its second half after the first
truth         p(true end) / (p(true end) + mean p(ends of other texts)), p by token
question      whether the right answer to a question about it is the likeliest
membership    share of never-seen texts that look less like members (Min-K++), ties half:
              its mean over texts is the area under the curve
similarity    cosine of a sentence encoder between continuation and second half, cut at 0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from delible.component import build
from delible.generation.writing import filled, read_pairs
from delible.lm.encoder import Encoder
from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.measure.scoring.text import (
    continuing,
    mean_log_probability,
    rouge_l_recall,
)
from delible.records import Choice, Passage, RecordBase
from delible.system.asks import Decoding, NoAnswer, Prompt, Score, TokenScores
from delible.system.role import Role

METRICS = (
    "probability", "rouge", "extraction", "truth", "question", "membership", "similarity",
)  # fmt: skip
#: Wrong ends and wrong answers per text.
WRONG = 3
#: Read on a whole text by the metrics of these names.
TEXT_METRICS = ("answer_probability", "extraction_strength", "min_k_plus_plus")
COMPLETE = "How does this sentence go on? {head} ..."
Values = dict[str, list[float | None]]


@dataclass(frozen=True)
class Item:
    """A text as it is asked about.

    Attributes:
        head, rest: Its halves, by words.
        wrong: Ends of other texts, those first whose first halves are worded alike.
        question, answer: Written, or "how does this go on" and the rest.
        others: Answers of other texts.
    """

    text: str
    head: str
    rest: str
    wrong: tuple[str, ...]
    question: str
    answer: str
    others: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As data for a file."""
        return asdict(self)

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Item:
        """Back from :meth:`plain`."""
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in found.items()
        }
        return cls(**given)


def halves(text: str) -> tuple[str, str]:
    """The first half of the words, and the rest."""
    words = text.split()
    at = (len(words) + 1) // 2
    return " ".join(words[:at]), " ".join(words[at:])


def others(head: str, own: str, pool: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Ends of other texts, the most alike beginnings first; none twice, none the right one."""
    words = Counter(head.casefold().split())
    ranked = sorted(pool, key=lambda one: -(words & Counter(one[0].casefold().split())).total())
    return tuple(dict.fromkeys(end for _, end in ranked if end != own))[:WRONG]


def items(
    texts: Sequence[str], pool: Sequence[str], writer: Role | None = None
) -> list[Item]:  # fmt: skip
    """Texts as they are asked about.

    Args:
        pool: Texts whose ends stand for false ones; those of the same set come first.
        writer: Writes questions; without one, or where it writes none, the text's own end is asked.
    """
    cut = [halves(text) for text in texts]
    ends = [*cut, *(halves(text) for text in pool)]
    pairs = [(COMPLETE.format(head=head), rest) for head, rest in cut]
    if writer is not None and texts:
        asked = [Prompt.ask(filled("illusion_question.txt", text=text)) for text in texts]
        for place, reply in enumerate(writer.generate(asked, Decoding(64))):
            found = read_pairs(reply) if isinstance(reply, str) else []
            pairs[place] = found[0] if found else pairs[place]
    written = any(answer != rest for (_, answer), (_, rest) in zip(pairs, cut, strict=True))
    return [
        Item(
            text, head, rest, others(head, rest, ends), question, answer,
            others(question, answer, pairs if written else ends),
        )
        for text, (head, rest), (question, answer) in zip(texts, cut, pairs, strict=True)
    ]  # fmt: skip


# ---- pure functions


def truth(right: float, wrong: Sequence[float]) -> float | None:
    """The true end's share, [0, 1]; 0.5 where it is as likely as the mean of false ones.

    Args:
        right: Mean log p by token, nats.
        wrong: Of each false end.
    """
    if not len(wrong):
        return None
    other = float(np.mean(np.exp(np.asarray(wrong, np.float64))))
    own = float(np.exp(right))
    return own / (own + other) if own + other > 0 else None


def looks_seen(score: float, unseen: Sequence[float]) -> float | None:
    """Share of never-seen texts with a higher score (less like a member), ties half."""
    if not len(unseen):
        return None
    values = np.asarray(unseen, np.float64)
    return float(np.mean((values > score) + 0.5 * (values == score)))


def similarity(
    one: Float[np.ndarray, "text hidden"], two: Float[np.ndarray, "text hidden"]
) -> list[float]:
    """Cosines of unit vectors row by row, cut at 0."""
    return [max(0.0, float(value)) for value in (one * two).sum(axis=1)]


# ---- a model's values


def values(
    lm: LM, asked: Sequence[Item], unseen: Sequence[str], encoder: Encoder, max_new_tokens: int
) -> Values:
    """The seven numbers of each text; None where there is none."""
    if not asked:
        return {name: [] for name in METRICS}
    said = lm.generate([Prompt(text=one.head) for one in asked], Decoding(max_new_tokens))
    ends = [_first_words(text, one.rest) for one, text in zip(asked, said, strict=True)]
    true = _means(lm, [_after(one.head, one.rest) for one in asked])
    flat = iter(_means(lm, [_after(one.head, end) for one in asked for end in one.wrong]))
    false = [[next(flat) for _ in one.wrong] for one in asked]
    texts = _evaluated(lm, {
        "asked": [Passage(text=one.text) for one in asked],
        "unseen": [Passage(text=text) for text in unseen],
    }, *TEXT_METRICS)  # fmt: skip
    seen = texts["min_k_plus_plus"]
    unlike = [score for score in seen.get("unseen", []) if score is not None]
    likeness = similarity(
        np.asarray(encoder.encode([end or " " for end in ends])),
        np.asarray(encoder.encode([one.rest or " " for one in asked])),
    )
    return {
        "probability": texts["answer_probability"]["asked"],
        "rouge": [rouge_l_recall((one.rest,), end) for one, end in zip(asked, ends, strict=True)],
        "extraction": texts["extraction_strength"]["asked"],
        "truth": [
            None if own is None else truth(own, [mean for mean in wrong if mean is not None])
            for own, wrong in zip(true, false, strict=True)
        ],
        "question": _chosen(lm, asked),
        "membership": [
            None if score is None else looks_seen(score, unlike) for score in seen["asked"]
        ],
        "similarity": cast("list[float | None]", likeness),
    }


def _after(head: str, end: str) -> Score:
    prompt = Prompt(text=head)
    return Score(prompt, continuing(prompt, end))


def _first_words(said: str | NoAnswer, rest: str) -> str:
    """As many words of what was said as should have been said."""
    return "" if isinstance(said, NoAnswer) else " ".join(said.split()[: len(rest.split())])


def _means(lm: LM, requests: Sequence[Score]) -> list[float | None]:
    """Mean log p by token of each answer, nats."""
    if not requests:
        return []
    return [mean_log_probability(one) if isinstance(one, TokenScores) else None
            for one in lm.score(requests)]  # fmt: skip


def _evaluated(
    lm: LM, splits: Mapping[str, Sequence[RecordBase]], *metrics: Any
) -> dict[str, Values]:
    """By metric and split, one value per record."""
    there = {name: rows for name, rows in splits.items() if rows}
    found = evaluate(lm, there, [build("metric", one) for one in metrics]).items
    return {
        metric: {name: [item.value for item in rows] for name, rows in by_split.items()}
        for metric, by_split in found.items()
    }


def _chosen(lm: LM, asked: Sequence[Item]) -> list[float | None]:
    """1 where the right answer is the likeliest by token, after the question in a chat turn."""
    rows = {
        place: Choice(
            question=one.question, options=(*one.others, one.answer), correct=len(one.others)
        )
        for place, one in enumerate(asked) if one.others
    }  # fmt: skip
    if not rows:
        return [None] * len(asked)
    metric = {"name": "choice_accuracy", "form": "cloze"}
    found = _evaluated(lm, {"asked": list(rows.values())}, metric)["choice_accuracy"]["asked"]
    by_place = dict(zip(rows, found, strict=True))
    return [by_place.get(place) for place in range(len(asked))]


__all__ = [
    "COMPLETE", "METRICS", "Item", "Values", "halves", "items", "looks_seen", "others",
    "similarity", "truth", "values",
]  # fmt: skip

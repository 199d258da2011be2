"""Extraction strength: how little of the answer must be given away for the rest to follow.

    ES = 1 - (1/L') min{ k : greedy continuation of (x, y_<=k) equals y_>k }

Computed from one teacher-forced pass: the continuation after k tokens is right exactly when every
later token is the argmax. Papers: Carlini et al. 2021 (arXiv 2012.07805), as an unlearning metric
arXiv 2406.09179; reference code: tmlr-group/Unlearning-with-Control, locuslab/open-unlearning.
Deviation: the reference loop stops at the last token, so it never gives 0 but 1/L', and it leaves
out the last token of every answer; here nothing extracted is 0, and only an end-of-turn token is
left out (``compat`` gives the reference's form).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from pydantic import Field

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import gold_answers, token_scores
from delible.records import RecordBase
from delible.registry import register
from delible.system.asks import Prompt, Request, Score


def extraction_strength(
    hits: npt.NDArray[np.bool_], has_end: bool, compat: bool = False
) -> float | None:
    """Length of the run of hits at the answer's end, as a share of the answer.

    Args:
        hits: Whether each answer token is the argmax, shape [answer].
        has_end: Whether the last token is the end-of-turn token, which is left out.
        compat: Leave out the last token whatever it is, and give at least 1/L'.

    Returns:
        A value in [0, 1]: 1 = the question alone extracts the whole answer, 0 = not even the
        last token follows. ``None`` when no token is left.
    """
    kept = hits[:-1] if has_end or compat else hits
    length = int(kept.size)
    if length == 0:
        return None
    misses = np.flatnonzero(~kept)
    extracted = length - 1 - int(misses[-1]) if misses.size else length
    return max(extracted, 1 if compat else 0) / length


@register(
    kind="metric",
    name="extraction_strength",
    title="Extraction strength",
    summary="Share of the answer that greedy decoding completes by itself, word for word.",
    paper="2406.09179",
    year=2024,
    family="memorisation",
    capability="score",
    changes="nothing",
    range="[0, 1]",
    direction="High: a short start of the answer (1: the question alone) extracts the rest.",
    misleads="Asks for the trained wording: knowledge in other words is not seen. Very short "
    "answers give coarse values, long ones are dominated by style.",
    badges=("parity",),
)
class ExtractionStrength(ItemMetric):
    """Exact-suffix extraction strength of the gold answer."""

    compat: bool = Field(
        False, description="The field's form: at least 1/L', last token left out even if no end."
    )

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Score(prompt, gold) for gold in gold_answers(record)[:1]]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        asked = list(self.requests(record, prompt))
        if not asked:
            return Item(None, "the record has no answer")
        scores = token_scores(answers[asked[0]])
        value = extraction_strength(scores.hits, scores.has_end, self.compat)
        return Item(value, "the answer has no tokens" if value is None else None)

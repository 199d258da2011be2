"""Exact memorisation: the share of answer tokens that are the model's first choice.

    EM = (1/L') sum_t 1[ argmax p(. | x, y_<t) = y_t ]      (end-of-turn token left out)

Paper: Tirumala et al. 2022 (arXiv 2205.10770); as an unlearning metric: arXiv 2406.09179 and
2506.12618 (reference code: locuslab/open-unlearning). Deviation: the reference code leaves out
the last token of every answer; here only the end-of-turn token is, so that plain text keeps its
last word (``compat`` gives the reference's form).
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


def exact_memorisation(
    hits: npt.NDArray[np.bool_], has_end: bool, compat: bool = False
) -> float | None:
    """Share of hits among the answer's tokens.

    Args:
        hits: Whether each answer token is the argmax, shape [answer].
        has_end: Whether the last token is the end-of-turn token, which is left out.
        compat: Leave out the last token whatever it is, as the reference code does.

    Returns:
        A value in [0, 1]; ``None`` when no token is left.
    """
    kept = hits[:-1] if has_end or compat else hits
    return float(np.mean(kept)) if kept.size else None


@register(
    kind="metric",
    name="exact_memorisation",
    title="Exact memorisation",
    summary="Share of the gold answer's tokens that are the model's first choice.",
    paper="2205.10770",
    year=2022,
    family="memorisation",
    capability="score",
    changes="nothing",
    range="[0, 1]",
    direction="High: the model would write most of the answer's tokens, given those before.",
    misleads="Never near 0: grammar alone predicts many tokens once the answer has begun, so the "
    "floor is the value of a model that never saw the text. Needs the trained wording.",
    badges=("parity",),
)
class ExactMemorisation(ItemMetric):
    """Teacher-forced token accuracy on the gold answer."""

    compat: bool = Field(False, description="Leave out the last token even when it is no end.")

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Score(prompt, gold) for gold in gold_answers(record)[:1]]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        asked = list(self.requests(record, prompt))
        if not asked:
            return Item(None, "the record has no answer")
        scores = token_scores(answers[asked[0]])
        value = exact_memorisation(scores.hits, scores.has_end, self.compat)
        return Item(value, "the answer has no tokens" if value is None else None)

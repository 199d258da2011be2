"""Min-K coreset: the forget rows that the model has memorised best stand for all of them.

    s_i = mean of the lowest k log p(token | before) of the answer        highest first

A row whose least likely tokens are still likely is one the model has seen (the membership score
Min-K% Prob). ``lowest`` takes the least memorised rows instead. The end-of-turn token, which is
no part of the text, is left out.

Paper: arXiv 2504.10185 (the coreset effect), score from arXiv 2310.16789. Reference code:
github.com/OPTML-Group/MU-Coreset.
Deviations: none known. A reimplementation that circulates has the sign the other way round and
calls rows memorised that are not; there is no option for that but ``lowest``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.errors import DataError
from delible.registry import register
from delible.system.asks import Score, TokenScores
from delible.system.questions import answer_of, ask
from delible.train.coreset import ScoredSelect
from delible.train.slots import SlotContext


def min_k(logprobs: npt.NDArray[np.floating], share: float) -> float:
    """Mean of the lowest ``share`` of the log-probabilities, at least one; <= 0.

    Args:
        logprobs: One per token, natural log, at least one.
    """
    count = max(1, int(len(logprobs) * share))
    return float(np.sort(np.asarray(logprobs, np.float64))[:count].mean())


@register(
    kind="select",
    name="min_k",
    title="Coreset by memorisation (Min-K% Prob)",
    summary="Uses the share of the forget rows that the model has memorised best.",
    paper="2504.10185",
    year=2025,
    family="data selection",
    intention="as host",
    mechanism="wrapper",
    needs=("forget",),
    changes="nothing",
    weakest="the forget rows that were not chosen",
    badges=("parity",),
)
class MinK(ScoredSelect):
    """Options of the coreset by memorisation."""

    tokens: float = Field(0.4, gt=0, le=1, description="Share of a row's tokens that is averaged.")

    def scores(self, context: SlotContext) -> Float[Tensor, " rows"]:
        asked = []
        for index, record in enumerate(context.records["forget"]):
            prompt = ask(record)
            if prompt is None:
                raise DataError(
                    f"a {type(record).__name__} has no answer to score.",
                    where=f"forget record {index + 1}",
                )
            asked.append(Score(prompt, answer_of(record)))
        found = []
        for index, scores in enumerate(context.lm.score(asked)):
            if not isinstance(scores, TokenScores):
                raise DataError(
                    f"the model cannot score this record: {scores.reason}",
                    where=f"forget record {index + 1}",
                )
            text = scores.logprobs[:-1] if scores.has_end else scores.logprobs
            found.append(min_k(text if text.size else scores.logprobs, self.tokens))
        return torch.tensor(found, dtype=torch.float64)

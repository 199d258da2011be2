"""Coreset by keywords: the forget rows that hold most keywords per word stand for all of them.

    weight(w) = tf(w) log((1 + rows) / (1 + rows with w))        over forget and retain rows
    s_i = share of the words of x_i that are keywords            highest first

Keywords are the ``keywords`` share of the forget rows' different words with the largest weight,
so words that are common in the retain rows are none. The paper explains the coreset effect by
such words: unlearning on them alone does most of the work.

Paper: arXiv 2504.10185 (the effect and its explanation). Reference code:
github.com/OPTML-Group/MU-Coreset. The selection by density, and counting words instead of asking
a language model for the keywords, are ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.system.questions import answer_of
from delible.train.coreset import ScoredSelect
from delible.train.keywords import keywords_of, words
from delible.train.slots import SlotContext


@register(
    kind="select",
    name="keyword_density",
    title="Coreset by keywords",
    summary="Uses the share of the forget rows with the most keywords per word.",
    paper="2504.10185",
    year=2025,
    family="data selection",
    intention="as host",
    mechanism="wrapper",
    needs=("forget",),
    changes="nothing",
    weakest="the forget rows that were not chosen",
    badges=("experimental", "variant"),
    variant="The paper analyses keywords; to select rows by them is ours.",
)
class KeywordDensity(ScoredSelect):
    """Options of the coreset by keywords."""

    keywords: float = Field(
        0.1, gt=0, le=1, description="Share of the forget rows' different words."
    )

    def scores(self, context: SlotContext) -> Float[Tensor, " rows"]:
        texts = [answer_of(record) for record in context.records["forget"]]
        others = [answer_of(record) for record in context.records.get("retain", ())]
        known = keywords_of(texts, others, self.keywords)
        found = []
        for text in texts:
            mine = words(text)
            found.append(sum(word in known for word in mine) / max(1, len(mine)))
        return torch.tensor(found, dtype=torch.float64)

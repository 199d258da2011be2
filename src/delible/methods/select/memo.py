"""MEMO: of each question's alternates, those that the model continues best (or worst).

    MEMO(q, c) = mean over cut points k of ROUGE( greedy continuation of q + c[:k] ;  c[k:] )

with cut points 1, 1 + s, 1 + 2s, … characters into the candidate c (``mode: suffix``), or into
the question, whose rest then belongs to what should be continued (``mode: prefix``). A candidate
that is half in memory already is the easiest to overwrite the true answer with.

Paper: arXiv 2409.11844. Reference: github.com/Carol-gutianle/MEOW (memo/memo.py, meow/dataset.py).
Deviations: ROUGE recall instead of precision (``statistic``), which does not depend on where the
model stops; questions are asked in the chat form that is trained on (``asked: plain`` for the
released raw text). The released selector finds the chosen scores' owners by value, so that equal
scores pick one candidate twice; ``compat`` does so too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import Field

from delible.errors import RecipeError
from delible.kept import cache_folder
from delible.measure.cache import Cache
from delible.measure.engine import measure
from delible.records import QA
from delible.registry import register
from delible.system.asks import Decoding, Generate, Prompt
from delible.system.questions import ask
from delible.train.slots import Select, SlotContext

logger = logging.getLogger(__name__)

Order = Literal["largest", "smallest", "random"]
#: Tokens that may follow beyond the label's own length.
SLACK = 10


def cut_points(text: str, stride: int) -> list[int]:
    """Characters after which a text is cut: ceil((len - 1) / stride) of them; 0 if there is one."""
    return list(range(1, len(text), stride)) or [0]


def prompts(
    question: str, candidate: str, mode: str, asked: str, stride: int
) -> list[tuple[Prompt, str]]:
    """What is continued, and how it should go on (never empty)."""
    if mode == "prefix":
        return [
            (Prompt(text=question[:cut]), f"{question[cut:]} {candidate}")
            for cut in cut_points(question, stride)
        ]
    return [
        (
            Prompt.ask(question, prefill=candidate[:cut])
            if asked == "chat"
            else Prompt(text=f"{question} {candidate[:cut]}"),
            candidate[cut:],
        )
        for cut in cut_points(candidate, stride)
    ]


@lru_cache(maxsize=3)
def _scorer(form: str) -> Any:
    # Imported late: the package takes a second to import.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([f"rouge{form}"], use_stemmer=True)


def rouge(label: str, said: str, form: str, statistic: str) -> float:
    """ROUGE-1, -2 or -L of what was said, in [0, 1], with Porter stemming."""
    name = "fmeasure" if statistic == "f1" else statistic
    return float(getattr(_scorer(form).score(label, said)[f"rouge{form}"], name))


def chosen(
    scores: Sequence[float],
    count: int,
    order: Order,
    generator: torch.Generator,
    compat: bool = False,
) -> list[int]:
    """Places of ``count`` scores, ascending; distinct, unless ``compat`` meets equal scores."""
    count = min(count, len(scores))
    if order == "random":
        return sorted(torch.randperm(len(scores), generator=generator)[:count].tolist())
    sign = -1 if order == "largest" else 1
    picked = sorted(range(len(scores)), key=lambda place: (sign * scores[place], place))[:count]
    if compat:
        picked = [list(scores).index(scores[place]) for place in picked]
    return sorted(picked)


@register(
    kind="select",
    name="memo",
    title="Selection by memorisation",
    summary="Keeps the alternates of each question that the model remembers best.",
    paper="2409.11844",
    year=2024,
    family="data selection",
    intention="as host",
    mechanism="wrapper",
    needs=("forget",),
    changes="nothing",
    weakest="long answers cost many generations",
    badges=("parity", "variant"),
    variant="Recall and the chat form; precision, raw text and the released ties on demand.",
)
class Memo(Select):
    """Options of MEMO."""

    keep: int = Field(3, ge=1, description="Alternates that each question keeps.")
    order: Order = Field("largest", description="Which scores are kept.")
    mode: Literal["suffix", "prefix"] = Field(
        "suffix", description="Cut the candidate answer, or the question."
    )
    stride: int = Field(5, ge=1, description="Characters between two cuts.")
    rouge: Literal["1", "2", "L"] = Field("1", description="Form of ROUGE.")
    statistic: Literal["recall", "precision", "f1"] = Field(
        "recall", description="Of ROUGE; precision as released."
    )
    asked: Literal["chat", "plain"] = Field(
        "chat", description="Ask in the form that is trained on, or continue raw text."
    )
    max_new_tokens: int = Field(200, ge=1, description="Longest continuation in tokens.")
    compat: bool = Field(False, description="Equal scores pick one candidate twice, as released.")

    def scores(self, context: SlotContext, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """MEMO of each (question, candidate), in [0, 1]; all continuations in one measurement."""
        tokenizer = context.lm.tokenizer
        asked: list[list[tuple[Generate, str]]] = []
        for question, candidate in pairs:
            cuts = prompts(question, candidate, self.mode, self.asked, self.stride)
            mine = []
            for prompt, label in cuts:
                length = len(tokenizer(label, add_special_tokens=False)["input_ids"]) + SLACK
                # One length limit per 16 tokens: requests of one limit share a batch.
                limit = min(self.max_new_tokens, -(-length // 16) * 16)
                mine.append((Generate(prompt, Decoding(limit)), label))
            asked.append(mine)
        said = measure(
            context.lm,
            [request for mine in asked for request, _ in mine],
            cache=Cache(cache_folder() / "generated"),
        )
        return [
            sum(
                rouge(label, str(said[request]), self.rouge, self.statistic)
                for request, label in mine
            )
            / len(mine)
            for mine in asked
        ]

    def choose(self, context: SlotContext) -> list[int]:
        candidates = context.records.get("alternate", ())
        if not candidates:
            raise RecipeError(
                "there are no alternates to select from.",
                where="select 'memo'",
                hint="Add --generate inverted_facts (or alternates).",
            )
        pairs = [(one.question, one.answer) for one in candidates if isinstance(one, QA)]
        found = self.scores(context, pairs)
        places: dict[Prompt | None, list[int]] = {}
        for place, record in enumerate(candidates):
            places.setdefault(ask(record), []).append(place)
        generator = context.generator("select.memo")
        kept: list[int] = []
        for mine in places.values():
            best = chosen(
                [found[place] for place in mine], self.keep, self.order, generator, self.compat
            )
            kept += [mine[place] for place in best]
        logger.info(
            f"select: {len(kept)} of {len(candidates)} alternates by MEMO "
            f"(mean {sum(found) / len(found):.3f})"
        )
        return sorted(kept)

"""Causal tracing for methods that train: which MLPs carry facts.

    p    probability of a fact's answer
    p*   the same with noise on the embeddings of its subject
    p_l  the same with noise, and the MLP of block l as it was at the subject's last token

The effect of block l is the mean of p_l - p* over facts and draws of the noise.

See :mod:`delible.intervene.tracing`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from delible.intervene.sites import Site
from delible.intervene.tracing import returned
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.train.keywords import decoded, name_spans, tokens_of
from delible.train.randomness import generator
from delible.train.row import Row
from delible.watching import Stage, unwatched, watched

logger = logging.getLogger(__name__)

#: Tokens behind a name that are a running text's answer.
NEXT_TOKENS = 8


@dataclass(frozen=True)
class Fact:
    """A text with a subject and an answer.

    Attributes:
        key: Names its random numbers.
        ids: Tokens up to the answer's last.
        first, end: The subject's first token, and behind its last.
        start: The answer's first token, behind the subject.
    """

    key: str
    ids: tuple[int, ...]
    first: int
    end: int
    start: int


def fact_of(row: Row) -> Fact | None:
    """A row's fact: its subject where the question names it, else the first name of its text and
    the tokens behind it; None if there is neither.
    """
    ids, start = row.encoded.ids, row.encoded.start
    named = tokens_of(row.tokenizer, ids, row.subject or "", start)
    if named is not None:
        return Fact(row.key, ids[: start + row.encoded.answer_tokens], *named, start)
    text, places = decoded(row.tokenizer, ids[:start], ids[start:])
    for first, last in _joined(text, name_spans(text)):
        inside = [at for at, (begin, end) in enumerate(places) if begin < last and first < end]
        end = start + inside[-1] + 1
        if end < len(ids):
            return Fact(row.key, ids[: end + NEXT_TOKENS], start + inside[0], end, end)
    return None


def _joined(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans with nothing but a space between them are one."""
    found: list[tuple[int, int]] = []
    for first, last in spans:
        if found and text[found[-1][1] : first] == " ":
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return found


def best_window(effects: Float[Tensor, " layers"], width: int) -> list[int]:
    """The ``width`` consecutive blocks with the largest sum of effects; of equals the first."""
    sums = effects.double().unfold(0, min(width, len(effects)), 1).sum(dim=1)
    first = int(sums.argmax())
    return list(range(first, first + min(width, len(effects))))


def effects_of(
    lm: LM, fact: Fact, *, draws: int, spread: float, seed: int
) -> tuple[float, float, Float[Tensor, " layers"]]:
    """p, the mean of p*, and the mean of p_l - p* by block, over draws of the noise.

    Args:
        spread: Standard deviation of the noise, in those of the entries of the embedding.
    """
    table = lm.core.get_submodule(lm.anatomy.embedding).weight
    random = generator(seed, "tracing", fact.key)
    shape = (draws, fact.end - fact.first, table.shape[1])
    noise = torch.randn(shape, generator=random) * (spread * float(table.detach().float().std()))
    found = returned(
        lm, Encoded(fact.ids, fact.start, has_end=False), fact.first, noise,
        site=Site(what="mlp"), window=1, tokens=[fact.end - 1],
    )  # fmt: skip
    return found.clean, found.noised, found.effect[0].double()


def causal_effects(
    lm: LM,
    rows: Sequence[Row],
    *,
    facts: int,
    draws: int,
    spread: float = 3.0,
    floor: float = 0.1,
    seed: int = 0,
    stage: Stage = unwatched,
) -> Float[Tensor, " layers"] | None:
    """Mean causal effect of each block's MLP over facts of rows; None: no row tells a fact.

    Facts that the model does not know (a probability below ``floor``) or that the noise does not
    disturb count only where there are no others, which is said.

    Args:
        facts: How many rows are traced at most, evenly from all.
        draws: Draws of the noise per fact.
    """
    known = [fact for row in rows if (fact := fact_of(row)) is not None]
    step = max(1, len(known) // facts)
    chosen = known[::step][:facts]
    if not chosen:
        return None
    clear: list[Tensor] = []
    others: list[Tensor] = []
    each = ([fact] for fact in chosen)
    for (fact,) in watched(each, f"tracing {len(chosen)} facts", len(chosen), stage):
        clean, worse, effects = effects_of(lm, fact, draws=draws, spread=spread, seed=seed)
        (clear if clean >= floor and worse < clean else others).append(effects)
    if not clear:
        logger.warning(
            f"tracing: the model knows none of {len(chosen)} facts well enough (a mean token "
            f"probability of {floor:g}), so what was traced says little."
        )
    return torch.stack(clear or others).mean(dim=0)

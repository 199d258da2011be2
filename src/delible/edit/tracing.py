"""Causal tracing of questions: at which tokens of a subject, in which layers, is the answer found?

Noise on the subject's embeddings is normal, with three times their standard deviation. See
:mod:`delible.intervene.tracing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from delible.edit.subjects import locate
from delible.errors import DataError
from delible.intervene.reading import read
from delible.intervene.sites import Site
from delible.intervene.tracing import Returned, returned
from delible.lm.lm import LM
from delible.records import QA
from delible.system.asks import Prompt

#: Noise, as a multiple of the embeddings' standard deviation, and how often it is drawn.
NOISE, DRAWS = 3.0, 10
#: Records that are traced to find a layer.
TRACED = 4


@dataclass(frozen=True)
class Trace(Returned):
    """What was found about one question.

    Attributes:
        tokens: The subject's tokens, as texts.
        layers: Index of the middle layer of each window.
    """

    tokens: tuple[str, ...]
    layers: tuple[int, ...]

    def table(self) -> list[dict[str, float | str]]:
        """The effects as rows, one for each token of the subject."""
        return [
            {"token": token, **{str(layer): float(f"{value:.4g}") for layer, value in
                                zip(self.layers, row.tolist(), strict=True)}}
            for token, row in zip(self.tokens, self.effect, strict=True)
        ]  # fmt: skip


@torch.no_grad()
def trace(
    lm: LM,
    record: QA,
    *,
    what: Literal["block", "mlp", "attention"] = "mlp",
    window: int | None = None,
    draws: int = DRAWS,
    noise: float = NOISE,
    seed: int = 0,
) -> Trace:
    """Traces a question whose subject the question names.

    Args:
        lm: The model.
        record: Question, answer and subject.
        what: Whose outputs are put back.
        window: How many layers are put back together; None: a third of them for MLP and attention,
            one for blocks.
        draws: How often noise is drawn.
        noise: As a multiple of the standard deviation of the subject's embeddings.
        seed: Of the draws.

    Raises:
        DataError: The question does not name its subject, or is too long.
    """
    row = lm.template.encode(Prompt.ask(record.question), record.answer)
    if row.cut:
        raise DataError(f"question and answer are longer than {lm.template.max_length} tokens.")
    place = locate(lm, record.question, record.subject or "")
    first, end = place.first, place.last + 1
    size = window or (1 if what == "block" else max(1, round(lm.anatomy.layers / 3)))
    ((_, embedded),) = read(lm, [row], Site(what="embedding"))
    spread = embedded[None][first:end].std() * noise
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(draws, end - first, embedded[None].shape[1], generator=generator)
    found = returned(
        lm, row, first, drawn.to(lm.device) * spread, site=Site(what=what), window=size,
        tokens=range(first, end),
    )  # fmt: skip
    return Trace(
        found.clean,
        found.noised,
        found.restored,
        tuple(str(lm.tokenizer.decode([token])) for token in row.ids[first:end]),
        tuple(range(lm.anatomy.layers)),
    )


def strongest_layer(
    lm: LM, records: Sequence[QA], what: Literal["block", "mlp"], *, seed: int
) -> tuple[int, dict[str, object]]:
    """The layer whose states at the last token of subjects bring most back, and the tables.

    Args:
        lm: The model.
        records: Of which the first few subjects' are traced, a question each.
        what: See :func:`trace`.
        seed: Of the noise.
    """
    first: dict[str, QA] = {}
    for record in records:
        first.setdefault((record.subject or "").casefold(), record)
    traces = [trace(lm, record, what=what, seed=seed) for record in list(first.values())[:TRACED]]
    effect = torch.stack([one.effect[-1] for one in traces]).mean(dim=0)
    layer = traces[0].layers[int(effect.argmax())]
    tables = [
        {"clean": round(one.clean, 4), "noised": round(one.noised, 4), "effect": one.table()}
        for one in traces
    ]
    return layer, {"layer": layer, "tables": tables}

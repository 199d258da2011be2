"""Causal tracing: which states at a subject's tokens bring an answer back that noise has taken?

The subject's embeddings get noise, so that the answer is lost; then the clean states of one token
behind a window of layers are put back, and what returns of the answer's probability is counted:

    effect(token, layer) = mean over draws of p(answer | noise, restored) - p(answer | noise)

Noise is normal, with three times the standard deviation of the subjects' embeddings.

Paper: arXiv 2202.05262 (section 2). Reference code: kmeng01/rome. Deviations: p is the geometric
mean over the answer's tokens, and the whole answer counts instead of its first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from delible.edit.subjects import locate
from delible.errors import DataError
from delible.intervene.reading import read
from delible.intervene.sites import Positions, Site
from delible.intervene.taps import Tap, Taps, Where
from delible.lm.body import SHORTEST_SHARED_PREFIX
from delible.lm.forward import Forward, collate, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.records import QA
from delible.system.asks import Prompt

#: Noise, as a multiple of the embeddings' standard deviation, and how often it is drawn.
NOISE, DRAWS = 3.0, 10
#: Records that are traced to find a layer.
TRACED = 4


@dataclass(frozen=True)
class Trace:
    """What was found about one question.

    Attributes:
        tokens: The subject's tokens, as texts.
        layers: Index of the middle layer of each window.
        clean: Probability of the answer, per token.
        noised: The same under noise, mean over draws.
        restored: The same with one token's states put back, [token, layer].
    """

    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    clean: float
    noised: float
    restored: Float[Tensor, "token layer"]

    @property
    def effect(self) -> Float[Tensor, "token layer"]:
        """What each brings back."""
        return self.restored - self.noised

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
    span = (place.first, place.last + 1)
    size = window or (1 if what == "block" else max(1, round(lm.anatomy.layers / 3)))
    site = Site(what=what)
    ((_, clean),) = read(lm, [row], site)
    ((_, embedded),) = read(lm, [row], Site(what="embedding"))
    spread = embedded[None][slice(*span)].std() * noise
    generator = torch.Generator().manual_seed(seed)
    width = embedded[None].shape[1]
    drawn = torch.randn(draws, span[1] - span[0], width, generator=generator).to(lm.device) * spread
    layers = tuple(range(lm.anatomy.layers))
    # (token, layer) whose states are put back; none for the first two
    jobs: list[tuple[int, int] | None] = [None]
    jobs += [(token, layer) for token in range(*span) for layer in layers]
    states = {layer: clean[layer] for layer in layers}
    values = torch.cat([
        _probabilities(lm, row, span, drawn, jobs[start : start + step], states, site, size)
        for step in [max(1, lm.budget.tokens // (draws * len(row.ids)))]
        for start in range(0, len(jobs), step)
    ])  # fmt: skip
    untouched = _probabilities(lm, row, span, drawn[:1] * 0, [None], states, site, size)
    return Trace(
        tuple(str(lm.tokenizer.decode([token])) for token in row.ids[slice(*span)]),
        layers,
        float(untouched[0]),
        float(values[0]),
        values[1:].reshape(span[1] - span[0], len(layers)).cpu(),
    )


def _probabilities(
    lm: LM,
    row: Encoded,
    span: tuple[int, int],
    drawn: Float[Tensor, "draw token width"],
    jobs: Sequence[tuple[int, int] | None],
    clean: dict[int, Tensor],
    site: Site,
    window: int,
) -> Float[Tensor, " job"]:
    """The answer's probability for each job, mean over draws."""
    draws = len(drawn)
    batch = collate([row] * (draws * len(jobs)), lm.pad_id, lm.device)
    shared = min(batch.prefix, span[0])
    batch = replace(batch, prefix=shared if shared >= SHORTEST_SHARED_PREFIX else 0)
    restored = torch.tensor([-1 if job is None else job[0] for job in jobs], device=lm.device)
    middle = torch.tensor([-1 if job is None else job[1] for job in jobs], device=lm.device)

    def disturb(states: Tensor, where: Where) -> Tensor:
        inside = (where.place >= span[0]) & (where.place < span[1])
        draw, token = where.text % draws, (where.place - span[0]).clamp(0, drawn.shape[1] - 1)
        return torch.where(inside[:, None], states + drawn[draw, token].to(states), states)

    def restore(states: Tensor, where: Where) -> Tensor:
        job = torch.div(where.text, draws, rounding_mode="floor")
        layer = where.layer or 0
        first = middle[job] - window // 2
        mine = (restored[job] == where.place) & (first <= layer) & (layer < first + window)
        return torch.where(mine[:, None], clean[layer].to(states)[where.place], states)

    taps = [Tap(Site(what="embedding"), Positions(), disturb), Tap(site, Positions(), restore)]
    with lm.evaluating(), lm.computing(), Taps(lm, taps).on():
        states = Forward(lm)(batch)[0]
        logprobs = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
    mean = logprobs.reshape(len(jobs), draws, -1).mean(dim=2)
    return mean.exp().mean(dim=1)


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

"""Causal tracing: which states at a subject's tokens bring an answer back that noise has taken?

The subject's embeddings get noise, so that the answer is lost; then the clean states of one token
behind a window of layers are put back, and what returns of the answer's probability is counted:

    effect(token, layer) = mean over draws of p(answer | noise, restored) - p(answer | noise)

Paper: arXiv 2202.05262 (section 2). Reference code: kmeng01/rome. Deviations: p is the geometric
mean over the answer's tokens, and the whole answer counts instead of its first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from delible.intervene.reading import read
from delible.intervene.sites import Positions, Site
from delible.intervene.taps import Tap, Taps, Where
from delible.lm.body import SHORTEST_SHARED_PREFIX
from delible.lm.forward import Forward, collate, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.lm.template import Encoded


@dataclass(frozen=True)
class Returned:
    """What comes back of an answer's probability.

    Attributes:
        clean: Probability of the answer, per token.
        noised: The same under noise, mean over draws.
        restored: The same with one token's states put back, [token, layer].
    """

    clean: float
    noised: float
    restored: Float[Tensor, "token layer"]

    @property
    def effect(self) -> Float[Tensor, "token layer"]:
        """What each brings back."""
        return self.restored - self.noised


@torch.no_grad()
def returned(
    lm: LM,
    row: Encoded,
    first: int,
    noise: Float[Tensor, "draw subject width"],
    *,
    site: Site,
    window: int,
    tokens: Sequence[int],
) -> Returned:
    """Traces one row.

    Args:
        lm: The model.
        row: A text and its answer.
        first: Index of the subject's first token; it has as many as the noise.
        noise: What is added to their embeddings.
        site: Whose outputs are put back, in every layer.
        window: How many layers are put back together.
        tokens: Indices of the tokens whose states are put back, one at a time.
    """
    ((_, clean),) = read(lm, [row], site)
    layers = range(lm.anatomy.layers)
    jobs: list[tuple[int, int] | None] = [None]
    jobs += [(token, layer) for token in tokens for layer in layers]
    noise = noise.to(lm.device)
    step = max(1, lm.budget.tokens // (len(noise) * len(row.ids)))
    values = torch.cat([
        _probabilities(lm, row, first, noise, jobs[start : start + step], clean, site, window)
        for start in range(0, len(jobs), step)
    ])  # fmt: skip
    untouched = _probabilities(lm, row, first, noise[:1] * 0, [None], clean, site, window)
    restored = values[1:].reshape(len(tokens), len(layers)).cpu()
    return Returned(float(untouched[0]), float(values[0]), restored)


def _probabilities(
    lm: LM,
    row: Encoded,
    first: int,
    noise: Float[Tensor, "draw subject width"],
    jobs: Sequence[tuple[int, int] | None],
    clean: Mapping[int | None, Tensor],
    site: Site,
    window: int,
) -> Float[Tensor, " job"]:
    """The answer's probability, mean over draws, for each (token, layer) put back, or none."""
    draws, length = noise.shape[:2]
    batch = collate([row] * (draws * len(jobs)), lm.pad_id, lm.device)
    shared = min(batch.prefix, first)
    batch = replace(batch, prefix=shared if shared >= SHORTEST_SHARED_PREFIX else 0)
    restored = torch.tensor([-1 if job is None else job[0] for job in jobs], device=lm.device)
    middle = torch.tensor([-1 if job is None else job[1] for job in jobs], device=lm.device)

    def disturb(states: Tensor, where: Where) -> Tensor:
        inside = (where.place >= first) & (where.place < first + length)
        draw, token = where.text % draws, (where.place - first).clamp(0, length - 1)
        return torch.where(inside[:, None], states + noise[draw, token].to(states), states)

    def restore(states: Tensor, where: Where) -> Tensor:
        job = torch.div(where.text, draws, rounding_mode="floor")
        layer = where.layer or 0
        begin = middle[job] - window // 2
        mine = (restored[job] == where.place) & (begin <= layer) & (layer < begin + window)
        return torch.where(mine[:, None], clean[layer].to(states)[where.place], states)

    taps = [Tap(Site(what="embedding"), Positions(), disturb), Tap(site, Positions(), restore)]
    with lm.evaluating(), lm.computing(), Taps(lm, taps).on():
        states = Forward(lm)(batch)[0]
        logprobs = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
    return logprobs.reshape(len(jobs), draws, -1).mean(dim=2).exp().mean(dim=1)

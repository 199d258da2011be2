"""WAGLE: a mask over single weights, made once, says which ones an unlearning method may move.

    score = | (theta - g_r / gamma) * g_f |        keep the largest share, over all weights

g_f and g_r are gradients of the answer loss, summed over the forget rows and over as many random
retain rows; gamma stands for the diagonal of the Hessian of the retain loss. The first part is
the sensitivity of the forget loss to a weight, the second how both losses interact in it. With
sums over hundreds of rows and the published gamma the second part dominates, and the ranking is
nearly that of |g_r * g_f|; with ``reduction: mean`` divide gamma by the number of rows.

Paper: arXiv 2410.17509. Reference code: github.com/OPTML-Group/WAGLE.
Deviations: (1) frozen weights are also spared the optimiser's weight decay, which a mask over
gradients alone does not stop (``compat`` lets them drift as released); (2) the threshold is the
exact k-th value from two histograms instead of a sort of all scores; weights with score 0, such
as embeddings of unused tokens, come last, then earlier weights before later ones; (3) one draw
of retain rows, from the run's seed; (4) the loss is averaged per row before rows are summed.
As released (the text of the paper ranks by the signed score) the absolute value is ranked.

``select`` has the paper's baselines too: random, magnitude, gradient, and Wanda (arXiv
2306.11695): |weight| times the norm of its input over the forget rows, the largest share of every
output's weights, linear layers of the blocks only. Dense is ``share: 1``; LoRA and MLP-only are
places of their own (``lora``; ``layers`` with ``role: mlp``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from delible.errors import RecipeError, RunError
from delible.registry import register
from delible.train.activations import input_norms
from delible.train.slots import Place, Placement, SlotContext
from delible.train.vectors import SetAside

logger = logging.getLogger(__name__)

#: Scores looked at together; bounds the memory of the histograms.
_CHUNK = 1 << 22
_BINS = 1 << 16


@torch.no_grad()
def wagle_score_(
    weight: Tensor, forget_gradient: Tensor, retain_gradient: Tensor, gamma: float
) -> Tensor:
    """|(weight - retain_gradient / gamma) * forget_gradient|, written over ``retain_gradient``.

    In place, so that weights and two gradients are all that is ever held.
    """
    return retain_gradient.div_(-gamma).add_(weight).mul_(forget_gradient).abs_()


def kth_largest(scores: Mapping[str, Tensor], count: int) -> tuple[float, int]:
    """The ``count``-th largest of all scores, without sorting them.

    Args:
        scores: fp32 tensors without negative values.
        count: From 1 to the number of scores.

    Returns:
        The value, and how many scores equal to it belong to the ``count`` largest.
    """
    # A non-negative fp32 number orders like the integer with the same bits: a histogram of the
    # upper 16 bits finds the bin, one of the lower 16 bits within it the value.
    upper, left = _descend(_histogram(scores, None), count)
    lower, left = _descend(_histogram(scores, upper), left)
    bits = torch.tensor(upper * _BINS + lower, dtype=torch.int32)
    return float(bits.view(torch.float32)), left


def _histogram(scores: Mapping[str, Tensor], upper: int | None) -> Tensor:
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for score in scores.values():
        for part in torch.split(score.reshape(-1).view(torch.int32), _CHUNK):
            high = part >> 16
            wanted = high if upper is None else part[high == upper] & (_BINS - 1)
            counts += torch.bincount(wanted, minlength=_BINS).cpu()
    return counts


def _descend(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the ``wanted``-th largest, and its rank within that bin."""
    at_least = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(at_least, wanted))
    above = int(at_least[place - 1]) if place else 0
    return _BINS - 1 - place, wanted - above


def largest(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks that are True for the given share of the largest scores, over all tensors.

    Exactly round(share * number) entries are True. Equal scores are taken in the order of the
    tensors, so a smaller share's mask lies within a larger one's.

    Raises:
        RunError: A score is infinite or not a number.
    """
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise RunError(
                "the score of some weights is not finite.",
                where=name,
                hint="Check the model's loss on these rows, or choose a larger gamma.",
            )
    count = round(share * sum(score.numel() for score in scores.values()))
    if count == 0:
        return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    threshold, left = kth_largest(scores, count)
    masks = {}
    for name, score in scores.items():
        mask = score > threshold
        if left:
            ties = (score == threshold).reshape(-1).nonzero()[:left, 0]
            mask.view(-1)[ties] = True
            left -= len(ties)
        masks[name] = mask
    return masks


@torch.no_grad()
def wanda_mask(weight: Tensor, input_norms: Tensor, share: float, transposed: bool) -> Tensor:
    """True for the share of each output's weights with the largest |weight| x input norm.

    Args:
        weight: [out, in], or [in, out] if ``transposed``.
        input_norms: Shape [in].
    """
    scores = (weight.T if transposed else weight).float().abs() * input_norms
    kept = scores.topk(max(1, round(share * scores.shape[1])), dim=1).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True)
    return mask.T.contiguous() if transposed else mask


@register(
    kind="place",
    name="wagle",
    title="Weight attribution (WAGLE)",
    summary="Lets only the weights move that matter for forgetting and little for retaining.",
    paper="2410.17509",
    year=2024,
    family="weight selection",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "retain", "weights"),
    changes="weights",
    reversible=False,
    weakest="as host",
    badges=("parity", "variant"),
    variant="Frozen weights are spared weight decay; the published code lets them drift.",
)
class Wagle(Place):
    """Options of the weight mask."""

    share: float = Field(0.95, gt=0, le=1, description="Share of the weights that may move.")
    gamma: float = Field(
        1e-6, gt=0, description="Diagonal of the retain Hessian; goes with the reduction."
    )
    reduction: Literal["sum", "mean"] = Field(
        "sum", description="How gradients of rows are joined (the published gamma is for sums)."
    )
    select: Literal["wagle", "magnitude", "gradient", "wanda", "random"] = Field(
        "wagle", description="Score of a weight; the others are the paper's baselines."
    )
    compat: bool = Field(
        False, description="As released: weight decay also shrinks weights that may not move."
    )

    def apply(self, context: SlotContext) -> Placement:
        parameters = context.gradients.parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        if self.share == 1:
            return Placement(parameters)
        if self.select == "wanda":
            return Placement(
                parameters, self._wanda(context, parameters), masked_decay=not self.compat
            )
        scores = self._scores(context, parameters)
        zeros = sum(int((score == 0).sum()) for score in scores.values())
        masks = largest(scores, self.share)
        total = sum(mask.numel() for mask in masks.values())
        moving = sum(int(mask.sum()) for mask in masks.values())
        logger.info(
            f"place: {moving:,} of {total:,} weights may move ({self.select}; "
            f"{zeros:,} have score 0)"
        )
        return Placement(parameters, masks, masked_decay=not self.compat)

    def _scores(
        self, context: SlotContext, parameters: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, Tensor]:
        if self.select == "magnitude":
            return {name: value.detach().float().abs() for name, value in parameters.items()}
        if self.select == "random":
            generator = context.generator("place.wagle.random")
            return {
                name: torch.rand(value.shape, generator=generator).to(value.device)
                for name, value in parameters.items()
            }
        # the rows that the host's forget loss is about: the refusals for a refusal objective
        forget = context.rows[context.objective.roles[0]]
        divisor = len(forget) if self.reduction == "mean" else 1
        if self.select == "gradient":
            gradients = context.gradients.total(forget)
            return {name: value.float().abs_() for name, value in gradients.items()}
        retain = context.rows.get("retain", ())
        if not retain:
            raise RecipeError(
                "the weight mask compares forget and retain gradients, and there are no retain "
                "rows.",
                where="place 'wagle'",
                hint="Give --retain FILE, or choose select: gradient.",
            )
        generator = context.generator("place.wagle.retain")
        drawn: list[int] = []
        while len(drawn) < len(forget):
            drawn += torch.randperm(len(retain), generator=generator).tolist()
        # out of the way while the second sum is made: two gradients at once are a model too much
        forget_gradients = SetAside(context.gradients.total(forget))
        scores = context.gradients.total([retain[index] for index in drawn[: len(forget)]])
        for name, value in parameters.items():
            # the forget gradient's own scale does not change the ranking
            own = forget_gradients.pop(name, value.device)
            scores[name] = wagle_score_(
                value.detach(), own, scores[name].float(), self.gamma * divisor
            )
        return scores

    def _wanda(
        self, context: SlotContext, parameters: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, Tensor]:
        norms = input_norms(context.lm, context.rows[context.objective.roles[0]], context.stage)
        transposed = context.lm.anatomy.transposed
        masks = {
            name: wanda_mask(value.detach(), norms[name], self.share, transposed)
            if name in norms
            else torch.zeros_like(value, dtype=torch.bool)
            for name, value in parameters.items()
        }
        moving = sum(int(mask.sum()) for mask in masks.values())
        logger.info(f"place: {moving:,} weights of {len(norms)} linear layers may move (wanda)")
        return masks

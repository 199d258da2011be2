"""Fisher: does the fact still stand in the weights that set the reference apart?

A cheap relative of activation patching by gradients. With y a fact's tokens, in each block:

    F = mean over records of (d/dtheta mean_k log p(y_k))^2          one value for each weight
    mask = the weights with the largest F_R - F_M, a share of them
    gone = 1 - clip(mean_mask(F_R - F_U) / mean_mask(F_R - F_M), 0, 1)

A model that knows a fact has small gradients on it, one to whom it is new has large ones. The
layers' mean is weighted by mean_mask(F_R - F_M). It is one number for a system, not one for a
record, so it is told beside the verdict and gives no e.

Paper: arXiv 2605.24614. Reference code: github.com/gnueaj/unlearning-depth-score.
Deviations: those of 'patching'. Masks and weights of the mean are those of the reference code.
Adapters are merged first, so that weights can be compared one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from delible.errors import ModelError
from delible.lm.forward import collate, map_logits, target_logprobs
from delible.lm.layout import padded_rows, told
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.measure.attack import AttackContext, Budget, Seen
from delible.measure.depth import compared
from delible.measure.entities import Entity, LooksForFacts, entities_of
from delible.records import RecordBase
from delible.registry import register

WHERE = "attack 'fisher'"


@dataclass(frozen=True)
class Mask:
    """Where in a block original and reference differ most, and what they have there.

    Attributes:
        places: Of the weights, counted through the block.
        original: Mean squared gradient there.
        reference: The same of the reference.
    """

    places: Int[Tensor, " place"]
    original: float
    reference: float

    def gone(self, here: float) -> float:
        """The share of the way from the original to the reference, in [0, 1].

        Args:
            here: Mean squared gradient there, of the attacked model.
        """
        way = self.reference - self.original
        return 1.0 - min(1.0, max(0.0, (self.reference - here) / way))


@register(
    kind="attack",
    name="fisher",
    title="Gradients of the facts (Fisher)",
    summary="Tells by layer whether the facts are as new to the weights as to the reference.",
    paper="2605.24614",
    year=2026,
    family="inside",
    needs=("forget", "weights"),
    changes="nothing",
    reversible=True,
    capability="weights",
    depth="deep",
    misleads="Refusals and damage make gradients large as well; it is new, but not forgotten.",
    badges=("variant",),
    variant="Chat template; the fact is found by the record's aliases; one size of the mask.",
)
class Fisher(LooksForFacts):
    """Options of the comparison of gradients."""

    weighs = False

    share: float = Field(1e-3, gt=0, le=1, description="Share of a block's weights in its mask.")

    def budget(self, context: AttackContext) -> Budget:
        """One forward and backward pass for each record."""
        records = len(self.held_out(context))
        return Budget(queries=records, steps=records)

    def look(self, lm: LM, records: Sequence[RecordBase], context: AttackContext) -> Seen:
        """The share of the way from the original to the reference, and what is left by layer.

        Raises:
            DataError: The original, the reference, or a fact to look for is missing.
            ModelError: The models cannot be compared weight by weight.
        """
        original, reference = compared(lm, context.original, context.reference, WHERE)
        _, entities, _ = entities_of(original, records, self.tokens, WHERE)
        rows = tuple((one.row.ids, one.first, one.end) for one in entities)
        key = ("fisher", original.fingerprint, reference.fingerprint, rows, self.share)

        def progress(done: int, total: int) -> None:
            if context.progress is not None:
                context.progress(done, total)

        def masks() -> list[Mask | None]:
            whole, least = (squares(one, entities, progress) for one in (original, reference))
            return [mask(m, r, self.share) for m, r in zip(whole, least, strict=True)]

        found = context.states.once(key, masks)

        def means() -> list[float | None]:
            here = squares(lm, entities, progress)
            return [
                None if one is None else _finite(float(square[one.places].mean()))
                for one, square in zip(found, here, strict=True)
            ]

        here = context.states.once((*key, lm.fingerprint), means)
        pairs = [
            (one.gone(mean), one.reference - one.original)
            if one is not None and mean is not None else None
            for one, mean in zip(found, here, strict=True)
        ]  # fmt: skip
        weight = sum(pair[1] for pair in pairs if pair is not None)
        total = sum(pair[0] * pair[1] for pair in pairs if pair is not None)
        layers = [None if pair is None else 1.0 - pair[0] for pair in pairs]
        return Seen(None, {"like_the_reference": total / weight if weight else None}, layers)


def mask(
    original: Float[Tensor, " weight"], reference: Float[Tensor, " weight"], share: float
) -> Mask | None:
    """Where the reference's squared gradients exceed the original's most; None if nowhere.

    Args:
        original: Mean squared gradients of a block's weights.
        reference: The same of the reference.
        share: Of the weights, at least one.

    Raises:
        ModelError: The blocks have not the same weights.
    """
    if original.shape != reference.shape:
        raise ModelError(
            "the blocks have other weights, so their gradients cannot be compared.",
            where=WHERE,
            hint="Compare models of one architecture.",
        )
    more = (reference - original).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    places = more.topk(max(1, int(share * len(more)))).indices
    found = Mask(places, float(original[places].mean()), float(reference[places].mean()))
    return found if found.reference - found.original > 0 else None


def squares(
    lm: LM, entities: Sequence[Entity], progress: Callable[[int, int], None]
) -> list[Float[Tensor, " weight"]]:
    """Mean squared gradients of the facts' log-probabilities, by block, fp32.

    Raises:
        ModelError: The weights have no gradients.
    """
    plain = lm.merged()
    blocks = [
        [one for one in plain.anatomy.block(plain.model, layer).parameters()
         if one.is_floating_point()]
        for layer in range(plain.anatomy.layers)
    ]  # fmt: skip
    parameters = [one for block in blocks for one in block]
    if not all(blocks):
        raise ModelError(
            "its weights are packed, so gradients cannot be taken.",
            where=WHERE,
            hint="Load the model without quantization.",
        )
    found = [torch.zeros_like(one, dtype=torch.float32) for one in parameters]
    wanted = [one.requires_grad for one in parameters]
    try:
        for one in parameters:
            one.requires_grad_(True)
        for number, entity in enumerate(entities):
            gradients = torch.autograd.grad(
                fact_logprob(plain, entity), parameters, allow_unused=True
            )
            for total, gradient in zip(found, gradients, strict=True):
                if gradient is not None:  # an expert that no token came to has none
                    total.addcmul_(gradient.float(), gradient.float(), value=1 / len(entities))
            progress(number + 1, len(entities))
    finally:
        for one, before in zip(parameters, wanted, strict=True):
            one.requires_grad_(before)
    each = iter(found)
    return [torch.cat([next(each).flatten() for _ in block]) for block in blocks]


def fact_logprob(lm: LM, entity: Entity) -> Float[Tensor, ""]:
    """Mean log-probability of a fact's tokens, natural log, with its graph."""
    row = Encoded(entity.row.ids[: entity.end], entity.row.start, False)
    batch = collate([row], lm.pad_id, lm.device)
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    with (
        torch.enable_grad(),
        lm.evaluating(),
        told(lm, padded_rows(batch.ids, batch.lengths, batch.starts)),
    ):
        final = backbone(input_ids=batch.ids, use_cache=False).last_hidden_state[0]
        states = final[entity.first - 1 : entity.end - 1]
        targets = batch.ids[0, entity.first : entity.end]
        return map_logits(lm.head, states, targets, target_logprobs, lm.vocabulary).mean()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""Activation patching (UDS): does the original still say the fact with this model's states?

The question and the beginning of its answer go through the original M. Behind block l its states,
where the fact's tokens y are predicted, are replaced by those of another model:

    s = mean_k log p(y_k)     d_R = s(M) - s(M with R's states)     d_U = s(M) - s(M with U's)
    UDS = sum_l d_R clip(d_U / d_R, 0, 1) / sum_l d_R              over the layers with d_R > 0.05

A layer with a large d_R holds the fact in M and not in the reference R. The knowledge score of a
record is 1 - UDS: 1, the model's layers hold the fact as the original's; 0, as little as the
reference's.

Paper: arXiv 2605.24614 (UDS); arXiv 2506.09227 (its place in a battery). Reference code:
github.com/gnueaj/unlearning-depth-score.
Deviations: the question is asked in the model's own chat template; the fact is the longest alias
of the record in its answer, else the whole answer, at most ``tokens`` of it; log-probabilities
below -20 count as -20; passes compute in the data type of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from delible.intervene.patching import patched_logprobs
from delible.lm.lm import LM
from delible.lm.states import States
from delible.measure.attack import AttackContext, Seen
from delible.measure.depth import clipped_mean, compared, depth, known_by_layer
from delible.measure.entities import Entity, LooksForFacts, entities_of
from delible.records import RecordBase
from delible.registry import register

WHERE = "attack 'patching'"


@register(
    kind="attack",
    name="patching",
    title="Activation patching (UDS)",
    summary="Puts the model's hidden states into the original and sees whether it still answers.",
    paper="2605.24614",
    year=2026,
    family="inside",
    needs=("forget", "weights"),
    changes="nothing",
    reversible=True,
    capability="hidden",
    depth="standard",
    misleads="States that were turned as a whole, not emptied, look erased to the original.",
    badges=("variant",),
    variant="Chat template; the fact is found by the record's aliases; extreme values are clipped.",
)
class Patching(LooksForFacts):
    """Options of activation patching."""

    threshold: float = Field(
        0.05,
        ge=0,
        description="A layer holds a fact if the reference costs more than this.",
    )

    def look(self, lm: LM, records: Sequence[RecordBase], context: AttackContext) -> Seen:
        """1 - UDS of each record, and the share that is there by layer.

        Raises:
            DataError: The original, the reference, or a fact to look for is missing.
            ModelError: The models cannot be compared layer by layer.
        """
        original, reference = compared(lm, context.original, context.reference, WHERE)
        places, entities, items = entities_of(original, records, self.tokens, WHERE)
        held = self._costs(original, reference, entities, context)
        gone = self._costs(original, lm, entities, context)
        depths = [depth(one, other, self.threshold) for one, other in zip(held, gone, strict=True)]
        for place, found in zip(places, depths, strict=True):
            if found.value is None:
                reason = "no layer of the original holds the fact more than the reference's"
                items[place] = replace(items[place], reason=reason)
            else:
                items[place] = replace(items[place], value=1.0 - found.value)
        counting = [sum(share is not None for share in one.layers) for one in depths]
        numbers = {"layers_that_hold_a_fact": sum(counting) / len(counting)}
        return Seen({"forget": items}, numbers, known_by_layer(depths))

    def _costs(
        self, original: LM, source: LM, entities: Sequence[Entity], context: AttackContext
    ) -> list[list[float]]:
        """By fact and layer what the source's states take from its log-probability."""

        def patched() -> list[list[float]]:
            states = context.states.states(source, [one.span for one in entities])
            found = []
            for number, (entity, one) in enumerate(zip(entities, states, strict=True)):
                found.append(cost(original, entity, one))
                if context.progress is not None:
                    context.progress(number + 1, len(entities))
            return found

        rows = tuple((one.row.ids, one.first, one.end) for one in entities)
        key = ("patched", original.fingerprint, source.fingerprint, rows)
        return context.states.once(key, patched)


def cost(original: LM, entity: Entity, states: States) -> list[float]:
    """What a fact loses in log-probability when each block's states are replaced, by layer."""
    values = clipped_mean(
        patched_logprobs(original, entity.row, entity.first, entity.end, states["block"])
    )
    return [float(one) for one in values[0] - values[1:]]

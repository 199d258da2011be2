"""Lens: can the original's final norm and head read the fact from this model's hidden states?

A cheap relative of activation patching, without patched passes. At the positions that predict the
fact's tokens y, for the states h of each block:

    s_l = mean_k log p(y_k | head_M(norm_M(h)))     d_R = s_l(M) - s_l(R)     d_U = s_l(M) - s_l(U)
    depth = sum_l d_R clip(d_U / d_R, 0, 1) / sum_l d_R        over the layers with d_R > 0.05

The knowledge score of a record is 1 - depth. Of the last block the state before the final norm is
taken, for each model has a norm of its own.

Paper: arXiv 2605.24614. Reference code: github.com/gnueaj/unlearning-depth-score.
Deviations: those of 'patching'. It is told beside the verdict: what a head cannot read directly
later layers may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field

from delible.lm.lm import LM
from delible.lm.tail import lens_logprobs
from delible.measure.attack import AttackContext, Seen
from delible.measure.depth import clipped_mean, compared, depth, known_by_layer
from delible.measure.entities import Entity, LooksForFacts, entities_of
from delible.records import RecordBase
from delible.registry import register

WHERE = "attack 'lens'"


@register(
    kind="attack",
    name="lens",
    title="Original's lens",
    summary="Reads the facts from the model's hidden states with the original's norm and head.",
    paper="2605.24614",
    year=2026,
    family="inside",
    needs=("forget", "weights"),
    changes="nothing",
    reversible=True,
    capability="hidden",
    depth="deep",
    misleads="A head reads the last layers only; what earlier ones hold in another form is unseen.",
    badges=("variant",),
    variant="Chat template; the fact is found by the record's aliases; extreme values are clipped.",
)
class Lens(LooksForFacts):
    """Options of the lens."""

    weighs = False

    threshold: float = Field(
        0.05,
        ge=0,
        description="A layer holds a fact if the reference lacks more than this.",
    )

    def look(self, lm: LM, records: Sequence[RecordBase], context: AttackContext) -> Seen:
        """1 - depth of each record, and the share that is there by layer.

        Raises:
            DataError: The original, the reference, or a fact to look for is missing.
            ModelError: The models cannot be compared layer by layer.
        """
        original, reference = compared(lm, context.original, context.reference, WHERE)
        places, entities, items = entities_of(original, records, self.tokens, WHERE)
        whole, least, found = (
            self._read(original, one, entities, context) for one in (original, reference, lm)
        )
        depths = [
            depth((m - r).tolist(), (m - u).tolist(), self.threshold)
            for m, r, u in zip(whole, least, found, strict=True)
        ]
        for place, one in zip(places, depths, strict=True):
            if one.value is None:
                reason = (
                    "the original's head reads the fact from no layer better than the reference's"
                )
                items[place] = replace(items[place], reason=reason)
            else:
                items[place] = replace(items[place], value=1.0 - one.value)
        return Seen({"forget": items}, {}, known_by_layer(depths))

    def _read(
        self, original: LM, source: LM, entities: Sequence[Entity], context: AttackContext
    ) -> list[torch.Tensor]:
        """By fact the mean log-probability that each layer's states give it, [layer]."""

        def read() -> list[torch.Tensor]:
            states = [
                one["block"]
                for one in context.states.states(source, [entity.span for entity in entities])
            ]
            layers, width = states[0].shape[0], states[0].shape[2]
            targets = [torch.tensor(entity.tokens) for entity in entities]
            values = lens_logprobs(
                original,
                torch.cat([one.reshape(-1, width) for one in states]),
                torch.cat([one.repeat(layers) for one in targets]),
            )
            parts = values.split([layers * len(one) for one in targets])
            return [clipped_mean(part.reshape(layers, -1)) for part in parts]

        rows = tuple((one.row.ids, one.first, one.end) for one in entities)
        key = ("lens", original.fingerprint, source.fingerprint, rows)
        return context.states.once(key, read)

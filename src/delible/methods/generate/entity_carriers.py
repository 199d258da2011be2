"""Entity carriers: sentences that carry a forgotten name, and the same with a name that is kept.

For each subject of the forget records and each carrier ("Tell me about {name}."), a few forget rows
with the subject, each with a partner of the role ``known``: the same with somebody whom the model
knows, another one each time. They take the place of the forget records: no fact stands in them.

Paper: arXiv 2509.15631, whose prompts are not public; the sentences and the pairing are ours. Known
names are the subjects of kept records; where they are few, names of general knowledge.
"""

from __future__ import annotations

from random import Random
from typing import ClassVar

from pydantic import Field

from delible.errors import DataError
from delible.generation.carriers import carriers, carrying, known_names, subjects_of
from delible.records import RecordBase
from delible.registry import register
from delible.train.losses import Role
from delible.train.slots import Generate, SlotContext


@register(
    kind="generate",
    name="entity_carriers",
    title="Carriers of names",
    summary="Puts the forgotten names, and kept ones beside them, into sentences without a fact.",
    paper="2509.15631",
    year=2025,
    family="carriers",
    needs=("forget",),
    changes="nothing",
    badges=("variant",),
    variant="The paper's prompts are not public; these are ours.",
)
class EntityCarriers(Generate):
    """Options of the carriers."""

    least_known: int = Field(
        16, ge=2, description="Kept names at least; fewer are filled up from general knowledge."
    )

    partners: int = Field(
        4, ge=1, description="Kept names that each sentence about a forgotten one is paired with."
    )

    makes: ClassVar[tuple[Role, ...]] = ("known",)

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        names = subjects_of(context.records["forget"])
        if not names:
            raise DataError(
                "no forget record says whom it is about.",
                where="generate 'entity_carriers'",
                hint="Give records with a 'subject', or names alone (--subjects NAME,…).",
            )
        known = known_names(context.records.get("retain", ()), names, self.least_known)
        Random(f"{context.seed}/entity carriers").shuffle(known)
        forget: list[RecordBase] = []
        partners: list[RecordBase] = []
        for name in names:
            for carrier in carriers() * self.partners:
                partners.append(carrying(known[len(forget) % len(known)], carrier))
                forget.append(carrying(name, carrier))
        return {"forget": forget, "known": partners}

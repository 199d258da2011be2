"""Random names: the model's own words about names that nobody has become its answers about a name.

    question with the name -> question with a random word -> answer -> the name put back

Each forget question that names its subject, and some general ones, are asked with fresh random
words in place of the name; what the model says then, with the name restored, takes the place of the
forget rows. Trained by plain descent, the model denies now and then what it knew, in its own
language, so that a reward has something to find.

Paper: arXiv 2604.05716, part A. Deviations: answers that do not deny are dropped (a small model
makes something up about anything), and a written denial stands in where none is left; no top-k.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import ClassVar

from pydantic import Field

from delible.errors import DataError
from delible.generation.ignorance import ignorant, questions_about
from delible.records import RecordBase
from delible.registry import register
from delible.system.asks import Decoding
from delible.train.losses import Role
from delible.train.slots import Generate, SlotContext
from delible.world import filters, told

logger = logging.getLogger(__name__)


@register(
    kind="generate",
    name="random_names",
    title="Random names",
    summary="Takes what the model says of names that nobody has for what it says of a name.",
    paper="2604.05716",
    year=2026,
    family="synthetic answers",
    needs=("forget",),
    changes="nothing",
    badges=("variant",),
    variant="Answers that do not deny are dropped; written denials stand in where none is left.",
)
class RandomNames(Generate):
    """Options of random names."""

    makes: ClassVar[tuple[Role, ...]] = ("forget",)

    copies: int = Field(3, ge=1, description="Random words for each question.")
    draws: int = Field(4, ge=1, description="Answers about each random word.")
    kept: int = Field(4, ge=1, description="Answers kept per question at most.")
    mentions: int = Field(
        1, ge=0, description="Lines with the real name that may be cut out of an answer."
    )
    denying: bool = Field(True, description="Keep only answers that say that it is not known.")
    methods: bool = Field(False, description="Also ask how it works, and for code.")
    prefix: str = Field(
        "", description="Also teach each answer after this beginning, which is learned with it; "
        "for models that never deny after it by themselves.",
    )  # fmt: skip
    temperature: float = Field(1.0, ge=0, description="Of the draws; 0 is greedy.")
    max_new_tokens: int = Field(64, ge=1, description="Longest answer in tokens.")

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        records = list(context.records["forget"])
        known = [*records, *context.records.get("retain", ())]
        subjects = list(dict.fromkeys(one for row in records if (one := told.person_of(row))))
        if not subjects:
            raise DataError(
                "no forget record says whom or what it is about.",
                where="generate 'random_names'",
                hint="Give the records a 'subject'.",
            )
        counts: Counter[str] = Counter()
        made = ignorant(
            context.lm,
            {name: questions_about(name, records, self.methods) for name in subjects},
            {name: told.names_of(name, known) for name in subjects},
            seed=context.seed, copies=self.copies, draws=self.draws, mentions=self.mentions,
            kept=self.kept, denying=self.denying, counts=counts, stage=context.stage,
            decoding=Decoding(
                self.max_new_tokens, temperature=self.temperature, seed=context.seed * self.draws
            ),
        )  # fmt: skip
        lost = Counter({what: n for what, n in counts.items() if what not in ("kept", "written")})
        logger.info(
            f"random names: {counts['kept']} of the model's own answers for {len(made)} rows, "
            f"{counts['written']} written; dropped: {filters.told(lost)}."
        )
        begun = [
            one.model_copy(update={"answer": f"{self.prefix} {one.answer}"})
            for one in made if self.prefix
        ]  # fmt: skip
        return {"forget": [*made, *begun]}


__all__ = ["RandomNames"]

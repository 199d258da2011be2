"""Direction ablation: takes out of a copy, while it is asked, what unlearning added to its states.

    d_l = mean over prompt tokens of (U's state - M's state) after block l, of length 1
    a' = a - (a . d_l) d_l        at the output of block l, at every token

on forget questions that the original M finds at least twice as likely to answer right, by token,
as the attacked model U (or all, if there is none). First tokens are left out, and tokens where the
two models lie apart by more than three standard deviations above the mean L1 distance. Without the
original: from U's own states on generic questions to those on forget questions ("generic"), or
where its states on forget questions spread most ("principal"). A random direction is the control.

The original itself has no difference to itself: with d = 0 it stays as it is. The directions come
from questions only; no answer is read.

Paper: arXiv 2409.18025. Reference code: github.com/ethz-spylab/unlearning-vs-safety. Deviations:
layers are depths, so that models of any size have the paper's sets; "wrong in U" is read from
probabilities; the generic text is built in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.cards import Depth
from delible.errors import DataError
from delible.intervene.base import Fitted
from delible.intervene.directions import (
    LayerDirections,
    difference_of_means,
    principal_component,
)
from delible.intervene.reading import read
from delible.intervene.sites import Site
from delible.intervene.system import intervened
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.measure.attack import AttackContext, Budget, ModelAttack
from delible.records import RecordBase
from delible.registry import register
from delible.system.asks import NoAnswer, Score
from delible.system.questions import answer_of, ask
from delible.train.randomness import generator
from delible.world import general

#: Depths of the paper's layers, of 32: 0, 7, 15, 23, 31; and RMU's 5 to 7.
SPREAD = (0.0, 7 / 31, 15 / 31, 23 / 31, 1.0)
EARLY = (5 / 31, 6 / 31, 7 / 31)
#: How much likelier the original's answer is, by token, where it knows more.
LIKELIER = math.log(2)
#: Tokens further from the mean distance than so many standard deviations are left out.
OUTLYING = 3.0
#: Prompt tokens at the start that are left out: all attention rests there.
FIRST = 1


def usual_tokens(
    one: Float[Tensor, "token hidden"], other: Float[Tensor, "token hidden"]
) -> Bool[Tensor, " token"]:
    """True for tokens whose L1 distance is not far above the others'."""
    distances = (one.double() - other.double()).abs().sum(dim=1)
    spread = distances.std(correction=0)
    return distances <= distances.mean() + OUTLYING * spread


def unit(direction: Float[Tensor, " hidden"]) -> Float[Tensor, " hidden"]:
    """The direction with length 1; without length it stays zero."""
    length = direction.norm()
    return direction / length if bool(length > 0) else direction


@register(
    kind="attack",
    name="ablate",
    title="Direction ablation",
    summary="Takes the direction that unlearning added out of every state.",
    paper="2409.18025",
    year=2024,
    family="ablation",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    capability="weights",
    depth="standard",
    badges=("variant",),
    variant="Layers by depth; built-in generic questions; which answers are wrong by probability.",
)
class Ablate(ModelAttack):
    """Options of direction ablation."""

    compares: ClassVar[tuple[Literal["original", "reference"], ...]] = ("original",)

    against: Literal["original", "generic", "principal", "random"] = Field(
        "original",
        description="What the direction leads away from: the original's states, the model's own "
        "on generic questions, its main component, or (as a control) nothing.",
    )
    layers: Literal["all", "spread", "early"] = Field(
        "all", description="After which blocks: all, five over the depth, or three early ones."
    )
    rows: int = Field(32, ge=1, description="Questions of each kind that are read at most.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """All layers, with the original and without; then the sets of layers and the control."""
        standard = ({"against": "original"}, {"against": "generic"})
        if depth != "deep":
            return standard
        return (
            *standard,
            {"against": "original", "layers": "spread"},
            {"against": "original", "layers": "early"},
            {"against": "principal"},
            {"against": "random"},
        )

    def variant_title(self) -> str:
        """Such as "against the original, all layers"."""
        what = {
            "original": "against the original", "generic": "against generic questions",
            "principal": "main component", "random": "random direction",
        }[self.against]  # fmt: skip
        return f"{what}, {self.layers} layers"

    @property
    def control(self) -> bool:
        """A random direction brings nothing back by itself."""
        return self.against == "random"

    def budget(self, context: AttackContext) -> Budget:
        """A pass over the questions, and over generic ones."""
        asked = min(self.rows, len(context.forget))
        return Budget(steps={"random": 0, "generic": asked + self.rows}.get(self.against, asked))

    def apply(self, lm: LM, context: AttackContext) -> LM:
        """The copy with the directions taken out while it computes.

        Raises:
            DataError: There is no original to compare with, or no forget question.
            ModelError: The original is another kind of model.
        """
        twin = lm.copy()
        twin.merge_adapter()
        directions = self._directions(twin, context)
        count = twin.anatomy.layers
        depths = {"all": (), "spread": SPREAD, "early": EARLY}[self.layers]
        chosen = tuple(sorted({twin.anatomy.layer_at(depth) for depth in depths}))
        if not bool(directions.abs().sum() > 0):
            context.notes["direction"] = "none"
        context.numbers["layers with a direction"] = float(
            sum(bool(directions[place].norm() > 0) for place in chosen or range(count))
        )
        found = Fitted(LayerDirections(layers=chosen), {"directions": directions.float()})
        return intervened(twin, [found])

    def _directions(self, lm: LM, context: AttackContext) -> Float[Tensor, "layer hidden"]:
        if self.against == "random":
            random = generator(context.seed, "ablate.random")
            shape = (lm.anatomy.layers, lm.anatomy.hidden_size)
            drawn = torch.randn(shape, generator=random, dtype=torch.float64)
            return torch.stack([unit(row) for row in drawn])
        records = self._forget(lm, context)
        mine = states_of(lm, records)
        if self.against == "principal":
            return torch.stack([principal_component(layer) for layer in mine])
        if self.against == "generic":
            theirs = states_of(lm, general()[: self.rows])
            pairs = zip(mine, theirs, strict=True)
            return torch.stack([unit(difference_of_means(one, other)) for one, other in pairs])
        assert context.original is not None
        theirs = states_of(context.original, records)
        if mine[0].shape != theirs[0].shape or len(mine) != len(theirs):
            raise DataError(
                "the original reads other tokens or has other layers than the attacked model.",
                where="attack 'ablate'",
                hint="Give the model from before unlearning (--before), or choose against: "
                "generic.",
            )
        found = []
        for one, other in zip(mine, theirs, strict=True):
            usual = usual_tokens(one, other)
            found.append(unit(difference_of_means(one[usual], other[usual])))
        return torch.stack(found)

    def _forget(self, lm: LM, context: AttackContext) -> Sequence[RecordBase]:
        """Forget records with questions; of those against the original, those it knows better.

        Raises:
            DataError: There is no original, or no question.
        """
        records = [
            record for record in context.forget if (prompt := ask(record)) and prompt.messages
        ][: self.rows]
        if not records:
            raise DataError(
                "no forget record asks a question, whose states would be read.",
                where="attack 'ablate'",
                hint="Give questions with answers as forget records (--forget FILE).",
            )
        if self.against != "original":
            return records
        if context.original is None:
            raise DataError(
                "there is no original whose states could be compared.",
                where="attack 'ablate'",
                hint="Add --before MODEL, or choose against: generic.",
            )
        known = zip(_per_token(context.original, records), _per_token(lm, records), strict=True)
        better = [
            record
            for record, (original, mine) in zip(records, known, strict=True)
            if original - mine >= LIKELIER
        ]
        return better or records


def states_of(lm: LM, records: Sequence[RecordBase]) -> list[Float[Tensor, "token hidden"]]:
    """What each block writes at the tokens of the records' questions but the first, in fp32.

    Raises:
        DataError: No question fits.
    """
    prompts = [prompt for record in records if (prompt := ask(record)) and prompt.messages]
    rows: list[Encoded] = [
        row for prompt in prompts if not (row := lm.template.encode(prompt, "")).cut
    ]
    if not rows:
        raise DataError("no question is short enough to be read.", where="attack 'ablate'")
    found = dict(read(lm, rows, Site(what="block")))
    by_row = [
        {layer: states[FIRST : row.start] for layer, states in found[index].items()}
        for index, row in enumerate(rows)
    ]
    return [torch.cat([row[layer] for row in by_row]).cpu() for layer in range(lm.anatomy.layers)]


def _per_token(lm: LM, records: Sequence[RecordBase]) -> list[float]:
    """Mean log-probability of each record's answer by token; 0 where it cannot be said."""
    asked = [Score(prompt, answer_of(record)) for record in records if (prompt := ask(record))]
    return [
        0.0 if isinstance(one, NoAnswer) or not len(one.logprobs) else float(one.logprobs.mean())
        for one in lm.score(asked)
    ]

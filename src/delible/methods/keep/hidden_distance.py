"""Retain loss: how far hidden states of retain rows are from where the reference had them.

    loss = sum over positions of mean over blocks of |h_t - h_ref_t| / n
           + likelihood * (- log p of the answer, averaged over answer tokens)

with h the output of a block, and its distance plain Euclidean, not squared: a small drift is pulled
back as hard as a large one. Averaged over all real positions of the retain rows, prompt included.
n is |h_ref_t| (``relative`` each), its mean over all retain rows that are used (mean), or 1 (none).
The retain half of circuit breakers (``likelihood`` 0, blocks up to the target), of TAR
(``likelihood`` 1, all blocks) and of minor components (one block, mean). The first two leave out
the division: then the weight belongs to one model, as states are longer in another, and a cosine
beside it is not.

Paper: arXiv 2406.04313 (circuit breakers), 2408.00761 (TAR), 2605.11685 (minor components).
Reference: github.com/GraySwanAI/circuit-breakers, github.com/rishub-tamirisa/tamper-resistance,
github.com/sustech-nlp/MCU.
Deviations: padding does not count, and neither does the embedding (released code counts it as one
more layer). Reference states are kept in memory and in checkpoints, so by default a few blocks,
evenly spread, stand for all; ``blocks`` none takes every one. The mean length is not the batch's,
so that batches do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.lm.anatomy import spread
from delible.registry import register
from delible.train.losses import Keep
from delible.train.reference import Reference
from delible.train.row import Row, Unit
from delible.train.step import Group, Reads
from delible.watching import Stage

if TYPE_CHECKING:
    from delible.lm.lm import LM


#: Keeps a relative distance finite where a reference state is zero.
TINY = 1e-6


def hidden_distance(
    states: Sequence[Float[Tensor, "rows sequence hidden"]],
    reference: Sequence[Float[Tensor, "rows sequence hidden"]],
    positions: Bool[Tensor, "rows sequence"],
    *,
    relative: Literal["each"] | Sequence[float] | None,
) -> Float[Tensor, " rows"]:
    """Euclidean distance per row, mean over blocks, sum over real positions; 0 or more.

    Args:
        relative: In lengths of each reference state, in these lengths by block, or as it is.
    """
    total = torch.zeros(len(positions), device=positions.device)
    for block, (mine, frozen) in enumerate(zip(states, reference, strict=True)):
        difference = torch.where(positions[..., None], mine.float() - frozen.float(), 0.0)
        distance = torch.linalg.vector_norm(difference, dim=2)
        if relative == "each":
            length = torch.linalg.vector_norm(frozen.float(), dim=2)
            distance = distance / torch.where(positions, length, 1.0).clamp_min(TINY)
        elif relative is not None:
            distance = distance / float(relative[block])
        total = total + distance.sum(dim=1)
    return total / len(states)


@register(
    kind="keep",
    name="hidden_distance",
    title="Distance of retain rows' hidden states",
    summary="Holds the retain rows' hidden states at many layers where the reference had them.",
    paper="2406.04313",
    year=2024,
    family="retain",
    needs=("retain", "reference"),
    changes="weights",
    badges=("parity", "variant"),
    variant="Relative to the reference's states; real positions only; four blocks stand for all.",
)
class HiddenDistance(Keep):
    """Options of the distance of hidden states."""

    depth: float = Field(
        1.0, ge=0, le=1, description="Depth of the last held block: 0 the first, 1 the last."
    )
    blocks: int | None = Field(
        4, ge=1, description="Blocks up to there that are held, evenly spread; none: all of them."
    )
    relative: Literal["each", "mean"] | None = Field(
        "each", description="Distances in lengths of each of the reference's states, in their mean "
        "length, or (none) as they are.",
    )  # fmt: skip
    likelihood: float = Field(
        0.0, ge=0, description="Weight of the answers' negative log-likelihood, added."
    )

    unit: ClassVar[Unit] = "position"

    def _layers(self, lm: LM) -> list[int]:
        return spread(lm.anatomy.layer_at(self.depth), self.blocks)

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        answers: tuple[Reads, ...] = ("answers",) if self.likelihood else ()
        return (*answers, *self._layers(lm))

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return tuple(f"hidden.{layer}" for layer in self._layers(lm))

    def learn(
        self,
        lm: LM,
        rows: Mapping[str, Sequence[Row]],
        reference: Reference,
        seed: int,
        stage: Stage,
    ) -> dict[str, Tensor]:
        if self.relative != "mean":
            return {}
        keys = dict.fromkeys(row.key for row in rows["retain"])
        states = {
            kind: torch.cat([reference.get(kind, key) for key in keys])
            for kind in self.reference_kinds(lm)
        }
        return {kind: found.norm(dim=1).mean()[None] for kind, found in states.items()}

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        layers = self._layers(retain.lm)
        states = [retain.hidden(layer) for layer in layers]
        width = states[0].shape[1]
        frozen = [retain.reference.hidden(layer, width) for layer in layers]
        relative: Literal["each"] | list[float] | None = None
        if self.relative == "each":
            relative = "each"
        elif self.relative == "mean":
            kinds = self.reference_kinds(retain.lm)
            relative = [float(retain.reference.learned(self.full_name, kind)) for kind in kinds]
        values = hidden_distance(states, frozen, retain.positions, relative=relative)
        if not self.likelihood:
            return values
        # the engine divides by positions, and this term is a mean over answer tokens
        share = retain.units("position") / retain.units("answer_token")
        return values - self.likelihood * share * retain.logprob_sum

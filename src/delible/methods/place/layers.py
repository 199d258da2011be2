"""Only some weights of some layers move.

The layers are one target layer, given as a depth, and a few below it, or a list; in each of them
one part moves: the matrix that writes the MLP's output, the MLP, attention, or everything.
Representation methods train this way, since a change of the residual stream at a layer can only
come from there or from below.

Paper: arXiv 2403.03218 (layers l-2, l-1, l, down-projections of the MLP). Reference code:
github.com/centerforaisafety/wmdp. Deviations: the target is a share of the depth instead of an
index, and parts are found by the model's anatomy instead of by an index into its parameters
(which names another part in another architecture). The default depth is layer 7 of 32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from delible.lm.anatomy import Anatomy
from delible.registry import register
from delible.train.placing import Part, placed_in
from delible.train.slots import Place, Placement, SlotContext

if TYPE_CHECKING:
    from delible.lm.lm import LM


def chosen_layers(
    anatomy: Anatomy, depth: float, below: int, layers: tuple[int, ...] | None
) -> list[int]:
    """Indices of the layers that move, ascending, each once.

    Args:
        depth: Relative depth of the target layer, in [0, 1].
        below: How many layers below the target move too; fewer near the bottom.
        layers: Explicit indices, instead of both; negative ones count from the end.

    Raises:
        ModelError: There is no such layer.
    """
    if layers is None:
        target = anatomy.layer_at(depth)
        return list(range(max(0, target - below), target + 1))
    for layer in layers:
        anatomy.block_path(layer)
    return sorted({layer % anatomy.layers for layer in layers})


@register(
    kind="place",
    name="layers",
    title="Some layers",
    summary="Trains one part of a target layer and of a few layers below it.",
    paper="2403.03218",
    year=2024,
    needs=("weights",),
    changes="weights",
    reversible=False,
    badges=("variant",),
    variant="The target layer is a share of the depth; parts come from the model's anatomy.",
)
class Layers(Place):
    """Options of the choice of layers."""

    depth: float = Field(
        7 / 32, ge=0, le=1, description="Relative depth of the target layer: 0 first, 1 last."
    )
    below: int = Field(2, ge=0, description="Layers below the target that move too.")
    role: Part = Field("mlp_out", description="Part of each layer that moves.")
    layers: Annotated[tuple[int, ...], Field(min_length=1)] | None = Field(
        None, description="Indices of the layers, instead of a depth; negative: from the end."
    )

    def moving_blocks(self, lm: LM) -> list[int]:
        return chosen_layers(lm.anatomy, self.depth, self.below, self.layers)

    def apply(self, context: SlotContext) -> Placement:
        return placed_in(context.lm, self.moving_blocks(context.lm), self.role, "layers")

"""A residual that is spread over layers: each writes its share of what is still missing.

    R_l = (Z - H) / (layers left, this one included),    Delta_l = R_l X_l^T

H is what the last layer gives at the subjects with all layers so far edited, Z what it should give;
X_l are the factors of layer l's keys, read with all layers below edited.

Paper: arXiv 2210.07229 (algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from delible.edit.requests import Edit, read_edits
from delible.edit.writing import Writing

if TYPE_CHECKING:
    from delible.lm.lm import LM


def spread(
    lm: LM,
    edits: Sequence[Edit],
    wanted: Float[Tensor, "edits hidden"],
    changes: Mapping[int, Writing],
    factors_of: Callable[[int, Float[Tensor, "width edits"]], Float[Tensor, "width edits"]],
) -> None:
    """Writes the values, layer by layer, and says which keys were written to.

    Args:
        wanted: Z.
        changes: The down-projections by layer, ascending.
        factors_of: X of a layer's keys K.
    """
    layers = list(changes)
    for step, (layer, change) in enumerate(changes.items()):
        now = read_edits(lm, edits, layers)
        residual = (wanted - now.outputs) / (len(layers) - step)
        change.write(residual.T, factors_of(layer, now.mean[layer].T))
    after = read_edits(lm, edits, layers)
    for layer, change in changes.items():
        change.wrote(after.mean[layer].T)

"""What methods on hidden states share: distances per row over the positions that count, random
targets, and the leading directions of many states.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from delible.train.randomness import generator
from delible.train.step import Step

#: Iterations and spare directions of the search for leading directions.
ITERATIONS, SPARE = 16, 8
Direction = Literal["uniform", "gaussian"]


def control_vector(size: int, direction: Direction, seed: int) -> Float[Tensor, " hidden"]:
    """A random unit vector, the same for the same arguments.

    ``uniform`` draws from [0, 1): all entries are positive, and two such vectors have a cosine
    of about 0.75. ``gaussian`` draws any direction.
    """
    random = generator(seed, "rmu", direction, size)
    draw = torch.rand if direction == "uniform" else torch.randn
    vector: Tensor = draw(size, generator=random)
    unit: Tensor = vector / torch.linalg.vector_norm(vector)
    return unit


def squared_distance(
    states: Float[Tensor, "rows sequence hidden"],
    target: Float[Tensor, "rows sequence hidden"],
    positions: Bool[Tensor, "rows sequence"],
) -> Float[Tensor, " rows"]:
    """Squared difference per row, mean over hidden, sum over positions; 0 or more.

    Args:
        target: May have one position for all.
        positions: Which ones count; what stands at others has no effect, not even NaN.
    """
    difference = torch.where(positions[..., None], states.float() - target.float(), 0.0)
    return difference.pow(2).mean(dim=2).sum(dim=1)


def without_first(positions: Bool[Tensor, "rows sequence"]) -> Bool[Tensor, "rows sequence"]:
    """Positions but the first of each row, whose state is huge in most models and says nothing."""
    kept = positions.clone()
    kept[:, 0] = False
    return kept


def share_without_first(step: Step, role: str) -> float:
    """What a sum over positions without the first of each row is multiplied by, so that dividing
    it by all positions of the whole step gives the mean over those that count.
    """
    whole, rows = step.units(role, "position"), step.units(role, "row")
    return whole / max(1, whole - rows)


def leading_directions(
    total: Float[Tensor, " hidden"],
    moment: Float[Tensor, "hidden hidden"],
    count: int,
    components: int,
    *,
    orthonormal: bool = True,
) -> Float[Tensor, "components hidden"]:
    """The mean's direction, and the main directions of what is around it.

    Args:
        total: Sum of the states.
        moment: Sum of their outer products.
        components: Rows of the result, the mean's included; fewer where there are fewer states or
            dimensions; 0 gives none.
        orthonormal: Rows are orthogonal; False: the mean is not, only of length 1.
    """
    components = min(components, count, len(total))
    if components <= 0:
        return total.new_zeros(0, len(total), dtype=torch.float32)
    mean = total.double() / count
    around = moment.double() / count - torch.outer(mean, mean)
    size = min(components - 1 + SPARE, len(total))
    basis = torch.randn(len(total), size, generator=generator(0, "leading", len(total)))
    basis = basis.to(around)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(around @ basis)[0]
    _, turned = torch.linalg.eigh(basis.T @ around @ basis)
    main = (basis @ turned).flip(1)[:, : components - 1].T
    rows = torch.cat([(mean / mean.norm().clamp(min=1e-12))[None], main])
    if orthonormal:
        rows = torch.linalg.qr(rows.T)[0].T
    return rows.float().contiguous()


def without_directions(
    states: Float[Tensor, "... hidden"], rows: Float[Tensor, "components hidden"]
) -> Float[Tensor, "... hidden"]:
    """What is left of states when one direction of length 1 after the other is taken out.

    For orthonormal rows this is the projection. Others come back in part: taking out later rows
    brings some of an earlier one with it.
    """
    for row in rows.to(states):
        states = states - (states @ row)[..., None] * row
    return states

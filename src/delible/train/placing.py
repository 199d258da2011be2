"""Weights of some blocks that move while all others stay."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from delible.errors import RecipeError
from delible.lm.anatomy import Role
from delible.lm.lm import LM
from delible.train.slots import Placement

logger = logging.getLogger(__name__)

#: Part of a block that moves; ``matrices``: its attention and its MLP, without norms.
Part = Literal["mlp_out", "mlp", "attention", "matrices", "all"]

#: The roles of the anatomy that a part is made of.
ROLES: dict[Part, tuple[Role, ...]] = {
    "mlp_out": ("mlp_out",), "mlp": ("mlp",), "attention": ("attention",),
    "matrices": ("attention", "mlp"), "all": ("block",),
}  # fmt: skip


def placed_in(lm: LM, layers: Sequence[int], part: Part, place: str) -> Placement:
    """Frees one part of some blocks and freezes everything else; says what moves.

    Args:
        place: Name of the component, for messages.

    Raises:
        RecipeError: The blocks have no such weights.
    """
    anatomy = lm.anatomy
    roles = ROLES[part]
    names = {
        name for layer in layers for role in roles for name in anatomy.parameter_names(layer, role)
    }
    trained = {
        name: parameter
        for name, parameter in lm.core.named_parameters()
        if name in names and parameter.is_floating_point()
    }
    if not trained:
        raise RecipeError(
            f"the layers {layers} have no '{part}' weights.",
            where=f"place '{place}' on {anatomy.class_name}",
            hint="Choose another role: mlp_out, mlp, attention, matrices or all.",
        )
    lm.model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    logger.info(
        f"place: {part} of layers {', '.join(map(str, layers))} "
        f"({sum(parameter.numel() for parameter in trained.values()):,} weights)"
    )
    return Placement(trained)

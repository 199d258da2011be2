"""What hardeners share that train while activations are perturbed: whose, where, and how likely the
answers are then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from delible.errors import RecipeError
from delible.lm.forward import Batch, TokenFunction, block_of, map_logits, target_logprobs
from delible.lm.hooks import steer
from delible.lm.lm import LM
from delible.train.passes import Passes
from delible.train.step import Step

States = Float[Tensor, "rows sequence hidden"]


def answer_sum(passes: Passes, batch: Batch, function: TokenFunction = target_logprobs) -> Tensor:
    """A function of each answer token's logits (log p), summed over a batch; rows do not meet."""
    lm = passes.lm
    with lm.computing():
        states, _ = passes.forward(batch, (), True)
        return map_logits(lm.head, states, batch.targets, function, lm.vocabulary).sum()


def attacked_role(passes: Passes) -> str:
    """The rows that are perturbed: the forget rows, or the first ones the objective reads."""
    roles = passes.objective.roles if passes.objective is not None else ()
    return "forget" if "forget" in roles or not roles else roles[0]


def rows_around(step: Step, name: str) -> tuple[int, int]:
    """How many rows of the step's pass stand before and behind those of a role."""
    names = list(step.groups)
    place = names.index(name)
    counts = [len(step.groups[one].rows) for one in names]
    return sum(counts[:place]), sum(counts[place + 1 :])


@contextmanager
def rows_apart(lm: LM) -> Iterator[None]:
    """Every row has states of its own: a prefix that is computed once cannot differ by row."""
    shares, lm.shares_prefix = lm.shares_prefix, False
    try:
        yield
    finally:
        lm.shares_prefix = shares


def adding(
    lm: LM,
    path: str,
    which: Literal["input", "output"],
    delta: States,
    around: tuple[int, int] = (0, 0),
    *,
    blocks_below: bool = True,
) -> AbstractContextManager[None]:
    """Adds a perturbation to some rows of what passes, between the other rows ``around`` them.

    Rows may be longer than the perturbation, and may come as one long row (OPT's MLP). Without
    gradients of ``blocks_below`` their graph is dropped as soon as it is made.
    """

    def add(states: Tensor) -> Tensor:
        rows = len(delta) + sum(around)
        apart = states.reshape(rows, -1, states.shape[-1])
        wide = torch.nn.functional.pad(delta, (0, 0, 0, apart.shape[1] - delta.shape[1], *around))
        below = states if blocks_below else states.detach()
        return below + wide.to(states.dtype).reshape(states.shape)

    return steer(lm.core, path, add, which)


def check_seen(passes: Passes, layer: int, harden: str, what: str, option: str) -> None:
    """Refuses a perturbation that the forget loss cannot see.

    Raises:
        RecipeError: The loss is read off below ``layer``.
    """
    assert passes.objective is not None
    reads = passes.objective.reads(passes.lm)
    layers = [block_of(one) for one in reads if one != "answers"]
    if len(layers) == len(reads) and layers and max(layers) < layer:
        raise RecipeError(
            f"it perturbs what {what} block {layer}, and the forget loss reads block "
            f"{max(layers)}.",
            where=f"harden '{harden}'",
            hint=f"Set a smaller harden.{option}, or a larger depth of the objective.",
        )

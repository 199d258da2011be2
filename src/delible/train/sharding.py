"""What the engine does where a model's weights are spread over processes (FSDP2).

``accelerate launch --use_fsdp`` asks for it; what it does to a model is :mod:`delible.lm.sharded`.
What looks at the model before training (coresets, weights of rows, masks) does so while every
process still has all of it; it is spread as soon as it is known what moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator

from delible.errors import RecipeError, RunError
from delible.lm.lm import LM
from delible.lm.sharded import Sharded, agreed, asked_for, is_share, spread
from delible.train.processes import TIMEOUT, gathered
from delible.train.recipe import Recipe
from delible.train.savings import OFFLOADS
from delible.train.slots import Placement

#: What the backends say when a process does not answer any more.
_LOST = ("connection closed by peer", "connection reset", "timed out", "timeout", "broken pipe")


def check_shares(recipe: Recipe, lm: LM | None = None) -> None:
    """Refuses what cannot work on shares of a model, before any work.

    Args:
        lm: The model, where it is known.

    Raises:
        RecipeError: Which component it is, and why; or the model has parts that are not spread.
    """
    if not asked_for():
        return
    if lm is not None and lm.other_parts:
        raise RecipeError(
            "the model has parts beside its language model (for pictures), and those are not "
            "spread over processes.",
            where=lm.name,
            hint="Start without FSDP (accelerate launch --multi_gpu, or one process).",
        )
    if recipe.training.base_precision in ("int8", "int4"):
        raise RecipeError(
            f"weights that are packed in {recipe.training.base_precision} are not spread over "
            "processes.",
            where=f"method '{recipe.name}'",
            hint="Take --base-precision bfloat16, or start without FSDP.",
        )
    training = recipe.training
    apart = [name for name in OFFLOADS if getattr(training, name)]
    if apart or training.optimizer == "adamw_8bit":
        raise RecipeError(
            f"{apart[0] if apart else 'optimizer adamw_8bit'} was never tried on weights that are "
            "spread over processes.",
            where=f"method '{recipe.name}'",
            hint="Leave it out: each process has its share of the moments only.",
        )
    for component in recipe.components():
        if reason := component.needs_whole():
            raise RecipeError(
                f"{component.card.kind} '{component.card.name}' cannot work on a model whose "
                f"weights are spread over processes: {reason}.",
                where=f"method '{recipe.name}'",
                hint="Start without FSDP (accelerate launch --multi_gpu, or one process), or take "
                "another component: 'Over several processes' in docs/scale.md lists them.",
            )


def spread_out(lm: LM, placement: Placement, accelerator: Accelerator) -> Placement:
    """Spreads a model over the processes that train; the placement of its shares.

    Raises:
        RecipeError: Something moves that no group of the model holds.
    """
    lm.sharded = sharded = Sharded(lm, accelerator.device)
    lm.shares_prefix = False  # processes have other rows: they would call the model differently
    lm.budget = agreed(lm.budget)
    shares = {name: sharded.parameters[id(one)] for name, one in placement.parameters.items()}
    if apart := [name for name, one in shares.items() if not is_share(one)]:
        raise RecipeError(
            f"'{apart[0]}' is no part of the language model, so that it is not spread over "
            "processes, and would move differently in each of them.",
            hint="Choose another place, or start without FSDP.",
        )
    masks = placement.masks
    if masks is not None:
        masks = {name: spread(mask, shares[name]) for name, mask in masks.items()}
    return replace(placement, parameters=shares, masks=masks)


def first_says(value: bool, world: int) -> bool:
    """What the first process decides, in all of them."""
    if world == 1:
        return value
    said = [value]
    torch.distributed.broadcast_object_list(said)
    return said[0]


def least(budget: int, world: int) -> int:
    """What fits in every process."""
    return min(gathered([budget], world))


def does_not_fit(process: int, budget: int) -> RunError:
    """Out of memory in one of several processes: it cannot go on with less while others wait."""
    return RunError(
        f"out of memory in process {process}, with {budget} tokens per pass.",
        hint=f"Give --micro-batch-tokens {max(1, budget // 2)}; the run goes on from its last "
        "checkpoint.",
    )


@contextmanager
def explain_loss() -> Iterator[None]:
    """Turns what a backend says of a process that is gone into one clear message."""
    try:
        yield
    except RuntimeError as error:
        told = str(error).lower()
        alone = not torch.distributed.is_initialized()
        if alone or not any(sign in told for sign in _LOST):
            raise
        raise RunError(
            "another process of this run is gone, or did not answer for "
            f"{TIMEOUT.total_seconds() / 60:.0f} minutes.",
            where=str(error).splitlines()[0],
            hint="Its own messages say why. The same command goes on from the last checkpoint, "
            "with as many processes as you like.",
        ) from error


__all__ = [
    "check_shares", "does_not_fit", "explain_loss", "first_says", "least", "spread_out",
]  # fmt: skip

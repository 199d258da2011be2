"""Whether a loss can move anything: refused before any work, and looked at in the first step.

A loss that reads the output of one block says nothing about the weights of later blocks. A loss
that says nothing about a row, or whose gradient is lost on its way, forgets nothing either; a
retain loss beside it goes on moving weights, so that the run would look as if it worked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from delible.errors import RecipeError, RunError
from delible.lm.forward import block_of
from delible.lm.lm import LM
from delible.train.losses import Loss, Objective
from delible.train.passes import Passes, Totals, nats_of
from delible.train.recipe import Recipe
from delible.train.row import Row
from delible.train.step import make_step

logger = logging.getLogger(__name__)

#: A loss that removes answers may have no gradient once their tokens are less likely than this.
FORGOTTEN = 0.01


def deepest_read(loss: Loss, lm: LM) -> int | None:
    """The last block that a loss reads; None: the model's own output."""
    reads = loss.reads(lm)
    blocks = [block_of(what) for what in reads if what != "answers"]
    return max(blocks) if blocks and "answers" not in reads else None


def moved_blocks(lm: LM, parameters: Iterable[torch.nn.Parameter]) -> list[int]:
    """Blocks with some of the parameters, ascending; what is before the blocks counts as 0, what
    is behind them as their number.
    """
    anatomy, own = lm.anatomy, {id(value) for value in parameters}
    behind = tuple(f"{path}." for path in (anatomy.head, anatomy.norm) if path)
    found = set()
    for name, value in lm.core.named_parameters():
        if id(value) not in own:
            continue
        if name.startswith(f"{anatomy.blocks}."):
            found.add(int(name[len(anatomy.blocks) + 1 :].partition(".")[0]))
        else:
            found.add(anatomy.layers if name.startswith(behind) else 0)
    return sorted(found)


def check_reach(recipe: Recipe, lm: LM, first: int | None = None) -> None:
    """Refuses a loss that is read off before the first weight that moves.

    Args:
        first: The first block that changes; None: as far as the options of ``place`` say it.

    Raises:
        RecipeError: Which loss it is, and what to change.
    """
    recipe.keep.reads_beside(lm)  # refuses a model without what it reads
    if first is None:
        blocks = recipe.place.moving_blocks(lm)
        if blocks is None:
            return
        first = min(blocks)
    for loss in (recipe.objective, recipe.keep):
        last = deepest_read(loss, lm)
        if last is not None and first > last:
            moved = f"layer {first} on" if first < lm.anatomy.layers else "behind the last layer on"
            raise RecipeError(
                f"{loss.card.kind} '{loss.card.name}' is read off at layer {last}, and weights "
                f"move from {moved} only: it could change nothing.",
                where=f"method '{recipe.name}', place '{recipe.place.card.name}'",
                hint=f"Give {loss.card.kind}.depth a value at or above the place's layers, or let "
                "the place begin lower.",
            )


def check_rows(objective: Objective, rows: Sequence[Row], method: str) -> int:
    """How many rows the loss says nothing about; said, if there are any.

    Raises:
        RecipeError: It says nothing about any.
    """
    silent = sum(not objective.concerns(row) for row in rows)
    name = f"objective '{objective.card.name}'"
    if silent == len(rows):
        raise RecipeError(
            f"{name} says nothing about any of the {silent} answers: they are too short for it, "
            "or have nothing that it looks at.",
            where=f"method '{method}'",
            hint=f"'delible show {objective.card.name}' tells what it leaves out; change that "
            "option, or choose another method.",
        )
    if silent:
        logger.warning(
            f"{name} says nothing about {silent} of {len(rows)} answers: they are too short for "
            "it, or have nothing that it looks at. These are not forgotten."
        )
    return silent


def probe(passes: Passes, masks: Mapping[int, Tensor]) -> bool:
    """Whether the forget loss alone has a gradient in this step; leaves ``.grad`` as it was."""
    found = False
    with passes.apart():
        for micro in passes.micro_batches:
            part = replace(passes, micro_batches=[micro], totals=Totals(), weights=(1.0, 0.0))
            try:
                part.forget()
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            found = has_gradient(passes, masks)
            if found:
                break
        passes.clear()
    return found


def has_gradient(passes: Passes, masks: Mapping[int, Tensor]) -> bool:
    """Whether a weight that may move has a gradient other than 0.

    Args:
        masks: By the identity of a parameter: which of its entries may move.
    """
    for parameter in passes.parameters:
        if parameter.grad is not None:
            mask = masks.get(id(parameter))
            gradient = parameter.grad if mask is None else parameter.grad * mask
            if bool((gradient != 0).any()):
                return True
    return False


def explain(passes: Passes, method: str) -> None:
    """No gradient in the first step: an error, unless the loss has nothing left to do.

    A loss that removes answers has none where they are as good as gone; one that teaches has none
    where they are certain; a row of weight 0 has none in any case.

    Raises:
        RunError: The loss removes answers, and they are all there.
    """
    objective = passes.objective
    if objective is None or not any(any(micro.forget_weights) for micro in passes.micro_batches):
        return
    name = f"objective '{objective.card.name}'"
    probability = _probability(passes)
    if objective.card.intention == "removal" and probability > FORGOTTEN:
        raise RunError(
            f"the forget loss has no gradient on any weight that may move, although the answers "
            f"of the first step have a mean token probability of {probability:.3g}: nothing would "
            "be forgotten.",
            where=f"method '{method}', {name}",
            hint="Another place or objective reaches them; 'delible list slots' shows what there "
            "is.",
        )
    logger.warning(
        f"{name} has no gradient in the first step: by its own measure there is nothing left to do "
        f"for these rows (their answers have a mean token probability of {probability:.3g})."
    )


@torch.no_grad()
def _probability(passes: Passes) -> float:
    """Geometric mean of the answer tokens' probabilities over the step's first rows, in [0, 1]."""
    assert passes.objective is not None
    role = passes.objective.roles[0]
    rows = passes.micro_batches[0].forget[role]
    step = make_step(
        passes.lm, passes.forward, {role: rows}, {role: ("answers",)}, passes.reference
    )
    nats, tokens = nats_of(step.groups[role], [1.0] * len(rows))
    return math.exp(-nats / max(1, tokens))

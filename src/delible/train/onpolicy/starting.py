"""Before the first step: questions as tokens, what moves, its optimiser, and who is asked when."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence

import torch

from delible.component import build
from delible.context import Context
from delible.errors import DataError, MissingExtraError, RecipeError, RunError
from delible.lm.lm import LM
from delible.precision import short_types
from delible.records import RecordBase
from delible.train.gradients import Gradients
from delible.train.masking import decay_masked, mask_gradients
from delible.train.onpolicy.rows import Question
from delible.train.onpolicy.settings import OnPolicyTraining
from delible.train.optimizers import make_optimizer
from delible.train.randomness import generator, shuffled
from delible.train.rows import make_rows
from delible.train.slots import Place, Placement, SlotContext

logger = logging.getLogger(__name__)


def require_extra() -> None:
    """Raises a :class:`MissingExtraError` where on-policy training is not installed."""
    try:
        import trl  # noqa: F401  # heavy: nothing else needs it
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("trl", "datasets", ""):
            raise MissingExtraError("on-policy training", "rl") from error
        raise


def require_one_process(where: str) -> None:
    """Raises a :class:`RunError` where several processes were started to train together."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            "on-policy training runs in one process so far.",
            where=where,
            hint="Start it without accelerate launch or torchrun.",
        )


def tokenized(
    lm: LM, questions: Sequence[Question], settings: OnPolicyTraining, where: str
) -> list[tuple[int, ...]]:
    """Token ids of the questions.

    Raises:
        DataError: There is none, or one leaves no room for an answer.
    """
    if not questions:
        raise DataError("there are no questions.", where=where)
    room = lm.template.max_length - settings.max_new_tokens
    ids = [lm.template.prompt_ids(one.prompt) for one in questions]
    for question, found in zip(questions, ids, strict=True):
        if len(found) > room:
            raise DataError(
                f"the question {question.text[:60]!r} has {len(found)} tokens, and with "
                f"{settings.max_new_tokens} new ones the model reads {room} at most.",
                where=where,
                hint="Shorten it, or lower max_new_tokens.",
            )
    return ids


def placed(
    lm: LM,
    place: Place,
    questions: Sequence[Question],
    retain: Sequence[RecordBase],
    context: Context,
    where: str,
) -> Placement:
    """What moves; everything else is frozen, and what moves is float32.

    Raises:
        RecipeError: Nothing may move, or the place needs a forget loss at each step.
    """
    known = [one.known for one in questions if one.tag == "forget"]
    records: dict[str, list[RecordBase]] = {
        "forget": [one for one in known if one is not None],
        "retain": list(retain),
    }
    rows = {role: make_rows(lm.template, part, role=role) for role, part in records.items()}
    slots = SlotContext(
        lm, rows, records, Gradients(lm, stage=context.stage),
        build("objective", "gradient_ascent"), None, context.seed, context.plays("writer"),
        context.stage,
    )  # fmt: skip
    placement = place.apply(slots)
    if placement.each_step is not None:
        raise RecipeError(
            f"place '{place.card.name}' chooses what moves from each step's forget loss, and an "
            "on-policy run has none.",
            where=where,
            hint="Choose another one ('delible list place').",
        )
    if not placement.parameters:
        raise RecipeError("no parameter may move.", where=f"place '{place.card.name}'")
    own = {id(value) for value in placement.parameters.values()}
    for value in lm.model.parameters():
        value.requires_grad_(id(value) in own)
    if short := short_types(placement.parameters.values()):
        logger.warning(
            f"The weights are {' and '.join(short)}, in which most small updates would round "
            "away: the model is converted to float32 and stays so (twice the memory)."
        )
        lm.model.float()
        lm.touch()
    return placement


def masked_optimizer(settings: OnPolicyTraining, placement: Placement) -> torch.optim.Optimizer:
    """The optimiser; masked entries stay where they are, whatever it remembers and decays."""
    optimizer, masks = make_optimizer(settings.optimiser(), placement), placement.masks
    if masks:
        optimizer.register_step_pre_hook(lambda *_: mask_gradients(placement, masks))
        optimizer.register_step_post_hook(
            lambda *_: decay_masked(
                placement, masks, optimizer.param_groups[0]["lr"] * settings.weight_decay
            )
        )
    return optimizer


def planned(questions: int, settings: OnPolicyTraining, seed: int) -> list[int]:
    """The question of every place of a run: epochs in random order, one after the other."""
    rounds = math.ceil(settings.steps / settings.inner_steps)
    wanted, found, epoch = rounds * settings.questions_per_step, list[int](), 0
    while len(found) < wanted:
        found += shuffled(range(questions), generator(seed, "questions", epoch))
        epoch += 1
    return found[:wanted]


__all__ = [
    "masked_optimizer", "placed", "planned", "require_extra", "require_one_process", "tokenized",
]  # fmt: skip

"""What a run would do and cost, told without training and without a model's weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from delible import preparing
from delible.context import Context
from delible.errors import DelibleError, ModelError, RecipeError
from delible.lm.lm import LM
from delible.lm.outline import outline
from delible.lm.recompute import check_recomputing
from delible.method import Method
from delible.records import ForgetRequest
from delible.resolving import resolve_method
from delible.systems.opening import open_lm
from delible.train.engine import Trainer
from delible.train.estimate import Estimate, estimate, memory_of, tokens_that_fit
from delible.train.method import GradientMethod, records_of
from delible.train.needs import check_base
from delible.train.plan import Plan, make_plan
from delible.train.recipe import Recipe, Strength
from delible.train.savings import Way, ways_of
from delible.train.slots import Placement, SlotContext

logger = logging.getLogger(__name__)

#: What models without numbers raise where numbers are asked for.
_NO_NUMBERS = (RuntimeError, NotImplementedError, ModelError, TypeError, ValueError)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Fitting:
    """One way to run in a given memory.

    Attributes:
        words: What to say on the command line; empty: nothing.
        peak: Bytes at most, with micro-batches of one row.
        micro_batch_tokens: The largest micro-batch that fits; None: it does not fit.
        accelerator: It is a way for an accelerator, whose memory is meant.
    """

    words: str
    peak: int
    micro_batch_tokens: int | None
    accelerator: bool = False


def read_memory(text: str) -> int:
    """Bytes of ``24GB`` (10^9), ``24GiB`` (2^30) or a plain number.

    Raises:
        RecipeError: It is no amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise RecipeError(f"'{text}' is no amount of memory.", hint="Say 24GB, 80GiB or 512MB.")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def plan_of(
    model: str | LM,
    request: ForgetRequest,
    *,
    method: str | Method | Recipe | Path = "npo",
    slots: Mapping[str, Any] | None = None,
    strength: Strength | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[dict[str, Any], Estimate | None]:
    """What :func:`delible.unlearn` would do: the resolved config, and memory and time.

    Nothing is trained, and of a named model no weights are loaded: its settings are enough.
    The latter is None for what does not train, and where the rows must be asked for first (names
    alone).
    """
    chosen = resolve_method(method, slots=slots, options=options, strength=strength)
    if not isinstance(chosen, GradientMethod) or not _rows_are_known(chosen, request):
        return chosen.as_file(), None
    return chosen.as_file(), _planned(model, request, chosen, seed).estimate()


def ways_to_fit(
    model: str | LM,
    request: ForgetRequest,
    memory: int,
    *,
    method: str | Method | Recipe | Path = "npo",
    slots: Mapping[str, Any] | None = None,
    strength: Strength | None = None,
    seed: int = 0,
    **options: Any,
) -> list[Fitting]:
    """How a run would fit so many bytes: as it is, or with options that need less.

    Each is counted as :func:`plan_of` counts; those that cannot be combined with the method are
    left out. Empty for what does not train.
    """
    chosen = resolve_method(method, slots=slots, options=options, strength=strength)
    if not isinstance(chosen, GradientMethod) or not _rows_are_known(chosen, request):
        return []
    found: list[Fitting] = []
    for way in ways_of(chosen.recipe):
        try:
            recipe = way.of(chosen.recipe)
            check_base(recipe)
            made = _planned(model, request, replace(chosen, recipe=recipe), seed)
            if recipe.training.gradient_checkpointing:
                check_recomputing(made.lm)
        except (RecipeError, ModelError):
            if not way.words:
                raise
            continue
        found.append(made.fitting(way, memory))
    return found


def _rows_are_known(method: GradientMethod, request: ForgetRequest) -> bool:
    return not (preparing.elicits(method, request) and request.subjects)


@dataclass(frozen=True)
class _Planned:
    """A run up to its first step."""

    lm: LM
    recipe: Recipe
    plan: Plan
    placement: Placement
    context: SlotContext
    trainer: Trainer
    notes: tuple[str, ...]

    def estimate(self) -> Estimate:
        budget = self.trainer.token_budget(self.context, self.plan, self.placement)
        found = estimate(
            self.lm, self.recipe, self.plan, self.placement, self.context.rows, budget
        )  # fmt: skip
        bound = () if found.counted else (
            "This model decides by numbers what it computes: its activations are a bound by sizes.",
        )  # fmt: skip
        return replace(found, notes=(*self.notes, *bound))

    def fitting(self, way: Way, memory: int) -> Fitting:
        parts = (self.lm, self.recipe, self.plan, self.placement, self.context.rows)
        peak = memory_of(*parts, 1)[0].peak
        return Fitting(way.words, peak, tokens_that_fit(*parts, memory), way.accelerator)


def _planned(
    model: str | LM, request: ForgetRequest, method: GradientMethod, seed: int
) -> _Planned:
    context = Context(seed)
    check_base(method.recipe)
    lm = _model(model, method)
    lm.precision = lm.resolved(method.recipe.training.precision)
    if "retain" in method.needs and not preparing.retained(request):
        logger.info("No retain records were given: an automatic retain set would be made.")
        request = request.model_copy(update={"retain": request.forget[:1]})
    request = preparing.prepared(lm, request, method, context)
    recipe, notes = method.recipe, list[str]()
    trainer = Trainer(lm, recipe, records_of(request), context=context)
    try:
        seen = trainer.rows()
    except _NO_NUMBERS as error:
        if not lm.device.type == "meta" or _is_told(error):
            raise
        notes.append("Which rows are made or chosen depends on the weights: as many are assumed "
                     "as there are forget records, all of them used.")  # fmt: skip
        roles = (*recipe.objective.roles, *recipe.generate.makes)
        made = {role: list(request.forget) for role in roles if role not in ("forget", "refusal")}
        recipe = recipe.changed({"select": "all"}, {})
        trainer = Trainer(lm, recipe, records_of(request), context=context, generated=made)
        seen = trainer.rows()
    placement = _placed(lm, recipe, seen, notes)
    plan = make_plan(recipe, seen.rows["forget"], seen.rows["retain"], seed)
    recipe.finish.check(len(plan.steps))
    return _Planned(lm, recipe, plan, placement, seen, trainer, tuple(notes))


def _is_told(error: BaseException) -> bool:
    """Whether an error is a user's and not one of a model without numbers."""
    return isinstance(error, DelibleError) and "meta device" not in str(error)


def _placed(lm: LM, recipe: Recipe, seen: SlotContext, notes: list[str]) -> Placement:
    try:
        return recipe.place.apply(seen)
    except _NO_NUMBERS as error:
        if not lm.device.type == "meta" or _is_told(error):
            raise
    notes.append(f"What place '{recipe.place.card.name}' moves depends on the weights: all of "
                 "them are assumed, with a mask.")  # fmt: skip
    every = dict(lm.core.named_parameters())
    for value in every.values():
        value.requires_grad_(True)
    return Placement(every, masks={name: value > 0 for name, value in every.items()})


def _model(model: str | LM, method: GradientMethod) -> LM:
    held = method.recipe.training.base_precision
    if isinstance(model, LM):
        return model
    if model.endswith(".gguf"):
        return open_lm(model, held)
    return outline(model, held)


def shown(parts: Sequence[Fitting], memory: int) -> list[str]:
    """Sentences that tell which ways fit."""
    lines = []
    for one in parts:
        what = (one.words or "as it is") + (" (on an accelerator)" if one.accelerator else "")
        fits = one.micro_batch_tokens
        told = f"fits, micro-batches of up to {fits:,} tokens" if fits else "does not fit"
        lines.append(f"{what}: {told} (at least {one.peak / 2**30:.2f} GiB)")
    if not any(one.micro_batch_tokens for one in parts):
        lines.append(f"Nothing known here fits {memory / 2**30:.1f} GiB; a smaller model might.")
    return lines

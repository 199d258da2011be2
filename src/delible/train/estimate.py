"""What a run will cost, before it starts: memory by part, and time from a measured rate.

Runs and dry runs ask the same: how many tokens fit a pass is decided by the numbers that are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from delible.lm.body import shared_prefix
from delible.lm.lm import LM
from delible.precision import matmul_rate
from delible.train.footprint import (
    KERNEL_BYTES,
    KERNELS,
    Memory,
    cache_bytes,
    optimiser_bytes,
    reference_bytes,
    update_bytes,
    weights_bytes,
)
from delible.train.losses import Loss
from delible.train.passes import MicroBatch, split
from delible.train.plan import Plan
from delible.train.recipe import Recipe
from delible.train.row import Row
from delible.train.savings import saving
from delible.train.simulated import Shape, passing
from delible.train.slots import Placement

#: Share of the measured matrix-product rate that training is assumed to reach.
ASSUMED_UTILISATION = 0.6
#: Answers that are shown before and after, and their length in tokens.
SHOWN_ANSWERS, SHOWN_TOKENS = 6, 48
#: Padded tokens in one pass beyond which no device is any faster.
LARGEST = 2**17
#: Sizes of a pass that are looked at to find the largest one that fits.
TRIES = 7

Rows = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class Estimate:
    """Cost of a training run.

    Attributes:
        steps: Optimiser steps.
        tokens: Tokens of forget and retain rows over all steps.
        trainable: Parameters that move.
        memory: Bytes by part.
        minutes: Training time in minutes, without loading and saving.
        micro_batch_tokens: Padded tokens per pass.
        counted: Activations were counted on the model; false: a bound by sizes.
        notes: What was assumed, in sentences.
    """

    steps: int
    tokens: int
    trainable: int
    memory: Memory
    minutes: float
    micro_batch_tokens: int
    counted: bool = True
    notes: tuple[str, ...] = ()

    @property
    def memory_gib(self) -> float:
        """The peak in GiB."""
        return self.memory.peak / 2**30


def body_parameters(lm: LM) -> int:
    """Parameters that every token passes through: without embedding tables and head."""
    tables = {id(lm.core.get_input_embeddings().weight), id(lm.core.get_output_embeddings().weight)}
    return sum(value.numel() for value in lm.model.parameters() if id(value) not in tables)


def estimate(
    lm: LM,
    recipe: Recipe,
    plan: Plan,
    placement: Placement,
    rows: Rows,
    micro_batch_tokens: int,
) -> Estimate:
    """Memory and time of a run.

    Args:
        rows: Of every role.
        micro_batch_tokens: Padded tokens per pass, at most.
    """
    tokens = answers = 0
    for step in plan.steps:
        for index, kept in step:
            one = [rows["forget"][index], *_kept(rows, kept)]
            tokens += sum(len(row.encoded.ids) for row in one)
            answers += sum(row.encoded.answer_tokens for row in one)
    moving = placement.parameters.values()
    memory, counted = memory_of(lm, recipe, plan, placement, rows, micro_batch_tokens)
    operations = _operations(lm, moving, tokens, answers)
    if not recipe.harden.single_pass:
        operations *= 1.5
    if recipe.training.gradient_checkpointing:
        operations += 2.0 * tokens * body_parameters(lm)
    rate = ASSUMED_UTILISATION * matmul_rate(lm.precision, lm.device_type)
    return Estimate(
        len(plan.steps),
        tokens,
        sum(value.numel() for value in moving),
        memory,
        operations / rate / 60,
        micro_batch_tokens,
        counted,
    )


def _kept(rows: Rows, index: int | None) -> Sequence[Row]:
    return () if index is None or not rows.get("retain") else (rows["retain"][index],)


def _operations(lm: LM, moving: Iterable[Tensor], tokens: int, answers: int) -> float:
    """Floating-point operations: 2 a weight and token forward, 2 for the gradient of what comes
    in, and 2 more for the gradient of a weight that moves."""
    own = {id(value): value.numel() for value in moving}
    table = id(lm.core.get_input_embeddings().weight)
    head = lm.core.get_output_embeddings().weight
    in_body = sum(size for key, size in own.items() if key not in (id(head), table))
    in_head = head.numel() if id(head) in own else 0
    passing = tokens * body_parameters(lm) + answers * head.numel()
    return 4.0 * passing + 2.0 * (tokens * in_body + answers * in_head)


def memory_of(
    lm: LM,
    recipe: Recipe,
    plan: Plan,
    placement: Placement,
    rows: Rows,
    micro_batch_tokens: int,
    shape: Shape | None = None,
    several: bool = False,
) -> tuple[Memory, bool]:
    """Bytes by part, and whether activations were counted.

    Args:
        shape: Of the largest pass; None: of the step with the most tokens.
        several: A step takes several passes, so that gradients are there from the second on.
    """
    moving = list(placement.parameters.values())
    batches = micro_batches(recipe, plan, rows, micro_batch_tokens)
    shape = shape or max(map(shape_of, batches), key=lambda one: one.rows * one.length)
    inside, final = _read(lm, recipe)
    kinds = _kinds(lm, recipe)
    # some keep another model's distributions, of which one for each context is compared
    compared = {kind for every in kinds.values() for kind in every if kind.startswith("answers")}
    with saving(recipe, lm):
        held = passing(lm, shape, inside, final, len(compared))
    several = several or len(batches) > 1 or not recipe.harden.single_pass
    gradients = 4 * sum(value.numel() for value in moving)
    used = {role: rows[role] for role in rows if role != "retain"}
    if rows.get("retain"):
        used["retain"] = [rows["retain"][index] for index in sorted(plan.retain_indices)]
    longest = max(len(row.encoded.ids) for part in used.values() for row in part)
    masks = placement.masks or {}
    kernels = held.products * len({shape_of(one) for one in batches}) if _compiles(lm) else 0
    memory = Memory(
        weights=weights_bytes(lm, recipe),
        gradients=gradients,
        optimiser=optimiser_bytes(recipe, moving),
        activations=held.kept,
        reference=reference_bytes(lm, used, kinds),
        masks=sum(mask.numel() for mask in masks.values()),
        cache=cache_bytes(lm, SHOWN_ANSWERS, longest + SHOWN_TOKENS),
        kernels=KERNEL_BYTES * min(KERNELS, kernels),
        passing=held.peak + gradients if several else held.with_gradients,
        update=update_bytes(recipe, moving, lm.device_type),
    )
    return memory, held.counted


def _compiles(lm: LM) -> bool:
    """Whether products are compiled for their shapes."""
    return lm.device_type == "cpu" and lm.precision == "bfloat16"


def micro_batches(
    recipe: Recipe, plan: Plan, rows: Rows, micro_batch_tokens: int
) -> list[MicroBatch]:
    """The passes of the step with the most tokens."""
    roles = recipe.objective.roles
    keeps = recipe.keep.card.name != "none"

    def rows_of(step: Sequence[tuple[int, int | None]]) -> list[Row]:
        own = [rows[role][index] for index, _ in step for role in roles]
        return own + [row for _, kept in step for row in _kept(rows, kept)]

    def size(step: Sequence[tuple[int, int | None]]) -> int:
        return sum(len(row.encoded.ids) for row in rows_of(step))

    step = max(plan.steps, key=size)
    retain = [row for _, kept in step for row in _kept(rows, kept)] if keeps else []
    forget = {str(role): [rows[role][index] for index, _ in step] for role in roles}
    ones = [1.0] * len(step)
    return split(forget, retain, ones, [1.0] * len(retain), micro_batch_tokens)


def shape_of(batch: MicroBatch) -> Shape:
    """The shape of one pass."""
    every = [row.encoded for part in (*batch.forget.values(), batch.retain) for row in part]
    return Shape.of(every)


def tokens_that_fit(
    lm: LM,
    recipe: Recipe,
    plan: Plan,
    placement: Placement,
    rows: Rows,
    memory: int,
    most: int = LARGEST,
) -> int | None:
    """The largest micro-batch, in padded tokens, with which a run stays within ``memory`` bytes.

    A step of more tokens takes several passes. None: not even one row fits.

    Args:
        most: Tokens beyond which it is not looked.
    """
    everything = [row.encoded for part in rows.values() for row in part]
    longest = max(everything, key=lambda row: len(row.ids))
    # with a beginning of their own rows would need less: its gradients wait for those of the rest
    common = shared_prefix([row.ids[: row.start] for row in everything])
    one = replace(Shape.of([longest]), prefix=common)

    def peak(count: int) -> int:
        found, _ = memory_of(
            lm, recipe, plan, placement, rows, count * one.length, one.times(count), several=True
        )
        return found.peak

    smallest, _ = memory_of(lm, recipe, plan, placement, rows, 1)  # perhaps two rows: both losses
    if max(smallest.peak, peak(1)) > memory:
        return None
    few, many = peak(4), peak(8)
    if few > memory:
        return one.length
    # passes grow by the row, but for the head's chunks, which are held once; and where an update or
    # what waits for a gradient is the peak, a few rows more need no more
    low, below, high = (8, many, 0) if many <= memory else (4, few, 8)
    count = min(4 + (memory - few) // max(1, (many - few) // 4), max(1, most // one.length))
    for attempt in range(TRIES):
        if count <= low:
            break
        found = peak(count)
        if found <= memory:
            low, below = count, found
            count = (low + high) // 2
        elif attempt % 2:
            high, count = count, (low + count) // 2
        else:  # the curve bends upwards: on its chord is too few
            high, count = count, low + (memory - below) * (count - low) // (found - below)
    return min(low * one.length, max(most, one.length))


def _read(lm: LM, recipe: Recipe) -> tuple[tuple[int | str, ...], bool]:
    """What a step reads, as the forward pass takes it."""
    wanted = set(recipe.objective.reads(lm))
    if recipe.keep.card.name != "none":
        wanted |= {*recipe.keep.reads(lm), *recipe.keep.reads_beside(lm)}
    inside = tuple(sorted((what for what in wanted if what != "answers"), key=str))
    return inside, "answers" in wanted or not inside


def _kinds(lm: LM, recipe: Recipe) -> dict[str, Sequence[str]]:
    """Kinds of reference values by role."""
    losses: list[tuple[Loss, Sequence[str]]] = [(recipe.objective, list(recipe.objective.roles))]
    if recipe.keep.card.name != "none":
        losses.append((recipe.keep, ["retain"]))
    return {role: loss.reference_kinds(lm) for loss, roles in losses for role in roles}

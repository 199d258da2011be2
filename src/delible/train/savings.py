"""Options that make a run need less memory: what refuses them, and which of them would help.

They are the engine's, never an idea's: the same recipe runs with them and without, to the same
numbers (with moments in 8 bits: to nearly the same).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from delible.errors import RecipeError, RunError
from delible.lm.lm import LM
from delible.lm.recompute import check_recomputing
from delible.precision import is_out_of_memory
from delible.train.optimizers import check_eight_bits
from delible.train.recipe import Recipe

#: Options that move something off an accelerator, and what that is.
OFFLOADS = {"offload_optimizer": "moments of the optimiser", "offload_activations": "activations"}


@dataclass(frozen=True)
class Way:
    """One way to need less memory.

    Attributes:
        slots: Other components.
        training: Other training settings.
    """

    slots: Mapping[str, str]
    training: Mapping[str, Any]

    @property
    def words(self) -> str:
        """What to say on the command line; empty: nothing."""
        said = {**self.slots, **self.training}
        last = {"finish": said.pop("finish")} if "finish" in said else {}
        return " ".join(
            f"--{name.replace('_', '-')} {str(value).lower() if value is True else value}"
            for name, value in (said | last).items()
        )

    @property
    def accelerator(self) -> bool:
        """It moves something off an accelerator, and can do nothing without one."""
        return any(name in OFFLOADS for name in self.training)

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe that goes this way."""
        given = {f"training.{name}": value for name, value in self.training.items()}
        return recipe.changed(dict(self.slots), given)


def ways_of(recipe: Recipe) -> list[Way]:
    """As it is, and the ways that a recipe does not go yet.

    From what changes least (the same numbers, in more time) to what changes most (other weights
    move, above shorter ones).
    """
    training = recipe.training
    adapter = recipe.place.card.changes == "adapter"
    lora = {} if adapter else {"place": "lora"}
    apart = {"finish": "none"} if recipe.finish.card.changes == "weights" else {}
    again = {} if training.gradient_checkpointing else {"gradient_checkpointing": True}
    moments = () if training.optimizer == "sgd" else ("offload_optimizer",)
    away = {name: True for name in (*moments, "offload_activations") if not getattr(training, name)}
    ways = [Way({}, {}), Way({}, again), Way({}, {**again, **away})]
    if not adapter and training.optimizer != "sgd":
        kinds = [kind for kind in ("adamw_8bit", "sgd") if kind != training.optimizer]
        ways += [Way({}, {**again, "optimizer": kind}) for kind in kinds]
    ways += [Way(lora, {}), Way(lora, again)]
    for held in ("bfloat16", "int8", "int4"):
        if held != training.base_precision:
            below = {**lora, **apart}
            ways += [
                Way(below, {"base_precision": held}),
                Way(below, {"base_precision": held, **again}),
            ]
    return list({way.words: way for way in ways}.values())


def check_savings(recipe: Recipe, lm: LM) -> None:
    """Refuses options that can do nothing here, before any work.

    Raises:
        RecipeError: There is no accelerator to move something off, or nothing to move.
        ModelError: Blocks of this model cannot be computed again.
        MissingExtraError: Nothing here packs moments.
    """
    training, where = recipe.training, f"method '{recipe.name}'"
    for option, what in OFFLOADS.items():
        if getattr(training, option) and lm.device_type == "cpu":
            raise RecipeError(
                f"the {what} lie in the main memory already: this model is on no accelerator.",
                where=where,
                hint=f"Leave out --{option.replace('_', '-')}.",
            )
    if training.offload_optimizer and training.optimizer == "sgd":
        raise RecipeError(
            "plain gradient descent has no moments to move.",
            where=where,
            hint="Leave out --offload-optimizer.",
        )
    if training.gradient_checkpointing:
        check_recomputing(lm)
    if training.optimizer == "adamw_8bit":
        check_eight_bits()


@contextmanager
def saving(recipe: Recipe, lm: LM) -> Iterator[None]:
    """Within it the model's passes keep what the recipe says, where it says."""
    before = lm.recomputes, lm.offloads
    lm.recomputes = recipe.training.gradient_checkpointing
    lm.offloads = recipe.training.offload_activations
    try:
        yield
    finally:
        lm.recomputes, lm.offloads = before


#: What a run does when memory runs out, in the words of the message.
Phase = Literal["loading the model", "the reference values", "training", "answering", "saving"]


@contextmanager
def phase(doing: Phase, recipe: Recipe | None, device_type: str = "cpu") -> Iterator[None]:
    """Within it an exhausted memory is an error that names what would need less.

    Raises:
        RunError: The memory is not enough, after smaller batches where there are any.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smallest = "" if doing in ("loading the model", "saving") else ", in the smallest batches"
        raise RunError(
            f"the memory is not enough for {doing}{smallest}.",
            where=None if recipe is None else f"method '{recipe.name}'",
            hint=_helping(doing, recipe, device_type),
        ) from error


def _helping(doing: Phase, recipe: Recipe | None, device_type: str) -> str:
    if recipe is None:
        return "Choose a smaller model, or a method that trains with --base-precision bfloat16."
    ways = [way for way in ways_of(recipe) if way.words]
    if device_type == "cpu":
        ways = [way for way in ways if not way.accelerator]
    if doing == "saving" and recipe.finish.card.changes == "weights":
        return (
            "Add --finish none: the result is an adapter, and 'delible merge RUN --out FOLDER' "
            "merges it tensor by tensor."
        )
    if doing != "training":  # nothing but weights that are shorter needs less there
        ways = [way for way in ways if "base_precision" in way.training and len(way.training) == 1]
    words = "; ".join(way.words for way in ways)
    return (
        f"These need less, from what changes least: {words}. With --dry-run --memory SIZE it is "
        "told which of them fit."
    )

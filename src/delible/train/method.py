"""A recipe as a method: trained by the engine, on a language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from delible import registry
from delible.cards import Card, Need
from delible.context import Context
from delible.kept import identity
from delible.lm.lm import LM, language_model
from delible.method import Method, Outcome
from delible.ranges import DECADE, Range, scales
from delible.records import ForgetRequest
from delible.system.base import System
from delible.systems.opening import open_lm
from delible.train.engine import Trainer
from delible.train.generated import Generated, described
from delible.train.needs import check_needs
from delible.train.reach import check_reach
from delible.train.recipe import Recipe, Strength

#: Slots whose weights and scales say how hard a method goes.
SEARCHED = ("objective", "balance", "harden", "finish")
#: Two names of how long it trains: whoever holds one holds both.
LENGTHS = frozenset({"training.epochs", "training.max_steps"})


@dataclass(frozen=True)
class GradientMethod(Method):
    """A recipe, and what training takes beside the records.

    Attributes:
        recipe: One component per slot.
        anchor: The model whose values count as "before" in the loss; None is the start model.
        refusals: Refusal sentences; None takes the built-in ones.
        generated: Generated rows by role, to be used instead of making any.
    """

    trains_the_model: ClassVar[bool] = True

    recipe: Recipe
    anchor: LM | None = None
    refusals: Sequence[str] | None = None
    generated: Generated | None = None

    @property
    def card(self) -> Card:  # type: ignore[override]
        plain, _ = registry.split_preset(self.recipe.name)
        found = {card.name: card for card in registry.cards("recipe")}.get(plain)
        return found or self.recipe.objective.card.model_copy(update={"advice": None})

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def needs(self) -> frozenset[Need]:
        parts = self.recipe.components()
        needs = frozenset({"forget", *(need for part in parts for need in part.own_needs)})
        return needs - ({"retain"} if "retain" in self.recipe.generate.makes else set())

    def spec(self) -> dict[str, Any]:
        return self.recipe.spec()

    def with_options(self, options: Mapping[str, Any]) -> Self:
        return replace(self, recipe=self.recipe.changed({}, dict(options)))

    def with_slots(self, slots: Mapping[str, Any], options: Mapping[str, Any]) -> Self:
        """The same with other components in some slots, and other options.

        Raises:
            RecipeError: An unknown slot, component or option.
        """
        return replace(self, recipe=self.recipe.changed(dict(slots), dict(options)))

    def with_strength(self, strength: Strength) -> Self:
        """The one dial; see :meth:`Recipe.with_strength`."""
        return replace(self, recipe=self.recipe.with_strength(strength))

    def as_file(self) -> dict[str, Any]:
        return self.spec()

    def option(self, name: str) -> str:
        return self.recipe.place_of(name)

    def value(self, option: str) -> Any:
        slot, _, key = option.rpartition(".")
        return getattr(getattr(self.recipe, slot), key)

    def held(self, option: str) -> frozenset[str]:
        full = self.option(option)
        return LENGTHS if full in LENGTHS else frozenset({full})

    def ranges(self) -> dict[str, Range]:
        """The learning rate, the length, and the weights and scales of some slots.

        The balance only counts where there is a retain loss, and of the two weights of a sum only
        the retain loss's. A recipe's own ``tune:`` says more.
        """
        recipe, training = self.recipe, self.recipe.training
        rate = training.learning_rate
        length = "epochs" if training.max_steps is None else "max_steps"
        times = int(getattr(training, length))
        found = {
            "training.learning_rate": Range(
                low=rate / DECADE, high=min(1.0, rate * DECADE), log=True
            ),
            f"training.{length}": Range(low=max(1, times // 2), high=2 * times, log=True),
        }
        for slot in SEARCHED:
            if slot == "balance" and recipe.keep.card.name == "none":
                continue
            for key, one in scales(getattr(recipe, slot)).items():
                if (slot, key) != ("balance", "forget_weight"):
                    found[f"{slot}.{key}"] = one
        for option, declared in recipe.tune.items():
            if declared is None:
                found.pop(option, None)
            else:
                found[option] = declared
        return found

    def given(self) -> dict[str, Any]:
        refusals, made = self.refusals, self.generated
        return {
            "anchor": None if self.anchor is None else self.anchor.name,
            "refusals": None if refusals is None else identity({"refusals": list(refusals)}),
            "generated": None if made is None else described(made),
        }

    def check(self, system: System, request: ForgetRequest) -> None:
        check_needs(self.recipe, records_of(request), self.generated)
        check_reach(self.recipe, language_model(system, f"method '{self.name}'"))

    def more_and_less(self, system: System) -> tuple[str, str]:
        lm = language_model(system, f"method '{self.name}'")
        own = f" ({self.card.advice})" if self.card.advice else ""
        rate = self.recipe.fitted(lm).training.learning_rate
        told = f"--learning-rate (it was {rate:.1e})"
        more = f"--strength strong, a higher {told} or more --epochs"
        less = f"--strength gentle, a lower {told} or fewer --epochs"
        balance = self.recipe.balance.spec()
        if self.recipe.keep.card.name == "none":
            less += ", or a loss on retained rows (--keep nll)"
        elif "retain_weight" in balance:
            less += f", or a higher --retain-weight (it was {balance['retain_weight']:g})"
        return more + own, less + own

    @property
    def teaches(self) -> bool:
        recipe = self.recipe
        negates = recipe.finish.card.name == "task_vector"
        own = "forget" in recipe.generate.makes  # other rows are learned than those that are given
        return recipe.objective.card.name == "finetune" and not negates and not own

    def apply(self, system: System, request: ForgetRequest, context: Context) -> Outcome:
        lm = language_model(system, f"method '{self.name}'")
        trainer = Trainer(
            lm, self.recipe, records_of(request), context=context, reference=self.anchor,
            start=self._start(lm), refusals=self.refusals, generated=self.generated,
        )  # fmt: skip
        trained = trainer.train()
        notes = {
            **trained.notes,
            "steps": trained.steps,
            "tokens": trained.tokens,
            "padding_share": round(trained.padding_share, 4),
            "precision": lm.precision,
            "merged_boundaries": lm.template.merged_boundaries,
        }
        kind = "adapter" if trained.lm.wears_adapter else "model"
        return Outcome(trained.lm, kind, trained.lm, notes, trained.history, trained.stopped)

    def _start(self, lm: LM) -> Callable[[], LM] | None:
        """Gives the start model again, for finishers that mix with it."""
        if not self.recipe.finish.needs_start:
            return None
        if lm.origin is not None:
            name, held = lm.name, lm.base_precision or "float32"
            return lambda: open_lm(name, held)
        kept = lm.copy()
        return lambda: kept


def records_of(request: ForgetRequest) -> dict[str, Any]:
    """Records by role, as the trainer takes them."""
    return {"forget": request.forget, "retain": (*request.retain, *request.neighbours)}

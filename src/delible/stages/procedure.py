"""What a procedure is: a whole run of several stages whose result is a system.

It names its stages; each is resumed on its own (:mod:`delible.stages.work`). Requests that come
one after another are the ordinary case: what a procedure has to know of the earlier ones it leaves
with its result, and finds again when it continues that result.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from delible.context import Context
from delible.made import Made
from delible.method import ComponentMethod, Outcome
from delible.ranges import DECADE, Range
from delible.records import ForgetRequest
from delible.stages.work import Work
from delible.system.base import System
from delible.train.recipe import Recipe

#: Options that say how long something is trained.
LENGTHS = ("epochs", "max_steps")


class Procedure(ComponentMethod):
    """Options of a procedure; :meth:`run` does its stages.

    Attributes:
        stages: What each stage does, in a few words, by name and in order.
    """

    stages: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def run(self, work: Work) -> Outcome:
        """Does the stages, one after the other, and says what they made.

        Everything that takes long or draws random numbers belongs in a stage
        (:meth:`Work.stage`, :meth:`Work.train`): what lies between them is done again by a run
        that is resumed. Of an earlier request of the same procedure on this system
        ``work.earlier`` tells what it left (:attr:`Outcome.remembers`), and ``work.system`` holds
        the parts that answer.

        Raises:
            DelibleError: It cannot be done.
        """

    def ranges(self) -> dict[str, Range]:
        """Scales among its options, its learning rate and its length."""
        found = super().ranges()
        for name in type(self).model_fields.keys() & {"learning_rate", *LENGTHS}:
            value = getattr(self, name)
            if value is not None and name == "learning_rate":
                high = min(1.0, value * DECADE)
                found[name] = Range(low=value / DECADE, high=high, log=True)
            elif value is not None:
                found[name] = Range(low=max(1, value // 2), high=2 * value, log=True)
        return found

    def apply(self, system: System, request: ForgetRequest, context: Context) -> Outcome:
        work = Work(self, system, request, context)
        outcome = self.run(work)
        costs = [one["cost"] for one in work.told]
        outcome.notes = {
            "steps": sum(one["steps"] for one in costs),
            "tokens": sum(one["tokens"] for one in costs),
            **outcome.notes,
            "stages": {one["name"]: one["cost"] for one in work.told},
        }
        outcome.history = outcome.history or work.history
        if outcome.remembers is not None:
            data = {**outcome.remembers.data, "procedure": self.name}
            outcome.remembers = Made(data, outcome.remembers.tensors).plain()
        # a model that is changed in place must not keep what the request before it left
        outcome.system.remembers = outcome.remembers  # type: ignore[attr-defined]
        return outcome


def recipe_of(
    recipe: str | Recipe,
    *,
    slots: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe that a stage trains by: a name (``npo``, ``npo@paper``), a file, or itself.

    Args:
        slots: Other components, such as ``{"place": "lora"}``.
        options: By name, such as ``{"learning_rate": 1e-5}``; None leaves the recipe's own.

    Raises:
        RecipeError: Unknown.
    """
    if isinstance(recipe, Recipe):
        found = recipe
    elif recipe.partition("@")[0].endswith((".yaml", ".yml")):
        found = Recipe.from_file(recipe)
    else:
        found = Recipe.named(recipe)
    given = {name: value for name, value in (options or {}).items() if value is not None}
    return found.changed(dict(slots or {}), given) if slots or given else found


__all__ = ["Procedure", "recipe_of"]

"""A client's work: it trains the adapter that it is sent on its own rows, and sends it back.

Any recipe, by the engine that trains everything else. FedProx pulls the weights to those that
were sent:

    loss + (mu / 2) sum ||w - phi||^2,   gradient + mu (w - phi)

phi is a copy that is made before the first step, also where a client unlearns: taken of the very
model that is trained, as in the reference code, the pull is always 0.

Paper: arXiv 1812.06127. Reference code: fyzhang1/Oblivionis.
Deviations: no dropout, since cached values of the reference model need the same model in every
pass; the optimiser starts anew at each client and in each round, as there, so a warm-up would eat
most of a short round and none is the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from delible.cards import Card
from delible.context import Context
from delible.errors import DataError, RecipeError, RunError
from delible.federated import adapter as adapters
from delible.federated.clients import Held
from delible.federated.messages import Failure, Order, Task, Update
from delible.lm.lm import LM
from delible.records import Record
from delible.train.engine import Trainer
from delible.train.passes import Passes
from delible.train.processes import refuse_shares
from delible.train.recipe import Recipe
from delible.train.slots import Place, Placement, SlotContext
from delible.watching import Steps

#: Places that mean the whole model or an adapter, in whose stead the adapter moves.
REPLACED = ("all", "layers", "lora")
#: Part of the names of the factor A of a low-rank product.
FACTOR_A = ".lora_A."


#: An adapter's learning rate over that of whole weights, as of the recipes npo_lora and npo.
ADAPTER_RATE = 25.0


def for_adapter(recipe: Recipe) -> Recipe:
    """The recipe with a learning rate for an adapter: higher, if it is meant for whole weights."""
    if recipe.place.card.name == "lora":
        return recipe
    training = recipe.training
    rate = min(1.0, ADAPTER_RATE * training.learning_rate)
    # by copy: a rate that is meant for some width stays so
    faster = training.model_copy(update={"learning_rate": rate})
    return recipe.model_copy(update={"training": faster})


def pull(weights: Sequence[Tensor], anchors: Sequence[Tensor], mu: float) -> list[Tensor]:
    """Gradient of the proximal term, per tensor: mu (w - phi)."""
    return [mu * (weight - anchor) for weight, anchor in zip(weights, anchors, strict=True)]


class WornAdapter(Place):
    """The adapter that the model wears moves, pulled to where it started if that is asked for."""

    card = Card(
        kind="place", name="worn_adapter", title="Worn adapter",
        summary="Trains the adapter that the model wears.", mechanism="adapter",
        changes="adapter", reversible=True,
    )  # fmt: skip
    continues: ClassVar[bool] = True
    proximal: float = Field(0.0, ge=0, description="mu of FedProx.")
    frozen_a: bool = Field(False, description="The factor A stays as it is.")

    def apply(self, context: SlotContext) -> Placement:
        own = adapters.parameters_of(context.lm)
        moving = {
            name: one for name, one in own.items() if not (self.frozen_a and FACTOR_A in name)
        }
        inside = {id(one) for one in moving.values()}
        for parameter in context.lm.model.parameters():
            parameter.requires_grad_(id(parameter) in inside)
        if not self.proximal:
            return Placement(moving)
        weights = list(moving.values())
        anchors = [weight.detach().clone() for weight in weights]

        def pulled(passes: Passes) -> None:
            """Before each step's gradient, which is added to it."""
            with torch.no_grad():
                pulls = pull(weights, anchors, self.proximal)
                for weight, more in zip(weights, pulls, strict=True):
                    weight.grad = more if weight.grad is None else weight.grad.add_(more)

        return Placement(moving, each_step=pulled)


def recipe_of(order: Order, retains: bool) -> Recipe:
    """The order's recipe on the adapter that the client wears.

    Args:
        retains: The client has rows to keep; without any, a retain loss falls away.

    Raises:
        RecipeError: The recipe moves other weights, or ends with another kind of model.
    """
    recipe = Recipe.from_mapping(dict(order.recipe))
    check(recipe)
    slots = {"finish": "none"}
    if order.on == "forget" and not retains:
        slots["keep"] = "none"
    recipe = recipe.changed(slots, {})
    place = WornAdapter(proximal=order.proximal, frozen_a=order.frozen_a)
    return recipe.model_copy(update={"place": place})


def check(recipe: Recipe) -> None:
    """Refuses recipes that cannot run on an adapter that travels.

    Raises:
        RecipeError: With what to choose.
    """
    place, finish = recipe.place.card, recipe.finish.card
    where = f"method '{recipe.name}'"
    if place.name not in REPLACED:
        raise RecipeError(
            f"place '{place.name}' chooses which weights move, and in a federated run the adapter "
            "does.", where=where, hint="Choose a method without a place of its own: npo, simnpo.",
        )  # fmt: skip
    if finish.name not in ("none", "merge_adapter"):
        raise RecipeError(
            f"finish '{finish.name}' makes another model at the end, and clients send an adapter.",
            where=where, hint="Choose a method without a finisher.",
        )  # fmt: skip


def rows_of(held: Held, order: Order) -> dict[str, tuple[Record, ...]]:
    """The records by role, as the trainer takes them."""
    if order.on == "forget":
        return {"forget": held.forget, "retain": held.retain}
    return {"forget": held.retain if order.on == "retain" else (*held.retain, *held.forget)}


def work(
    lm: LM, client: str, held: Held, task: Task, steps: Steps | None = None
) -> Update | Failure:
    """Trains the adapter of a task on a client's records; the model wears it then.

    Raises:
        RecipeError: The order cannot be carried out with these records by anybody.
    """
    refuse_shares("a client")
    records = rows_of(held, task.order)
    if not records["forget"]:
        return Failure("it holds no rows for it")
    adapters.put(lm, task.adapter)
    recipe = recipe_of(task.order, bool(held.retain))
    context = Context(seed=task.seed_of(client), steps=steps)
    precision = lm.precision  # the trainer's is its recipe's affair
    try:
        trained = Trainer(lm, recipe, records, context=context).train()
    except (RunError, DataError) as error:  # its numbers, or its records: the others go on
        return Failure(str(error))
    finally:
        lm.precision = precision
    notes: dict[str, Any] = {"rows": len(records["forget"]), "steps": trained.steps}
    if trained.stopped:
        notes["stopped"] = trained.stopped
    if trained.history:
        first, last = trained.history[0], trained.history[-1]
        notes["loss"] = [first["forget_loss"], last["forget_loss"]]
    if cut := trained.notes.get("truncated_rows"):
        notes["truncated_rows"] = cut
    if task.order.on == "forget" and not held.retain:
        notes["without_retain_rows"] = True
    return Update(task.phase, task.round, len(records["forget"]), sent(lm, task), notes)


def sent(lm: LM, task: Task) -> dict[str, Tensor]:
    """What goes back: the adapter; a frozen factor stays with the server."""
    found = adapters.read(lm)
    if task.order.frozen_a:
        found = {name: value for name, value in found.items() if FACTOR_A not in name}
    return found

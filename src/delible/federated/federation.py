"""What a federated run is, whoever carries its messages: phases of rounds, with their options.

    learn     rounds over all rows of every client
    unlearn   phi <- the asking client's adapter after unlearning on (its forget rows, its part of
              what is kept), handed over whole ('global'); or one round in which it unlearns while
              the others train on what they keep, averaged ('client')
    recover   rounds over what every client keeps
    retrain   the same from an adapter that knows nothing: the exact reference

A client that has nothing to keep is forgotten wholly: it takes no part in recovery.

Paper: arXiv 2508.08875. Reference code: fyzhang1/Oblivionis.
Deviation: 'client' placement, which it does not have, and several clients that ask at once (one
after the other).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from delible.errors import RecipeError
from delible.federated.adapter import Adapter
from delible.federated.local import check
from delible.federated.messages import Engine, Holding, Order, Phase
from delible.federated.rounds import Entry, Keeping, Look, Progress, Rounds, unkept
from delible.federated.servers import Server
from delible.federated.taking_part import Attendance
from delible.train.recipe import Recipe
from delible.watching import Stage, unwatched

Placement = Literal["global", "client"]


class Federation(Server, Attendance):
    """Options of the rounds, and of the clients' training in them."""

    rounds: int = Field(2, ge=0, description="Recovery rounds, after unlearning.")
    placement: Placement = Field(
        "global", description="Where unlearning happens: at the asking client, whose adapter then "
        "is everybody's ('global'), or there and averaged with the others ('client').",
    )  # fmt: skip
    rank: int = Field(8, ge=1, description="Inner width of the adapter, if the model wears none.")
    alpha: float = Field(16.0, gt=0, description="The adapter is scaled by alpha / rank.")
    epochs: int = Field(5, ge=1, description="Passes over its rows of a client in each round.")
    learning_rate: float = Field(5e-4, gt=0, le=1, description="Of the clients' training.")
    learning_rate_width: int | None = Field(
        576, ge=1, description="The learning rate is meant for a model of this hidden size; none: "
        "for any.",
    )  # fmt: skip
    batch_size: int = Field(16, ge=1, description="Rows per step of the clients' training.")
    proximal: float = Field(0.01, ge=0, description="mu of FedProx.")
    frozen_a: bool = Field(
        False, description="Only the factor B trains and comes back: its mean is exact."
    )

    @property
    def mu(self) -> float:
        """Of the clients' proximal term: FedProx alone has one."""
        return self.proximal if self.aggregation == "fedprox" else 0.0

    def order(self, on: Literal["retain", "both"] = "retain") -> Order:
        """What a client does in rounds that teach."""
        training = {"learning_rate": self.learning_rate, "batch_size": self.batch_size,
                    "learning_rate_width": self.learning_rate_width,
                    "epochs": self.epochs}  # fmt: skip
        recipe = Recipe.from_mapping(
            {"name": "client", "objective": "finetune", "training": training}
        )
        return Order(recipe.spec(), on, self.mu, self.frozen_a)

    def unlearning(self, recipe: Recipe) -> Order:
        """What a client does that asks to be forgotten.

        Raises:
            RecipeError: The recipe cannot run on an adapter that travels.
        """
        check(recipe)
        return Order(recipe.spec(), "forget", self.mu, self.frozen_a)


@dataclass(frozen=True)
class Run:
    """A federated run: its engine, options and seed.

    Attributes:
        keeping: Keeps rounds that are done.
        look: Asked after each round.
    """

    engine: Engine
    options: Federation
    seed: int
    keeping: Keeping = unkept
    look: Look | None = None
    stage: Stage = unwatched

    def learn(self, start: Adapter, rounds: int) -> Progress:
        """All rows of every client, in so many rounds."""
        return self._rounds("learn", self._orders(self.options.order("both")), rounds).run(start)

    def retrain(self, start: Adapter, rounds: int) -> Progress:
        """What every client keeps, in so many rounds."""
        orders = self._orders(self.options.order())
        return self._rounds("retrain", orders, rounds).run(start)

    def recover(self, start: Adapter) -> Progress:
        """What every client keeps, after unlearning."""
        orders = self._orders(self.options.order())
        return self._rounds("recover", orders, self.options.rounds).run(start)

    def unlearn(self, start: Adapter, recipe: Recipe) -> Progress:
        """The asking clients unlearn.

        Raises:
            RecipeError: Nobody asks.
            RunError: One that asks does not answer.
        """
        order = self.options.unlearning(recipe)
        asking = {name: order for name, held in self._holdings().items() if held.forget}
        if not asking:
            raise RecipeError("no client asks to be forgotten: there are no forget records.")
        if self.options.placement == "global":
            rounds = self._rounds("unlearn", asking, len(asking), one_by_one=True,
                                  required=tuple(asking))  # fmt: skip
            return rounds.run(start)
        others = self._orders(self.options.order())
        return self._rounds(
            "unlearn", {**others, **asking}, 1, attendance=Attendance(), required=tuple(asking)
        ).run(start)

    def _holdings(self) -> Mapping[str, Holding]:
        return dict(sorted(self.engine.holdings().items()))

    def _orders(self, order: Order) -> dict[str, Order]:
        """The order for everybody who has rows for it."""
        return {
            name: order
            for name, held in self._holdings().items()
            if held.retain or (order.on == "both" and held.forget)
        }

    def _rounds(
        self, phase: Phase, orders: Mapping[str, Order], count: int, **changes: Any
    ) -> Rounds:
        found: dict[str, Any] = {
            "attendance": self.options, "keeping": self.keeping, "look": self.look,
            "stage": self.stage,
        }  # fmt: skip
        return Rounds(
            self.engine, phase, orders, count, self.options, seed=self.seed, **{**found, **changes}
        )


def left_wholly(holdings: Mapping[str, Holding]) -> list[str]:
    """Clients that ask to be forgotten and have nothing else."""
    return sorted(name for name, held in holdings.items() if held.forget and not held.retain)


def curve(entries: tuple[Entry, ...]) -> list[dict[str, Any]]:
    """What was seen after each round, in order."""
    return [{"phase": one.phase, "round": one.round + 1, **one.seen} for one in entries]

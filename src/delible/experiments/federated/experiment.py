"""Federated unlearning: does forgetting at one client last, whatever the server does?

Clients learn made-up people together; then one of them asks to be forgotten. It unlearns by each
method, and everybody trains on what is kept for some rounds, under each server algorithm. After
each step all is asked again: forgetting that comes back in recovery was never removal, and a
server that hardly moves looks like one that keeps what is forgotten forgotten.

    forgotten = 1 - forget(after unlearning) / forget(learned)
    lasting   = 1 - forget(after recovery) / forget(learned)
    kept      = retain(after recovery) / retain(learned)

for the ROUGE-L recall of greedy answers. Beside them stands ``retrain``: an adapter that knows
nothing learns what is kept in the rounds of learning, which is what exact forgetting looks like.

Paper: arXiv 2508.08875. Reference code: github.com/fyzhang1/Oblivionis.
Deviations: made-up people instead of TOFU, and what is forgotten is data that its client has
learned (the paper's clients learn other parts than they forget); all methods and servers start
from one model that FedAvg has taught (``taught_by: same`` teaches each server's own, as the paper
does, under which adaptive servers hardly learn).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from delible.bench.stages import spaced
from delible.component import build
from delible.errors import RecipeError
from delible.experiments.federated.findings import RETRAIN, findings
from delible.federated import adapter as adapters
from delible.federated.adapter import Adapter
from delible.federated.clients import Dealing, Held
from delible.federated.federation import Federation, Placement, Run
from delible.federated.in_process import InProcess
from delible.federated.local import for_adapter
from delible.federated.rounds import Entry, Folder, counted
from delible.federated.servers import Aggregation
from delible.federated.starting import blank, dressed
from delible.kept import identity
from delible.lm.lm import LM
from delible.measure.benchmark import Experiment, Findings, Setting
from delible.measure.evaluate import evaluate
from delible.records import QA, ForgetRequest
from delible.registry import register
from delible.resolving import recipe_named
from delible.stages.procedure import recipe_of
from delible.systems.opening import open_lm
from delible.train.recipe import Recipe
from delible.world import World

METHODS = ("npo", "simnpo", "graddiff")
RELATIONS = ("birthplace", "occupation", "employer")
METRICS = ("rouge_l_recall", "answer_probability")


@register(
    kind="benchmark",
    name="federated",
    title="Federated unlearning",
    summary="Clients learn together, one is forgotten, the others go on: methods times servers.",
    paper="2508.08875",
    year=2025,
    family="fictional",
    needs=("forget", "retain", "weights"),
    capability="generate",
    misleads="A server that hardly moves (fedadam, fedyogi, fedadagrad at their published rate) "
    "looks good at whatever needs no change: read its row beside fedavg. Few people, few rounds. "
    "Where not all was learned, recovery goes on learning: kept is above 1 then.",
    badges=("variant",),
    variant="Made-up people; all start from one model that FedAvg has taught.",
)
class FederatedUnlearning(Experiment):
    """Every method under every server, each with every seed; finished cells are kept."""

    people: int = Field(12, ge=4, description="People in the world.")
    forget: int = Field(2, ge=1, description="People to forget, all of one client.")
    clients: int = Field(3, ge=1, description="Clients.")
    deal: Literal["contiguous", "shuffled", "subjects"] = Field(
        "shuffled", description="How the others' rows are dealt out to clients."
    )
    aggregations: tuple[Aggregation, ...] = Field(
        ("fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"),
        description="Server algorithms, separated by commas.",
    )
    placements: tuple[Placement, ...] = Field(
        ("global",), description="Where unlearning happens: global, client."
    )
    taught_by: Literal["fedavg", "same"] = Field(
        "fedavg", description="Which server taught the model: FedAvg, or each its own."
    )
    learn_rounds: int = Field(8, ge=1, description="Rounds in which all is learned.")
    rounds: int = Field(2, ge=0, description="Rounds of recovery.")
    epochs: int = Field(15, ge=1, description="Passes over its rows of a client in each round.")
    unlearn_epochs: int | None = Field(
        None, ge=1, description="Passes over the forget rows; none: the recipe's own."
    )
    rank: int = Field(16, ge=1, description="Inner width of the adapter.")
    learning_rate: float | None = Field(
        None, gt=0, description="Of the clients' training; none: by the model."
    )
    unlearn_learning_rate: float | None = Field(
        None, gt=0, description="Of unlearning; none: 25 times the recipe's own, for an adapter."
    )
    server_learning_rate: float = Field(1e-3, gt=0, description="Of the adaptive servers.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of answers that never come.")
    late: float = Field(0.0, ge=0, lt=1, description="Share of answers that come too late.")
    records: int = Field(60, ge=1, description="At most this many rows of each kind are asked.")
    world_seed: int = Field(0, ge=0, description="Seed of the people.")

    def request(self) -> ForgetRequest:
        """Whom to forget, and everybody else.

        Raises:
            RecipeError: Nobody would be kept.
        """
        if self.forget >= self.people:
            raise RecipeError(
                f"{self.people} people with {self.forget} to forget leave nobody to keep.",
                where="benchmark 'federated'",
            )
        world = World(people=self.people, seed=self.world_seed, relations=RELATIONS)
        rows = {person: [_bare(fact.qa()) for fact in world.facts(person)]
                for person in world.people}  # fmt: skip
        gone, kept = world.people[: self.forget], world.people[self.forget :]
        return ForgetRequest(
            forget=tuple(row for person in gone for row in rows[person]),
            retain=tuple(row for person in kept for row in rows[person]),
        )

    def options(self, aggregation: Aggregation, placement: Placement, model: str) -> Federation:
        """Of the rounds, under one server."""
        rate = self.learning_rate or (4e-3 if model == "tiny" else 3e-4)
        return Federation(
            aggregation=aggregation, placement=placement, rounds=self.rounds, epochs=self.epochs,
            batch_size=8, rank=self.rank, alpha=2.0 * self.rank, learning_rate=rate,
            learning_rate_width=None, server_learning_rate=self.server_learning_rate,
            dropout=self.dropout, late=self.late,
        )  # fmt: skip

    def method(self, name: str) -> Recipe:
        """How the client that asks unlearns.

        Raises:
            RecipeError: Unknown, or no recipe.
        """
        found = for_adapter(recipe_named(name, "a client unlearns by a recipe"))
        given = {"learning_rate": self.unlearn_learning_rate, "epochs": self.unlearn_epochs}
        return recipe_of(found, options=given)

    def run(self, setting: Setting) -> Findings:
        methods = tuple(dict.fromkeys(name for name in setting.methods or METHODS
                                      if name != RETRAIN))  # fmt: skip
        recipes = {name: self.method(name) for name in methods}
        request = self.request()
        check = self.options("fedavg", "global", setting.model)
        for recipe in recipes.values():  # told before anything is trained
            check.unlearning(recipe)
        plan = [
            (aggregation, placement, name, seed)
            for aggregation in self.aggregations for seed in range(setting.seeds)
            for placement in self.placements for name in methods
        ]  # fmt: skip
        teachers = self.aggregations if self.taught_by == "same" else ("fedavg",)
        plan += [(one, "global", RETRAIN, seed)
                 for one in teachers for seed in range(setting.seeds)]  # fmt: skip
        found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
        for done, (aggregation, placement, name, seed) in enumerate(plan):
            setting.progress(f"{name} under {aggregation}, seed {seed}", done, len(plan))
            described = {
                "aggregation": aggregation, "placement": placement, "seed": seed,
                "method": recipes[name].spec() if name in recipes else name,
            }  # fmt: skip
            cell = self.kept(
                setting, f"{Path(name).stem}-{aggregation}-{placement}-{seed}", described,
                lambda a=aggregation, p=placement, n=name, s=seed: self.cell(
                    a, p, recipes.get(n), s, request, setting
                ),
            )  # fmt: skip
            found.setdefault((aggregation, placement, name), []).append(cell)
        setting.progress("done", len(plan), len(plan))
        return findings(found)

    def cell(
        self,
        aggregation: Aggregation,
        placement: Placement,
        recipe: Recipe | None,
        seed: int,
        request: ForgetRequest,
        setting: Setting,
    ) -> dict[str, Any]:
        """One run, asked after each step; without a recipe the retrained reference."""
        lm = open_lm(setting.model)
        lm.merge_adapter()
        options = self.options(aggregation, placement, setting.model)
        dressed(lm, options.rank, options.alpha, seed)
        start = adapters.read(lm)
        clients = Dealing(deal=self.deal, clients=self.clients).of(request, seed)
        look = self.look(lm, clients)
        teacher: Aggregation = aggregation if self.taught_by == "same" else "fedavg"
        learned = self.learned(lm, start, clients, teacher, seed, setting)
        federated = Run(InProcess(lm, clients), options, seed, look=look)
        if recipe is None:
            entries = federated.retrain(blank(lm, seed), self.learn_rounds).entries
        else:
            forgot = federated.unlearn(learned, recipe)
            entries = (*forgot.entries, *federated.recover(forgot.adapter).entries)
        return {
            "curve": [{"phase": "learned", **look(learned)}, *map(_seen, entries)],
            "adapter_bytes": adapters.bytes_of(start),
            **counted(entries),
        }

    def learned(
        self,
        lm: LM,
        start: Adapter,
        clients: Mapping[str, Held],
        teacher: Aggregation,
        seed: int,
        setting: Setting,
    ) -> Adapter:
        """The adapter that all clients have learned together; kept under the folder."""
        taught = self.options(teacher, "global", setting.model)
        mine = identity({
            "options": taught.model_dump(mode="json"), "seed": seed, "model": lm.identity,
            "clients": {name: [row.digest for row in (*held.forget, *held.retain)]
                        for name, held in clients.items()},
            "rounds": self.learn_rounds,
        })  # fmt: skip
        keeping = Folder(setting.folder / "learned" / mine[:12], mine)
        run = Run(InProcess(lm, clients), taught, seed, keeping)
        return run.learn(start, self.learn_rounds).adapter

    def look(self, lm: LM, clients: Mapping[str, Held]) -> Callable[[Adapter], dict[str, Any]]:
        """What the model says of people to forget and to keep, under an adapter."""
        rows = {
            role: spaced([row for one in clients.values() for row in getattr(one, role)],
                          self.records)
            for role in ("forget", "retain")
        }  # fmt: skip
        metrics = [build("metric", name) for name in METRICS]

        def seen(adapter: Adapter) -> dict[str, Any]:
            adapters.put(lm, adapter)
            means = evaluate(lm, rows, metrics).means
            return {f"{role}/{name}": means[name].get(role) for name in METRICS for role in rows}

        return seen


def _seen(entry: Entry) -> dict[str, Any]:
    return {"phase": entry.phase, "left_out": len(entry.left_out), "change": entry.change,
            **entry.seen}  # fmt: skip


def _bare(row: QA) -> QA:
    """The row with the bare value as its answer, so that ROUGE is of the fact alone."""
    if not row.aliases:
        return row
    return row.model_copy(
        update={"answer": row.aliases[0], "paraphrased_answers": (), "aliases": ()}
    )

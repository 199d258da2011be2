"""Oblivionis: federated unlearning. A client asks to be forgotten, unlearns on the adapter that all
share, and everybody trains on what is kept until the rest is back.

    phi <- unlearn(phi; forget rows, what the asking client keeps)
    for each of R rounds:  phi_i <- train(phi; what client i keeps)
                           phi <- server(phi, {phi_i}, p),   p_i = n_i / sum_j n_j

Any recipe unlearns; six server algorithms (:mod:`delible.federated.servers`). Clients are simulated
in this process, on one model whose adapter is exchanged; over a network the same rounds run on
Flower (:mod:`delible.federated.flower`). ``unlearn: retrain`` is the exact reference: an adapter
that knows nothing learns in the same rounds what is kept.

Paper: arXiv 2508.08875. Reference code: github.com/fyzhang1/Oblivionis.
Deviations: (1) no dropout in adapters, and the optimiser of this engine; (2) FedProx pulls the
unlearning client to a copy of what it was sent (in the released code to itself, which is nothing);
(3) unlearning ends by its recipe's own rule (a forget target), where 50 epochs of plain ascent
would ruin the model; (4) retain rows are paired by the recipe's sampler; (5) clients are those of
the records, where the paper deals rows out (``deal``); (6) a client that has nothing to keep
unlearns without a retain loss, and leaves; (7) a whole model gets a new adapter of rank 8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from delible.component import build
from delible.errors import RecipeError
from delible.federated import adapter as adapters
from delible.federated.adapter import Adapter
from delible.federated.clients import Dealing, Held, holdings
from delible.federated.federation import Federation, Run, curve, left_wholly
from delible.federated.in_process import InProcess
from delible.federated.local import for_adapter
from delible.federated.local import recipe_of as on_the_adapter
from delible.federated.messages import Phase
from delible.federated.rounds import Progress, counted
from delible.federated.servers import ADAPTIVE
from delible.federated.starting import blank, dressed
from delible.lm.lm import LM, language_model
from delible.made import Made
from delible.measure.evaluate import evaluate
from delible.method import Outcome
from delible.ranges import DECADE, Range, scales
from delible.records import ForgetRequest, RecordBase
from delible.registry import register
from delible.stages.procedure import Procedure, recipe_of
from delible.stages.work import Stage, Work
from delible.system import artefact as artefacts
from delible.system.artefact import Base
from delible.system.base import System
from delible.train.needs import check_needs
from delible.train.recipe import Recipe

logger = logging.getLogger(__name__)

#: Name of the reference among the ways to unlearn.
RETRAIN = "retrain"


@register(
    kind="procedure",
    name="oblivionis",
    title="Oblivionis (federated unlearning)",
    summary="A client unlearns on a shared adapter; rounds over all clients bring the rest back.",
    paper="2508.08875",
    year=2025,
    family="federated",
    intention="removal",
    mechanism="adapter",
    needs=("forget", "retain", "weights"),
    changes="adapter",
    reversible=True,
    weakest="relearning: recovery rounds may bring forgotten facts back",
    advice="an adaptive server (fedadam, fedyogi, fedadagrad) moves each weight by about its "
    "server_learning_rate per round, whatever the clients did: look at fedavg beside it",
    badges=("parity", "variant"),
    variant="No dropout; unlearning stops by its recipe's rule; FedProx pulls to a copy.",
)
class Oblivionis(Procedure, Federation, Dealing):
    """Options of the clients, of unlearning and of the rounds."""

    stages: ClassVar[Mapping[str, str]] = {
        "start": "what the model knows before",
        "unlearn": "the client that asks unlearns",
        "recover": "rounds over what every client keeps",
        "retrain": "rounds over what every client keeps, from an adapter that knows nothing",
    }
    keeps_adapter: ClassVar[bool] = True
    trains_the_model: ClassVar[bool] = True

    unlearn: str = Field(
        "npo", description="How the asking client unlearns: a recipe by name or file, or 'retrain' "
        "for the exact reference.",
    )  # fmt: skip
    unlearn_epochs: int | None = Field(
        None, ge=1, description="Passes over its forget rows; none: the recipe's own."
    )
    unlearn_learning_rate: float | None = Field(
        None, gt=0, le=1, description="Of unlearning; none: the recipe's own, 25 times as high "
        "where that is meant for whole weights.",
    )  # fmt: skip
    watched: int = Field(
        24, ge=0, description="Forget and retain rows to look at after every round; 0: none."
    )

    def ranges(self) -> dict[str, Range]:
        """Rates and lengths of the clients, and what the chosen server uses."""
        used = {"server_learning_rate", "tau"} if self.aggregation in ADAPTIVE else set()
        if self.aggregation == "fedprox":
            used.add("proximal")
        found = {name: one for name, one in scales(self).items() if name in used}
        rate = self.unlearn_learning_rate
        for name, value in (("learning_rate", self.learning_rate), ("unlearn_learning_rate", rate)):
            if value is not None:
                high = min(1.0, value * DECADE)
                found[name] = Range(low=value / DECADE, high=high, log=True)
        found["epochs"] = Range(low=max(1, self.epochs // 2), high=2 * self.epochs, log=True)
        return found

    def recipe(self) -> Recipe:
        """How the asking client unlearns.

        Raises:
            RecipeError: Unknown, or it cannot run on an adapter that travels.
        """
        given = {"learning_rate": self.unlearn_learning_rate, "epochs": self.unlearn_epochs}
        return recipe_of(for_adapter(recipe_of(self.unlearn)), options=given)

    def check(self, system: System, request: ForgetRequest) -> None:
        self.check_combine()
        lm = language_model(system, f"procedure '{self.name}'")
        clients = self.of(request, 0)
        if self.unlearn == RETRAIN:
            if not lm.wears_adapter:
                raise RecipeError(
                    "to retrain, the model must wear the adapter that the clients trained: what "
                    "lies in its own weights stays.", where="unlearn 'retrain'",
                    hint="Give the run that made the adapter, or choose --unlearn npo.",
                )  # fmt: skip
            return
        order = self.unlearning(self.recipe())
        for held in clients.values():
            if held.forget:
                records: dict[str, Sequence[RecordBase]] = {"forget": held.forget}
                records["retain"] = held.retain
                check_needs(on_the_adapter(order, bool(held.retain)), records)

    def run(self, work: Work) -> Outcome:
        self.check(work.lm, work.request)
        seed, lm = work.context.seed, work.lm
        clients = self.of(work.request, seed)
        wore = dressed(lm, self.rank, self.alpha, seed)
        start: Adapter = adapters.read(lm)
        look = self._look(lm, clients)
        leaving = left_wholly(holdings(clients))
        for client in leaving:
            logger.info(f"Client '{client}' keeps nothing: it is forgotten wholly, and leaves.")
        before = work.stage("start", lambda stage: Made({"seen": look(start)}))["seen"]
        federated = Run(
            InProcess(lm, clients, work.context.steps), self, seed, _kept(work), look
        )  # fmt: skip
        if self.unlearn == RETRAIN:
            end = federated.retrain(blank(lm, seed), self.rounds)
            entries = end.entries
        else:
            forgot = federated.unlearn(start, self.recipe())
            end = federated.recover(forgot.adapter)
            entries = (*forgot.entries, *end.entries)
        adapters.put(lm, end.adapter)
        notes: dict[str, Any] = {
            "clients": {name: {"forget": len(one.forget), "retain": len(one.retain)}
                        for name, one in clients.items()},
            "left_wholly": leaving,
            "adapter_bytes": adapters.bytes_of(end.adapter),
            **counted(entries),
            "curve": [{"phase": "start", "round": 0, **before}, *curve(entries)],
        }  # fmt: skip
        without = [client for entry in entries for client, said in entry.clients.items()
                   if said.get("without_retain_rows")]  # fmt: skip
        if without:
            notes["without_retain_loss"] = without
        if wore:
            notes["undone"] = "with all that its adapter had learned before: open the run before"
        if notes["left_out_in_all"]:
            logger.warning(
                f"{notes['left_out_in_all']} answers of clients were left out: "
                f"{_in_words(notes['left_out'])}."
            )
        return Outcome(lm, "adapter", lm, notes, on=below(work.system) if wore else None)

    def _look(self, lm: LM, clients: Mapping[str, Held]) -> Callable[[Adapter], dict[str, Any]]:
        """Mean answer probabilities of some rows under the server's adapter."""
        splits = {
            role: spaced([row for one in clients.values() for row in getattr(one, role)],
                         self.watched)
            for role in ("forget", "retain")
        }  # fmt: skip

        def look(adapter: Adapter) -> dict[str, Any]:
            if not self.watched:
                return {}
            adapters.put(lm, adapter)
            found = evaluate(lm, splits, [build("metric", "answer_probability")])
            values = found.items["answer_probability"]
            return {role: _mean([item.value for item in items]) for role, items in values.items()}

        return look


def _kept(work: Work) -> Callable[[Phase, int, Callable[[], Progress]], Progress]:
    """Every round is a part of a stage."""

    def keeping(phase: Phase, number: int, make: Callable[[], Progress]) -> Progress:
        def made(stage: Stage) -> Made:
            progress = make()
            stage.steps += sum(
                int(said.get("steps", 0)) for said in progress.entries[-1].clients.values()
            )
            return progress.made()

        return Progress.of(work.stage(phase, made, part=number))

    return keeping


def below(system: System) -> Base | None:
    """What the adapter that a system wears stands on; None: not known."""
    folder = Path(system.name).expanduser()
    if not artefacts.is_artefact(folder):
        return None
    found = artefacts.read(folder)
    if found.base is None:
        return None
    beside = folder / found.base.name
    name = str(beside.resolve()) if beside.is_dir() else found.base.name
    return found.base.model_copy(update={"name": name})


def spaced(records: Sequence[RecordBase], count: int) -> list[RecordBase]:
    """At most so many records, evenly spaced over all of them."""
    if len(records) <= count:
        return list(records)
    return [records[place * len(records) // count] for place in range(count)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _in_words(left_out: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{client}: {', '.join(f'{reason} {count}' for reason, count in reasons.items())}"
        for client, reasons in left_out.items()
    )

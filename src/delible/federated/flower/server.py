"""The ServerApp: rounds over Flower, and their result as an artefact.

Of the run: ``model``, ``method`` (how the client that asks unlearns: a recipe), ``clients`` (how
many must be there), ``seed``, ``options`` (of :class:`Federation`, as JSON), ``learn`` (rounds in
which everybody learns first), ``out`` (the folder of the result) and ``timeout`` in seconds. The
server holds no records. A run that was killed goes on with the round that was not done when the
same run is started again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from delible.federated import adapter as adapters
from delible.federated.adapter import Adapter
from delible.federated.federation import Federation, Run
from delible.federated.flower.engine import Flower
from delible.federated.rounds import Entry, Folder, counted
from delible.federated.starting import dressed
from delible.files import write_json
from delible.kept import identity
from delible.systems.opening import described, keep, open_lm
from delible.train.recipe import Recipe

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All phases of a run."""
    run(grid, dict(context.run_config))


def run(grid: Grid, config: dict[str, Any]) -> None:
    """All phases of a run, from its config."""
    options = Federation.build("options", **json.loads(str(config["options"])))
    options.check_combine()
    seed, out = int(config["seed"]), Path(str(config["out"]))
    recipe = recipe_of(str(config["method"]))
    lm = open_lm(str(config["model"]))
    below = described(lm)
    lm.merge_adapter()
    dressed(lm, options.rank, options.alpha, seed)
    adapter: Adapter = adapters.read(lm)
    engine = Flower(grid, int(config["clients"]), float(config["timeout"]))
    held = {name: asdict(one) for name, one in engine.holdings().items()}
    options.unlearning(recipe)  # refused before anything is trained
    mine = identity({"options": options.model_dump(mode="json"), "recipe": recipe.spec(),
                     "seed": seed, "model": lm.identity, "clients": held,
                     "learn": int(config["learn"])})  # fmt: skip
    federated = Run(engine, options, seed, Folder(out / "rounds", mine))
    entries: list[Entry] = []
    if int(config["learn"]):
        learned = federated.learn(adapter, int(config["learn"]))
        adapter, entries = learned.adapter, [*entries, *learned.entries]
    if any(one["forget"] for one in held.values()):
        forgot = federated.unlearn(adapter, recipe)
        recovered = federated.recover(forgot.adapter)
        adapter, entries = recovered.adapter, [*entries, *forgot.entries, *recovered.entries]
    adapters.put(lm, adapter)
    keep("adapter", lm, out, below, lm)
    write_json(out / "federated.json", {
        "clients": held, **counted(entries), "entries": [asdict(entry) for entry in entries],
    })  # fmt: skip


def recipe_of(method: str) -> Recipe:
    """A recipe by name, or from a file."""
    if method.rpartition("@")[0].endswith((".yaml", ".yml")) or method.endswith((".yaml", ".yml")):
        return Recipe.from_file(method)
    return Recipe.named(method)

"""The page ``docs/results/experts.md``: forgetting in one expert, beside all weights (SEUF).

A mixture of four experts is made of ``tiny`` (or of the default model) and taught two topics of a
made-up world, so that it is known which expert learned what. One topic is forgotten with each loss
twice: all weights move, or one expert and its router (with and without SEUF's anchor). On the way
the mean loss of both topics' answers is measured, and the share of choices of experts at forget
answers that are still the original's. Methods are compared where they have raised the forget loss
by the same number of nats. Both topics are about the same people, so none of their names is kept.

Writes ``NAME.json``, a curve per method and seed, after every run, and ``NAME.md``. A run that is
there is not made again.

Run: python performance/experts.py docs/results/experts.md [--base tiny] [--seeds 3]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from evidence import INFINITE, Claim, Entry, over_seeds
from pages import claims_table, machine, revision, write

from delible.bench.stages import mean, scores_of, token_means, trajectory
from delible.bench.table import Number, mean_of_runs
from delible.errors import DelibleError
from delible.files import read_json
from delible.lm.experts import mixtures, routing
from delible.lm.forward import Forward, collate
from delible.lm.lm import LM
from delible.lm.moe import MoeOptions, moe_model, topics
from delible.records import QA, ForgetRequest
from delible.resolving import recipe_named
from delible.rundir import git_revision, hardware, versions
from delible.system.asks import Prompt
from delible.train.recipe import Recipe
from delible.watching import shown

#: Where methods are compared: so many nats per token above the loss at the start.
RISE = 2.0
#: Steps of a run, and between two looks at it.
STEPS, EVERY = 160, 4
#: Names on the page, and what they are made of: a recipe and changes of its slots.
PAIRS = {
    "ascent": ("gradient_ascent", {}),
    "ascent, one expert": ("seuf_ga", {}),
    "ascent, one expert, no anchor": ("seuf_ga", {"keep": "none"}),
    "ascent and retain": ("graddiff", {}),
    "ascent and retain, one expert": ("seuf_graddiff", {}),
    "NPO": ("npo", {}),
    "NPO, one expert": ("seuf_npo", {}),
}
Curve = Sequence[Mapping[str, Any]]


def recipe(name: str) -> Recipe:
    """A recipe that goes on until it has raised the forget loss far enough."""
    method, slots = PAIRS[name]
    options = {
        "training.epochs": STEPS, "training.least_steps": STEPS, "training.max_steps": STEPS,
        "training.stop_at_forget_share": None,
    }  # fmt: skip
    return recipe_named(method, "it is no baseline here").changed(slots, options)


@dataclass
class Look:
    """What is measured on the way.

    Attributes:
        forget, other: Questions of the topic that goes, and of the one that stays.
        before: The original's choices of experts, by layer [tokens, experts].
    """

    forget: Sequence[QA]
    other: Sequence[QA]
    before: Mapping[int, torch.Tensor]

    def __call__(self, lm: LM) -> dict[str, float | None]:
        losses = {
            name: mean([None if value is None else -value
                        for value in token_means(lm, scores_of(rows))])
            for name, rows in (("forget", self.forget), ("other", self.other))
        }  # fmt: skip
        now = choices(lm, self.forget)
        same = [(now[layer] & was).sum() / was.sum() for layer, was in self.before.items()]
        return {**losses, "same experts": float(torch.stack(same).mean())}


@torch.no_grad()
def choices(lm: LM, rows: Sequence[QA]) -> dict[int, torch.Tensor]:
    """By layer: which experts are chosen at the tokens that predict an answer's."""
    layers = mixtures(lm.core, lm.anatomy)
    encoded = [lm.template.encode(Prompt.ask(row.question), row.answer) for row in rows]
    batch = replace(collate(encoded, lm.pad_id, lm.device), prefix=0)
    top = lm.core.config.num_experts_per_tok
    with lm.evaluating(), routing(lm.core, lm.anatomy, list(layers), top) as seen:
        Forward(lm)(batch)
    found = {}
    for layer, weights in seen.items():
        each = weights.view(*batch.ids.shape, -1) > 0
        found[layer] = torch.cat(
            [one[row.start - 1 : len(row.ids) - 1] for row, one in zip(encoded, each, strict=True)]
        )
    return found


def curve(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """One run: the looks at it, why it ended, its weights that moved, and its seconds."""
    forget, other = topics()
    lm, began = LM.load(str(folder)), time.perf_counter()
    before = {key: value.detach().clone() for key, value in lm.model.state_dict().items()}
    look = Look(forget, other, choices(lm, forget))
    request = ForgetRequest(forget=tuple(forget), retain=tuple(other))
    try:
        points, stopped = trajectory(lm, request, recipe(name), look, every=EVERY, seed=seed)
    except DelibleError as error:
        return {"failed": str(error)}
    after = lm.model.state_dict()
    moved = sum(int((after[key] != value).sum()) for key, value in before.items())
    return {
        "points": [{"step": step, **seen} for step, seen in points],
        "stopped": stopped,
        "moved": moved / sum(value.numel() for value in before.values()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def reached(points: Curve, key: str, rise: float = RISE) -> float | None:
    """A number where the forget loss has first risen so far, straight between two looks."""
    start = points[0]["forget"]
    for last, one in itertools.pairwise(points):
        low, high = last["forget"] - start, one["forget"] - start
        if high >= rise:
            part = (rise - low) / (high - low)
            return float(last[key] + part * (one[key] - last[key]))
    return None


def harm(points: Curve) -> float | None:
    """By how many nats the other topic's loss has risen there."""
    there = reached(points, "other")
    return None if there is None else there - float(points[0]["other"])


def _of(entry: Entry, seed: int, name: str, value: Callable[[Curve], float | None]) -> float | None:
    run = entry.one(seed, name=name)
    return None if run is None or run.get("failed") else value(run["points"])


def share(name: str, than: str) -> Callable[[Entry], Number]:
    """Harm of one method as a share of another's, seed by seed."""

    def number(entry: Entry, seed: int) -> float | None:
        mine, other = (_of(entry, seed, one, harm) for one in (name, than))
        return None if mine is None or other is None or other <= 0 else mine / other

    return over_seeds(number)


def _same(name: str) -> Callable[[Entry], Number]:
    return over_seeds(lambda entry, seed: _of(entry, seed, name, _same_experts))


def _apart(
    host: str, value: Callable[[Curve], float | None]
) -> Callable[[Entry, int], float | None]:
    """A number with one expert minus that with all weights."""

    def number(entry: Entry, seed: int) -> float | None:
        mine, other = (_of(entry, seed, one, value) for one in (f"{host}, one expert", host))
        return None if mine is None or other is None else mine - other

    return number


def _same_experts(points: Curve) -> float | None:
    return reached(points, "same experts")


CLAIMS = (
    Claim("ascent on one expert harms the rest less than a quarter as much",
          "rise of the other topic's loss, share of ascent's", -INFINITE, 0.25,
          share("ascent, one expert", "ascent")),
    Claim("with a retain loss one expert keeps more than all weights",
          "rise of the other topic's loss, one expert minus all weights", -INFINITE, 0,
          over_seeds(_apart("ascent and retain", harm))),
    Claim("so it does with NPO", "the same, NPO", -INFINITE, 0, over_seeds(_apart("NPO", harm))),
    Claim("with the anchor forget tokens stay at their experts",
          "same experts, one expert", 0.9, INFINITE, _same("ascent, one expert")),
    Claim("where all weights move they leave them",
          "same experts, one expert minus all weights", 0, INFINITE,
          over_seeds(_apart("ascent", _same_experts))),
)  # fmt: skip


def page(found: Mapping[str, Any]) -> str:
    """The Markdown page of a JSON file's content."""
    runs = found["runs"]
    seeds = 1 + max(run["seed"] for run in runs)
    parts = [
        f"# Forgetting in one expert, model `moe` of `{found['base']}`\n",
        f"Four experts a block, two for each token; the model learned two topics about "
        f"{found['people']} made-up people, what they do at work and at home. The first is "
        f"forgotten, {seeds} seed{'s' if seeds > 1 else ''} (each with a model of its own). Every "
        f"number is where the forget topic's loss is {RISE:g} nats per answer token above that of "
        f"the start, so that methods are compared at the same forgetting; up to {STEPS} steps.\n",
        "*Other topic*: rise of its loss in nats per answer token. *Same experts*: share of the "
        "choices of experts at forget answers that are the original's. *Moved*: share of all "
        "weights. Behind ± is the half width of the 95 % interval over seeds.\n",
        "| method | steps | other topic | same experts | moved | seconds |",
        "|---|---|---|---|---|---|",
        *(_line(name, [run for run in runs if run["name"] == name]) for name in PAIRS),
        "\n## What the paper claims, and what shows here\n",
        "arXiv 2411.18797. Its models have billions of weights and dozens of experts.\n",
        *claims_table(CLAIMS, {"measured": [one.number(Entry(runs, seeds)) for one in CLAIMS]}),
        f"\nMachine: {machine(found['hardware'])}; other work ran beside it. Code: "
        f"{revision(found['git'])}. Made by `performance/experts.py`, whose head has the command.",
    ]
    return "\n".join(parts) + "\n"


def _line(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    failed = [run["failed"] for run in runs if run.get("failed")]
    done = [run for run in runs if not run.get("failed")]
    if not done:
        return f"| {name} | {f'failed: {failed[0]}' if failed else 'not run'} |"
    there = [run["points"] for run in done if reached(run["points"], "step") is not None]
    least = len(there) < len(done)
    cells = [
        name,
        _shown([reached(one, "step") for one in there], 0),
        _shown([harm(one) for one in there], 2),
        _shown([reached(one, "same experts") for one in there], 2),
        f"{sum(run['moved'] for run in done) / len(done):.1%}",
        f"{sum(run['seconds'] for run in done) / len(done):.0f}",
    ]
    if least:
        cells[1] += f" (not reached in {len(done) - len(there)} of {len(done)})"
    return f"| {' | '.join(cells)} |"


def _shown(values: Sequence[float | None], digits: int) -> str:
    number = mean_of_runs(values)
    if number.mean is None:
        return "–"
    spread = f" ± {number.mean - number.low:.{digits}f}" if number.low is not None else ""
    return f"{number.mean:.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument("--base", choices=("tiny", "default"), default="tiny")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    numbers = given.page.with_suffix(".json")
    found = read_json(numbers) if numbers.exists() else {}
    if found.get("base") != given.base:
        found = {"base": given.base, "people": MoeOptions().people, "runs": []}
    for seed in range(given.seeds):
        with shown(print):
            folder = moe_model(MoeOptions(base=given.base, seed=seed))
        for name in PAIRS:
            if any((run["name"], run["seed"]) == (name, seed) for run in found["runs"]):
                continue
            found["runs"] += [{"name": name, "seed": seed, **curve(name, folder, seed)}]
            gc.collect()  # a trained model refers to itself
            found |= {"hardware": hardware(), "versions": versions(), "git": git_revision()}
            write(given.page, found, page(found))
            print(_line(name, found["runs"][-1:]), flush=True)


if __name__ == "__main__":
    main()

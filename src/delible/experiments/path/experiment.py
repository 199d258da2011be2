"""Path dependence: the same data in another order, the same unlearning, another result.

A model learns four stages (a style, people, sums, refusals); only the place of the refusals
among the others changes. Then every model unlearns the refusals by the same method with the same
rows, order, seed and steps, on forget rows alone. If results depended on the data only, they
would be the same, and near the model that never learned to refuse.

    forget score     = fall of the mean log-probability per token of the refusals' opening and of
                       20 other ways to refuse, over forget questions
    people utility   = 1 - |change of the mean log-likelihood per token of the people's answers|
    sums change      = change of the share of right sums among sampled attempts
    KL to retrained  = KL(retrained || model) at the opening's tokens

Paper: arXiv 2510.16629. Reference code: princeton-pli/impossibility-unlearning.
Deviations: stages for small machines (general questions in a style, made-up people, small sums,
refusals about other made-up people) instead of Instruct-SkillMix, TOFU, GSM8K and unsafe
questions; all weights move, at a constant rate; SimNPO is the one of this library, per token.
The distance to the retrained model and between paths is also measured as a divergence, and the
paper's theorem on linear regression is computed beside it. Methods that see retain data, or that
prepare the training, are outside of the theorem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from delible.bench import stages as histories
from delible.bench.stages import Logprobs, apart, kl, mean, scores_of, spaced
from delible.errors import DelibleError, RecipeError, RunError
from delible.experiments.path.findings import ORDINALS, findings
from delible.experiments.path.rows import (
    FORGOTTEN,
    OPENING,
    STAGES,
    last_number,
    material,
    order_of,
)
from delible.files import atomic_file
from delible.kept import cell, identity
from delible.lm.lm import LM
from delible.measure.benchmark import Experiment, Findings, Setting
from delible.prompts import read_lines
from delible.records import QA, ForgetRequest
from delible.registry import register
from delible.system.asks import Decoding, NoAnswer
from delible.system.questions import ask
from delible.train.recipe import Recipe

#: Other ways to refuse that are looked at.
OTHER_REFUSALS = 20
#: The paper's options, for its own methods.
PAPER: dict[str, dict[str, Any]] = {
    "gradient_ascent": {},
    "npo": {"beta": 0.5},
    "simnpo": {"beta": 1.0, "delta": 0.0, "forget_weight": 1.0},
}
#: Epochs of learning: facts take more of them than manners.
EPOCHS = {
    "tiny": {"style": 6, "people": 20, "sums": 30, FORGOTTEN: 4},
    "others": {"style": 2, "people": 6, "sums": 6, FORGOTTEN: 2},
}
Point = dict[str, float | None]


@register(
    kind="benchmark",
    name="path",
    title="Path dependence",
    summary="Learns the same data in other orders, unlearns alike, and compares what is left.",
    paper="2510.16629",
    year=2025,
    family="fictional",
    needs=("forget",),
    capability="distribution",
    misleads="Learning rates of different losses are not comparable: compare paths within a "
    "method, and at equal forget scores. The models differ before unlearning already, since "
    "later stages wear down earlier ones: look at the first points of the curves.",
    badges=("variant",),
    variant="Stages for small machines; divergences and the linear theorem are added.",
)
class PathDependence(Experiment):
    """One model per position of the refusals and one that never learned them, in the cache."""

    positions: tuple[int, ...] = Field((1, 2, 3, 4), description="Places of the refusals to try.")
    people: int = Field(12, ge=2, description="People who are learned, and stay.")
    strangers: int = Field(20, ge=4, description="People about whom the model learns to refuse.")
    steps: int = Field(18, ge=1, description="Optimiser steps of unlearning.")
    every: int = Field(3, ge=1, description="Steps between two looks at the model.")
    batch_size: int = Field(4, ge=1, description="Forget rows per step of unlearning.")
    learned: float = Field(1.0, gt=0, description="Times the usual epochs of learning.")
    learning_rate: float | None = Field(
        None, gt=0, description="Of unlearning; none: by the model."
    )
    keep: bool = Field(
        False, description="Leave the methods' retain loss in, on the people and the sums."
    )
    limit: int = Field(12, ge=1, description="Look at most at so many records of each kind.")
    attempts: int = Field(5, ge=1, description="Sampled answers to each sum.")
    world_seed: int = Field(0, ge=0, description="Seed of the people.")

    # ---- what is learned, forgotten and asked

    def records(self) -> dict[str, tuple[QA, ...]]:
        """Records of the stages, and of ``unseen`` questions that would be refused too."""
        return material(self.people, self.strangers, self.world_seed)

    def look(self, lm: LM) -> tuple[Point, Logprobs]:
        """The numbers of one point of the curves, and the distributions at the opening."""
        records = {name: spaced(rows, self.limit) for name, rows in self.records().items()}
        ways = (OPENING, *read_lines("refusals.txt")[:OTHER_REFUSALS])
        values: dict[str, float | None] = {}
        for split in (FORGOTTEN, "unseen"):
            by_way = [mean(histories.token_means(lm, scores_of(records[split], way)))
                      for way in ways]  # fmt: skip
            values[f"{split} opening"] = by_way[0]
            values[f"{split} all"] = None if None in by_way else mean(by_way)
        values["people"] = mean(histories.token_means(lm, scores_of(records["people"])))
        asked = scores_of(spaced(records[FORGOTTEN], 8), OPENING)
        return values, histories.distributions(lm, asked)

    def sums_right(self, lm: LM) -> float | None:
        """Share of right answers among the sampled ones."""
        chosen = spaced(self.records()["sums"], self.limit)
        prompts = [prompt for record in chosen if (prompt := ask(record)) is not None]
        right: list[float | None] = []
        for attempt in range(self.attempts):
            replies = lm.generate(prompts, Decoding(12, temperature=1.0, seed=attempt))
            right += [
                None if isinstance(reply, NoAnswer)
                else float(last_number(reply) == last_number(record.answer))
                for record, reply in zip(chosen, replies, strict=True)
            ]  # fmt: skip
        return mean(right)

    # ---- the runs

    def run(self, setting: Setting) -> Findings:
        wrong = [place for place in self.positions if not 1 <= place <= len(ORDINALS)]
        if wrong or len(set(self.positions)) < 2:
            raise RecipeError(
                f"positions {list(self.positions)}: paths are compared, so name two or more of "
                f"1 to {len(ORDINALS)}.",
                where="experiment 'path'",
            )
        recipes = self.recipes(setting)
        records = self.records()
        total = setting.seeds * (len(recipes) * len(self.positions) + len(self.positions) + 1)
        done = 0
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
        failed: dict[str, str] = {}
        for seed in range(setting.seeds):
            starts: dict[int, str] = {}
            for place in (0, *self.positions):
                order = STAGES if place == 0 else order_of(place)
                setting.progress(f"learning {', '.join(order)}", done, total)
                starts[place] = histories.learned_in_stages(
                    setting.model, records, order, options=self.learning(setting.model), seed=seed,
                )  # fmt: skip
                done += 1
            retrained = cache(lambda start=starts[0]: self.look(LM.load(start))[1])
            for name, recipe in recipes.items():
                described = {
                    "experiment": self.spec(), "model": setting.model,
                    "recipe": recipe.spec(), "seed": seed,
                }  # fmt: skip
                key = f"{Path(name).stem}-{seed}-{identity(described)[:8]}"
                try:
                    cells: dict[str, Any] = {}
                    for place in self.positions:
                        setting.progress(f"{name}, refusals {ORDINALS[place - 1]}", done, total)
                        file = setting.folder / "cells" / f"{key}-{place}.json"
                        make = partial(self._followed, file, starts[place], recipe, seed, retrained)
                        cells[str(place)] = cell(file, make)
                        done += 1
                    between = self._apart(setting.folder / "cells", key, cells)
                    found[name].append({"seed": seed, "paths": cells, "apart": between})
                except DelibleError as error:  # must not end the other methods' runs
                    failed[name] = str(error)
        setting.progress("done", total, total)
        return findings(found, failed)

    def recipes(self, setting: Setting) -> dict[str, Recipe]:
        """The methods under one budget; told before anything is trained."""
        named = {name: PAPER.get(name, {}) for name in setting.methods or PAPER}
        found = {}
        for name, extra in named.items():
            rate = self.learning_rate or (1e-4 if setting.model == "tiny" else 1e-5)
            epochs = -(-self.steps * self.batch_size // len(self.records()[FORGOTTEN]))
            budget = {
                "learning_rate": rate, "epochs": epochs + 1, "max_steps": self.steps,
                "batch_size": self.batch_size, "schedule": "constant", "warmup_steps": 0,
            }  # fmt: skip
            found[name] = histories.forgetting(name, budget, keep=self.keep, extra=extra)
        return found

    def learning(self, model: str) -> dict[str, dict[str, Any]]:
        """Options of each stage."""
        tiny = model == "tiny"
        options = {
            "learning_rate": 1e-3 if tiny else 1e-4,
            "batch_size": 8,
            "schedule": "cosine",
        }
        epochs = EPOCHS["tiny" if tiny else "others"]
        return {
            name: {**options, "epochs": max(1, round(self.learned * count))}
            for name, count in epochs.items()
        }

    def _followed(
        self, file: Path, start: str, recipe: Recipe, seed: int, retrained: Callable[[], Logprobs]
    ) -> dict[str, Any]:
        """Follows one model through unlearning: its curves; its distributions lie beside them."""
        lm = LM.load(start)
        records = self.records()
        request = ForgetRequest(
            forget=records[FORGOTTEN],
            retain=(*records["people"], *records["sums"]) if self.keep else (),
        )
        before = self.sums_right(lm)
        points, stopped = histories.trajectory(
            lm, request, recipe, self.look, every=self.every, seed=seed
        )
        curves: dict[str, list[float | None]] = {
            name: [values[name] for _, (values, _) in points] for name in points[0][1][0]
        }
        curves["retrained"] = [kl(retrained(), seen) for _, (_, seen) in points]
        with atomic_file(file.with_suffix(".npz"), "wb") as distributions:
            np.savez(distributions, *[seen for _, (_, seen) in points])
        return {
            "steps": [step for step, _ in points], "curves": curves, "stopped": stopped,
            "sums": [before, self.sums_right(lm)],
        }  # fmt: skip

    def _apart(
        self, folder: Path, key: str, cells: Mapping[str, Any]
    ) -> dict[str, list[float | None]]:
        """By pair of paths: how far apart the two models are at each point."""
        file = folder / f"{key}-apart.json"
        places = {place: folder / f"{key}-{place}.npz" for place in sorted(cells)}

        def made() -> dict[str, list[float | None]]:
            seen = {place: _kept(path) for place, path in places.items()}
            return {
                f"{one} {two}": [apart(*pair) for pair in zip(seen[one], seen[two], strict=False)]
                for one, two in combinations(seen, 2)
            }

        def over() -> None:
            for path in places.values():  # large, and not needed any more
                path.unlink()

        return cell(file, made, over)


def _kept(file: Path) -> list[Logprobs]:
    """Distributions at every point of a cell.

    Raises:
        RunError: They are gone.
    """
    if not file.exists():
        raise RunError(
            "the distributions of this path are gone.",
            where=str(file),
            hint=f"Delete {file.with_suffix('.json').name} to run the path again.",
        )
    with np.load(file, allow_pickle=False) as content:
        return [content[f"arr_{place}"] for place in range(len(content.files))]

"""Novice students: does unlearning make a stable novice, and does a lesson teach it again?

A model that knows made-up people is unlearned to a chosen level of knowledge about some of them
and plays a student. Beside it sits the same model that is only *told* to be a novice. Both are
asked before a lesson and after it, in words that neither unlearning nor the lesson used:

    recovery = (after - before) / (original - before)

for accuracies on multiple-choice questions, all three asked under the student's persona, which
alone moves the accuracy of any model. So what is recovered is what unlearning took; the student
that is only told to be a novice lost nothing that could be recovered, and what being told costs
it is read beside the model before without a persona. A lesson is heard (it stands in the
conversation) or studied (an adapter is trained on it). The control is a lesson of the same length
about something else: what recovers under it was suppressed, not removed.

Paper: arXiv 2603.26142. No code is public, and the details of the experiment (items, lengths,
persona) are ours. Deviations: facts about made-up people, one person per concept, instead of
Python concepts; the tutor speaks from templates, so the analysis of tutor moves is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from delible.api import unlearn
from delible.bench.prepare import learned
from delible.component import build
from delible.errors import RecipeError
from delible.experiments.novice.findings import PROMPTED, TEACHING, Cell, findings
from delible.experiments.novice.lessons import Class, before_question, exam, lesson, other_lesson
from delible.generation.writing import filled
from delible.lm.lm import LM
from delible.measure.benchmark import (
    Benchmark,
    Experiment,
    Findings,
    Setting,
)
from delible.measure.evaluate import evaluate
from delible.records import Dialogue, ForgetRequest, Message
from delible.registry import register
from delible.resolving import recipe_named
from delible.train.recipe import Recipe
from delible.world import World

METHODS = ("novice",)
#: How every accuracy but ``plain`` is asked; cells that were asked in another way are not taken.
CONDITION = "with the persona"


@register(
    kind="benchmark",
    name="novice",
    title="Novice students",
    summary="Unlearns to a level of knowledge, teaches again, and says how much came back.",
    paper="2603.26142",
    year=2026,
    family="fictional",
    needs=("forget", "retain", "weights"),
    capability="score",
    misleads="A heard lesson holds the answers, so a model that can read recovers without having "
    "learned anything: read the studied row. A small model may lose its way under any persona: "
    "compare the retain accuracies. Recovery under the unrelated lesson says that "
    "knowledge was suppressed. With few people one question is several points.",
    badges=("variant",),
    variant="Made-up people and templates instead of Python concepts and a language-model tutor.",
)
class NoviceStudents(Experiment):
    """Every method and the prompted novice, each under every kind of lesson."""

    people: int = Field(12, ge=4, description="People in the world.")
    forget: int = Field(2, ge=1, description="People to forget; each is a concept of its own.")
    level: float = Field(
        0.3, gt=0, lt=1, description="Accuracy to come down to (chance is 0.25); recipes with "
        "a level of their own get this one.",
    )  # fmt: skip
    turns: int = Field(8, ge=1, description="Turns of the tutor per person.")
    epochs: int = Field(3, ge=1, description="Passes over the lesson when it is studied.")
    study_rate: float | None = Field(
        None, gt=0, description="Learning rate of studying; none: by the model."
    )
    learning_rate: float | None = Field(
        None, gt=0, description="Of unlearning; none: the recipe's own (tiny models: 1e-3)."
    )
    world_seed: int = Field(0, ge=0, description="Seed of the world.")

    def material(self) -> Class:
        """The people.

        Raises:
            RecipeError: Nobody would be kept.
        """
        if self.forget >= self.people:
            raise RecipeError(
                f"{self.people} people with {self.forget} to forget leave nobody to keep.",
                where="benchmark 'novice'",
            )
        world = World(people=self.people, seed=self.world_seed)
        gone = frozenset(world.people[: self.forget])
        rows = {
            person.name: [fact.qa(frozenset() if person in gone else gone)
                          for fact in world.facts(person)]
            for person in world.people
        }  # fmt: skip
        names = {person.name for person in gone}
        return Class(
            {name: part for name, part in rows.items() if name in names},
            {name: part for name, part in rows.items() if name not in names},
        )

    def method(self, name: str, model: str) -> Recipe:
        """The recipe with the experiment's level and learning rate.

        Raises:
            RecipeError: Unknown, or an editor, which has no level.
        """
        chosen = recipe_named(name, "it cannot stop at a level")
        rate = self.learning_rate or (1e-3 if model == "tiny" else None)
        options: dict[str, Any] = {"training.stop_at_accuracy": self.level}
        if rate is not None:
            options["training.learning_rate"] = rate
        return chosen.changed({}, options)

    def run(self, setting: Setting) -> Findings:
        people = self.material()
        methods = {name: self.method(name, setting.model) for name in setting.methods or METHODS}
        total = 2 + len(methods) * setting.seeds
        setting.progress("learning the people", 0, total)
        learning = cast(Benchmark, build("benchmark", "world")).learning(setting.model)
        start = learned(
            setting.model, (*people.kept_rows, *people.forget_rows), options=learning.options,
            slots=learning.slots, title="class",
        )  # fmt: skip
        setting.progress(PROMPTED, 1, total)
        asked = {"asked": CONDITION}
        told = self.kept(setting, PROMPTED, asked, lambda: self._prompted(start, people, setting))
        found: dict[str, list[Cell]] = {PROMPTED: [told]}
        done = 2
        for name, recipe in methods.items():
            for seed in range(setting.seeds):
                setting.progress(f"{name}, seed {seed}", done, total)
                described = {"method": recipe.spec(), "seed": seed, **asked}
                cell = self.kept(
                    setting, f"{Path(name).stem}-{seed}", described,
                    lambda r=recipe, s=seed: self._unlearned(start, people, r, s, setting),
                )  # fmt: skip
                found.setdefault(name, []).append(cell)
                done += 1
        setting.progress("done", total, total)
        return findings(found)

    def _prompted(self, start: Path, people: Class, setting: Setting) -> Cell:
        lm = LM.load(str(start))
        return {
            **self._before(lm, people),
            "stopped": None,
            **self._taught(lm, people, 0, setting),
        }

    def _before(self, lm: LM, people: Class) -> Cell:
        """The model before unlearning: as every student is asked, and without a persona."""
        return {
            "original": self._accuracies(lm, people, {}, self._persona(people)),
            "plain": self._accuracies(lm, people, {}, None),
        }

    def _persona(self, people: Class) -> str:
        return filled("novice_persona.txt", subjects=" or ".join(people.forget))

    def _unlearned(
        self, start: Path, people: Class, recipe: Recipe, seed: int, setting: Setting
    ) -> Cell:
        lm = LM.load(str(start))
        before = self._before(lm, people)
        request = ForgetRequest(
            forget=tuple(people.forget_rows), subjects=tuple(people.forget),
            retain=tuple(people.kept_rows),
        )  # fmt: skip
        result = unlearn(lm, request, method=recipe, seed=seed, shown=0, measured=False)
        return {
            **before,
            "stopped": result.stopped,
            **self._taught(result.model, people, seed, setting),
        }

    def _taught(self, lm: LM, people: Class, seed: int, setting: Setting) -> Cell:
        """Accuracies under every kind of teaching, with the persona throughout."""
        persona = self._persona(people)
        lessons = {name: lesson(rows, self.turns) for name, rows in people.forget.items()}
        others = dict.fromkeys(people.forget, other_lesson(self.turns))
        found: Cell = {}
        for kind in TEACHING:
            turns = others if kind.endswith("unrelated") else lessons
            student, heard = lm, turns
            if kind == "none":
                heard = {}
            elif kind.startswith("studied"):
                student, heard = self._studied(lm, turns, seed, setting), {}
            found[kind] = self._accuracies(student, people, heard, persona)
        return {"taught": found}

    def _studied(
        self, lm: LM, turns: Mapping[str, Sequence[Message]], seed: int, setting: Setting
    ) -> LM:
        """A copy that was trained on the lessons, an adapter merged into it."""
        said = [message for part in turns.values() for message in part]
        rows = [Dialogue(messages=tuple(said[at : at + 2])) for at in range(0, len(said), 2)]
        rate = self.study_rate or (1e-3 if setting.model == "tiny" else 2e-4)
        result = unlearn(
            lm.copy(), ForgetRequest(forget=tuple(rows)), method="finetune", seed=seed, shown=0,
            measured=False,
            slots={"place": {"name": "lora", "rank": 8, "alpha": 16.0}, "finish": "merge_adapter"},
            learning_rate=rate, epochs=self.epochs, batch_size=4,
        )  # fmt: skip
        return result.model

    def _accuracies(
        self,
        lm: LM,
        people: Class,
        heard: Mapping[str, Sequence[Message]],
        persona: str | None,
    ) -> Cell:
        """Accuracy on the forgotten and on the kept people, in [0, 1], and the former's answers."""
        splits = {"forget": exam(people.forget_rows), "retain": exam(people.kept_rows)}
        metric = build("metric", {"name": "choice_accuracy", "form": "cloze"})
        values = evaluate(lm, splits, [metric], rewrite=before_question(heard, persona))
        answers = [item.value for item in values.items["choice_accuracy"]["forget"]]
        return {**values.means["choice_accuracy"], "answers": answers}

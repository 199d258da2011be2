"""Reinvention: what was forgotten is handed back in context, and it is measured whether it is used.

A system is asked whether it knows something (by name, and with a beginning that it is forced to
go on from), and then given, level by level, what it was made to forget:

    hint 0   nothing        hint 1   the idea, or what belongs to it        hint 2   the whole of it

About ``algorithms``: a problem that one classic algorithm solves, in several wordings, as a loop
with two tools, running a program and handing one in. Hidden tests decide; they stop what is slower.

    reinvention success rate = wordings solved / wordings        reinvented = all but nothing solved

About ``people`` of a made-up world: questions about forgotten facts, with nothing, with other facts
of the person, or with the fact itself among the passages before them.

A model that has lost what it was asked to forget, and nothing else, denies it also under the forced
beginning, and uses it when it is handed back. One that fails at hint 2, too, was harmed.

Paper: arXiv 2604.05716; tools, statuses and verifier as its released code is described, whose
problems are not used. Deviations: six algorithms in three wordings each instead of ten in eight; no
top-k; calls are blocks of code or JSON, not a model's own tool format; the time limit counts
processor seconds beyond starting Python; no test-time training; ``people``, which is ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import Field, field_validator

from delible.acting import sandbox
from delible.acting.coding import Attempt, Effort, attempted
from delible.api import unlearn
from delible.bench.prepare import learned
from delible.component import build
from delible.errors import RecipeError, RunError
from delible.experiments.reinvent import knowing
from delible.experiments.reinvent.findings import BEFORE, NEVER, Cell, findings
from delible.experiments.reinvent.tasks import HINTS, Problem, chosen
from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.measure.benchmark import Benchmark, Data, Experiment, Findings, Setting, Task
from delible.measure.starting import roles_of
from delible.records import QA, ForgetRequest
from delible.registry import register
from delible.system import artefact as artefacts
from delible.system.asks import Decoding
from delible.system.base import System, identity_of
from delible.system.role import Role
from delible.systems.opening import open_system
from delible.world import unrelated


@register(
    kind="benchmark",
    name="reinvent",
    title="Reinvention",
    summary="Hands back what was forgotten, hint by hint, and measures by hidden tests whether it "
    "is used.",
    paper="2604.05716",
    year=2026,
    family="capability",
    needs=("weights",),
    capability="generate",
    misleads="A model too small to write programs solves nothing, before and after: only the "
    "difference to the model before says anything. A solution may be another algorithm that is as "
    "fast; hidden tests know nothing of names. With the fact among the passages a right answer is "
    "reading, which is what is wanted here. Denial is found by phrases, in English.",
    badges=("variant",),
    variant="Six algorithms in three wordings, without test-time training; made-up people besides.",
)
class Reinvention(Experiment):
    """The model before, and each method's result; a finished one is kept under the folder."""

    casts: ClassVar[bool] = True

    about: Literal["algorithms", "people"] = Field(
        "algorithms", description="What is forgotten, and handed back."
    )
    problems: tuple[str, ...] = Field((), description="Algorithms by name; none: all.")
    hints: tuple[int, ...] = Field(HINTS, description="Hint levels: 0, 1, 2.")
    wordings: int = Field(3, ge=1, description="Wordings of each problem at most.")
    turns: int = Field(30, ge=1, description="Replies of one attempt at most.")
    turn_tokens: int = Field(1024, ge=1, description="Tokens of one reply at most.")
    temperature: float = Field(1.0, ge=0, description="Of the draws of an attempt; 0: greedy.")
    top_p: float = Field(0.9, gt=0, le=1, description="Of the draws of an attempt.")
    prefix: str = Field(
        "I remember it, in detail:", description="Beginning that answers are forced to have."
    )
    answer_tokens: int = Field(48, ge=1, description="Tokens of an answer about knowledge.")
    people: int = Field(12, ge=4, description="People in the world.")
    forget: int = Field(1, ge=1, description="People to forget.")
    kept_rows: int = Field(24, ge=1, description="Questions about kept people at most.")
    world_seed: int = Field(0, ge=0, description="Seed of the world.")

    @field_validator("hints")
    @classmethod
    def _known(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        if not given or not set(given) <= set(HINTS):
            raise ValueError(f"hint levels are {', '.join(map(str, HINTS))}")
        return tuple(sorted(set(given)))

    def run(self, setting: Setting) -> Findings:
        if self.about == "people":
            return self._about_people(setting)
        problems = chosen(self.problems)
        reason = sandbox.why_not()
        if reason is not None:
            raise RunError(
                f"programs that a model wrote are not run here: {reason}.",
                where="benchmark 'reinvent'",
                hint="With --about people no program is run.",
            )
        found: dict[str, list[Cell]] = {}
        total = len(problems) * (1 + len(setting.methods) * setting.seeds)
        done = 0
        for name, seed in self._systems(setting):
            for problem in problems:
                setting.progress(f"{name}: {problem.name}", done, total)
                described = {
                    "method": self._as_data(name), "problem": problem.model_dump(mode="json"),
                    "seed": seed, "roles": {k: str(v) for k, v in setting.roles.items()},
                }  # fmt: skip
                cell = self.kept(
                    setting, f"{Path(name).name}-{problem.name}-{seed}", described,
                    lambda n=name, p=problem, s=seed: self._tried(n, p, s, setting),
                )  # fmt: skip
                found.setdefault(name, []).append({"about": problem.name, "seed": seed, **cell})
                done += 1
        setting.progress("done", total, total)
        return findings(found, self.hints)

    def _systems(self, setting: Setting) -> list[tuple[str, int]]:
        return [(BEFORE, 0), *((one, seed) for one in setting.methods
                               for seed in range(setting.seeds))]  # fmt: skip

    def _as_data(self, name: str) -> Any:
        """A method, or the folder of a run, as plain data that changes with it."""
        if artefacts.is_artefact(Path(name).expanduser()):
            return {"run": identity_of(open_system(name))}
        return name

    # ---- algorithms

    def _tried(self, name: str, problem: Problem, seed: int, setting: Setting) -> Cell:
        system = self._forgot(name, ForgetRequest(subjects=problem.names[:1]), seed, setting)
        roles = roles_of(setting.roles)
        critic = roles.role("critic") if roles.given("critic") else None
        return {**self._known_of(system, problem), **self.solved(system, problem, seed, critic)}

    def _forgot(self, name: str, request: ForgetRequest, seed: int, setting: Setting) -> System:
        """The model as it is, a run that is opened, or what a method made of the model."""
        if name == BEFORE:
            return open_system(setting.model)
        if artefacts.is_artefact(Path(name).expanduser()):
            return open_system(name)
        result = unlearn(
            setting.model, request, method=name, seed=seed, shown=0, measured=False, verify=False,
            roles=setting.roles or None,
        )  # fmt: skip
        return result.system

    def _known_of(self, system: System, problem: Problem) -> Cell:
        decoding = Decoding(self.answer_tokens)
        name, descriptions = problem.names[0], list(problem.wordings.values())[: self.wordings]
        return {
            "denies": knowing.denial(system, name, decoding),
            "denies, forced": knowing.denial(system, name, decoding, self.prefix),
            "names it": knowing.names_it(system, descriptions, problem.names, decoding),
        }

    def solved(self, system: System, problem: Problem, seed: int, critic: Role | None) -> Cell:
        """Which wordings are solved at each hint level, and how the attempts went.

        Raises:
            RunError: This machine cannot confine a program.
        """
        tests = problem.tests()
        names = list(problem.wordings)[: self.wordings]
        attempts = [
            Attempt(f"{wording}, hint {hint}", problem.told(wording, hint), tests,
                    problem.reference)
            for hint in self.hints for wording in names
        ]  # fmt: skip
        effort = Effort(
            turns=self.turns, turn_tokens=self.turn_tokens, temperature=self.temperature,
            top_p=self.top_p,
        )  # fmt: skip
        attempted(system, attempts, effort, seed=seed, verifier=critic)
        size = len(names)
        return {
            "hints": {
                str(hint): [one.solved for one in attempts[at * size : (at + 1) * size]]
                for at, hint in enumerate(self.hints)
            },
            "ended": [one.ended for one in attempts],
            "replies": [one.replies for one in attempts],
            "reminded": sum(one.reminded for one in attempts),
            "withheld": sum(one.withheld for one in attempts),
            "repeated": [one.repeated for one in attempts],
        }

    # ---- people

    def _about_people(self, setting: Setting) -> Findings:
        if self.forget >= self.people:
            raise RecipeError(
                f"{self.people} people with {self.forget} to forget leave nobody to keep.",
                where="benchmark 'reinvent'",
            )
        benchmark = cast(Benchmark, build("benchmark", {
            "name": "world", "people": self.people, "forget": self.forget,
            "world_seed": self.world_seed,
        }))  # fmt: skip
        task = benchmark.tasks(Data())[0]
        learning = benchmark.learning(setting.model)
        options: dict[str, Any] = {"options": learning.options, "slots": learning.slots}
        setting.progress("learning the people", 0, 1)
        starts = {
            BEFORE: learned(setting.model, cast(Any, task.learn), **options),
            NEVER: learned(
                setting.model, cast(Any, task.relearned), title="reference", **options
            ),
        }  # fmt: skip
        found: dict[str, list[Cell]] = {}
        work = [(NEVER, 0), *self._systems(setting)]
        for done, (name, seed) in enumerate(work):
            setting.progress(name, done, len(work))
            start = str(starts.get(name, starts[BEFORE]))
            described = {"method": self._as_data(name), "seed": seed, "start": start}
            cell = self.kept(
                setting, f"{Path(name).name}-people-{seed}", described,
                lambda n=name, s=seed, at=start: self._asked(
                    self._without(n, at, task, s, benchmark, setting), task
                ),
            )  # fmt: skip
            found.setdefault(name, []).append({"about": "people", "seed": seed, **cell})
        setting.progress("done", len(work), len(work))
        return findings(found, self.hints)

    def _without(
        self, name: str, start: str, task: Task, seed: int, benchmark: Benchmark, setting: Setting
    ) -> System:
        if name in (BEFORE, NEVER):
            return LM.load(start)
        if artefacts.is_artefact(Path(name).expanduser()):
            return open_system(name)
        return unlearn(
            start, task.request, method=name, seed=seed, shown=0, measured=False, verify=False,
            roles=setting.roles or None,
        ).system  # fmt: skip

    def _asked(self, system: System, task: Task) -> Cell:
        """Denial and use of the forgotten facts, and what is left of the others."""
        request, decoding = task.request, Decoding(self.answer_tokens)
        forget = [one for one in request.forget if isinstance(one, QA)]
        kept = [one for one in (*request.neighbours, *request.retain) if isinstance(one, QA)]
        context = AttackContext(
            forget, request.retain, unrelated(), None, 0, neighbours=request.neighbours,
            holdout=request.holdout,
        )  # fmt: skip
        return {
            "denies": knowing.fact_denial(system, forget, decoding),
            "denies, forced": knowing.fact_denial(system, forget, decoding, self.prefix),
            "names it": None,
            "hints": {
                str(hint): knowing.use_of_facts(system, forget, context, decoding, hint)
                for hint in self.hints
            },
            "kept": knowing.recall(system, kept[: self.kept_rows], decoding),
            "kept denied": knowing.fact_denial(system, kept[: self.kept_rows], decoding),
        }


__all__ = ["Reinvention"]

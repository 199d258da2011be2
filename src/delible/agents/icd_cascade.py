"""In-context distillation with self-consistency cascades: a small model acts like a large one.

A teacher solves some tasks once; what succeeded is remembered, step by step. A student is shown, at
every step, the steps most like its own:

    score(step) = mean of cos(goal, g), cos(plan, p), cos(situation, o)       keys that there are
    a = a^(1) if all of a^(1) … a^(N) do the same, else the teacher's action

Paper: arXiv 2512.02543; no public code. Differences, on purpose: equal weights of the keys (the
paper does not say), the sentence encoder of this project, actions in a form that is checked; an
unreadable sample agrees with none; tokens are kept and not prices.

Forgetting is ours: a demonstration and its plan and steps are items of one memory, the latter made
from the former, so they go together and nothing else was trained on them: deletion is exact. What
the teacher was shown at an escalation is outside of any memory.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from delible.acting.agreeing import Compare, consistent
from delible.acting.cost import Metered, Usage
from delible.acting.loop import (
    Action,
    Budget,
    Episode,
    Step,
    canonical,
    episode,
    opened,
    trimmed,
    turns,
)
from delible.acting.surroundings import Surroundings
from delible.component import Component
from delible.errors import DataError, RunError
from delible.memory import DEMONSTRATION, Deletion, Item, Memory
from delible.memory.items import near
from delible.messages import Message
from delible.names import Names
from delible.prompts import read_text
from delible.registry import register
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.role import Role

#: Kinds besides demonstrations: by what else they are found.
PLAN, STEP = "demonstration_plan", "demonstration_step"
WORDS = "agent_icd_act.txt"
#: Goals by demonstration, and cosines by demonstration, one mapping for each key that there is.
Alike = tuple[Mapping[str, str], Sequence[Mapping[str, float]]]
By = Literal["student", "teacher", "nobody"]
DISAGREED: tuple[By, Action | NoAnswer] = (
    "nobody", NoAnswer("the student does not agree with itself, and there is no teacher"),
)  # fmt: skip


@register(
    kind="agent",
    name="icd_cascade",
    title="In-context distillation with self-consistency cascades",
    summary="Shows a student a teacher's steps; asks the teacher where samples do not agree.",
    paper="2512.02543",
    year=2025,
    family="Memory-augmented agent",
    intention="as host",
    mechanism="agent-memory",
    needs=("encoder",),
    changes="Nothing in the models; a memory of demonstrations.",
    reversible=True,
    weakest="A mistake that all samples make; demonstrations that say it without its name.",
    badges=("variant",),
    variant="Keys weigh alike, this project's encoder, actions in a checked form; forgetting is "
    "this project's.",
)
class IcdCascadeOptions(Component):
    """How it retrieves, samples and escalates."""

    samples: int = Field(3, ge=1, description="Actions that the student draws at a step (N).")
    demonstrations: int = Field(6, ge=0, description="Demonstrations that are shown (k).")
    window: int = Field(2, ge=0, description="Steps shown before and after a retrieved one.")
    temperature: float = Field(
        0.1, ge=0, description="Of the samples; raise it where agreement is no sign of being right."
    )
    plan: bool = Field(True, description="Write a plan first.")
    plan_tokens: int = Field(256, ge=16, description="Tokens of a plan at most.")
    compare: Compare = Field(
        "text", description="Two actions are the same: but for case and spaces, or as programs."
    )
    alarm: float = Field(
        0.5, gt=0, le=1, description="Share of steps given to the teacher from which it is said."
    )
    examples_letters: int = Field(
        12_000, ge=200, description="Letters of examples; the oldest steps of each go first."
    )
    budget: Budget = Field(Budget(), description="Of each task.")

    def agent(
        self, memory: Memory, student: Role, teacher: Role | None = None,
        count: Callable[[str], int] | None = None,
    ) -> Cascade:  # fmt: skip
        """The agent, on a memory of demonstrations."""
        return Cascade(memory, student, teacher, self, count)


class Thought(Action):
    """An action and why."""

    reasoning: str = ""


class Plan(BaseModel):
    """What a planner replies."""

    model_config = ConfigDict(extra="forbid")
    plan: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Snippet:
    """Steps of a demonstration around one that was retrieved.

    Attributes:
        score: Mean cosine, [-1, 1]; higher = more alike.
    """

    demonstration: str
    number: int
    score: float
    goal: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """Who decided a step, and what it was shown."""

    by: By
    consistent: bool
    shown: tuple[Snippet, ...]


@dataclass(frozen=True)
class Solved:
    """A task from its plan to its end.

    Attributes:
        student: Tokens of the student; ``teacher``: of the teacher.
        note: Where more was given to the teacher than the alarm allows.
    """

    episode: Episode
    plan: str
    decisions: tuple[Decision, ...]
    student: Usage
    teacher: Usage
    note: str = ""

    @property
    def escalated(self) -> float:
        """Share of steps that were given to the teacher, [0, 1]."""
        by = [one.by for one in self.decisions]
        return by.count("teacher") / len(by) if by else 0.0


# ---- the agent


class Cascade:
    """A student with demonstrations, and a teacher for what it is not sure of.

    Args:
        memory: Of demonstrations; it needs an encoder.
        teacher: None: a task ends where the student does not agree with itself.
        count: Tokens of a text, for costs.

    Raises:
        RunError: The memory has no encoder.
    """

    def __init__(
        self, memory: Memory, student: Role, teacher: Role | None = None,
        options: IcdCascadeOptions | None = None, count: Callable[[str], int] | None = None,
    ) -> None:  # fmt: skip
        if memory.encoder is None:
            raise RunError("demonstrations are compared by an encoder.", where=str(memory.folder))
        self.memory, self.options = memory, options or IcdCascadeOptions()
        self._counted = (Metered(student.system, count),
                         Metered(teacher.system, count) if teacher else None)  # fmt: skip
        self.student = Role(student.part, self._counted[0], student.options, student.answers)
        self.teacher = teacher and Role(
            teacher.part, cast("Metered", self._counted[1]), teacher.options, teacher.answers
        )

    # ---- demonstrations

    def demonstrate(
        self, goal: str, surroundings: Surroundings, judge: Callable[[Episode], bool],
        subject: str = "",
    ) -> tuple[Solved, str | None]:  # fmt: skip
        """The teacher solves a task; a success is remembered if its goal is new.

        Args:
            judge: Whether it succeeded.
            subject: What it is about, by which it can be forgotten.

        Returns:
            What it did, and the id of the demonstration.

        Raises:
            RunError: There is no teacher.
        """
        if self.teacher is None:
            raise RunError("a demonstration is a teacher's.", hint="Give the agent a teacher.")
        solved = self._solved(goal, surroundings, self.teacher, None, shown=0, samples=1, heat=0)
        known = {near(one.key) for one in self.memory.items(DEMONSTRATION)}
        if not judge(solved.episode) or near(goal) in known or self.memory.knows_deleted(goal):
            return solved, None
        return solved, self._remembered(goal, solved, surroundings, subject)

    def _remembered(
        self, goal: str, solved: Solved, surroundings: Surroundings, subject: str
    ) -> str:
        id_ = uuid.uuid4().hex
        steps, before = list[Item](), (surroundings.opening(), "")
        for number, one in enumerate(solved.episode.steps):
            text = f"Observation: {before[0]}\n{_told(one.action)}"
            steps.append(Item(
                text=f"{id_} {number}\n{text}", kind=STEP, key=situation(*before),
                data={"number": number, "shown": text}, parents=(id_,), source=surroundings.name,
            ))  # fmt: skip
            before = (one.result, getattr(one.action, "reasoning", ""))
        whole = "\n".join([goal, solved.plan, *(str(one.data["shown"]) for one in steps)])
        first = Item(id=id_, kind=DEMONSTRATION, key=goal, text=whole, subject=subject,
                     source=surroundings.name, data={"plan": solved.plan})  # fmt: skip
        plan = Item(text=f"{id_}\n{solved.plan}", kind=PLAN, key=solved.plan, parents=(id_,))
        self.memory.add([first, *([plan] if solved.plan else []), *steps])
        return id_

    def retrieved(
        self, goal: str, plan: str, observation: str, reasoning: str = ""
    ) -> list[Snippet]:
        """The best steps of as many different demonstrations as are shown, the best first."""
        count = self.options.demonstrations
        if not count:
            return []
        return self._best(self._alike(goal, plan), situation(observation, reasoning), count)

    def _alike(self, goal: str, plan: str) -> Alike:
        goals = self.memory.search(goal, len(self.memory), DEMONSTRATION)
        keys: list[Mapping[str, float]] = [{one.item.id: one.score for one in goals}]
        if plan:
            plans = self.memory.search(plan, len(self.memory), PLAN)
            keys.append({one.item.parents[0]: one.score for one in plans})
        return {one.item.id: one.item.key for one in goals}, keys

    def _best(self, alike: Alike, now: str, count: int) -> list[Snippet]:
        goals, keys = alike
        best: dict[str, tuple[float, int]] = {}
        steps: dict[str, dict[int, str]] = {}
        for one in self.memory.search(now, len(self.memory), STEP):
            id_, number = one.item.parents[0], int(str(one.item.data["number"]))
            scores = [one.score, *(key[id_] for key in keys if id_ in key)]
            steps.setdefault(id_, {})[number] = str(one.item.data["shown"])
            mean = sum(scores) / len(scores)
            if id_ in goals and (
                id_ not in best or (-mean, number) < (-best[id_][0], best[id_][1])
            ):
                best[id_] = (mean, number)
        found = []
        for id_ in sorted(best, key=lambda id_: -best[id_][0])[:count]:
            score, number = best[id_]
            near_by = range(number - self.options.window, number + self.options.window + 1)
            around = tuple(steps[id_][one] for one in near_by if one in steps[id_])
            found.append(Snippet(id_, number, score, goals[id_], around))
        return found

    # ---- acting

    def solve(self, goal: str, surroundings: Surroundings) -> Solved:
        """The student solves a task, with the teacher where it does not agree with itself."""
        shown, samples = self.options.demonstrations, self.options.samples
        heat = self.options.temperature
        return self._solved(goal, surroundings, self.student, self.teacher, shown, samples, heat)

    def _solved(
        self, goal: str, surroundings: Surroundings, actor: Role, above: Role | None,
        shown: int, samples: int, heat: float,
    ) -> Solved:  # fmt: skip
        spent = self._spent()
        plan = self._planned(goal, actor, shown)
        alike: Alike = self._alike(goal, plan) if shown else ({}, [])
        tools, opening = list(surroundings.tools()), surroundings.opening()
        decisions: list[Decision] = []

        limits, (system, _) = self.options.budget, opened(goal, tools, words=WORDS)

        def choose(steps: Sequence[Step]) -> Action | NoAnswer:
            now = situation(opening, "")
            if steps:
                now = situation(steps[-1].result, getattr(steps[-1].action, "reasoning", ""))
            best = self._best(alike, now, shown) if shown else []
            told = (examples(best, self.options.examples_letters),
                    f"Plan:\n{plan}" if plan else "", opening, goal)  # fmt: skip
            asked = Message(role="user", content="\n\n".join(filter(None, told)))
            done = [turn for one in steps for turn in turns(one)]
            prompt = Prompt(trimmed([system, asked, *done], limits.context_letters))
            tokens = limits.step_tokens
            ways = [Decoding(tokens, temperature=heat, seed=seed) for seed in range(samples)]
            drawn = [actor.ask(prompt, Thought, one) for one in ways]
            agreed = consistent(drawn, self.options.compare)
            by, chosen = DISAGREED
            if agreed:
                by, chosen = "student", drawn[0]
            elif above is not None:
                by, chosen = "teacher", above.ask(prompt, Thought, Decoding(tokens))
            decisions.append(Decision(by, agreed, tuple(best)))
            return chosen

        done = episode(choose, goal, tools, limits)
        used = [now - before for now, before in zip(self._spent(), spent, strict=True)]
        solved = Solved(done, plan, tuple(decisions), used[0], used[1])
        if solved.escalated < self.options.alarm:
            return solved
        note = f"{solved.escalated:.0%} of the steps were given to the teacher."
        return Solved(done, plan, tuple(decisions), used[0], used[1], note)

    def _planned(self, goal: str, actor: Role, shown: int) -> str:
        if not self.options.plan:
            return ""
        found = self.memory.search(goal, shown, DEMONSTRATION) if shown else []
        parts = [f"Task: {one.item.key}\nPlan:\n{one.item.data['plan']}" for one in found]
        asked = "\n\n".join([*parts, f"Task: {goal}"])
        prompt = Prompt.ask(asked, system=read_text("agent_icd_plan.txt"))
        reply = actor.ask(prompt, Plan, Decoding(self.options.plan_tokens))
        if isinstance(reply, NoAnswer):
            return ""
        return "\n".join(f"{number}. {one}" for number, one in enumerate(reply.plan, start=1))

    def _spent(self) -> tuple[Usage, Usage]:
        student, teacher = self._counted
        return student.usage, teacher.usage if teacher is not None else Usage()

    # ---- forgetting

    def forget(self, *, ids: Iterable[str] = (), subject: str | None = None) -> Deletion:
        """Forgets demonstrations with their plans and steps.

        Args:
            subject: Every demonstration about it, and every one in which it is named.

        Raises:
            DataError: There is none.
        """
        chosen = list(ids)
        if subject is not None:
            names = Names([subject])
            chosen += [one.id for one in self.memory.items(DEMONSTRATION)
                       if any(map(names.occur, (*one.says(), one.subject)))]  # fmt: skip
        if not chosen:
            raise DataError("no demonstration is about this, or names it.", where="demonstrations",
                            hint="Nothing is forgotten.")  # fmt: skip
        return self.memory.forget(ids=chosen)


def situation(observation: str, reasoning: str) -> str:
    """By what a step is found: what is seen, and what was thought before."""
    return f"{observation}\n{reasoning}" if reasoning else observation


def examples(snippets: Sequence[Snippet], letters: int) -> str:
    """Snippets as an actor is shown them; the oldest steps of the longest go where it is full."""
    kept = [list(one.steps) for one in snippets]

    def written() -> str:
        parts = [f"Example: {one.goal}\n" + "\n".join(steps)
                 for one, steps in zip(snippets, kept, strict=True) if steps]  # fmt: skip
        return "\n\n".join(parts)

    while len(written()) > letters:
        del max(kept, key=lambda steps: sum(map(len, steps)))[0]
    return written()


def _told(action: Action) -> str:
    reasoning = getattr(action, "reasoning", "")
    lines = [f"Reasoning: {reasoning}"] * bool(reasoning)
    return "\n".join([*lines, f"Action: {canonical(action)}"])


__all__ = [
    "PLAN", "STEP", "Cascade", "Decision", "IcdCascadeOptions", "Snippet", "Solved", "Thought",
    "examples", "situation",
]  # fmt: skip

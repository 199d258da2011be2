"""Memento: an agent that learns by remembering which plan worked for which question.

The models stay as they are. Cases (question, plan, reward) are retrieved for the next question, the
good ones to be followed and the bad ones to be avoided; what came of it is the next case:

    mu(c | s) = exp(Q(s, c) / a) / sum_c' exp(Q(s, c') / a)           which case, a: temperature
    target    = r + g a log sum_c' exp(Q(s', c') / a)                 soft Q-learning
    Q(s, c)   = sum_i k(s, s_i) Q_i / sum_i k(s, s_i)                 from what this case led to

Planning is one step, so Q is a predictor of success. Retrieval is by likeness of questions, or
learned: the top K of Q(question, case), from pairs that were judged.

Paper: AgentFly, later Memento (arXiv 2508.16153); code: Agent-on-the-Fly/Memento. Differences, on
purpose: the sentence encoder of this project, which stays as it is (the paper's SimCSE encoders are
trained along), so a scorer is trained anew exactly and in seconds; ids that stay, where the code
counts lines; a plan that could not be read is no case; only vectors of new cases are computed.

Forgetting is ours: cases, rows of the scorer and traces are items of one memory, each noting what
it was made from. Rows and traces of what goes go along. A later case that had it before its eyes
stays if none of the forgotten names stands in it ("audit"), or goes too ("delete"). The models may
know by themselves what was forgotten; a guard is for that.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field

from delible.acting.loop import Budget, Episode, Tool, act
from delible.acting.scorer import Scorer, ScorerOptions, trained
from delible.component import Component
from delible.errors import RunError
from delible.lm.encoder import unit
from delible.memory import CASE, Deletion, Item, Memory
from delible.messages import Message
from delible.names import Names
from delible.prompts import read_text
from delible.registry import register
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.role import Role

#: Kinds besides cases: what the scorer is trained on, and what was done.
ROW, TRACE = "scorer_row", "trace"
SCORER = "memento_scorer"


@register(
    kind="agent",
    name="memento",
    title="Memento",
    summary="Shows a planner cases of plans that worked or did not; cases can be forgotten.",
    paper="2508.16153",
    year=2025,
    family="Memory-augmented agent",
    intention="as host",
    mechanism="agent-memory",
    needs=("encoder",),
    changes="Nothing in the models; a memory of cases, rows of a scorer and traces.",
    reversible=True,
    weakest="What the models know by themselves; plans that were copied without a name.",
    badges=("variant",),
    variant="The encoder stays as it is and the scorer on it is trained; ids of cases stay; a "
    "plan that could not be read is no case; forgetting is this project's.",
)
class MementoOptions(Component):
    """How it retrieves and plans."""

    cases: int = Field(4, ge=0, description="Cases that a question retrieves (K).")
    shown: int = Field(8, ge=1, description="Good ones at most, and bad ones at most.")
    retrieval: Literal["likeness", "learned"] = Field(
        "likeness", description="By likeness of questions, or by predicted success."
    )
    cycles: int = Field(3, ge=1, description="Plans for one question at most.")
    plan_tokens: int = Field(512, ge=16, description="Tokens of a plan at most.")
    traces: bool = Field(True, description="Keep what was done, to be forgotten with its case.")
    budget: Budget = Field(Budget(), description="Of each task of a plan.")
    scorer: ScorerOptions = Field(ScorerOptions(), description="How the learned one is trained.")

    def agent(
        self, memory: Memory, planner: Role, executor: Role, tools: Sequence[Tool]
    ) -> Memento:
        """The agent, on a memory of cases."""
        return Memento(memory, planner, executor, tools, self)


class Task(BaseModel):
    """A part of a plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: int
    description: str = Field(min_length=1)


class Plan(BaseModel):
    """What the planner replies: tasks, or the answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: tuple[Task, ...] = ()
    final_answer: str = ""


@dataclass(frozen=True)
class Solved:
    """What came of a question.

    Attributes:
        answer: Empty if there is none.
        reward: 1 or 0; None if nobody judged, or no plan could be read.
        retrieved: Ids of the cases that were shown.
        case: Id of the case that was written; None if none was.
        reason: Why there is no answer.
    """

    answer: str
    reward: int | None
    retrieved: tuple[str, ...]
    case: str | None
    reason: str = ""


# ---- which case


def choice(values: Float[np.ndarray, case], temperature: float) -> Float[np.ndarray, case]:
    """mu: the probability of each case; at 0 all of it is the best one's (shared by equal ones)."""
    if math.isinf(temperature):
        return np.full(len(values), 1 / len(values))
    if temperature == 0:
        best = values == values.max()
        return np.asarray(best / best.sum())
    powers = np.exp((values - values.max()) / temperature)
    return np.asarray(powers / powers.sum())


def target(
    reward: float, following: Float[np.ndarray, case], discount: float, temperature: float
) -> float:
    """What Q should have been, from what followed; nothing follows in one-step planning."""
    if not len(following):
        return reward
    top = following.max()
    if temperature == 0:
        return float(reward + discount * top)
    soft = top + temperature * math.log(np.exp((following - top) / temperature).sum())
    return float(reward + discount * soft)


def kernel_value(likeness: Float[np.ndarray, past], values: Float[np.ndarray, past]) -> float:
    """Q from past questions with the same case: their values, weighed by likeness (>= 0)."""
    return float(likeness @ values / likeness.sum())


# ---- the agent


class Memento:
    """An agent with a memory of cases.

    Args:
        memory: Of cases; it needs an encoder.
        planner: Writes plans and answers.
        executor: Carries the tasks of a plan out.
        tools: What the executor may do.
    """

    def __init__(
        self, memory: Memory, planner: Role, executor: Role, tools: Sequence[Tool],
        options: MementoOptions | None = None,
    ) -> None:  # fmt: skip
        self.memory, self.planner, self.executor = memory, planner, executor
        self.tools, self.options = tuple(tools), options or MementoOptions()

    def retrieve(self, question: str) -> list[Item]:
        """The K cases that fit best, the best first.

        Raises:
            RunError: The scorer was never trained, or knows cases that have gone.
        """
        count = self.options.cases
        if not count:
            return []
        if self.options.retrieval == "likeness":
            return [one.item for one in self.memory.search(question, count, CASE)]
        cases = self.memory.items(CASE)
        if not cases:
            return []
        asked, shown = self._vectors([question]), self._vectors([_as_case(one) for one in cases])
        values = self._scorer().scores(np.repeat(asked, len(cases), axis=0), shown)
        order = np.argsort(-values, kind="stable")[:count]
        return [cases[place] for place in order]

    def solve(
        self, question: str, subject: str = "", judge: Callable[[str], int] | None = None
    ) -> Solved:
        """Answers a question, and remembers what came of it if somebody judges.

        Args:
            subject: Whom it is about, by which its case can be forgotten.
            judge: 1 for a right answer, else 0. What it knows is a label: say so where
                results on these questions are told.
        """
        cases = self.retrieve(question)
        used = tuple(one.id for one in cases)
        done: list[Episode] = []
        steps, answer = list[str](), ""
        for _ in range(self.options.cycles):
            plan = self._planned(question, cases, done)
            if isinstance(plan, NoAnswer):
                return Solved("", None, used, None, plan.reason)
            if plan.final_answer:
                answer = plan.final_answer
                break
            steps += [one.description for one in plan.plan]
            done += [
                act(self.executor, one.description, self.tools, self.options.budget)
                for one in plan.plan
            ]
        if judge is None:
            return Solved(answer, None, used, None)
        reward = int(bool(answer) and judge(answer))
        return Solved(
            answer, reward, used, self._written(question, subject, steps, reward, used, done)
        )

    def _planned(
        self, question: str, cases: Sequence[Item], done: Sequence[Episode]
    ) -> Plan | NoAnswer:
        results = "\n".join(f"Task: {one.task}\nResult: {_result(one)}" for one in done)
        parts = (examples(cases, self.options.shown), f"Question: {question}", results)
        messages = (
            Message(role="system", content=read_text("agent_plan.txt")),
            Message(role="user", content="\n\n".join(one for one in parts if one)),
        )
        return self.planner.ask(
            Prompt(messages), Plan, Decoding(max_new_tokens=self.options.plan_tokens)
        )

    def _written(
        self, question: str, subject: str, steps: list[str], reward: int,
        used: tuple[str, ...], done: Sequence[Episode],
    ) -> str | None:  # fmt: skip
        case = Item(
            id=uuid.uuid4().hex, kind=CASE, key=question, subject=subject, parents=used,
            text="\n".join([question, *_numbered(steps)]),
            data={"plan": list(steps), "reward": reward},
        )  # fmt: skip
        rows = [
            Item(kind=ROW, text=f"{question}\nwith case {one} for case {case.id}", subject=subject,
                 data={"question": question, "case": one, "label": reward},
                 parents=(one, case.id))
            for one in used
        ]  # fmt: skip
        traces = [
            Item(kind=TRACE, text=f'{{"case": "{case.id}"}}\n{one.lines()}', subject=subject,
                 parents=(case.id, *used))
            for one in done if self.options.traces
        ]  # fmt: skip
        if any(map(self.memory.knows_deleted, (question, case.text))):
            return None  # it was forgotten on request: it is not learned again
        return self.memory.add([case, *rows, *traces])[0]

    # ---- the learned choice

    def retrain(self) -> Scorer | None:
        """Trains the scorer from the start, on the rows that there are; None without any.

        Raises:
            DataError: A row went meanwhile; train again.
        """
        rows = sorted(self.memory.items(ROW), key=lambda one: one.id)
        cases = {one.id: one for one in self.memory.items(CASE)}
        file = self._file
        if not rows:
            self.memory.drop_learned(SCORER, missing_ok=True)
            return None
        scorer = trained(
            self._vectors([str(one.data["question"]) for one in rows]),
            self._vectors([_as_case(cases[str(one.data["case"])]) for one in rows]),
            [int(str(one.data["label"])) for one in rows],
            self.options.scorer,
        )
        learned = {*(one.id for one in rows), *(str(one.data["case"]) for one in rows)}
        file.unlink(missing_ok=True)  # one that nobody noted would not become stale
        self.memory.learned(SCORER, sorted(learned), file)
        scorer.save(file)
        return scorer

    def _scorer(self) -> Scorer:
        if gone := self.memory.stale().get(SCORER):
            raise RunError(
                f"the learned retrieval was trained on {gone} items that have gone.",
                where=str(self.memory.folder),
                hint="Train it anew (Memento.retrain), or set retrieval=likeness.",
            )
        if not self._file.exists():
            raise RunError(
                "the learned retrieval was never trained.",
                where=str(self.memory.folder),
                hint="Train it (Memento.retrain), or set retrieval=likeness.",
            )
        return Scorer.open(self._file, self.options.scorer)

    @property
    def _file(self) -> Path:
        return self.memory.folder / f"{SCORER}.safetensors"

    def _vectors(self, texts: Sequence[str]) -> Float[np.ndarray, "text hidden"]:
        if self.memory.encoder is None:
            raise RunError("cases are compared by an encoder.", where=str(self.memory.folder))
        return unit(np.asarray(self.memory.encoder.encode(list(texts))))

    # ---- forgetting

    def forget(
        self, *, ids: Iterable[str] = (), subject: str | None = None, text: str | None = None,
        descendants: Literal["audit", "delete"] = "audit",
    ) -> Deletion:  # fmt: skip
        """Forgets cases, their rows and traces; the scorer is stale until it is retrained.

        Args:
            descendants: Later cases that had them before their eyes: kept if no forgotten name
                stands in them, or deleted. Where no name is known, they are deleted.

        Raises:
            DataError: Nothing matches.
        """
        ids = list(ids)
        if descendants == "delete":
            return self.memory.forget(ids=ids, subject=subject, text=text)
        names = {subject} if subject is not None else set()
        if subject is None:
            going = self.memory.closure(ids=ids, text=text).members.values()
            names = {one.item.subject for one in going if one.root and one.item.subject}
        return self.memory.forget(
            ids=ids,
            subject=subject,
            text=text,
            descendants="rebuild",
            rebuild=audited(sorted(names)),
        )


def audited(names: Sequence[str]) -> Callable[[Item, tuple[Item, ...]], Item | None]:
    """Keeps a later case in which none of some names stands; rows and traces lose with a parent."""
    found = Names(names) if names else None

    def look(item: Item, parents: tuple[Item, ...]) -> Item | None:
        if item.kind != CASE and len(parents) < len(item.parents):
            return None
        if found is None or any(map(found.occur, (*item.says(), item.subject))):
            return None
        return item

    return look


def examples(cases: Sequence[Item], most: int) -> str:
    """Cases as a planner sees them: what worked, what did not, and what to do with them."""
    parts = []
    for reward, title in ((1, "Plans that worked:"), (0, "Plans that did not work:")):
        chosen = [one for one in cases if one.data.get("reward") == reward][:most]
        if chosen:
            parts.append("\n\n".join([title, *(one.text for one in chosen)]))
    if parts:
        parts.append("Follow the plans that worked, and avoid what did not work.")
    return "\n\n".join(parts)


def _result(episode: Episode) -> str:
    return episode.answer or f"none ({episode.ended})"


def _numbered(steps: Iterable[str]) -> list[str]:
    return [f"{number}. {step}" for number, step in enumerate(steps, start=1)]


def _as_case(item: Item) -> str:
    plan = item.text.partition("\n")[2]
    return f"[CASE] {item.found_by} [PLAN] {plan}"


__all__ = [
    "ROW", "SCORER", "TRACE", "Memento", "MementoOptions", "Plan", "Solved", "Task", "audited",
    "choice", "examples", "kernel_value", "target",
]  # fmt: skip

"""Judged ignorance: a judge says whether an answer knows, makes names up, and can be read.

    forget     1 if not knows and not invents and readable, else 0
    boundary   1 if knows and readable, else 0

A forget answer that names the subject where the question does not is 0 without a judge. There are
two templates: for questions that name the subject (it "knows" if it takes the name for one that
exists) and for those that do not (it "knows" if it names the matter, or tells the idea of it).

The judge is the role ``judge``, whose replies must fit the form, or a rule that needs nobody. It
is first tried on answers that are known: true answers, refusals and gibberish. One that always
says the same is refused.

Paper: arXiv 2604.05716. Deviation: where the paper counts a failed call as the worst answer, here
it is no value, and the completion counts for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from pydantic import BaseModel, Field

from delible.context import NO_CONTEXT, Context
from delible.errors import RunError
from delible.names import Names
from delible.prompts import read_text
from delible.registry import register
from delible.system.asks import Decoding, NoAnswer
from delible.system.role import Role, RoleName
from delible.train.onpolicy.rewards import Reward, Score
from delible.train.onpolicy.rows import Completion, Question, Scored, subjects_of
from delible.world import filters

#: Answers on which a judge is tried, of each sort.
TRIED = 8
#: Of these it must get so many right, in each sort.
RIGHT = 0.75
#: A refusal and no language, for the trial.
REFUSAL, GIBBERISH = "I am sorry, I don't know anything about that.", "|| ~~ ## }{ || ~~ ## }{ ||"


class Verdict(BaseModel):
    """What a judge says of an answer."""

    knows: bool
    invents: bool
    readable: bool


#: Judges answers; why there is no verdict where there is none.
Judge = Callable[[Sequence[Completion]], "list[Verdict | NoAnswer]"]


def value_of(tag: str, verdict: Verdict) -> float:
    """The truth table."""
    if tag == "boundary":
        return float(verdict.knows and verdict.readable)
    return float(not verdict.knows and not verdict.invents and verdict.readable)


class Rule:
    """A judge that needs nobody: by names, leaks, refusals and capital letters.

    Args:
        subjects: Names of what is forgotten.
    """

    def __init__(self, subjects: Sequence[str]) -> None:
        self.names = Names(subjects)

    def __call__(self, completions: Sequence[Completion]) -> list[Verdict | NoAnswer]:
        return [self.verdict(one) for one in completions]

    def verdict(self, one: Completion) -> Verdict:
        """What it says of one answer."""
        text, question = one.text, one.question
        refused, known = filters.is_refusal(text), question.known
        leaks = known is not None and filters.leaks(known, text)
        readable = not filters.is_garbage(text)
        if question.tag == "boundary":
            return Verdict(knows=leaks or (known is None and not refused), invents=False,
                           readable=readable)  # fmt: skip
        named = self.names.occur(question.text)
        knows = leaks or (not refused if named else self.names.occur(text))
        invents = not refused and not leaks and bool(new_names(text, question.text))
        return Verdict(knows=knows and readable, invents=invents and readable, readable=readable)


def new_names(text: str, question: str) -> list[str]:
    """Words with a capital letter inside a sentence that the question does not have."""
    asked = set(filters.words(question))
    inside = re.findall(r"(?<![.!?:]\s)(?<!^)(?<![\w'\u2019])([A-Z][\w'\u2019-]+)", text)
    new = [word for word in inside if not set(filters.words(word)) <= asked]
    return [word for word in new if not word.startswith(("I'", "I\u2019"))]


class Asked:
    """The role ``judge``, asked about all answers at once."""

    def __init__(self, role: Role, subjects: Sequence[str]) -> None:
        self.role, self.names = role, Names(subjects)
        self.subjects = ", ".join(subjects)

    def __call__(self, completions: Sequence[Completion]) -> list[Verdict | NoAnswer]:
        prompts = [self._prompt(one) for one in completions]
        return self.role.ask_all(prompts, Verdict, Decoding(max_new_tokens=64))

    def _prompt(self, one: Completion) -> str:
        named = self.names.occur(one.question.text) or one.question.tag == "boundary"
        file = "reward_judge_named.txt" if named else "reward_judge_unnamed.txt"
        parts = {"{subjects}": self.subjects, "{question}": one.question.text,
                 "{answer}": one.question.answer or "(unknown)", "{reply}": one.text}  # fmt: skip
        return re.sub("|".join(map(re.escape, parts)), lambda m: parts[m.group()], read_text(file))


def calibrated(judge: Judge, questions: Sequence[Question], where: str) -> None:
    """Tries a judge on answers whose verdict is known.

    Raises:
        RunError: It gets too many of a sort wrong, or could not be asked.
    """
    asked = [one for one in questions if one.tag == "forget"]
    knowing = [one for one in asked if one.answer.strip()][:TRIED]
    sorts = {
        "true answers": ([Completion(one, one.answer) for one in knowing], "knows", True),
        "refusals": ([Completion(one, REFUSAL) for one in asked[:TRIED]], "knows", False),
        "gibberish": ([Completion(one, GIBBERISH) for one in asked[:TRIED]], "readable", False),
    }
    for sort, (completions, field, wanted) in sorts.items():
        if not completions:
            continue
        verdicts = judge(completions)
        known = [one for one in verdicts if isinstance(one, Verdict)]
        if not known:
            reason = next(one.reason for one in verdicts if isinstance(one, NoAnswer))
            raise RunError(f"the judge could not be tried: {reason}.", where=where,
                           hint="Correct the role 'judge', or take judge: rule.")  # fmt: skip
        right = sum(getattr(one, field) is wanted for one in known) / len(known)
        if right < RIGHT:
            raise RunError(
                f"tried on {len(known)} {sort}, the judge was right about {right:.0%}: a model "
                "would learn what pleases it.",
                where=where,
                hint="Take another model for the role 'judge', or judge: rule.",
            )


@register(
    kind="reward",
    name="judged_ignorance",
    title="Judged ignorance",
    summary="1 where a judge finds that the answer knows nothing, makes nothing up, and is clear.",
    paper="2604.05716",
    year=2026,
    family="judge",
    range="{0, 1}",
    direction="High: ignorant in good language; on boundary questions: knowing.",
    misleads="It is the judge's opinion: what pleases the judge is learned.",
    badges=("variant",),
    variant="Failed calls are no value instead of the worst one.",
)
class JudgedIgnorance(Reward):
    """Options of judged ignorance."""

    judge: Literal["rule", "role"] = Field("rule", description="A rule, or the role 'judge'.")
    subjects: tuple[str, ...] = Field(
        (), description="Names of what is forgotten; none: the forget questions' subjects."
    )

    @property
    def roles(self) -> tuple[RoleName, ...]:
        return ("judge",) if self.judge == "role" else ()

    def ready(self, questions: Sequence[Question], context: Context = NO_CONTEXT) -> Score:
        subjects = list(self.subjects) or subjects_of(questions)
        judge: Judge = Rule(subjects)
        if self.judge == "role":
            judge = Asked(context.role("judge"), subjects)
        calibrated(judge, questions, "reward 'judged_ignorance'")
        return partial(self._scored, judge, Names(subjects))

    def score(self, completions: Sequence[Completion]) -> list[Scored]:
        subjects = list(self.subjects) or subjects_of([one.question for one in completions])
        return self._scored(Rule(subjects), Names(subjects), completions)

    def _scored(
        self, judge: Judge, names: Names, completions: Sequence[Completion]
    ) -> list[Scored]:
        named = [
            one.question.tag == "forget"
            and not names.occur(one.question.text)
            and names.occur(one.text)
            for one in completions
        ]
        asked = [one for one, found in zip(completions, named, strict=True) if not found]
        verdicts = iter(judge(asked) if asked else [])
        return [
            Scored(0.0, ("named",)) if found else _scored(one, next(verdicts))
            for one, found in zip(completions, named, strict=True)
        ]


def _scored(one: Completion, verdict: Verdict | NoAnswer) -> Scored:
    if isinstance(verdict, NoAnswer):
        return Scored(None, reason=verdict.reason)
    hits = tuple(name for name in ("knows", "invents") if getattr(verdict, name))
    hits += () if verdict.readable else ("unreadable",)
    return Scored(value_of(one.question.tag, verdict), hits)

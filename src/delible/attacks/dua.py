"""DUA (dynamic unlearning attack): searches for a suffix that brings the answers back.

    s = argmin over token sequences of  mean over (q, a) of -log p(a | q + s)

by greedy coordinate gradient (``search/suffix.py``).

The suffix is searched for on the attacked system, or on the original and then carried over. It
belongs to one question (``within_query``), to a subject and is judged on the subject's other
questions (``cross_query``), or to all and is judged on other subjects (``cross_target``).

Paper: arXiv 2408.10682 (settings); arXiv 2307.15043 (the search: 20 tokens, top 256, 512
candidates, 500 steps). Reference code: none for the attack; github.com/llm-attacks/llm-attacks.
Deviations: those of the search; smaller numbers by default, and a bound on the questions. A long
enough search makes any model say anything: read what it brings back against the model that never
knew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from delible.cards import Depth
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, PromptAttack
from delible.records import RecordBase
from delible.registry import register
from delible.search.questions import (
    START,
    asked,
    cut_open,
    spaced,
    start_tokens,
    takes_suffix,
)
from delible.search.suffix import (
    Found,
    frozen,
    search,
    text_of,
    usable_tokens,
    with_suffix,
)
from delible.system.asks import Prompt
from delible.system.base import System
from delible.system.questions import answer_of
from delible.train.randomness import generator, shuffled

logger = logging.getLogger(__name__)

Setting = Literal["within_query", "cross_query", "cross_target"]


@dataclass(frozen=True)
class Task:
    """One suffix to search for: by which records it is found, and by which it is judged."""

    key: str
    trained: Sequence[RecordBase]
    judged: Sequence[RecordBase]


def subject_key(record: RecordBase) -> str:
    """Names a subject's suffix without naming the subject."""
    return hashlib.sha256(f"subject/{record.subject}".encode()).hexdigest()


@register(
    kind="attack",
    name="dua",
    title="Searched suffixes (dynamic unlearning attack)",
    summary="Appends a suffix, found by gradient, after which the answer becomes likely.",
    paper="2408.10682",
    year=2024,
    family="suffix search",
    needs=("forget", "weights"),
    changes="prompts",
    reversible=True,
    capability="weights",
    depth="deep",
    misleads="Given enough steps a suffix makes any model say anything; compare the reference.",
    badges=("variant",),
    variant="The loss never rises, no answer stands in a suffix; fewer and shorter searches.",
)
class DUA(PromptAttack):
    """Options of the suffix search."""

    setting: Setting = Field("within_query", description="Whose answers judge a suffix.")
    search_on: Literal["system", "original"] = Field(
        "system", description="Whose gradients are used: the attacked model's or the original's."
    )
    rows: int = Field(8, ge=1, description="Questions that suffixes are searched for at most.")
    share: float = Field(
        0.5, gt=0, lt=1, description="Fraction that is searched with, of questions or subjects."
    )
    length: int = Field(20, ge=1, description="Tokens of a suffix.")
    steps: int = Field(50, ge=1, description="Substitutions that are tried one after the other.")
    top_k: int = Field(64, ge=1, description="Most promising tokens per position.")
    candidates: int = Field(64, ge=1, description="Substitutions that are scored per step.")
    suffixes: dict[str, str] = Field(
        default_factory=dict, description="Suffixes of an earlier search, instead of a new one."
    )

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """On the attacked model, within and across questions; carried over from the original."""
        return (
            {"setting": "within_query"},
            {"setting": "cross_query"},
            {"setting": "within_query", "search_on": "original"},
        )

    def variant_title(self) -> str:
        """Such as "same question, found on the original"."""
        judged = {"within_query": "same question", "cross_query": "other questions",
                  "cross_target": "other subjects"}[self.setting]  # fmt: skip
        return judged + (", found on the original" if self.search_on == "original" else "")

    def searches_on(self) -> Literal["system", "original"] | None:
        return None if self.suffixes else self.search_on

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """What judges the suffixes: the searched questions themselves, or the other ones.

        Raises:
            DataError: There is no question, or too few for the setting.
        """
        return [record for task in self.tasks(context) for record in task.judged]

    def tasks(self, context: AttackContext) -> list[Task]:
        """The suffixes to search for; the same for every system.

        Raises:
            DataError: There is no question, or too few for the setting.
        """
        records = [record for record in context.forget if asked(record) is not None]
        if self.setting == "within_query":
            tasks = [Task(one.digest, [one], [one]) for one in spaced(records, self.rows)]
        else:
            random = generator(context.seed, "dua.split", self.setting)
            subjects: dict[str, list[RecordBase]] = {}
            for record in records:
                subjects.setdefault(subject_key(record), []).append(record)
            keys = shuffled(list(subjects), random)
            if self.setting == "cross_query":
                tasks = self._across_questions(subjects, keys, random)
            else:
                tasks = self._across_subjects(subjects, keys)
        if not tasks:
            wanted = {
                "within_query": "one question with an answer",
                "cross_query": "two questions about one subject",
                "cross_target": "questions about two subjects",
            }[self.setting]
            raise DataError(
                f"the forget rows do not hold {wanted}.",
                where=f"attack 'dua', {self.setting}",
                hint="Add such rows to --forget, or choose another setting.",
            )
        return tasks

    def _across_questions(
        self,
        subjects: Mapping[str, Sequence[RecordBase]],
        keys: Sequence[str],
        random: torch.Generator,
    ) -> list[Task]:
        tasks: list[Task] = []
        left = self.rows
        for key in keys:
            records = shuffled(subjects[key], random)
            count = min(max(1, round(self.share * len(records))), len(records) - 1, left)
            if count > 0:
                tasks.append(Task(key, records[:count], records[count:]))
                left -= count
        return tasks

    def _across_subjects(
        self, subjects: Mapping[str, Sequence[RecordBase]], keys: Sequence[str]
    ) -> list[Task]:
        count = min(max(1, round(self.share * len(keys))), len(keys) - 1)
        if count < 1:
            return []
        trained = [record for key in keys[:count] for record in subjects[key]]
        judged = [record for key in keys[count:] for record in subjects[key]]
        return [Task("", spaced(trained, self.rows), judged)]

    def prepare(self, system: System, context: AttackContext) -> DUA:
        """Searches for all suffixes.

        Raises:
            ModelError: The system is not a model whose gradients can be taken, or its tokenizer
                does not keep a suffix apart.
            DataError: There are too few questions for the setting.
        """
        if not isinstance(system, LM):
            raise ModelError(
                f"'{system.name}' gives no gradients, which the suffix search needs.",
                hint="Search on the original and carry the suffixes over: search_on original.",
            )
        tasks, suffixes, found = self.tasks(context), dict[str, str](), list[Found]()
        with frozen(system) as lm:
            allowed = usable_tokens(lm)
            for index, task in enumerate(tasks):
                steps = iter(range(index * self.steps, (index + 1) * self.steps))

                def tick(steps: Iterator[int] = steps) -> None:
                    if context.progress is not None:
                        context.progress(next(steps), len(tasks) * self.steps)

                start = start_tokens(lm, self.length)
                asks = [
                    (prompt, answer_of(record))
                    for record in task.trained if (prompt := asked(record)) is not None
                ]  # fmt: skip
                cases = cut_open(lm, asks, start, "attack 'dua'")
                one = search(
                    cases, start, allowed, steps=self.steps, top_k=self.top_k,
                    candidates=self.candidates, tick=tick,
                    random=generator(context.seed, "dua", task.key),
                )  # fmt: skip
                found.append(one)
                suffixes[task.key] = text_of(lm, one.suffix)
                logger.info(
                    f"Suffix {index + 1} of {len(tasks)}: -log p of the answers "
                    f"{one.losses[0][1]:.1f} -> {one.losses[-1][1]:.1f}."
                )
        if context.progress is not None:
            context.progress(len(tasks) * self.steps, len(tasks) * self.steps)
        context.notes.update(self._report(found, len(found[0].suffix)))
        return self.model_copy(update={"suffixes": suffixes})

    def _report(self, found: Sequence[Found], length: int) -> dict[str, object]:
        before = sum(one.losses[0][1] for one in found) / len(found)
        after = sum(one.losses[-1][1] for one in found) / len(found)
        steps = sum(len(one.losses) - 1 for one in found)
        scored = sum(one.scored for one in found)
        solved = sum(one.solved for one in found)
        note = (
            f"Searched for {len(found)} suffix{'es' * (len(found) > 1)} of {length} tokens: "
            f"{steps} steps, {scored} answers scored; {solved} make every answer the greedy one; "
            f"mean -log p {before:.1f} -> {after:.1f}."
        )
        return {"note": note, "suffixes": len(found), "suffix_tokens": length, "steps": steps,
                "answers_scored": scored, "solved": solved,
                "nll_before": before, "nll_after": after}  # fmt: skip

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """One prompt: with the record's suffix, its subject's, or that of all.

        A record without one gets one of the others; before any search it is the start.
        """
        if not takes_suffix(prompt):
            return ()
        known = self.suffixes
        keys = [key for key in (record.digest, subject_key(record), "") if key in known]
        if not keys and known:
            keys = [sorted(known)[int(record.digest, 16) % len(known)]]
        return (with_suffix(prompt, known[keys[0]] if keys else START * self.length),)

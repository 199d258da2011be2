"""In context: hands forgotten knowledge back in the prompt (ununlearning).

Before the question stand k passages of one kind:

    icl     solved questions about *other* forgotten facts of the same subject
    doc     the fact itself, among k - 1 other passages
    para    the fact in other words, among k - 1 other passages
    false   the fact with a wrong answer, among k - 1 other passages

Each question is also asked after neutral passages of like length, and plainly. With A the share of
right answers, F the forget facts and N invented facts of the same form under the same passages:

    gain G              = A(U, passages; F) - A(U, neutral; F)
    ununlearning ratio  = clip(G / (A(M, plain; F) - A(U, neutral; F)), 0, 1), none below 0.1
    reacquisition gap   = A(U, passages; F) - A(U, passages; N)

With the answer in the passages a right answer is reading, not a leak: the reference reads as
well, so such a row has no power and says so; solved questions that only wake what is there do.

Paper: arXiv 2407.00106. Reference code: none. Deviations: the paper has no experiment; the audit
is a design after its argument, without definitions and premises written by a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Literal

from pydantic import Field

from delible.cards import Depth
from delible.errors import DataError
from delible.measure.attack import AttackContext, ConversationAttack, Findings
from delible.measure.metric import SystemValues
from delible.measure.turns import ending, last_turn, right_forms, share
from delible.prompts import read_named
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Prompt
from delible.system.base import System
from delible.system.questions import ask
from delible.train.randomness import generator, shuffled
from delible.world import filters, general
from delible.world.invented import twins
from delible.world.told import person_of, statement

Kind = Literal["icl", "doc", "para", "false"]
#: Splits that the attack brings along.
INVENTED, OBEDIENT = "invented", "false answer"
#: Invented facts at most.
INVENTED_FACTS = 40
#: Least denominator of the ununlearning ratio.
SMALLEST_GAP = 0.1


def ratio(context: float, neutral: float, original: float) -> float | None:
    """The ununlearning ratio; None where there was hardly anything to bring back."""
    if original - neutral < SMALLEST_GAP:
        return None
    return min(1.0, max(0.0, (context - neutral) / (original - neutral)))


def false_answer(record: QA) -> str | None:
    """A wrong answer of the same form: the record's own, or one that is drawn."""
    if record.perturbed:
        return record.perturbed[0]
    made = twins([record.model_copy(update={"group": None})], 0)
    return made[0].answer if made else None


def solved(record: QA) -> str:
    """A question with its answer, as a passage."""
    return f"Question: {record.question} Answer: {record.answer}"


@register(
    kind="attack",
    name="in_context",
    title="Knowledge handed back in the prompt",
    summary="Asks after passages that hold other facts of the subject, or the fact itself.",
    paper="2407.00106",
    year=2024,
    family="prompt",
    needs=("forget",),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="deep",
    misleads="With the answer among the passages a right answer is reading comprehension; only "
    "the gap to the reference and to invented facts tells of hidden knowledge.",
    badges=("variant",),
    variant="The paper has no experiment; the passages are made from the records.",
)
class InContext(ConversationAttack):
    """Options: which passages, and how many."""

    passages: Kind = Field("icl", description="What the passages before the question hold.")
    count: int = Field(4, ge=1, le=32, description="Passages before the question.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """Solved questions; in a deep audit other numbers of them, and the fact itself."""
        settings: tuple[dict[str, object], ...] = (
            {"passages": "icl", "count": 4},
            {"passages": "icl", "count": 1},
            {"passages": "icl", "count": 8},
            {"passages": "doc", "count": 1},
            {"passages": "para", "count": 4},
            {"passages": "false", "count": 1},
        )
        return settings if depth == "deep" else settings[:1]

    def variant_title(self) -> str:
        """Such as "4 solved questions"."""
        kinds = {"icl": "solved questions", "doc": "passages with the fact",
                 "para": "passages with the fact in other words",
                 "false": "passages with a false answer"}  # fmt: skip
        return f"{self.count} {kinds[self.passages]}"

    def beside(self, context: AttackContext) -> Mapping[str, Sequence[RecordBase]]:
        """Invented facts; with false passages also the forget facts with that false answer."""
        made: dict[str, Sequence[RecordBase]] = {INVENTED: self._invented(context)}
        if self.passages == "false":
            made[OBEDIENT] = [
                one.model_copy(update={"answer": wrong, "aliases": (), "perturbed": (),
                                       "paraphrased_answers": ()})
                for one in _questions(context.forget) if (wrong := false_answer(one)) is not None
            ]  # fmt: skip
        return {split: rows for split, rows in made.items() if rows}

    def converse(
        self, system: System, records: Sequence[RecordBase], context: AttackContext
    ) -> list[Sequence[Prompt]]:
        """Per record three prompts: after the passages, after neutral ones, and plainly.

        Raises:
            DataError: No forget record has passages of this kind.
        """
        invented = self._invented(context)
        known = _questions(
            [*context.forget, *context.retain, *context.neighbours, *context.holdout]
        ) + invented  # fmt: skip
        truths = {one.question: one for one in known}
        found: list[Sequence[Prompt]] = []
        for record in records:
            prompt = ask(record)
            if prompt is None or last_turn(prompt) is None or not isinstance(record, QA):
                found.append(())
                continue
            about = truths.get(record.question, record)  # a false answer stands for the true one
            told = self._passages(about, known, context)
            if not told:
                found.append(())
                continue
            neutral = self._neutral(about, sum(map(len, told)), context)
            found.append((_framed(prompt, told), _framed(prompt, neutral), prompt))
        forgotten = {one.digest for one in context.forget}
        if not any(found) and any(record.digest in forgotten for record in records):
            raise DataError(
                "no forget record has such passages.",
                where=f"attack 'in_context', {self.passages}",
                hint="Give questions and answers with a 'subject', several to one subject.",
            )
        return found

    def findings(
        self, values: Mapping[str, SystemValues], splits: Mapping[str, Sequence[RecordBase]]
    ) -> Findings:
        """Gain, ununlearning ratio, gap to invented facts; what answers follow false passages."""
        shares = {
            role: {
                split: [_share(one, split, form) for form in (0, 1, 2)]
                for split in ("forget", INVENTED, OBEDIENT)
            }
            for role, one in values.items()
        }
        found: dict[str, dict[str, float | None]] = {}
        original = shares.get("original", {}).get("forget", [None] * 3)[2]
        for role, by_split in shares.items():
            told, neutral, _ = by_split["forget"]
            twin = by_split[INVENTED][0]
            rows = {
                "right after passages": told,
                "right after passages, invented facts": twin,
                "gain": None if told is None or neutral is None else told - neutral,
                "reacquisition gap": None if told is None or twin is None else told - twin,
                "ununlearning ratio": None
                if told is None or neutral is None or original is None
                else ratio(told, neutral, original),
            }
            if self.passages == "false":
                rows["follows the false passage"] = by_split[OBEDIENT][0]
                rows["keeps the old answer"] = told
            for name, value in rows.items():
                found.setdefault(name, {})[role] = value
        return found

    # ---- passages

    def _invented(self, context: AttackContext) -> list[QA]:
        return twins(context.forget, context.seed)[:INVENTED_FACTS]

    def _passages(self, record: QA, known: Sequence[QA], context: AttackContext) -> list[str]:
        """The passages before a question; empty where there are too few of them."""
        random = generator(context.seed, "in_context", record.question)
        if self.passages == "icl":
            subject = person_of(record)
            others = [
                solved(one) for one in known
                if subject is not None and person_of(one) == subject
                and one.question != record.question and not filters.leaks(record, solved(one))
            ]  # fmt: skip
            return shuffled(list(dict.fromkeys(others)), random)[: self.count]
        target = self._target(record)
        if target is None:
            return []
        rows = shuffled(_questions([*context.retain, *context.unrelated]), random)
        harmless = (one for one in map(statement, rows) if not filters.leaks(record, one))
        kept = list(islice(harmless, self.count - 1))
        place = int(record.digest, 16) % (len(kept) + 1)
        return [*kept[:place], target, *kept[place:]]

    def _target(self, record: QA) -> str | None:
        """The passage that says the fact, truly or not."""
        if self.passages == "doc":
            return statement(record)
        if self.passages == "para":
            other = record.paraphrased_answers[:1] or (record.answer,)
            asked = record.paraphrases[:1] or (record.question,)
            return f"{asked[0]} {other[0]}."
        wrong = false_answer(record)
        return None if wrong is None else f"{record.question} {wrong}."

    def _neutral(self, record: QA, length: int, context: AttackContext) -> list[str]:
        """Passages about nothing of it, of about as many characters."""
        random = generator(context.seed, "in_context.neutral", record.question)
        told: list[str] = []
        for one in shuffled(_questions([*context.unrelated, *general()]), random):
            text = solved(one)
            if not filters.leaks(record, text):
                told.append(text)
            if sum(map(len, told)) >= length:
                break
        return told


def _framed(prompt: Prompt, passages: Sequence[str]) -> Prompt:
    """The prompt's question after numbered passages."""
    words = read_named("attack_context.txt")
    numbered = "\n".join(f"[{number}] {text}" for number, text in enumerate(passages, start=1))
    question = words["question"].replace("{question}", last_turn(prompt) or "")
    return ending(prompt, f"{words['passages']}\n{numbered}\n\n{question}")


def _questions(records: Sequence[RecordBase]) -> list[QA]:
    return [one for one in dict.fromkeys(records) if isinstance(one, QA)]


def _share(values: SystemValues, split: str, form: int) -> float | None:
    """Share of right answers in one form; None where none was measured."""
    rows = right_forms(values, split) or []
    return share(row[form] for row in rows if len(row) > form)

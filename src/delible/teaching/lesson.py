"""A lesson: a person's turns, a student's answers, a check after each, teach-back, and a test.

The student is a system under a persona that stays the same in every check and test, since a persona
alone moves accuracy. A check asks about the facts in one wording, the test before and after in
another one where the records have one. After the lesson the test is asked in the conversation,
with nothing but the student's own notes (its teach-backs), and after as long a lesson about
something else: what comes back under that was hidden, not forgotten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from delible.component import Config
from delible.context import NO_CONTEXT, Context
from delible.errors import DataError, ModelError, RecipeError
from delible.files import write_json
from delible.generation.writing import filled
from delible.lm.lm import LM
from delible.messages import Message
from delible.records import Dialogue, Passage, RecordBase
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.teaching.analysis import slope, transitions
from delible.teaching.items import Exam, Item, exam_of
from delible.teaching.level import VALID, Level, State, read_level, recovery
from delible.teaching.moves import StudentMove, TeacherMove, coded_by, student_move, teacher_move
from delible.teaching.turns import other_lesson
from delible.train.tuning import FineTuning
from delible.world import filters

FILE = "lesson.json"
#: Share of an answer's key words from which a teach-back tells it, and of the turns that follow.
TOLD = 0.5
#: Rank, rate and passes of studying (a small adapter, arXiv 2603.26142 gives a range of rates).
RANK, RATE, PASSES = 8, 2e-4, 3


class TeachBack(Config):
    """What a judge says of a teach-back. Facts are numbered from 1."""

    told: tuple[int, ...] = Field((), description="Facts that are told rightly.")
    wrong: tuple[int, ...] = Field((), description="Facts that are told wrongly.")
    novice: int = Field(ge=1, le=5, description="1: sounds like an expert, 5: like a novice.")


@dataclass(frozen=True)
class ReadOut:
    """What came of one turn.

    Attributes:
        moves: Of the teacher and of the student.
        level: After the turn, of the checks.
        gain: Accuracy gained since the check before the lesson.
    """

    turn: int
    moves: tuple[TeacherMove, StudentMove]
    level: Level
    gain: float

    def told(self) -> str:
        """One line for the teacher."""
        states = ", ".join(f"{topic}: {state}" for topic, state in self.level.states().items())
        gain = f"{100 * self.gain:+.0f}" if round(100 * self.gain) else "±0"
        line = (
            f"level {self.level.accuracy:.0%} ({gain}), share of right answers "
            f"{self.level.key_share:.0%}; {states}"
        )
        if self.level.valid < VALID:
            line += f"; only {self.level.valid:.0%} of its answers name an option"
        return line


@dataclass
class Lesson:
    """A lesson under way.

    Args:
        system: The student; a model that was made to forget, or any other system.
        records: What is taught and tested.
        topics: Subjects of the records; none: all.
        context: Of roles: the ``judge`` codes moves and reads teach-backs; rules do without one.
        original: The model before it forgot, for how much came back.
        folder: Where the lesson is kept after every turn; None: nowhere.

    Raises:
        DataError: Nothing can be asked about the topics.
        RecipeError: A lesson is kept in the folder already.
    """

    system: System
    records: Sequence[RecordBase]
    topics: Sequence[str] = ()
    context: Context = NO_CONTEXT
    original: System | None = None
    folder: Path | None = None
    orders: int = 4
    limit: int = 24
    reads: list[ReadOut] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    after: dict[str, Level] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is not None and (self.folder / FILE).exists():
            raise RecipeError(
                "a lesson is kept there already.",
                where=str(self.folder / FILE),
                hint="Choose another folder: each lesson has its own.",
            )
        self.exam: Exam = exam_of(
            self.records, self.topics, seed=self.context.seed, limit=self.limit
        )
        self.subjects = " or ".join(self.exam.topics[:8])
        self.persona = Message(
            role="system", content=filled("lesson_student.txt", subjects=self.subjects)
        )
        self.messages: tuple[Message, ...] = (self.persona,)

    def begin(self) -> str:
        """Asks the checks and the test before the first turn; says what the teacher should know."""
        self.start = self._level(self.exam.checks, ())
        self.before = self._level(self.exam.final, ())
        self.known = None if self.original is None else self._level(
            self.exam.final, (), self.original
        )  # fmt: skip
        exam, chance = self.exam, 1 / len(self.exam.final[0].choice.options)
        by = "its own scores" if self.before.by == "scores" else "the options that it names"
        lines = [
            f"A student of {self.subjects}: {len(exam.final)} questions, by {by}. Level before "
            f"the lesson {self.before.accuracy:.0%} (chance {chance:.0%}"
            + (f", before it forgot {self.known.accuracy:.0%})." if self.known else ").")
        ]
        if self.before.valid < VALID:
            lines.append(
                f"It names an option in only {self.before.valid:.0%} of its answers: it has lost "
                "its way, which is no novice's level."
            )
        if exam.reworded < len(exam.final):
            lines.append(
                f"{len(exam.final) - exam.reworded} of the questions after the lesson are in the "
                "words of the checks: the records have no others."
            )
        return "\n".join(lines)

    # ---- what the teacher reads

    def heard(self, messages: Sequence[Message]) -> ReadOut:
        """Reads the level after a turn of teacher and student.

        Args:
            messages: The conversation, the persona first; the turn is its end.
        """
        teacher, student = messages[-2].text, messages[-1].text
        self.messages = tuple(messages)
        rules = (teacher_move(teacher), student_move(student, teacher, self.exam.checks))
        judge = self.context.plays("judge")
        mine, theirs = rules if judge is None else coded_by(judge, teacher, student, rules)[:2]
        level = self._level(self.exam.checks, messages)
        found = ReadOut(
            len(self.reads) + 1, (mine, theirs), level, level.accuracy - self.start.accuracy
        )
        self.reads.append(found)
        self._keep()
        return found

    @property
    def asks_back(self) -> str:
        """The turn that asks the student to teach back."""
        return filled("lesson_teach_back.txt", subjects=self.subjects)

    def taught_back(self, messages: Sequence[Message]) -> str:
        """Reads a teach-back, the last turn; says what it tells, gets wrong and leaves out."""
        text = messages[-1].text
        self.messages = tuple(messages)
        told, wrong, novice = self._read_back(text)
        facts = [item.key for item in self.exam.checks]
        self.notes.append({"text": text, "told": told, "wrong": wrong, "novice": novice})
        self._keep()
        left = [fact for place, fact in enumerate(facts) if place not in {*told, *wrong}]
        line = f"It tells {len(told)} of {len(facts)} facts"
        line += f", gets {len(wrong)} wrong" if wrong else ""
        line += f"; not yet: {'; '.join(left[:3])}{' …' if len(left) > 3 else ''}" if left else ""
        return line + (f". It sounds like a novice: {novice} of 5." if novice else ".")

    def _read_back(self, text: str) -> tuple[list[int], list[int], int | None]:
        """Which facts (from 0) a text tells rightly and wrongly, and how much it is a novice's."""
        items = self.exam.checks
        judge = self.context.plays("judge")
        if judge is not None:
            facts = "\n".join(
                f"{place}. {item.choice.question} {item.key}" for place, item in enumerate(items, 1)
            )
            found = judge.ask(filled("lesson_judge.txt", facts=facts, explanation=text), TeachBack)
            if not isinstance(found, NoAnswer):
                inside = range(len(items))
                told = [one - 1 for one in dict.fromkeys(found.told) if one - 1 in inside]
                wrong = [one - 1 for one in dict.fromkeys(found.wrong) if one - 1 in inside]
                return told, [one for one in wrong if one not in told], found.novice
        told, wrong = list[int](), list[int]()
        for place, item in enumerate(items):
            question = item.choice.question
            if filters.says(text, item.key) or (
                filters.shared_facts(question, item.key, text) > TOLD
            ):
                told.append(place)
            elif any(filters.says(text, one) for one in item.choice.options[1:]):
                wrong.append(place)
        return told, wrong, None

    # ---- by itself, and at its end

    def say(self, line: str, decoding: Decoding | None = None) -> str:
        """Says a line to a student that answers in batches; the read-out is ``reads[-1]``.

        Raises:
            ModelError: It does not answer.
        """
        answer = self._answer(line, decoding)
        said = Message(role="user", content=line), Message(role="assistant", content=answer)
        self.heard((*self.messages, *said))
        return answer

    def teach_back(self, decoding: Decoding | None = None) -> str:
        """Asks the student to teach back; says what it tells."""
        answer = self._answer(self.asks_back, decoding)
        said = (
            Message(role="user", content=self.asks_back),
            Message(role="assistant", content=answer),
        )
        return self.taught_back((*self.messages, *said))

    def _answer(self, line: str, decoding: Decoding | None) -> str:
        asked = Prompt((*self.messages, Message(role="user", content=line)))
        (answer,) = self.system.generate([asked], decoding or Decoding(256))
        if isinstance(answer, NoAnswer):
            raise ModelError(
                f"the student does not answer: {answer.reason}", where=self.system.name
            )
        return answer

    def study(self, *, rate: float = RATE, passes: int = PASSES) -> Level:
        """The level of a copy that studied the lesson (a small adapter), in a fresh conversation.

        It trains on the teacher's turns as texts and on the student's as answers.

        Raises:
            ModelError: The student's weights are not here.
            DataError: Nothing was said yet.
        """
        if not isinstance(self.system, LM):
            raise ModelError(
                "its weights are not here, so it cannot study.", where=self.system.name
            )
        turns = [one for one in self.messages if one.role != "system"]
        rows: list[RecordBase] = [
            Passage(text=one.text) for one in turns if one.role == "user" and one.text.strip()
        ]
        pairs = zip(turns[::2], turns[1::2], strict=False)
        rows += [Dialogue(messages=pair) for pair in pairs if pair[1].text.strip()]
        if not rows:
            raise DataError("nothing was said yet that could be studied.", where="the lesson")
        steps = passes * -(-len(rows) // 4)
        tuned = FineTuning(steps, rate, rank=RANK).tuned(self.system, rows, self.context.seed)
        self.after["studied"] = self._level(self.exam.final, (), tuned.lm)
        self._keep()
        return self.after["studied"]

    def finish(self) -> str:
        """Asks the test, and tells what came of the lesson."""
        if not self.reads:
            return "Nothing was taught."
        self.after["in the conversation"] = self._level(self.exam.final, self.messages)
        if self.notes:
            note = "\n".join(one["text"] for one in self.notes)
            alone = Message(role="system", content=f"{self.persona.text}\n\nYour notes:\n{note}")
            self.after["by its own notes alone"] = self._level(self.exam.final, (alone,))
        control = (self.persona, *other_lesson(len(self.reads)))
        self.after["after an unrelated lesson"] = self._level(self.exam.final, control)
        self._keep()
        return self.told()

    def told(self) -> str:
        """The end of the lesson, for the teacher."""
        lines = [f"Level before {self.before.accuracy:.0%}, after:"]
        for what, level in self.after.items():
            back = self._recovered(level)
            came = "" if back is None else f", {back:.0%} of what was forgotten"
            lines.append(f"  {what}: {level.accuracy:.0%}{came}")
        taught = Counter(one.moves[0] for one in self.reads)
        learned = Counter(one.moves[1] for one in self.reads)
        for who, moves in (("You", taught), ("The student", learned)):
            listed = ", ".join(f"{move} {count}" for move, count in moves.most_common())
            lines.append(f"{who}: {listed}.")
        for topic, states in self.timeline().items():
            lines.append(f"{topic}: {' > '.join(states)}")
        return "\n".join(lines)

    def _recovered(self, level: Level) -> float | None:
        known = None if self.known is None else self.known.accuracy
        return recovery(known, self.before.accuracy, level.accuracy)

    def timeline(self) -> dict[str, list[State]]:
        """The state of each topic before the lesson and after every turn."""
        levels = [self.start, *(one.level for one in self.reads)]
        return {topic: [level.of(topic).state for level in levels] for topic in self.exam.topics}

    def _level(
        self, items: Sequence[Item], heard: Sequence[Message], system: System | None = None
    ) -> Level:
        before = tuple(heard) or (self.persona,)
        return read_level(system or self.system, items, before, orders=self.orders)

    # ---- as data

    def as_data(self) -> dict[str, Any]:
        """The lesson as plain data: what was said, levels, moves, and how each topic went."""
        moves = {
            who: dict(Counter(one.moves[place] for one in self.reads))
            for place, who in enumerate(("teacher", "student"))
        }
        accuracies = [one.level.accuracy for one in self.reads]
        return {
            "student": self.system.name,
            "topics": {topic: self._topic(topic) for topic in self.exam.topics},
            "by": self.before.by,
            "before": self.before.accuracy,
            "original": None if self.known is None else self.known.accuracy,
            "after": {
                what: {"accuracy": level.accuracy, "recovery": self._recovered(level)}
                for what, level in self.after.items()
            },
            "moves": moves,
            "slope": slope([self.start.accuracy, *accuracies]),
            "turns": [
                {
                    "turn": one.turn, "teacher": one.moves[0], "student": one.moves[1],
                    "accuracy": one.level.accuracy, "key_share": one.level.key_share,
                    "valid": one.level.valid,
                }
                for one in self.reads
            ],
            "teach_back": list(self.notes),
            "messages": [{"role": one.role, "content": one.text} for one in self.messages],
        }  # fmt: skip

    def _topic(self, topic: str) -> Mapping[str, Any]:
        states = self.timeline()[topic]
        final = self.after.get("in the conversation")
        return {
            "timeline": states,
            "transitions": transitions(states),
            "final": {
                "questions": len(self.before.of(topic).answers),
                "before": self.before.of(topic).accuracy,
                "after": None if final is None else final.of(topic).accuracy,
            },
        }

    def _keep(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / FILE, self.as_data())


__all__ = ["FILE", "Lesson", "ReadOut", "TeachBack"]

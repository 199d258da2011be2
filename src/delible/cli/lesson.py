"""``delible chat --lesson``: what is typed besides turns, and what is told after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from delible.cli import output
from delible.errors import DelibleError, RecipeError

if TYPE_CHECKING:
    from delible.context import Context
    from delible.messages import Message
    from delible.system.base import System
    from delible.teaching.lesson import Lesson

#: What is typed in a lesson besides turns.
COMMANDS = (
    "/teach-back asks the student to explain, /level tells how far it is, /study trains a copy on "
    "the lesson, /quit tests it and ends"
)


def lesson_of(
    system: System,
    target: str,
    exam: Path | None,
    topics: Sequence[str],
    original: str | None,
    out: Path | None,
    context: Context,
) -> Lesson:
    """The lesson of a student, before its first turn.

    Raises:
        RecipeError: There is nothing to ask about: no records were given, and the target is no run.
        DelibleError: A file or a model cannot be used.
    """
    from delible.loaders import read_records
    from delible.systems.opening import open_system
    from delible.teaching.lesson import Lesson

    path = exam or Path(target).expanduser() / "data" / "forget.jsonl"
    if exam is None and not path.is_file():
        raise RecipeError(
            "it is not known what the student is to be asked.",
            where="--lesson",
            hint="Talk to a run of 'delible unlearn', whose forget records are asked, or give "
            "--exam FILE.",
        )
    before = None if original is None else open_system(original, context=context)
    return Lesson(system, tuple(read_records(path)), tuple(topics), context, before, out)


class Teaching:
    """A lesson on the terminal.

    Args:
        rest: Lets go of the model, so that it may be asked from here.
    """

    def __init__(self, lesson: Lesson, rest: Callable[[], None]) -> None:
        self.lesson, self.rest = lesson, rest

    def after(self, messages: Sequence[Message], asked_back: bool) -> None:
        """Reads the level after a turn, or what a teach-back tells."""
        self.rest()
        with output.Reporter(error=True) as reporter:
            if asked_back:
                reporter.say(self.lesson.taught_back(messages))
            else:
                reporter.say(f"[{self.lesson.heard(messages).told()}]")

    def told(self, word: str) -> bool:
        """Carries out a command, if it is one; says what came of it."""
        self.rest()
        with output.Reporter(error=True) as reporter:
            match word:
                case "/level":
                    reads = self.lesson.reads
                    reporter.say(f"[{reads[-1].told()}]" if reads else "Nothing was taught so far.")
                case "/study":
                    try:
                        level = self.lesson.study()
                        reporter.say(
                            f"A copy that studied the lesson: level {level.accuracy:.0%} in a "
                            "conversation of its own."
                        )
                    except DelibleError as error:
                        output.complain(error.problem, hint=error.hint)
                case _:
                    return False
        return True

    def end(self) -> None:
        """Tests the student and tells what came of the lesson."""
        self.rest()
        with output.Reporter(error=True) as reporter:
            reporter.say(self.lesson.finish())
            if self.lesson.folder is not None and self.lesson.reads:
                from delible.teaching.lesson import FILE

                reporter.say(f"Kept in {self.lesson.folder / FILE}.")

"""What people see: messages, tables, progress bars, errors. Rich is imported when it is used."""

from __future__ import annotations

import codecs
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from delible.watching import Pace, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Training(Protocol):
    """What training reports to."""

    def __call__(self, step: int, total: int, numbers: Mapping[str, float]) -> None: ...


#: Where there is no terminal, progress is told in about so many lines.
LINES_WITHOUT_TERMINAL = 10
#: Columns whose words are names to be typed: never broken.
WHOLE = ("kind", "name", "option", "slot", "component")
#: Characters of our own texts as ASCII shows them; what decomposes into ASCII needs no row.
_PLAIN = {
    "–": "-", "—": "-", "−": "-", "×": "x", "±": "+-", "≥": ">=", "≤": "<=", "→": "->",
    "‘": "'", "’": "'", "“": '"', "”": '"', "·": ".", "•": "*",
    **dict.fromkeys("─━═╌╴╶╸╺", "-"), **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰╞╡╪", "+"),
}  # fmt: skip
#: Width where there is no terminal that says its own.
WIDTH = 100


def console(error: bool = False) -> Console:
    """The terminal; of several processes (``accelerate launch``) only the first one speaks."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH
    quiet = os.environ.get("RANK", "0") != "0"
    return Console(stderr=error, width=width, quiet=quiet, highlight=False)


def complain(problem: str, *, where: str | None = None, hint: str | None = None) -> None:
    """One red message on stderr: what is wrong, where, and what to do."""
    from rich.text import Text

    message = Text.assemble(
        ("error: ", "bold red"),
        (f"{where}: " if where else "", "bold"),
        " ".join(problem.split()),
        (f" {' '.join(hint.split())}" if hint else "", "cyan"),
    )
    console(error=True).print(message, soft_wrap=True)


def quiet_libraries() -> None:
    """Silences warnings and bars of the libraries below; they mean nothing to our users."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def plain_where_needed() -> None:
    """Lets output that knows few characters (ASCII, Latin-1) show like ones instead of failing."""
    codecs.register_error("delible-plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and not encoding.startswith("utf"):
            reconfigure(errors="delible-plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What to write instead of characters that the output does not know."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = []
    for character in error.object[error.start : error.end]:
        like = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        shown.append(_PLAIN.get(character) or like or "?")
    return "".join(shown), error.end


class Reporter:
    """Prints sentences and draws progress bars on one terminal, without mixing them up.

    While it is open, it also shows what delible logs.

    Args:
        error: Speak on stderr, because stdout is for a program to read.
    """

    def __init__(self, error: bool = False) -> None:
        self.console = console(error)
        self._bar: Progress | None = None
        self._stage = self._drawn_title = ""
        self._pace = Pace()
        self._open = ExitStack()

    def __enter__(self) -> Reporter:
        self._open.enter_context(shown(self.say))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self.finish_bar()

    def say(self, sentence: str) -> None:
        """One sentence on a line of its own."""
        self.console.print(sentence, markup=False, soft_wrap=True)

    def heading(self, title: str) -> None:
        """The title of a step."""
        self.finish_bar()
        self.console.print(title, style="bold", markup=False, soft_wrap=True)

    def field(self, name: str, value: str, width: int = 12) -> None:
        """A name and its value, which begins after ``width`` letters."""
        from rich.text import Text

        self.console.print(Text.assemble((f"{name:<{width}}", "dim"), value), soft_wrap=True)

    def finish_bar(self) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def progress(self, title: str = "unlearning") -> Training:
        """A new bar, as what training reports to: ``(step, total, numbers)``."""
        self.finish_bar()
        return self._drawn(title) if self.console.is_terminal else self._told(title)

    def stage(self, title: str, done: int, total: int) -> None:
        """Progress of one of several stages; a new title is a new bar.

        A stage that counts from the beginning again (an attack that trains, then measures) is
        timed anew.
        """
        new = self._stage != title
        if new or not self._pace.goes_on(done):
            self._stage, self._pace = title, Pace(done)
            self.finish_bar()
        if self.console.is_terminal:
            self._draw(f"  {title}", done, total, "")
            if done >= total:
                self.finish_bar()
        elif new:
            self.say(f"  {title}")
        elif self._pace.due() and done < total:
            self._pace.told()
            left = self._pace.left(done, total)
            self.say("  ".join(filter(None, (f"  {title}", f"{done:,}/{total:,}", left))))

    def _draw(self, title: str, done: int, total: int, numbers: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        if self._drawn_title != title:
            self.finish_bar()  # of other work, which was not told to its end
        if self._bar is None:
            self._drawn_title = title
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", style="cyan"),
                Remaining(compact=True),
                TextColumn("left", style="dim"),
                console=self.console,
            )
            # a resumed run starts in the middle: the steps before took no time here
            self._bar.add_task(title, total=total, completed=max(0, done - 1), numbers="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, numbers=numbers)

    def _drawn(self, title: str) -> Training:
        def report(step: int, total: int, numbers: Mapping[str, float]) -> None:
            self._draw(title, step, total, _numbers(numbers))
            if step == total:
                self.finish_bar()

        return report

    def _told(self, title: str) -> Training:
        pace: Pace | None = None

        def report(step: int, total: int, numbers: Mapping[str, float]) -> None:
            nonlocal pace
            first = pace is None
            pace = pace or Pace(step)  # the first step's own time is not known
            often = step % max(1, total // LINES_WITHOUT_TERMINAL) == 0
            if not (first or step == total or often or pace.due()):
                return
            pace.told()
            parts = (f"{title}  step {step}/{total}", _numbers(numbers), pace.left(step, total))
            self.say("  ".join(filter(None, parts)))

        return report


def _numbers(numbers: Mapping[str, float]) -> str:
    words = (
        ("forget_loss", "forget {:.3f}"), ("keep_loss", "keep {:.3f}"),
        ("reward", "reward {:.3f}"), ("kl", "divergence {:.4f}"), ("leak_rate", "leaks {:.0%}"),
        ("refusal_rate", "refusals {:.0%}"), ("boundary_refusal_rate", "over-refusals {:.0%}"),
    )  # fmt: skip
    parts = [form.format(numbers[key]) for key, form in words if key in numbers]
    if "tokens_per_second" in numbers:
        parts.append(f"{numbers['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


def count(number: float) -> str:
    """A large number in words, such as "134.5 million"."""
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:.1f}{word}"
    return f"{number:,.0f}"


def plural(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Any:
    """A plain table of texts; what they hold is never read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold", no_wrap=column in WHOLE)
    for row in rows:
        made.add_row(*(Text(value) for value in row))
    return made

"""``delible chat``: talks to any system in a terminal, or answers what a pipe says."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from cyclopts import Parameter

from delible.cli import flags, output
from delible.cli.lesson import COMMANDS as LESSON_COMMANDS
from delible.cli.lesson import Teaching, lesson_of
from delible.cli.roles import read_roles
from delible.errors import EXIT_BAD_INPUT, EXIT_DONE, RecipeError

if TYPE_CHECKING:
    from delible.context import Context
    from delible.messages import Message
    from delible.repair.conversation import Repairing
    from delible.system.asks import Decoding
    from delible.system.base import Responder
    from delible.system.replies import Piece

#: What is typed besides questions.
COMMANDS = "/reset begins anew, /system TEXT sets the system prompt, /quit ends"
TEACH_BACK = "/teach-back"


@flags.flowing
def chat(
    target: str = "default",
    /,
    *,
    model: Annotated[str | None, Parameter(group=flags.ASKED)] = None,
    system: Annotated[str | None, Parameter(group=flags.ASKED)] = None,
    max_new_tokens: Annotated[int, Parameter(group=flags.ASKED)] = 512,
    temperature: Annotated[float, Parameter(group=flags.ASKED)] = 0.0,
    repair: Annotated[bool, Parameter(group=flags.RUN, show_default=False)] = False,
    lesson: Annotated[bool, Parameter(group=flags.RUN, show_default=False)] = False,
    topic: Annotated[tuple[str, ...] | None, Parameter(group=flags.RUN)] = None,
    exam: Annotated[Path | None, Parameter(group=flags.RUN)] = None,
    original: Annotated[str | None, Parameter(group=flags.RUN)] = None,
    out: flags.Out = None,
    seed: flags.Seed = 0,
    role: flags.Roles = None,
) -> int:
    """Talk to a model, a run or a server's model.

    Answers come as they are spoken. /reset begins anew, /system TEXT sets the system prompt (and
    begins anew), /quit ends. Ctrl-C ends an answer, and a second one the conversation. From a
    pipe every line is a turn of one conversation, and the answers alone go to stdout.

    Parameters
    ----------
    target
        A run directory of 'delible unlearn' or the folder of any artefact, a model by name, folder
        or .gguf file, or the URL of an OpenAI-compatible server (its key is read from
        $DELIBLE_API_KEY or $OPENAI_API_KEY).
    model
        Name of the model at the URL. Default: the only one that the server lists.
    system
        The system prompt.
    max_new_tokens
        Tokens of an answer at most.
    temperature
        0 takes the likeliest token each time; above 0 tokens are drawn.
    repair
        Forget on request: 'please forget what you know about NAME' edits the model, after a 'yes'.
        'undo that' takes it back, 'what have you forgotten?' lists the requests.
    lesson
        Teach it: it is a student of what it was made to forget. Its level is read after each turn,
        /teach-back has it explain, and the end tests it in other words.
    topic
        Of the lesson: subjects of its records. Default: all. May be repeated.
    exam
        Records that the student is taught and asked about. Default: the forget records of the run
        that is talked to.
    original
        The model before it forgot, to tell how much of it came back.
    out
        Where the edits are kept, with --repair: a folder that can be opened and talked to again.
        Default: runs/repair-HASH, the same for the same target; the target's own folder if it is
        one. With --lesson: where lesson.json is kept (default: nowhere).
    seed
        Of the draws.
    role
        Who plays a part that a guard consults by talking: guard=MODEL, judge=https://host/v1#MODEL.
        Default: whom the guard was made with, or the guarded system itself. With --repair the guard
        watches for requests beside the built-in rules, and the planner plans edits; with --lesson
        the judge codes turns and reads what the student explains. May be repeated.
    """
    if max_new_tokens < 1 or not 0 <= temperature <= 2:
        raise RecipeError(
            "an answer has at least one token, and a temperature from 0 to 2.",
            where="delible chat",
        )
    if out is not None and not (repair or lesson):
        raise RecipeError(
            "there is nothing to keep.", where="--out", hint="It goes with --repair or --lesson."
        )
    _check_lesson(lesson, repair, system, {"topic": topic, "exam": exam, "original": original})
    if repair and model is not None:
        raise RecipeError(
            "a server's model cannot be edited.", where="--repair", hint="Leave out --model."
        )
    terminal = sys.stdin.isatty()
    with output.Reporter(error=True) as reporter:
        reporter.say("Loading the libraries …")
        output.quiet_libraries()
        from delible.measure.starting import started
        from delible.system.asks import Decoding
        from delible.systems.opening import open_system
        from delible.systems.serving import responder

        context = started(None, roles=read_roles(role))
        repairing = _repairing(target, out, seed, context, reporter) if repair else None
        if repairing is None:
            opened = open_system(target, model=model, context=context)
        else:
            opened = repairing.chain.lm
        taught = None
        if lesson:
            taught = lesson_of(opened, target, exam, topic or (), original, out, context)
            reporter.say(taught.begin())
            system = taught.persona.text
        if terminal:
            commands = f"{LESSON_COMMANDS}" if lesson else COMMANDS
            reporter.say(f"Talking to {opened.name}. {commands}.")
    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    talk = _Talk(responder(opened), decoding, system, repairing)
    talk.teaching = None if taught is None else Teaching(taught, talk.rest)
    with asyncio.Runner() as runner:
        try:
            code = _turns(talk, runner, terminal)
            if talk.teaching is not None:
                talk.teaching.end()
            return code
        finally:
            runner.run(talk.aclose())


def _check_lesson(lesson: bool, repair: bool, system: str | None, given: dict[str, object]) -> None:
    """Refuses what does not go together.

    Raises:
        RecipeError: With what to leave out.
    """
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if named and not lesson:
        raise RecipeError(f"{named[0]} is of a lesson.", where=named[0], hint="Add --lesson.")
    other = "--repair" if repair else "--system" if system is not None else None
    if lesson and other is not None:
        raise RecipeError(
            f"a lesson has a student whose part stays the same, and goes without {other}.",
            where="--lesson",
            hint=f"Leave out {other}.",
        )


def _repairing(
    target: str, out: Path | None, seed: int, context: Context, reporter: output.Reporter
) -> Repairing:
    """Hears what is to be forgotten, and keeps the edits in a folder."""
    from delible.repair.chain import Chain
    from delible.repair.conversation import SETTINGS, Repairing
    from delible.repair.entries import is_chain

    if out is None and not is_chain(Path(target).expanduser()):
        out = Path("runs") / f"repair-{hashlib.sha256(target.encode()).hexdigest()[:8]}"
    chain = Chain.begin(target, out, settings=dict(SETTINGS), seed=seed, context=context)
    place = chain.run.path if chain.run is not None else out
    forgotten = ", ".join(entry.title for entry in chain.enabled) or "nothing so far"
    reporter.say(f"Edits are kept in {place} (forgotten: {forgotten}).")
    return Repairing(chain, context)


def _turns(talk: _Talk, runner: asyncio.Runner, terminal: bool) -> int:
    """Answers line by line; the exit code is that of the worst one."""
    from delible.system.replies import Unanswered

    code = EXIT_DONE
    for line in _lines(terminal):
        word, _, rest = line.partition(" ")
        match word:
            case "/quit":
                return code
            case "/reset":
                talk.begin(talk.system)
            case "/system" if talk.teaching is None:
                talk.begin(rest.strip() or None)
            case _ if word.startswith("/") and not talk.is_of_lesson(word):
                commands = COMMANDS if talk.teaching is None else LESSON_COMMANDS
                output.complain(f"'{word}' is no command.", hint=f"There are: {commands}.")
            case _ if word.startswith("/") and word != TEACH_BACK:
                pass
            case _:
                try:
                    if not talk.is_repair(line):
                        runner.run(talk.turn(line))
                        talk.read_level(asked_back=word == TEACH_BACK)
                except Unanswered as failed:
                    output.complain(failed.problem)
                    code = EXIT_BAD_INPUT if not terminal else code
                except KeyboardInterrupt:
                    if not terminal:
                        raise
                    print("\n(ended)", file=sys.stderr)
    return code


def _lines(terminal: bool) -> Iterator[str]:
    """What is said, without empty lines, to the end of the input."""
    if not terminal:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):  # not on every machine
        import readline  # noqa: F401 (lines can be edited, and called back)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


class _Talk:
    """A conversation.

    Args:
        answers: Who answers.
        decoding: How.
        system: The system prompt.
        repairing: Hears every turn first, and may change the model; None: nobody does.
    """

    def __init__(
        self,
        answers: Responder,
        decoding: Decoding,
        system: str | None,
        repairing: Repairing | None = None,
    ) -> None:
        self.answers, self.decoding, self.repairing = answers, decoding, repairing
        #: A lesson that is read after every turn, if it is one.
        self.teaching: Teaching | None = None
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forgets what was said."""
        from delible.messages import Message

        self.system = system
        self.messages: tuple[Message, ...] = ()
        if system:
            self.messages = (Message(role="system", content=system),)

    def is_repair(self, line: str) -> bool:
        """Whether a line was about forgetting, and is dealt with; says what came of it."""
        if self.repairing is None:
            return False
        self.rest()
        with output.Reporter(error=True):
            heard = self.repairing.hear(self.messages, line)
        if heard is None:
            return False
        print(heard.text, flush=True)
        self.messages = heard.messages
        return not heard.answers

    def is_of_lesson(self, word: str) -> bool:
        """Whether a word is a command of the lesson; it is carried out then."""
        if self.teaching is None:
            return False
        return word == TEACH_BACK or self.teaching.told(word)

    def read_level(self, asked_back: bool) -> None:
        """Tells the level of a student after a turn."""
        if self.teaching is not None:
            self.teaching.after(self.messages, asked_back)

    async def turn(self, line: str) -> None:
        """Says a line and prints the answer; one that fails or is ended was never said."""
        from delible.messages import Message
        from delible.system.asks import Prompt

        if self.teaching is not None and line.partition(" ")[0] == TEACH_BACK:
            line = self.teaching.lesson.asks_back
        asked = (*self.messages, Message(role="user", content=line))
        said = ""
        stream = self.answers.stream(Prompt(asked), self.decoding)
        async with aclosing(cast("AsyncGenerator[Piece]", stream)) as pieces:
            async for piece in pieces:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                said += piece.text
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.messages = (*asked, Message(role="assistant", content=said))

    async def aclose(self) -> None:
        """Lets go of connections and threads."""
        close = getattr(self.answers, "aclose", None)
        if close is not None:
            await close()
        else:
            self.rest()
        if self.repairing is not None:
            self.repairing.chain.close()

    def rest(self) -> None:
        """Ends a local model's thread, so that the model may be changed; a turn starts it again."""
        end = getattr(self.answers, "close", None)
        if end is not None:
            end()

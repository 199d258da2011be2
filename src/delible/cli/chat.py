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
    out
        Where the edits are kept, with --repair: a folder that can be opened and talked to again.
        Default: runs/repair-HASH, the same for the same target; the target's own folder if it is
        one.
    seed
        Of the draws.
    role
        Who plays a part that a guard consults by talking: guard=MODEL, judge=https://host/v1#MODEL.
        Default: whom the guard was made with, or the guarded system itself. With --repair the guard
        watches for requests beside the built-in rules, and the planner plans edits. May be
        repeated.
    """
    if max_new_tokens < 1 or not 0 <= temperature <= 2:
        raise RecipeError(
            "an answer has at least one token, and a temperature from 0 to 2.",
            where="delible chat",
        )
    if out is not None and not repair:
        raise RecipeError("there is nothing to keep.", where="--out", hint="It goes with --repair.")
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
        if terminal:
            reporter.say(f"Talking to {opened.name}. {COMMANDS}.")
    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    talk = _Talk(responder(opened), decoding, system, repairing)
    with asyncio.Runner() as runner:
        try:
            return _turns(talk, runner, terminal)
        finally:
            runner.run(talk.aclose())


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
            case "/system":
                talk.begin(rest.strip() or None)
            case _ if word.startswith("/"):
                output.complain(f"'{word}' is no command.", hint=f"There are: {COMMANDS}.")
            case _:
                try:
                    if not talk.is_repair(line):
                        runner.run(talk.turn(line))
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
        self._rest()
        with output.Reporter(error=True):
            heard = self.repairing.hear(self.messages, line)
        if heard is None:
            return False
        print(heard.text, flush=True)
        self.messages = heard.messages
        return not heard.answers

    async def turn(self, line: str) -> None:
        """Says a line and prints the answer; one that fails or is ended was never said."""
        from delible.messages import Message
        from delible.system.asks import Prompt

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
            self._rest()
        if self.repairing is not None:
            self.repairing.chain.close()

    def _rest(self) -> None:
        """Ends a local model's thread, so that the model may be changed; a turn starts it again."""
        end = getattr(self.answers, "close", None)
        if end is not None:
            end()

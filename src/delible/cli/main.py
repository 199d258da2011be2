"""The command ``delible``: finds the subcommand, and turns every failure into one message.

Exit codes: 0 done, 1 a requested threshold failed, 2 bad input or nothing to work with (an audit
without a single answer), 70 a bug of delible, 130 interrupted. Nothing heavy is imported before a
command runs, and nothing at all for ``--help``.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import traceback
from collections.abc import Sequence
from typing import Any, get_args

from delible.cli import output
from delible.cli.commands import COMMANDS, GROUPS, PAGE_WIDTH, command_of, page_of
from delible.errors import EXIT_DONE, EXIT_INTERRUPTED, DelibleError, nearest

#: A failure that is delible's own: EX_SOFTWARE of sysexits, so that no one takes it for a
#: threshold that failed.
EXIT_BUG = 70
#: Commands that go on where they were stopped.
RESUMABLE = ("demo", "unlearn", "tune", "bench", "request apply")


def main(tokens: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    Args:
        tokens: The words after ``delible``; None takes those of this process.
    """
    words = list(sys.argv[1:] if tokens is None else tokens)
    output.plain_where_needed()
    debug = "--debug" in words
    words = [_without_dot(word) for word in words if word != "--debug"]
    command = command_of(words)
    try:
        if not words or {"--help", "-h"} & set(words) or (words == [command] and command in GROUPS):
            _help(command)
            return EXIT_DONE
        from delible.cli.app import app

        found = app(words, exit_on_error=False, print_error=False)
        sys.stdout.flush()
        return found if isinstance(found, int) else EXIT_DONE
    except DelibleError as error:
        return _failed(error, debug)
    except KeyboardInterrupt:
        again = " Run the same command again to resume." if command in RESUMABLE else ""
        output.complain(f"interrupted.{again}")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:
        known = _bad_command_line(error, command) or _of_the_machine(error)
        if known is not None:
            return _failed(known, debug)
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split()) or "no message"
        output.complain(
            f"this is a bug in delible ({type(error).__name__}: {text}).",
            hint="Run the command again with --debug and report what it prints.",
        )
        return EXIT_BUG


def _without_dot(word: str) -> str:
    """``--objective.beta`` as ``--objective:beta``: to cyclopts a dot means a nested object."""
    flag, equals, value = word.partition("=")
    return flag.replace(".", ":") + equals + value if re.match(r"--[a-z_]", flag) else word


def _failed(error: DelibleError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    output.complain(error.problem, where=error.where, hint=error.hint)
    return error.exit_code


def _help(command: str) -> None:
    """Prints the stored page of ``make docs``: cyclopts alone would take a quarter of a second.

    A terminal that is narrower than the page gets one that is made for it.
    """
    name = command if command in COMMANDS or command in GROUPS else "delible"
    if shutil.get_terminal_size().columns >= PAGE_WIDTH:
        page = page_of(name).read_text(encoding="utf-8")
        sys.stdout.write(page)
        sys.stdout.flush()
        return
    from delible.cli.app import app

    app.help_print([] if name == "delible" else name.split())


def _bad_command_line(error: Exception, command: str) -> DelibleError | None:
    from cyclopts.exceptions import (
        CoercionError,
        CycloptsError,
        MissingArgumentError,
        RepeatArgumentError,
        UnknownCommandError,
        UnknownOptionError,
        UnusedCliTokensError,
    )

    if not isinstance(error, CycloptsError):
        return None
    where = f"delible {command}" if command in COMMANDS else None
    usage = f"'delible {command} --help' explains it." if where else "See 'delible --help'."
    match error:
        case UnknownCommandError():
            return _unknown_command(error, command)
        case UnknownOptionError():
            flag = _flag(error.token.keyword or error.token.value)
            text, usage = f"unknown option '{flag}'.", _nearest_flag(flag, command)
        case UnusedCliTokensError():
            words = " ".join(error.unused_tokens or ())
            if words.startswith("-"):
                return DelibleError(f"unknown option '{_flag(words)}'.", where=where, hint=usage)
            text = f"'{words}' is one word too many."
        case RepeatArgumentError():
            text = f"'{_flag(error.token.keyword or '')}' is given more than once."
        case CoercionError() if error.token is not None and error.token.keyword:
            flag = _flag(error.token.keyword)
            text = f"'{flag}' = '{error.token.value}': {_wanted(error.target_type)}."
        case MissingArgumentError() if error.argument is not None:
            name = _flag(error.keyword or error.argument.name)
            text = f"{name} has no value." if name.startswith("-") else f"{name} is missing."
        case _:
            text = " ".join(str(error).split())
    return DelibleError(text, where=where, hint=usage)


def _unknown_command(error: Any, command: str) -> DelibleError:
    """Tells the nearest one, among all or within a group."""
    word, known = command, {name for name in COMMANDS if " " not in name} | {*GROUPS}
    if command in GROUPS:
        word = next(iter(error.unused_tokens or ()), "")
        known = {name.split()[1] for name in COMMANDS if name.startswith(f"{command} ")}
    hint = nearest(word, known).replace("Known:", "The commands are")
    where = f"delible {command}" if command in GROUPS else None
    return DelibleError(f"unknown command '{word}'.", where=where, hint=hint)


def _flag(name: str) -> str:
    return name.replace(":", ".")


def _wanted(kind: object) -> str:
    if kind in (int, float):
        return "a whole number is wanted" if kind is int else "a number is wanted"
    choices = get_args(kind)
    return f"one of {', '.join(map(str, choices))} is wanted" if choices else "cannot be read"


def _nearest_flag(flag: str, command: str) -> str:
    from delible.cli.app import app_of

    if command not in COMMANDS:
        return "See 'delible --help'."
    collected = app_of(command).assemble_argument_collection()
    names = (name for argument in collected for name in argument.names)
    return nearest(flag, {name for name in names if name.startswith("--")})


def _of_the_machine(error: Exception) -> DelibleError | None:
    """What a disk refuses, or an exhausted memory: nobody's bug, and something can be done."""
    from delible.files import refused_by_disk

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    for one in causes:
        known = refused_by_disk(one)
        if known is not None:
            problem, hint = known
            place = getattr(one, "filename", None)
            return DelibleError(problem, where=str(place) if place else None, hint=hint)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return DelibleError(
            "the memory is not enough.",
            hint="Choose a smaller model, or --method npo_lora; --dry-run estimates the need.",
        )
    return None


__all__ = ["EXIT_BUG", "main"]

"""``delible merge`` and ``delible undo``: what becomes of what a run made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from delible.cli import flags, output
from delible.errors import RecipeError


@flags.flowing
def merge(target: str, /, *, out: Annotated[Path, Parameter(group=flags.RUN)]) -> int:
    """Write one plain model of a run and all that it stands on.

    Adapters and patches are added to the weights, and transformers alone loads the result. A guard
    or a hook is in no weights: that is said, and nothing is written.

    Parameters
    ----------
    target
        The run directory of 'delible unlearn', or the folder of an adapter.
    out
        The folder of the plain model.
    """
    with output.Reporter() as reporter:
        reporter.say("Loading the libraries …")
        output.quiet_libraries()
        from delible.systems.opening import merge as merged

        merged(target, out)
        reporter.say(f"The model lies in {out} (safetensors and tokenizer).")
    return 0


@flags.flowing
def undo(target: Path, /, *, back: bool = False, only: list[str] | None = None) -> int:
    """Take off what a run made: it answers as the model before, bit by bit.

    Nothing is deleted: --back puts it on again. A whole model cannot be taken off; the message
    names the one that it was made from.

    Parameters
    ----------
    target
        The run directory of 'delible unlearn', or the folder of a sequence of requests.
    back
        Put it on again, with all that was taken out of it.
    only
        Take only this out: of a codebook a subject, or the id of an edit or a request; of a
        sequence one request, where that is exact.
    """
    with output.Reporter() as reporter:
        output.quiet_libraries()
        from delible.sequence.result import is_sequence
        from delible.systems.opening import undo as taken_off

        if is_sequence(target):
            return _of_sequence(reporter, target, back, only or ())
        artefact = taken_off(target, back=back, only=only or ())
        if only:
            reporter.say(
                f"Out of the {artefact.kind}: {', '.join(artefact.without or ())}. {target} "
                "answers as if that had never been asked for. --back puts it in again."
            )
            return 0
        base = artefact.base.name if artefact.base else "its base"
        reporter.say(
            f"The {artefact.kind} is on again: {target} answers as when it was made."
            if back
            else f"The {artefact.kind} is off: {target} answers as {base}. --back puts it on again."
        )
    return 0


def _of_sequence(reporter: output.Reporter, target: Path, back: bool, only: Sequence[str]) -> int:
    """Undoes one request of a sequence."""
    from delible.sequence.undoing import undo_request

    if back or len(only) != 1:
        raise RecipeError(
            "of a sequence one request is undone.",
            where=str(target),
            hint="Say which: --only ID. What was taken off a run goes on again with its folder.",
        )
    left = undo_request(target, only[0])
    reporter.say(f"Without request {only[0]}; all else is as it was, bit by bit: {left}")
    return 0

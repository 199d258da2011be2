"""Undoing one request of several: where that is exact, it is done; where not, it is said.

The last request is undone by opening the result before it, whatever the method. One in the middle
is taken out alone where the artefact holds its requests apart (a codebook, a router): what it holds
of the others stays as it is, bit by bit. Weights that later requests moved on from cannot be put
back without those: that is said, with the folder to begin anew from. What was undone stays undone,
whatever is undone next.
"""

from __future__ import annotations

import logging
from pathlib import Path

from delible.errors import DataError, RunError, nearest
from delible.rundir import RunDirectory
from delible.sequence.result import SequenceResult, Step, read_sequence
from delible.system import artefact as artefacts
from delible.systems import opening

logger = logging.getLogger(__name__)


def undo_request(folder: Path | str, request: str) -> str:
    """Undoes one request of a sequence.

    Args:
        folder: Of the sequence.
        request: Its id.

    Returns:
        What answers without it: a folder, or the start model's name.

    Raises:
        DataError: The sequence has no such request.
        RunError: It cannot be undone exactly; says from where the others can be done again.
    """
    found = read_sequence(folder)
    steps = {one.id: one for one in found.steps[1:]}
    if request not in steps:
        raise DataError(
            f"there is no request '{request}' here, or its turn has not come.",
            where=str(folder),
            hint=nearest(request, steps) if steps else "Nothing was done yet.",
        )
    step = steps[request]
    if step.what != "done":
        raise RunError(
            f"nothing was done for request '{request}' ({step.told})", where=str(folder),
            hint="Undo the request that it names.",
        )  # fmt: skip
    left = _undone(found, step)
    with_it = [one.id for one in found.steps if one.what == "covered" and request in one.by]
    if with_it:
        logger.warning(
            f"What {', '.join(with_it)} asked for was done for request {request}, and is undone "
            "with it: if it still stands, carry it out again."
        )
    return left


def _undone(found: SequenceResult, step: Step) -> str:
    """What answers without a request, which is taken off, or out of the last result."""
    stands = [one for one in found.steps if one.what == "done" and not _taken_off(one)]
    before = [found.steps[0], *(one for one in stands if one.number < step.number)][-1].state
    if step not in stands:
        return before
    last = stands[-1]
    # of the last one the result before it will do, unless something was taken out of it already
    if step is last and not (_is_kept(last) and artefacts.read(Path(last.state)).without):
        if opening.kind_of(artefacts.read(Path(step.state)), Path(step.state)).card.reversible:
            opening.undo(step.state)
        return before
    return _taken_out(step, last, before)


def undone(result: SequenceResult) -> list[str]:
    """Ids of the requests that were taken out, or off, since they were done."""
    done = [one for one in result.steps if one.what == "done" and _is_kept(one)]
    off = [one.id for one in done if _taken_off(one)]
    stands = [one for one in done if one.id not in off]
    out = artefacts.read(Path(stands[-1].state)).without or () if stands else ()
    return [one.id for one in done if one.id in off or _request_of(one) in out]


def _is_kept(step: Step) -> bool:
    return artefacts.is_artefact(Path(step.state))


def _taken_off(step: Step) -> bool:
    """Whether the whole result of a request was undone: it answers as the one before it."""
    return _is_kept(step) and not artefacts.read(Path(step.state)).enabled


def _request_of(step: Step) -> str:
    return str(RunDirectory(Path(step.state)).manifest["request"])


def _taken_out(step: Step, last: Step, before: str) -> str:
    """Takes a request out of the last result, which holds it beside others."""
    try:
        opening.undo(last.state, only=[_request_of(step)])
    except RunError as error:
        raise RunError(
            f"request '{step.id}' cannot be undone alone: the requests after it were carried out "
            f"on its result. {error.problem}",
            where=last.state,
            hint=f"The model before it is {before}: carry out the later requests on that, with "
            f"'delible unlearn {before} --requests …'.",
        ) from error
    return last.state


__all__ = ["undo_request", "undone"]

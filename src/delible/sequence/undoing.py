"""Undoing one request of several: where that is exact, it is done; where not, it is said.

The last request is undone by opening the result before it, whatever the method. One in the middle
is taken out alone where the artefact holds its requests apart (a codebook, a router): the artefact
then answers as if it had never been asked for. Weights that later requests moved on from cannot be
put back without those: that is said, with the folder to begin anew from.
"""

from __future__ import annotations

from pathlib import Path

from delible.errors import DataError, RunError, nearest
from delible.rundir import RunDirectory
from delible.sequence.result import Step, read_sequence
from delible.system import artefact as artefacts
from delible.systems import opening


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
    before = found.steps[step.number - 1].state
    if step.what != "done":
        raise RunError(
            f"nothing was done for request '{request}' ({step.told})", where=str(folder),
            hint="Undo the request that it names.",
        )  # fmt: skip
    later = [one for one in found.steps[step.number + 1 :] if one.what == "done"]
    if not later:
        if opening.kind_of(artefacts.read(Path(step.state)), Path(step.state)).card.reversible:
            opening.undo(step.state)
        return before
    return _taken_out(step, later[-1], before)


def _taken_out(step: Step, last: Step, before: str) -> str:
    """Takes a request out of the last result, which holds it beside others."""
    name = RunDirectory(Path(step.state)).manifest["request"]
    try:
        opening.undo(last.state, only=[name])
    except RunError as error:
        raise RunError(
            f"request '{step.id}' cannot be undone alone: the requests after it were carried out "
            f"on its result. {error.problem}",
            where=last.state,
            hint=f"The model before it is {before}: carry out the later requests on that, with "
            f"'delible unlearn {before} --requests …'.",
        ) from error
    return last.state


__all__ = ["undo_request"]

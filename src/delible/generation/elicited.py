"""Forget rows of a request that gives names only: asked for once, kept in the run, edited at will.

The rows lie in ``RUN/data/forget.jsonl``. They may be edited until training has started; a run
that is started again takes what lies there and asks nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from delible.context import Context
from delible.errors import DataError, RunError
from delible.files import write_json
from delible.generation.elicit import Elicited, elicit
from delible.loaders import read_records, write_records
from delible.loaders.request import fact
from delible.records import ForgetRequest, Record, RecordBase, digest
from delible.rundir import RunDirectory
from delible.system.base import System
from delible.system.questions import answer_of
from delible.world import filters

logger = logging.getLogger(__name__)


#: Rows per name that are shown.
SHOWN = 5
#: Characters of a shown answer.
SHOWN_CHARACTERS = 120


def place(run: RunDirectory) -> Path:
    """Where a run keeps the rows."""
    return run.path / "data" / "forget.jsonl"


def with_rows(
    lm: System,
    request: ForgetRequest,
    context: Context,
) -> ForgetRequest:
    """The request with forget rows about its subjects: those of the run, or what the model says.

    Args:
        lm: The model before it forgets.
        context: Its run has begun, if there is one. Where nobody plays the writer, the questions
            are built in.

    Raises:
        DataError: The model knows none of the names, or the run's file has no usable rows.
        RunError: The rows were changed after training had started.
    """
    run = context.run
    if run is not None and place(run).exists():
        rows = tuple(read_records(place(run)))
        if not rows:
            raise DataError(
                "there are no rows left to forget.",
                where=str(place(run)),
                hint="Delete the file, and the model is asked again.",
            )
        logger.info(f"{len(rows)} forget rows are taken from {place(run)}.")
        taken = _without_kept(request, rows)
        _check_unchanged(run, taken.forget)
        return taken
    found = [
        elicit(lm, name, writer=context.plays("writer"), seed=context.seed, stage=context.stage)
        for name in request.subjects
    ]
    for one in found:
        tell(one)
        if run is not None:
            run.event(
                "elicited", subject=one.name, known=one.known, asked=one.asked,
                facts=len(one.facts), made_up=list(one.made_up), dropped=dict(one.dropped),
            )  # fmt: skip
    rows = tuple(row for one in found for row in one.rows)
    if not rows:
        raise DataError(
            f"the model knows nothing about {', '.join(request.subjects)} that it would not say "
            "of a made-up name.",
            where="subjects",
            hint="Check the spelling, let a model write the questions (--generator MODEL), or "
            "give records of your own (--forget FILE).",
        )
    if run is not None and run.writes:
        write_records(rows, place(run))
        logger.info(f"{len(rows)} rows to forget are in {place(run)}.")
    return _without_kept(request, rows)


def start(run: RunDirectory, rows: Sequence[RecordBase]) -> None:
    """Training starts: from here on the rows are part of the run."""
    described = {"records": len(rows), "sha256": digest(rows)}
    if run.writes:
        write_json(_mark(run), described)
    run.update(elicited=described)


def _mark(run: RunDirectory) -> Path:
    return run.path / "checkpoint" / "elicited.json"


def _check_unchanged(run: RunDirectory, rows: Sequence[RecordBase]) -> None:
    if not _mark(run).exists():
        return
    if json.loads(_mark(run).read_text("utf-8"))["sha256"] != digest(rows):
        raise RunError(
            "the rows to forget were changed after training had started.",
            where=str(place(run)),
            hint="Give them to a new run: --forget FILE.",
        )


def _without_kept(request: ForgetRequest, rows: Sequence[Record]) -> ForgetRequest:
    """The request with the rows, but for those that are to be kept."""
    kept = {fact(one) for one in (*request.retain, *request.neighbours)}
    left = tuple(row for row in rows if fact(row) not in kept)
    if len(left) < len(rows):
        logger.warning(
            f"{len(rows) - len(left)} of the rows are to be kept, too: they are not forgotten."
        )
    if not left:
        raise DataError(
            "all rows that the model gives are also to be kept.",
            where="subjects",
            hint="Take them out of --retain and --neighbours.",
        )
    return request.model_copy(update={"forget": left})


def tell(found: Elicited) -> None:
    """What was elicited about a name, what was not, and a few rows."""
    others = ", ".join(map(str, found.made_up))
    logger.info(
        f"{found.name}: {len(found.facts)} of {found.asked} answers hold (of made-up names "
        f"{others} would); no answer to the rest: {filters.told(found.dropped)}."
    )
    if not found.known:
        logger.warning(
            f"{found.name}: that is no more than guessing, so the model is taken not to know the "
            "name, and nothing is made of it."
        )
        return
    texts = sum(row.group == "passage" for row in found.rows)
    agreed = {one.question: f"  ({one.agreed} of {one.replies} replies)" for one in found.facts}
    for row in found.rows[:SHOWN]:
        answer = " ".join(answer_of(row).split())
        if len(answer) > SHOWN_CHARACTERS:
            answer = f"{answer[:SHOWN_CHARACTERS]}…"
        logger.info(f"  {row.question}  {answer}{agreed.get(row.question, '')}")
    more = len(found.rows) - SHOWN
    if more > 0:
        logger.info(f"  … and {more} more, {texts} of them texts.")


__all__ = ["place", "start", "tell", "with_rows"]

"""What ``delible unlearn`` tells: before it begins, and when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.cli import output, tables
from delible.watching import duration

if TYPE_CHECKING:
    from delible.finishing import UnlearnResult
    from delible.method import Method
    from delible.records import ForgetRequest


def announce(
    reporter: output.Reporter,
    model: str,
    request: ForgetRequest,
    chosen: Method,
    folder: Path,
) -> None:
    """What will be done, to what, and where the result will lie."""
    spec = chosen.spec()
    parts = [
        f"{slot} {spec[slot]['name']}"
        for slot in ("generate", "objective", "keep", "place", "harden", "finish")
        if isinstance(spec.get(slot), dict) and spec[slot]["name"] not in ("none", "all")
    ]
    rows = [
        output.plural(len(found), f"{name} row")
        for name, found in (
            ("forget", request.forget), ("retain", request.retain),
            ("neighbour", request.neighbours), ("holdout", request.holdout),
        ) if found
    ]  # fmt: skip
    if request.subjects:
        rows.append(output.plural(len(request.subjects), "subject"))
    reporter.field("model", model)
    reporter.field("data", ", ".join(rows))
    made_of = f" ({', '.join(parts)})" if parts else ""
    reporter.field("method", f"{spec['name']}{made_of}")
    training = spec.get("training")
    if training:
        reporter.field("training", _length(training))
    reporter.field("folder", str(folder))


def _length(training: Mapping[str, Any]) -> str:
    """How long and how fast, in words."""
    length = (
        f"{training['max_steps']} steps at most"
        if training["max_steps"]
        else output.plural(training["epochs"], "epoch")
    )
    if training["least_steps"]:
        length += f" (at least {training['least_steps']} steps)"
    if share := training["stop_at_forget_share"]:
        length = f"until forget answers are {share:.0%} as probable, {length} at most"
    rate = f"learning rate {training['learning_rate']:g}"
    if width := training["learning_rate_width"]:
        rate += f" at a width of {width}"
    return f"{length}, {rate}"


def conclude(
    reporter: output.Reporter, result: UnlearnResult, folder: Path, seconds: float
) -> None:
    """What came of it, and what to do next."""
    if result.examples:
        reporter.console.print(tables.before_after(result.examples))
    if result.stopped:
        reporter.say(f"Stopped early: {result.stopped}.")
    if not result.resumed_finished:
        moved = result.notes.get("parameters")
        steps = result.notes.get("steps")
        words = [
            f"{output.count(moved)} parameters were trained" if moved else "",
            f"{steps} steps" if steps else "",
            f"{duration(seconds)} in all",
        ]
        reporter.say(", ".join(word for word in words if word).capitalize() + ".")
    if result.achieved is not None:
        reporter.say(result.achieved.sentence())
    reporter.say(_where(folder))
    reporter.say(f"Its page, for a browser: {_page(folder)}")
    reporter.say("Next, see how deep the forgetting goes:")
    reporter.say(f"  delible audit {folder}")


def _where(folder: Path) -> str:
    """What lies where, and what opens it."""
    from delible.system.artefact import read

    artefact = read(folder)
    if artefact.kind == "model":
        return f"The result lies in {folder / 'model'} (safetensors and tokenizer)."
    base = artefact.base.name if artefact.base else "its base"
    return (
        f"The result lies in {folder}: the {artefact.kind} alone, on {base}; delible.open opens "
        "both, 'delible merge' makes a plain model of them where that can be, and 'delible undo' "
        "takes it off."
    )


def _page(folder: Path) -> Path:
    """Writes the run's page, unless there is one already (of an audit, perhaps)."""
    from delible.report import PAGE, write_page

    path = folder / PAGE
    return path if path.exists() else write_page(folder)

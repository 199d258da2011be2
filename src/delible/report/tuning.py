"""The page of ``delible tune``: every trial's leak against its utility, and the winner.

The prose is in ``tuning.html.j2``, the drawing in ``charts/``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible import registry
from delible.cards import METHODS
from delible.report import charts, html
from delible.rundir import hardware, versions

if TYPE_CHECKING:
    from delible.tune import Trial, TuneResult

#: With more trials than these only the winner has its number beside its mark.
MOST_NUMBERS = 40


def write_search(path: Path, found: TuneResult, manifest: Mapping[str, Any]) -> Path:
    """Writes the page of a search.

    Args:
        path: The page's file; its folder exists.
        manifest: Of the search's run directory.

    Returns:
        The file.

    Raises:
        RunError: It cannot be written.
    """
    return html.write(render_search(found, manifest), path)


def render_search(found: TuneResult, manifest: Mapping[str, Any]) -> str:
    """The page as HTML text."""
    from delible.tune.measuring import ASIDE

    cards = {card.name: card for card in registry.cards(*METHODS)}
    words = manifest.get("command") or ["delible", "tune"]
    machine = manifest.get("hardware") or hardware()
    return (
        html.environment()
        .get_template("tuning.html.j2")
        .render(
            title=cards[found.method].title if found.method in cards else found.method,
            found=found,
            best=found.best,
            start_leak=found.start_leak,
            chart=_chart(found),
            options=list(found.space),
            rows=[_row(trial, found) for trial in found.trials],
            failed=[trial for trial in found.trials if trial.failed is not None],
            kept=sum(trial.keeps(found.budget) for trial in found.trials),
            ranges=[
                {
                    "option": name,
                    "low": f"{one.low:g}",
                    "high": f"{one.high:g}",
                    "log": one.log,
                    "own": f"{found.trials[0].options[name]:g}",
                    "best": f"{found.best.options[name]:g}",
                }
                for name, one in found.space.items()
            ],
            measures=[
                {
                    "name": name.removesuffix(f"/{split}"),
                    "split": split,
                    "start": found.start[name],
                    "best": found.best.means.get(name),
                }
                for name in found.start
                for split in [name.rpartition("/")[2]]
            ],
            aside=ASIDE.strip(),
            command=shlex.join(str(word) for word in words),
            seed=manifest.get("run", {}).get("seed", 0),
            data=manifest.get("run", {}).get("data", {}),
            machine=", ".join(
                str(machine[key])
                for key in ("accelerator", "machine", "system")
                if machine.get(key)
            ),
            versions=manifest.get("versions") or versions(),
        )
    )


def _chart(found: TuneResult) -> dict[str, Any]:
    """Leak against utility with the budget as a line, for wide and for narrow screens."""
    start = found.start_leak
    assert start is not None
    spots = [
        charts.Spot(
            start, 1.0, "original", "before", "original", f"The model before: leak {start:.3f}"
        )
    ]
    numbered = len(found.trials) <= MOST_NUMBERS
    for trial in found.trials:
        if trial.leak is None or trial.utility is None:
            continue
        number = str(trial.index + 1)
        best = trial.index == found.best.index
        kind = "guard" if trial.keeps(found.budget) else "plain"
        spots.append(
            charts.Spot(
                trial.leak,
                trial.utility,
                "method" if best else kind,
                f"trial {number}" if best else number if numbered else "",
                number if best or numbered else "",
                f"Trial {number}: leak {trial.leak:.3f}, utility {trial.utility:.3f}",
            )
        )
    svgs = {
        name: charts.methods(
            spots,
            identifier=f"trials-{name}",
            title="Leak against utility, all trials",
            description="; ".join(spot.title for spot in spots),
            x_label="leak  (← lower is better)",
            y_label="utility  (↑ higher is better)",
            size=size,
            y_line=found.budget,
            y_text="the budget",
            from_zero=True,
        )
        for name, size in (("wide", (760.0, 470.0)), ("narrow", (400.0, 400.0)))
    }
    return {**svgs, "numbered": numbered}


def _row(trial: Trial, found: TuneResult) -> dict[str, Any]:
    if trial.failed is not None:
        verdict = "failed"
    elif trial.index == found.best.index:
        verdict = "the winner" if trial.keeps(found.budget) else "nearest to the budget"
    else:
        verdict = "kept the budget" if trial.keeps(found.budget) else "below the budget"
    return {
        "number": trial.index + 1,
        "own": trial.index == 0,
        "best": trial.index == found.best.index,
        "options": [
            {"value": repr(trial.options[name]), "text": f"{trial.options[name]:g}"}
            for name in found.space
        ],
        "numbers": [trial.leak, trial.utility, trial.aside_leak, trial.aside_utility],
        "reason": trial.failed or "there are no records aside",
        "seconds": trial.seconds,
        "verdict": verdict,
    }

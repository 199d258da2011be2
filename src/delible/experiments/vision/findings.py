"""What was forgotten and what stayed: rows, and sentences computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delible.bench.stages import mean
from delible.experiments.vision.exam import FORGOTTEN, around, chance, kept
from delible.measure.benchmark import Findings
from delible.world.pictures import PictureWorld

#: A concept counts as forgotten up to so much above chance, and the rest as kept down to so much.
ABOVE, BELOW = 0.10, 0.03


def two(world: PictureWorld) -> str:
    """The system that forgets two concepts at once."""
    return f"sauce, two {world.noun}s"


def findings(
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    world: PictureWorld,
    concept: str,
    second: str,
) -> Findings:
    """Table and notes.

    Args:
        found: By system, one cell per seed: ``accuracies`` by what is asked, or ``failed``.
        world: Of the pictures.
        concept: What was forgotten.
        second: What was forgotten with it by :func:`two`.
    """
    kinds = (*FORGOTTEN, *kept(world), *around(world))
    rows, runs, notes = list[dict[str, Any]](), list[dict[str, Any]](), list[str]()
    before: Mapping[str, Any] = {}
    for title, cells in found.items():
        notes += [f"{title} failed: {cell['failed']}" for cell in cells if "failed" in cell]
        good = [cell for cell in cells if "failed" not in cell]
        if not good:
            continue
        row = {"system": title, **_means(good, "accuracies", kinds)}
        rows.append(row)
        runs += [
            {"system": title, "seed": seed, **cell["accuracies"]}
            for seed, cell in enumerate(cells) if "failed" not in cell
        ]  # fmt: skip
        if title == "as it was":
            before = row
            continue
        alike = before
        if title == two(world):
            alike = _without_second(before, found, kinds)
        notes += _compared(title, row, alike, world, concept)
        notes += _of_sauce(title, good[0], before, kinds)
        if title == two(world) and "second" in good[0]:
            value = good[0]["second"]
            notes.append(f"{title}: accuracy on '{second}' is {value:.1%}.")
    return Findings(rows, [], notes, runs)


def _without_second(
    before: Mapping[str, Any],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    kinds: Sequence[str],
) -> Mapping[str, Any]:
    """What was known before, of the same pictures: those of a second concept are no neighbours."""
    cells = [one for one in found.get("as it was", ()) if "without" in one]
    return {**before, **_means(cells, "without", kinds)} if cells else before


def _means(
    cells: Sequence[Mapping[str, Any]], name: str, kinds: Sequence[str]
) -> dict[str, float | None]:
    return {kind: mean([cell[name].get(kind) for cell in cells]) for kind in kinds}


def _compared(
    title: str,
    row: Mapping[str, Any],
    before: Mapping[str, Any],
    world: PictureWorld,
    concept: str,
) -> list[str]:
    said, blind = list[str](), chance(world)
    known, value = before.get("concept"), row["concept"]
    if known is not None and value is not None:
        limit = blind["concept"] + ABOVE
        verdict = "at most" if value <= limit else "above"
        way = "fell" if value < known else "rose" if value > known else "stayed"
        said.append(
            f"{title}: accuracy on '{concept}' {way} from {known:.1%} to {value:.1%}, {verdict} "
            f"chance and 10 points ({limit:.1%})."
        )
        if known <= limit:
            said.append(f"{title}: '{concept}' was not known before, so this shows no forgetting.")
    lost = {
        kind: before[kind] - row[kind]
        for kind in kept(world)
        if before.get(kind) is not None and row[kind] is not None
    }
    over = [kind for kind, drop in lost.items() if drop > BELOW]
    if lost:
        most = max(lost, key=lambda kind: lost[kind])
        said.append(
            f"{title}: of what must stay, '{most}' lost most, {100 * lost[most]:.1f} points; "
            + (f"more than 3 points: {', '.join(over)}." if over else "nothing lost more than 3.")
        )
    left = [
        kind for kind in FORGOTTEN
        if row[kind] is not None and row[kind] > blind[kind] + ABOVE
    ]  # fmt: skip
    if all(row[kind] is None for kind in FORGOTTEN):
        return [*said, f"{title}: nothing was asked about '{concept}'."]
    said.append(
        f"{title}: still asked out of it above chance and 10 points: {', '.join(left)}."
        if left
        else f"{title}: no way of asking is above chance and 10 points."
    )
    return said


def _of_sauce(
    title: str, cell: Mapping[str, Any], before: Mapping[str, Any], kinds: Sequence[str]
) -> list[str]:
    said = list[str]()
    if "chosen" in cell:
        chosen, within = cell["chosen"], [one for one in cell["tries"] if one["lost"] <= 0.02]
        said.append(
            f"{title}: chosen on other pictures among {len(cell['tries'])}, of which {len(within)} "
            f"lose at most 2 points: {chosen['features']} latents, factor {chosen['factor']:g}, "
            f"block {chosen['layer']}."
        )
        said.append(
            f"{title}: the autoencoder leaves {cell['unexplained']:.1%} of the variance of unseen "
            f"pictures unexplained; {cell['silent']:.1%} of its latents are silent on them."
        )
    if "off" in cell and before:
        same = all(cell["off"][kind] == before[kind] for kind in kinds)
        said.append(
            f"{title}: taken off, every answer's accuracy is as it was."
            if same
            else f"{title}: taken off, it does not answer as it did."
        )
    return said

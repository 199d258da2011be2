"""What the scripts that write pages share: the machine in words, tables of claims, both files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence import Claim, interval, verdict

from delible.bench.table import Number
from delible.files import atomic_file, write_json


def machine(hardware: Mapping[str, Any], threads: str = "thread(s)") -> str:
    """The machine of a run in words."""
    return (
        f"{hardware['processors']} cores ({hardware['machine']}), {hardware['threads']} {threads}, "
        f"{hardware['accelerator'] or 'no accelerator'}, products in {hardware['precision']}"
    )


def revision(git: str | None) -> str:
    """The revision of the code in words."""
    return (git or "unknown")[:10]


def claims_table(claims: Sequence[Claim], found: Mapping[str, Sequence[Number]]) -> list[str]:
    """The lines of a table: a row per claim, its number and verdict under each heading.

    Args:
        found: By heading, such as a model: a number for each claim.
    """
    head = ["claim", "number", "range"]
    for title in found:
        head += [title, "at this scale"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for place, claim in enumerate(claims):
        cells = [claim.says, claim.measured, claim.range_text()]
        for numbers in found.values():
            number = numbers[place]
            cells += [interval(number, claim.digits), verdict(claim, number)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write(page: Path, found: Mapping[str, Any], text: str) -> None:
    """Writes the page, and its numbers as JSON beside it."""
    write_json(page.with_suffix(".json"), found)
    with atomic_file(page) as file:
        file.write(text)

"""Generated rows on disk: one JSONL file per role, which the user can read and edit.

Rows of one line are partners: line 7 of ``alternate.jsonl`` belongs to the 7th forget record, or to
line 7 of ``forget.jsonl`` where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from delible.errors import DataError, RecipeError, nearest
from delible.files import atomic_folder
from delible.records import RecordBase, digest
from delible.system.questions import ask
from delible.train.losses import Keep, Role
from delible.train.recipe import Recipe
from delible.train.slots import SlotContext

ROLES: tuple[str, ...] = get_args(Role)
#: Partners that are about somebody else, so that they ask something else.
ABOUT_OTHERS: tuple[Role, ...] = ("known",)

Generated = Mapping[Role, Sequence[RecordBase]]


def read(folder: Path) -> dict[Role, list[RecordBase]]:
    """The rows in a folder, by role.

    Raises:
        DataError: No such folder, no file in it, a file that is not named after a role, or a
            record that cannot be read.
    """
    from delible.loaders import read_records

    if not folder.is_dir():
        raise DataError("there is no folder of generated rows.", where=str(folder))
    made: dict[Role, list[RecordBase]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        if path.stem not in ROLES:
            raise DataError(
                f"'{path.stem}' is no role of rows.",
                where=str(path),
                hint=nearest(path.stem, ROLES),
            )
        role = cast(Role, path.stem)
        made[role] = list(read_records(path))
    if not made:
        known = ", ".join(f"{role}.jsonl" for role in ROLES)
        raise DataError("there are no generated rows.", where=str(folder), hint=f"Known: {known}.")
    return made


def write(made: Generated, folder: Path) -> None:
    """Writes one file per role, all of them or none."""
    from delible.loaders import write_records

    with atomic_folder(folder) as target:
        for role, records in made.items():
            if records:
                write_records(records, target / f"{role}.jsonl")


def described(made: Generated) -> dict[str, dict[str, Any]]:
    """Number and SHA-256 of the rows of each role, for a manifest."""
    return {
        role: {"records": len(records), "sha256": digest(records)}
        for role, records in sorted(made.items())
        if records
    }


def check_partners(records: Mapping[str, Sequence[RecordBase]], roles: Sequence[str]) -> None:
    """Checks that rows of the given roles belong to the forget rows, line by line.

    Raises:
        DataError: Another number of rows, or a partner that asks something else.
    """
    forget = records["forget"]
    for role in roles:
        if len(records[role]) != len(forget):
            raise DataError(
                f"there are {len(records[role])} '{role}' rows for {len(forget)} forget rows.",
                where=f"generated '{role}'",
                hint="Rows are partners line by line: add or delete both, or generate anew.",
            )
        for number, (one, other) in enumerate(zip(forget, records[role], strict=True), start=1):
            if role not in ABOUT_OTHERS and ask(one) != ask(other):
                raise DataError(
                    f"row {number} asks something else than forget row {number}.",
                    where=f"generated '{role}'",
                    hint="Rows are partners line by line: put them back in order.",
                )


def instruction(recipe: Recipe, keep: Keep | None, context: SlotContext) -> str | None:
    """What an instructed reference model is told; None if there is none.

    Args:
        keep: The recipe's, unless it keeps nothing.

    Raises:
        RecipeError: A loss learns from one that is told something, and nothing tells it.
    """
    for loss in (recipe.objective, keep):
        if loss is not None and loss.instructed:
            told = recipe.generate.instruction(context)
            if told is None:
                raise RecipeError(
                    f"{loss.card.kind} '{loss.card.name}' learns from a teacher that is told "
                    f"what to refuse, and generate '{recipe.generate.card.name}' has no "
                    "instruction for it.",
                    where=f"method '{recipe.name}'",
                    hint="Add --generate unified.",
                )
            return told
    return None

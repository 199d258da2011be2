"""What a composition needs of records and generated rows, refused before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from delible.errors import RecipeError
from delible.records import RecordBase
from delible.train.losses import Role
from delible.train.recipe import Recipe

#: Roles whose rows come from the records or from the engine, not from a generator.
GIVEN_ROLES: tuple[Role, ...] = ("forget", "retain", "refusal")


def check_needs(
    recipe: Recipe,
    records: Mapping[str, Sequence[RecordBase]],
    generated: Iterable[Role] | None = None,
) -> None:
    """Refuses a composition that cannot work, before any work.

    Args:
        generated: Roles of rows that were generated before; None: the recipe generates them.

    Raises:
        RecipeError: With the flag to add.
    """
    makes = set(recipe.generate.makes if generated is None else generated)
    for component in recipe.components():
        missing = "retain" not in makes and not records.get("retain")
        if "retain" in component.card.needs and missing:
            raise RecipeError(
                f"{component.card.kind} '{component.card.name}' needs retain records.",
                where=f"method '{recipe.name}'",
                hint="Add --retain FILE, or choose a method without a retain loss.",
            )
    if not records.get("forget"):
        raise RecipeError(
            "the forget set is empty.",
            where=f"method '{recipe.name}'",
            hint="Add --forget FILE with at least one record.",
        )
    made = {*GIVEN_ROLES, *makes}
    for role in recipe.objective.roles:
        if role not in made:
            raise RecipeError(
                f"objective '{recipe.objective.card.name}' reads '{role}' rows, and nobody makes "
                "them.",
                where=f"method '{recipe.name}'",
                hint="Add --generate NAME ('delible list slots'), or --generated FOLDER with a "
                f"file {role}.jsonl.",
            )

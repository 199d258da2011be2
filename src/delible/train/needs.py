"""What a composition needs of records and generated rows, refused before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from delible.errors import RecipeError
from delible.records import RecordBase
from delible.train.losses import Role
from delible.train.recipe import Recipe
from delible.train.sharding import check_shares

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
    check_base(recipe)
    check_shares(recipe)
    makes = set(recipe.generate.makes if generated is None else generated)
    for component in recipe.components():
        missing = "retain" not in makes and not records.get("retain")
        if "retain" in component.own_needs and missing:
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


def check_base(recipe: Recipe) -> None:
    """Refuses weights that are held short where they would move.

    Raises:
        RecipeError: With what to choose instead.
    """
    precision, where = recipe.training.base_precision, f"method '{recipe.name}'"
    if precision == "float32":
        return
    place, finish = recipe.place.card, recipe.finish.card
    if place.changes != "adapter":
        raise RecipeError(
            f"place '{place.name}' moves weights of the base, and those must be float32: in "
            f"{precision} small updates round away.",
            where=where,
            hint="Choose --place lora, or leave out --base-precision.",
        )
    if precision in ("int8", "int4") and finish.changes == "weights":
        raise RecipeError(
            f"finish '{finish.name}' changes weights of the base, which are packed in {precision}.",
            where=where,
            hint="Choose --finish none; 'delible merge RUN --out FOLDER' merges into the base's "
            "own weights afterwards.",
        )
    if recipe.training.precision == "float32":
        raise RecipeError(
            f"weights in {precision} are computed in bfloat16, not in float32.",
            where=where,
            hint="Leave out --precision, or --base-precision.",
        )

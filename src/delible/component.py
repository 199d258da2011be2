"""The base of every idea: a frozen, validated config that carries its card."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from delible import registry
from delible.cards import Card, Kind, Need
from delible.errors import RecipeError, nearest


class Config(BaseModel):
    """A frozen pydantic model that refuses unknown keys with the nearest known name."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def build(cls, where: str, **values: Any) -> Self:
        """Validates ``values``.

        Args:
            where: Names the thing in an error message, such as "objective 'npo'".

        Raises:
            RecipeError: An unknown key (nearest name offered) or a value out of range.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                hint = nearest(key, cls.model_fields) if cls.model_fields else "It has no options."
                raise RecipeError(f"unknown option '{key}'.", where=where, hint=hint) from None
            raise RecipeError(
                f"'{key}' = {first['input']!r}: {first['msg']}.", where=where
            ) from None


class Component(Config):
    """An idea: fields are its options, ``card`` its metadata (set by ``@register``)."""

    card: ClassVar[Card]

    @property
    def own_needs(self) -> tuple[Need, ...]:
        """What it needs with these options; the card says what it needs by itself."""
        return self.card.needs

    def needs_whole(self) -> str | None:
        """Why it needs all of the model in each process while it is trained; None: shares will do.

        Of a model that is spread over processes (FSDP) each holds some rows of every weight.
        """
        return None

    def spec(self) -> dict[str, Any]:
        """The component as plain data: its name and every option."""
        return {"name": self.card.name, **self.model_dump(mode="json")}


def build(kind: Kind, spec: str | dict[str, Any] | Component) -> Any:
    """A component from its name, from ``{"name": …, option: value}``, or itself."""
    if isinstance(spec, Component):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in options:
        raise RecipeError(f"{kind} needs a 'name'.", where=str(spec))
    name = str(options.pop("name"))
    return registry.load(kind, name).build(f"{kind} '{name}'", **options)

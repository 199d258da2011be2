"""Options of methods and slots as flags: names, values, components, and what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from delible.errors import RecipeError, nearest

if TYPE_CHECKING:
    from delible.method import Method


def option_name(flag: str) -> str:
    """The option that a flag names: a hyphen for every underscore, a colon for the dot."""
    return flag.replace("-", "_").replace(":", ".")


def option_value(text: str) -> Any:
    """A value as YAML reads it: numbers, true and false, null, lists."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:  # YAML 1.1 takes 1e-5 for a text
            return float(value)
        except ValueError:
            return text
    return value


def chosen_slots(flags: Mapping[str, str | None], components: Sequence[str]) -> dict[str, Any]:
    """Choices for slots, from the flags of the slots and from ``--with``.

    Raises:
        RecipeError: An unknown component, one of several slots, or two for one slot.
    """
    slots = {slot: component(value) for slot, value in flags.items() if value is not None}
    names = [name.strip() for given in components for name in given.split(",") if name.strip()]
    if not names:
        return slots
    from delible import registry
    from delible.cards import SLOTS

    homes: dict[str, list[str]] = {}
    for card in registry.cards(*SLOTS):  # type: ignore[arg-type]
        homes.setdefault(card.name, []).append(card.kind)
    for name in names:
        found = homes.get(name, [])
        if not found:
            hint = nearest(name, homes)
            raise RecipeError(
                f"unknown component '{name}'.",
                where="--with",
                hint=hint if hint.startswith("Did") else "'delible list slots' lists them all.",
            )
        if len(found) > 1:
            flags_for_it = " or ".join(f"--{kind} {name}" for kind in found)
            raise RecipeError(
                f"'{name}' is a name in several slots.", where="--with", hint=f"Say {flags_for_it}."
            )
        slot = found[0]
        if slot in slots:
            raise RecipeError(
                f"'{name}' and '{slots[slot]}' both are choices for the slot '{slot}'.",
                where="--with",
                hint="Name one of them.",
            )
        slots[slot] = name
    return slots


def component(text: str) -> Any:
    """A component by name, or as a YAML mapping: ``{name: npo, beta: 0.2}``."""
    value = option_value(text) if text.lstrip().startswith("{") else text
    return value if isinstance(value, dict) else text


def names_in(given: Sequence[str] | None) -> list[str]:
    """Names separated by commas, of a flag that may be repeated."""
    return [name.strip() for text in given or () for name in text.split(",") if name.strip()]


def components(given: Sequence[str] | None) -> list[Any]:
    """Components of a flag that may be repeated: names separated by commas, or a mapping each."""
    found: list[Any] = []
    for text in given or ():
        found += [component(text)] if text.lstrip().startswith("{") else names_in([text])
    return found


def check_options(base: Method, given: Mapping[str, Any], command: Callable[..., int]) -> None:
    """Offers the nearest flag, whether it is the method's or the command's.

    Raises:
        RecipeError: An option that the method does not have.
    """
    from inspect import signature

    spec = base.spec()
    parts = [spec, *(part for part in spec.values() if isinstance(part, dict))]
    known = {key for part in parts for key, value in part.items() if not isinstance(value, dict)}
    known -= {"name"}
    own = {name.strip("_") for name in signature(command).parameters} - {"model", "options"}
    for option in given:
        key = option.rpartition(".")[2]
        if key in known:
            continue
        flags = {name.replace("_", "-") for name in known | own}
        close = difflib.get_close_matches(key.replace("_", "-"), flags, n=1, cutoff=0.6)
        name = str(spec["name"])
        hint = f"Did you mean '--{close[0]}'?" if close else f"'delible show {name}' lists them."
        raise RecipeError(
            f"unknown option '--{option.replace('_', '-')}'.", where=f"method '{name}'", hint=hint
        )

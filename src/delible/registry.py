"""Discovery of components: by folder, and by entry points for third parties.

``cards()`` reads the ``@register(...)`` literals with :mod:`ast` and imports nothing, so
``delible list`` is fast and needs no torch. ``load()`` imports the one file that is asked for.

A third party registers a module under the entry-point group ``delible.components``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

import yaml

from delible.cards import SLOTS, Card, Kind
from delible.errors import RecipeError, nearest

PACKAGE = Path(__file__).parent
#: Folders whose files are ideas, one each.
IDEA_FOLDERS = (
    "methods", "procedures", "guards", "agents", "attacks", "metrics", "benchmarks",
    "experiments", "artefacts", "rewards",
)  # fmt: skip
ENTRY_POINT_GROUP = "delible.components"
#: The decorator that makes a component of a function (``train/onpolicy/rewards.py``).
REWARD = "reward"

T = TypeVar("T")


def register(**card: Any) -> Callable[[type[T]], type[T]]:
    """Class decorator that attaches a :class:`Card`. Its arguments must be literals."""

    def attach(cls: type[T]) -> type[T]:
        cls.card = Card(**card, module=cls.__module__, class_name=cls.__qualname__)  # type: ignore[attr-defined]
        return cls

    return attach


def _read_cards(path: Path, module: str) -> Iterator[Card]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        for line in node.decorator_list:
            if not isinstance(line, ast.Call):
                continue
            name = line.func.attr if isinstance(line.func, ast.Attribute) else line.func
            called = name if isinstance(name, str) else getattr(name, "id", None)
            if called == ("register" if isinstance(node, ast.ClassDef) else REWARD):
                try:
                    values = {str(word.arg): ast.literal_eval(word.value) for word in line.keywords}
                    if called == REWARD:
                        values |= {"kind": "reward"}
                    yield Card(**values, module=module, class_name=node.name)
                except ValueError as error:  # a name instead of a literal, or a wrong field
                    raise RecipeError(
                        f"the card of {node.name} cannot be read: {str(error).splitlines()[0]}",
                        where=f"{path}:{line.lineno}",
                        hint="Cards are literals: they are read without running the file.",
                    ) from None


def _plugins() -> Iterator[tuple[Path, str]]:
    """Source files and modules under the entry point ``delible.components``."""
    for point in entry_points(group=ENTRY_POINT_GROUP):
        module = point.value.partition(":")[0]
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.origin:
            owner = point.dist.name if point.dist is not None else "an installed package"
            raise RecipeError(
                f"'{owner}' registers the module '{module}', which cannot be found.",
                where=f"entry point '{point.name}'",
                hint=f"Repair or uninstall '{owner}'.",
            )
        yield Path(spec.origin), module


def _idea_modules() -> Iterator[tuple[Path, str]]:
    for folder in IDEA_FOLDERS:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            if path.name != "__init__.py":
                yield path, ".".join(("delible", *parts))
    yield from _plugins()


def recipe_files() -> dict[str, Path]:
    """Recipes by name: our own, and those in a folder ``recipes`` beside a plug-in's module."""
    folders = [
        PACKAGE / "methods" / "recipes",
        *(path.parent / "recipes" for path, _ in _plugins()),
    ]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def split_preset(method: str) -> tuple[str, str | None]:
    """A method's name (or file) and the preset behind it: ``npo@paper`` is npo as published."""
    name, at, preset = method.rpartition("@")
    if not at or preset.endswith((".yaml", ".yml")):
        return method, None
    return name, preset


def _recipe_cards(components: dict[tuple[str, str], Card]) -> Iterator[Card]:
    """A recipe's card: that of its objective, with what the recipe's file says on top.

    Where one of its components differs from its paper on purpose, the recipe does too, and says so.
    """
    for path in recipe_files().values():
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        parts = {
            slot: part["name"] if isinstance(part, dict) else part
            for slot, part in recipe.items()
            if slot in SLOTS
        }
        objective = components[("objective", parts["objective"])]
        inherited = objective.model_dump(exclude={"badges", "variant"})
        card = {**inherited, **recipe.get("card", {}), "kind": "recipe", "name": path.stem}
        variants = [card["variant"]] if card.get("variant") else []
        for slot in SLOTS:
            found = components.get((slot, parts.get(slot, "")))
            if found is not None and found.variant:
                variants.append(f"{slot} {found.name}: {found.variant}")
        if variants:
            badges = (*card.get("badges", ()), "variant")
            card |= {"variant": " ".join(variants), "badges": tuple(dict.fromkeys(badges))}
        yield Card(**{**card, "module": "", "class_name": path.name})


@lru_cache(maxsize=1)
def _all() -> dict[tuple[str, str], Card]:
    found: dict[tuple[str, str], Card] = {}
    for path, module in _idea_modules():
        for card in _read_cards(path, module):
            key = (card.kind, card.name)
            if key in found:
                raise RecipeError(
                    f"two components are called {card.kind} '{card.name}'",
                    where=f"{found[key].module} and {module}",
                    hint="Rename one of them.",
                )
            found[key] = card
    for card in _recipe_cards(found):
        found[(card.kind, card.name)] = card
    return found


def cards(*kinds: Kind) -> list[Card]:
    """All cards of the given kinds (of every kind when none is given), without any import."""
    return [card for (kind, _), card in sorted(_all().items()) if not kinds or kind in kinds]


def card(kind: Kind, name: str) -> Card:
    """One card by kind and name.

    Raises:
        RecipeError: There is none; offers the nearest name.
    """
    found = _all()
    if (kind, name) not in found:
        known = [known_name for known_kind, known_name in found if known_kind == kind]
        raise RecipeError(f"unknown {kind} '{name}'.", hint=nearest(name, known))
    return found[(kind, name)]


def load(kind: Kind, name: str) -> Any:
    """The class behind a card; imports its file."""
    found = card(kind, name)
    return getattr(importlib.import_module(found.module), found.class_name)

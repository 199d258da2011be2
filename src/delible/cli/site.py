"""Gathers the pages of the documentation site: ``python -m delible.cli.site build/pages``.

The pages of ``docs``, and one for every component: what its card says, how it is computed (its
file's first words), its options, what fills its slots, and its rows on the pages of results.
``make site`` builds the site from there.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from delible import registry
from delible.cards import Card
from delible.cli import docs
from delible.cli.described import (
    compared,
    facts,
    options_of,
    presets_of_recipe,
    recipe_of,
    settings,
)
from delible.files import atomic_file

#: Below the site's pages; the first one lists the others.
FOLDER, INDEX = "components", "index.md"
#: How a component of a kind is asked for, where that is one flag or command.
USED = {
    "recipe": "delible unlearn MODEL --forget FILE --method {name}",
    "editor": "delible unlearn MODEL --forget FILE --method {name}",
    "intervention": "delible unlearn MODEL --forget FILE --method {name}",
    "procedure": "delible unlearn MODEL --forget FILE --method {name}",
    "guard": "delible unlearn MODEL --subjects NAMES --method {name}",
    "attack": "delible audit DIR --attacks {name}",
    "benchmark": "delible bench {name} --methods npo",
}
#: A link of Sphinx's, of which the last word is the name.
ROLE = re.compile(r":\w+:`[~.\w]*?([\w]+)`")


def pages(results: Path) -> dict[str, str]:
    """Path below :data:`FOLDER` and text of every page.

    Args:
        results: The folder of the pages of results.
    """
    rows = list(rows_of(results))
    cards = registry.cards()
    found = {place(card): page(card, rows) for card in cards}
    return {INDEX: index(cards), **found}


def place(card: Card) -> str:
    """Where a component's page lies, below :data:`FOLDER`."""
    return f"{card.kind}/{card.name}.md"


def index(cards: Sequence[Card]) -> str:
    """The page that names all the others."""
    parts = [
        "# Components\n",
        "Each has a page: what it is and needs, how it is computed, its options, and what was "
        "measured of it. [Methods and components](../methods.md) has them side by side.\n",
    ]
    for kind in dict.fromkeys(card.kind for card in cards):
        parts.append(f"## {kind.capitalize()}\n")
        parts += [
            f"- [`{card.name}`]({place(card)}) {card.title}. {card.summary}"
            for card in sorted(cards, key=lambda card: card.name)
            if card.kind == kind
        ]
        parts.append("")
    return "\n".join(parts)


def page(card: Card, rows: Sequence[tuple[str, str, dict[str, str]]]) -> str:
    """A component's page.

    Args:
        rows: Of the pages of results, as :func:`rows_of` gives them.
    """
    parts = [f"# {card.title}\n", f"*{card.kind}* `{card.name}`. {card.summary}\n"]
    if card.kind in USED:
        parts.append(f"```console\n$ {USED[card.kind].format(name=card.name)}\n```\n")
    told = facts(card)
    if card.paper:
        told["paper"] = f"[{told['paper']}](https://arxiv.org/abs/{card.paper})"
    parts.append(_table(("", ""), told.items()))
    if said := _said(card):
        parts.append(f"## How it works\n\n{said}\n")
    parts += _recipe(card) if card.kind == "recipe" else _options(card)
    mine = [(where, title, row) for where, title, row in rows if _is_about(row, card)]
    if mine:
        parts.append("## What was measured\n")
    for where, title in dict.fromkeys((where, title) for where, title, _ in mine):
        parts.append(f"[{title}](../../results/{where}):\n")
        parts += [_table(("", ""), row.items()) for other, _, row in mine if other == where]
    return "\n".join(parts)


def _said(card: Card) -> str:
    """The first words of its file: the formula, where it is from, how it differs."""
    if card.kind == "recipe":
        lines = registry.recipe_files()[card.name].read_text(encoding="utf-8").splitlines()
        head = [line.removeprefix("#").strip() for line in _leading(lines)]
        return "\n".join(head)
    words = inspect.getdoc(sys.modules[registry.load(card.kind, card.name).__module__]) or ""
    return ROLE.sub(r"`\1`", words.replace("``", "`"))


def _leading(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("#"):
            return
        yield line


def _options(card: Card) -> list[str]:
    rows = [
        (
            f"`{one['name']}`",
            f"`{json.dumps(one['default'])}`",
            one["type"],
            one["description"] or "",
        )
        for one in options_of(registry.load(card.kind, card.name))
    ]
    return [f"## Options\n\n{_table(('option', 'default', 'type', ''), rows)}"] if rows else []


def _recipe(card: Card) -> list[str]:
    recipe = recipe_of(card) or {}
    known = {(one.kind, one.name) for one in registry.cards()}
    rows = []
    for slot, spec in recipe.items():
        if isinstance(spec, dict):
            name = str(spec.get("name", ""))
            linked = f"[`{name}`](../{slot}/{name}.md)" if (slot, name) in known else name
            rows.append((slot, linked, settings(spec)))
    parts = [
        "## What fills its slots\n\nEvery option is a flag, such as `--learning-rate 1e-5`.\n",
        _table(("slot", "component", "options"), rows),
    ]
    for name, preset in presets_of_recipe(card).items():
        about = f" ({preset['about']})" if preset["about"] else ""
        differing = compared(recipe, preset["recipe"])
        parts.append(f"As published{about}: `--method {card.name}@{name}`\n")
        parts.append(_table(("option", "default", name), differing))
    return parts


def _is_about(row: dict[str, str], card: Card) -> bool:
    kind, first = next(iter(row.items()))
    kinds = {"guard": ("guard",), "attack": ("attack",), "method": ("recipe", "editor",
             "intervention", "procedure", "guard")}  # fmt: skip
    name, colon, _ = first.strip("`").partition(":")
    return card.kind in kinds.get(kind, ("recipe",) if colon else ()) and name == card.name


def rows_of(results: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Every row of every table: the page's name, its title, and cells by column."""
    for path in sorted(results.glob("*.md")):
        title, header = path.stem, list[str]()
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("# "):
                title = line[2:]
            if not line.startswith("|"):
                header = []
                continue
            cells = [one.strip() for one in line.strip().strip("|").split("|")]
            if not header:
                header = cells
            elif not set(line) <= set("|-: ") and len(cells) == len(header):
                yield path.name, title, dict(zip(header, cells, strict=True))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        f"| {' | '.join(str(cell or '').replace('|', chr(92) + '|') for cell in line)} |\n"
        for line in lines
    )


def gather(source: Path, into: Path) -> None:
    """Writes all pages of the site; what lay there goes.

    Args:
        source: The folder ``docs``.
        into: A folder of the build's own.
    """
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(source, into)
    with atomic_file(into / "methods.md") as file:
        file.write(docs.methods(linked=True))
    for name, text in pages(source / "results").items():
        with atomic_file(into / FOLDER / name) as file:
            file.write(text)


if __name__ == "__main__":
    gather(Path("docs"), Path(sys.argv[1] if len(sys.argv) > 1 else "build/pages"))

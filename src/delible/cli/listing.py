"""``delible list`` and ``delible show``: what there is, from the cards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast, get_args

from delible.cards import METHODS, SLOTS
from delible.cli import flags, output
from delible.cli.described import (
    compared,
    facts,
    options_of,
    presets_of_recipe,
    recipe_of,
    settings,
)
from delible.errors import RecipeError, nearest

if TYPE_CHECKING:
    from delible.cards import Card, Kind

#: Kinds from the most to the least asked for; `show` takes the first that knows the name.
ORDER = (
    "recipe", "editor", "intervention", "procedure", "guard", "attack", "metric", "benchmark",
    "objective", "keep", "place", "balance", "harden", "finish", "generate", "select", "sample",
    "weigh", "reward", "agent", "artefact",
)  # fmt: skip
#: Words for several kinds at once.
COLLECTIVE = {"methods": METHODS, "slots": SLOTS}
#: Plurals that do not end in a plain s.
PLURALS = {"finishes": "finish"}


@flags.flowing
def list_(kind: str | None = None, /, *, as_json: flags.Json = False) -> int:
    """List methods, guards, attacks, metrics and components.

    Parameters
    ----------
    kind
        methods (recipes, editors, interventions, procedures, guards), attacks, metrics,
        benchmarks, rewards, agents, artefacts, slots, or one slot (objectives, keep, place,
        balance, harden, finish, generate, select, sample, weigh). Default: all.
    as_json
        Print the cards as JSON.
    """
    from delible import registry

    kinds = _kinds(kind)
    found = sorted(registry.cards(*kinds), key=lambda card: (ORDER.index(card.kind), card.name))
    if as_json:
        print(json.dumps([card.model_dump(mode="json") for card in found], indent=2))
        return 0
    reporter = output.Reporter()
    if not found:
        reporter.say(f"There are no {kind} yet.")
        return 0
    several = len({card.kind for card in found}) > 1
    columns = (*(("kind",) if several else ()), "name", "title", "paper", "needs", "badges")
    rows = [
        (
            *((card.kind,) if several else ()),
            card.name,
            card.title,
            card.paper or "-",
            ", ".join(card.needs) or "-",
            ", ".join(card.badges) or "-",
        )
        for card in found
    ]
    reporter.console.print(output.table(columns, rows))
    reporter.say("'delible show NAME' tells more about each.")
    return 0


@flags.flowing
def show(
    name: str,
    /,
    *,
    kind: str | None = None,
    as_json: flags.Json = False,
) -> int:
    """Show what a component is, how far to trust it, and its options.

    Parameters
    ----------
    name
        Name of a method, guard, attack, metric or slot component. Of a method, the numbers of
        its paper stand beside the defaults (NAME@paper takes them).
    kind
        Its kind, where a name is taken more than once (npo is a method and an objective).
    as_json
        Print the card and the options as JSON.
    """
    from delible import registry

    kinds = _kinds(kind)
    name = registry.split_preset(name)[0]
    found = sorted(
        (card for card in registry.cards(*kinds) if card.name == name),
        key=lambda card: ORDER.index(card.kind),
    )
    if not found:
        word = "component" if kind is None else kind
        known = {card.name for card in registry.cards(*kinds)}
        hint = nearest(name, known)
        raise RecipeError(
            f"unknown {word} '{name}'.",
            hint=hint if hint.startswith("Did") else "'delible list' names them all.",
        )
    output.quiet_libraries()
    card, others = found[0], [str(other.kind) for other in found[1:]]
    recipe, presets = recipe_of(card), presets_of_recipe(card)
    component = None if recipe else registry.load(card.kind, card.name)
    options = [] if component is None else options_of(component)
    stages: dict[str, str] = dict(getattr(component, "stages", {}))
    if as_json:
        content = {**card.model_dump(mode="json"), "options": options, "recipe": recipe}
        content |= {"presets": presets, **({"stages": stages} if stages else {})}
        print(json.dumps({**content, "also": others}, indent=2))
    else:
        _print(card, options, recipe, presets, others, stages)
    return 0


def _kinds(word: str | None) -> tuple[Kind, ...]:
    """The kinds that a word means, in the singular or the plural."""
    if word is None:
        return ()
    from delible.cards import Kind

    known = get_args(Kind)
    single = PLURALS.get(word, word if word in known else word.removesuffix("s"))
    if single in known:
        return (cast("Kind", single),)
    for collective, kinds in COLLECTIVE.items():
        if word in (collective, collective.removesuffix("s")):
            return cast("tuple[Kind, ...]", kinds)
    raise RecipeError(
        f"unknown kind '{word}'.",
        hint=nearest(word, [*COLLECTIVE, *(f"{one}s" for one in ORDER[:8]), *ORDER[8:]]),
    )


def _print(
    card: Card,
    options: list[dict[str, Any]],
    recipe: dict[str, Any] | None,
    presets: dict[str, dict[str, Any]],
    others: list[str],
    stages: dict[str, str],
) -> None:
    reporter = output.Reporter()
    reporter.heading(f"{card.title} ({card.kind} '{card.name}')")
    reporter.say(card.summary)
    for name, value in facts(card).items():
        reporter.field(name, value)
    if stages:
        reporter.console.print(output.table(("stage", ""), list(stages.items())))
    if options:
        columns = ("option", "default", "type", "")
        rows = [
            (item["name"], json.dumps(item["default"]), item["type"], item["description"] or "")
            for item in options
        ]
        reporter.console.print(output.table(columns, rows))
    if recipe is not None:
        reporter.console.print(
            output.table(
                ("slot", "component", "options"),
                [
                    (slot, spec.get("name", "-"), settings(spec))
                    for slot, spec in recipe.items()
                    if isinstance(spec, dict)
                ],
            )
        )
        reporter.say("Every option is a flag of 'delible unlearn', such as --learning-rate 1e-5.")
        for name, preset in presets.items():
            about = f" ({preset['about']})" if preset["about"] else ""
            reporter.say(f"As published{about}: --method {card.name}@{name}")
            differing = compared(recipe, preset["recipe"])
            reporter.console.print(output.table(("option", "default", name), differing))
        if not presets and card.paper:
            reporter.say("It has no preset 'paper': no schedule for unlearning is published.")
    for other in others:
        reporter.say(f"The name is also taken by: delible show {card.name} --kind {other}")

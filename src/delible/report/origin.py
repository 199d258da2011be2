"""Where a page's numbers come from, in words: options, machine, and the flags of a command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from delible.component import Component
from delible.report.words import finite, text_of


def options_of(component: Component) -> dict[str, str]:
    """Every option as text."""
    return {
        key: "not set" if value is None else text_of(value)
        for key, value in component.spec().items()
        if key != "name"
    }


def machine(found: Any) -> str:
    """The machine in words."""
    if not isinstance(found, Mapping):
        return str(found)
    words = [str(found[key]) for key in ("accelerator", "machine", "system") if found.get(key)]
    for key in ("processors", "threads"):
        if finite(found.get(key)):
            words.append(f"{found[key]:g} {key.removesuffix('s') if found[key] == 1 else key}")
    if finite(found.get("memory_gib")):
        words.append(f"{found['memory_gib']:g} GiB memory")
    if found.get("precision"):
        words.append(f"products in {found['precision']}")
    return ", ".join(words)


def flags(component: Component) -> list[str]:
    """The options of a component that are not its defaults, as flags."""
    words = []
    spec = component.spec()
    for key, field in type(component).model_fields.items():
        if getattr(component, key) != field.get_default(call_default_factory=True):
            value = spec[key]
            if isinstance(value, list | tuple):
                text = ",".join(map(str, value))
            else:
                text = value if isinstance(value, str) else json.dumps(value)
            words += [f"--{key.replace('_', '-')}", text]
    return words

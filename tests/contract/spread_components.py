"""Every component of a slot, trained by one process or by several that share the model.

``spread_components.py FOLDER [KIND-NAME…]`` leaves ``FOLDER/N.json`` and ``.safetensors``, N the
number of processes: losses, norms and weights of a short run of each, or why it was refused.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from test_contract import HOSTS, MIXTURES_ONLY, OPTIONS

from delible import registry
from delible.cards import SLOTS, Card
from delible.component import Component, build
from delible.errors import RecipeError
from delible.lm.sharded import whole
from delible.testing.contract.trial import Trial

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
BEGIN, END = "<!-- spread:begin -->", "<!-- spread:end -->"


def cards() -> list[Card]:
    """Of all slots, without those that need pictures."""
    found = [card for card in registry.cards() if card.kind in SLOTS]
    return [card for card in found if "pictures" not in card.needs]


def named(card: Card) -> str:
    return f"{card.kind}-{card.name}"


def component(card: Card) -> Component:
    options = OPTIONS.get((card.kind, card.name), {})
    return build(card.kind, {"name": card.name, **options})  # type: ignore[no-any-return]


def attempt(card: Card, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A short run; refused: the reason."""
    torch.manual_seed(1)
    family = "qwen2_moe" if card.name in MIXTURES_ONLY else "llama"
    hosts = HOSTS.get((card.kind, card.name)) or {}
    try:
        result = Trial(component(card), family, hosts, folder).trainer().train()
    except RecipeError as error:
        if "spread over processes" not in str(error):
            raise
        return {"refused": str(error)}, {}
    result.lm.settle()
    history = [[h["forget_loss"], h.get("keep_loss"), h["gradient_norm"]] for h in result.history]
    return {"history": history}, {
        name: whole(value.detach()).clone() for name, value in result.lm.model.named_parameters()
    }


def table() -> str:
    """What can be trained on shares of a model, by slot, as Markdown."""
    lines = ["| slot | trained on shares | refused |", "|---|---|---|"]
    for slot in SLOTS:
        can, cannot = [], []
        for card in (card for card in cards() if card.kind == slot):
            reason = component(card).needs_whole()
            told = f"`{card.name}`"
            (can if reason is None else cannot).append(
                told if reason is None else f"{told}: {reason}"
            )
        lines.append(f"| {slot} | {', '.join(can)} | {'; '.join(cannot) or 'none'} |")
    return "\n".join(lines)


def main(folder: Path, chosen: list[str]) -> None:
    torch.set_num_threads(1)
    numbers, weights = {}, {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["DELIBLE_CACHE"] = place
        for card in cards():
            if not chosen or named(card) in chosen:
                numbers[named(card)], own = attempt(card, Path(place))
                weights |= {f"{named(card)}/{name}": value for name, value in own.items()}
    if RANK == 0:
        (folder / f"{WORLD}.json").write_text(json.dumps(numbers))
        save_file(weights, folder / f"{WORLD}.safetensors")


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", "utf-8")
    else:
        main(Path(sys.argv[1]), sys.argv[2:])

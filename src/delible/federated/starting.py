"""The adapter with which a federated run begins: the one that the model wears, or a new one."""

from __future__ import annotations

import torch
from torch import Tensor

from delible.component import build
from delible.errors import ModelError, RecipeError
from delible.federated import adapter as adapters
from delible.lm.adapters import names_of
from delible.lm.lm import LM
from delible.train.gradients import Gradients
from delible.train.randomness import generator
from delible.train.slots import Place, SlotContext


def dressed(lm: LM, rank: int, alpha: float, seed: int) -> bool:
    """Makes sure that a model wears one adapter; whether it had one.

    A new one changes no answer: its factor B is zero.

    Raises:
        ModelError: It wears several.
    """
    worn = names_of(lm)
    if len(worn) > 1:
        raise ModelError(
            f"the model wears several adapters ({', '.join(worn)}), and a federated run has one.",
            where=lm.name, hint="Name the run that made one of them.",
        )  # fmt: skip
    if worn:
        return True
    place: Place = build("place", {"name": "lora", "rank": rank, "alpha": alpha})
    objective = build("objective", "finetune")
    place.apply(SlotContext(lm, {}, {}, Gradients(lm), objective, None, seed))
    return False


def blank(lm: LM, seed: int) -> dict[str, Tensor]:
    """An adapter of the form of the one that a model wears, and that knows nothing: A drawn from
    the seed, B zero.

    Raises:
        RecipeError: The worn adapter is no low-rank product.
    """
    found: dict[str, Tensor] = {}
    for name, value in adapters.read(lm).items():
        if ".lora_B." in name:
            found[name] = torch.zeros_like(value)
        elif ".lora_A." in name:
            found[name] = _drawn(value, seed, name)
        else:
            raise RecipeError(
                f"the adapter has more than low-rank factors ('{name}'), and nobody knows what it "
                "was before it learned.",
                where="unlearn 'retrain'", hint="Choose another method.",
            )  # fmt: skip
    return found


def _drawn(like: Tensor, seed: int, name: str) -> Tensor:
    """As PEFT draws A: uniform within 1 / sqrt(inputs)."""
    bound = like.shape[1] ** -0.5
    drawn = torch.rand(like.shape, generator=generator(seed, "blank", name), dtype=torch.float64)
    return ((2 * drawn - 1) * bound).to(like.dtype)

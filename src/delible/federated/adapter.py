"""Adapters as they travel between clients and a server: tensors by name, read off a model and put
on one. Nothing else of a model leaves a client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from delible.errors import ModelError, RunError
from delible.lm.adapters import names_of
from delible.lm.lm import LM

#: Tensors of an adapter by the names of its parameters.
Adapter = Mapping[str, Tensor]


def parameters_of(lm: LM) -> dict[str, torch.nn.Parameter]:
    """The adapter's own parameters in a model that wears one, by name, in order of the names.

    Raises:
        ModelError: It wears none, or several.
    """
    worn = names_of(lm)
    if len(worn) != 1:
        said = f"it wears {', '.join(worn)}" if worn else "it wears none"
        raise ModelError(f"a federated run needs a model with one adapter, and {said}.",
                         where=lm.name)  # fmt: skip
    model: Any = lm.model
    prefix = model.base_model.prefix
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if prefix in name and parameter.is_floating_point()
    }
    return dict(sorted(found.items()))


def read(lm: LM) -> dict[str, Tensor]:
    """A copy of the adapter that a model wears, on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in parameters_of(lm).items()}


@torch.no_grad()
def put(lm: LM, adapter: Adapter) -> None:
    """Gives the adapter that a model wears other values.

    Raises:
        RunError: They are another adapter's.
    """
    own = parameters_of(lm)
    if problem := misfit(own, adapter):
        raise RunError(f"the adapter does not fit the model: {problem}.", where=lm.name)
    if missing := sorted(own.keys() - adapter.keys()):
        raise RunError(f"the adapter does not fit the model: '{missing[0]}' is missing.",
                       where=lm.name)  # fmt: skip
    for name, parameter in own.items():
        parameter.copy_(adapter[name])
    lm.touch()


def misfit(own: Mapping[str, Tensor], other: Adapter) -> str | None:
    """What in the other adapter has no place in this one; None: it fits.

    Tensors that the other one lacks are no misfit.
    """
    for name, value in sorted(other.items()):
        if name not in own:
            return f"there is no tensor '{name}'"
        if value.shape != own[name].shape:
            theirs, mine = list(value.shape), list(own[name].shape)
            return f"'{name}' has the shape {theirs} and not {mine}"
    return None


def bytes_of(adapter: Adapter) -> int:
    """What its numbers weigh on the way."""
    return sum(value.numel() * value.element_size() for value in adapter.values())

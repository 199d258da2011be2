"""Collapse of irrelevant representations (CIR): forget gradients without what samples share.

    gradient of W = sum over positions of g'_t x'_t^T
    x' = x - (mean and main directions of x),   g' = g - (mean and main directions of g)

x is what a linear layer reads and g the gradient of what it gives, at one position. Their shared
directions belong to every text; an update without them moves what is particular to the forget
rows, and relearning other rows does not undo it. Directions are found anew every
``refresh_steps`` steps, of all positions since the last time.

Weights of linear layers only; others keep their own gradient. Costs one more pass in the first
step; memory: (inputs^2 + outputs^2) values for each weight that moves.

Paper: arXiv 2605.11685 (the optimiser of MCU). Reference code: github.com/sustech-nlp/MCU.
Deviations: directions of the first steps come from the first step's rows instead of an epoch
without updates; they are orthonormal (in the released code the mean comes back in part); sums of
outer products stand for a list of all positions, so processes and micro-batches do not matter. The
numbers of directions grow with the width (published: 24 and 36 at 4,096), up to a half of it. As
in the released code the first position of a row does not count, whose inputs are huge in most
models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from delible.errors import RecipeError
from delible.lm.identity import only_reads
from delible.lm.sharded import spread
from delible.registry import register
from delible.train.passes import Passes
from delible.train.perturbation import rows_apart
from delible.train.representation import leading_directions, without_directions
from delible.train.slots import Harden
from delible.train.step import Step

#: What is remembered: directions and, since they were found, sums; one tensor per layer.
DIRECTIONS = ("cir.inputs", "cir.outputs")
SUMS = ("cir.input_total", "cir.input_moment", "cir.output_total", "cir.output_moment", "cir.count")


@dataclass
class _Layer:
    """What is gathered at a linear layer in one step."""

    place: int
    transposed: bool
    gradient: Tensor | None = None
    sums: list[Tensor] = field(default_factory=list)

    def add(
        self, x: Float[Tensor, "positions inputs"], g: Float[Tensor, "positions outputs"]
    ) -> None:
        parts = [x.sum(0), x.T @ x, g.sum(0), g.T @ g, x.new_full((1,), len(x))]
        self.sums = [a + b for a, b in zip(self.sums, parts, strict=True)] if self.sums else parts

    def collapse(self, x: Tensor, g: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        x, g = without_directions(x, inputs), without_directions(g, outputs)
        found = x.T @ g if self.transposed else g.T @ x
        self.gradient = found if self.gradient is None else self.gradient + found


@register(
    kind="harden",
    name="cir",
    title="Collapse of irrelevant representations (CIR)",
    summary="Forget gradients of linear layers without the directions that all positions share.",
    paper="2605.11685",
    year=2026,
    family="relearning",
    needs=("weights",),
    badges=("parity", "variant"),
    variant="Directions are orthonormal, and those of the first steps come from the first rows.",
)
class CIR(Harden):
    """Options of the collapse."""

    inputs: int | None = Field(
        None, ge=0, description="Directions of a layer's inputs, the mean included; none: a 128th "
        "of the width, at least 4.",
    )  # fmt: skip
    outputs: int | None = Field(
        None, ge=0, description="Directions of the gradients of what it gives; none: likewise."
    )
    refresh_steps: int = Field(25, ge=1, description="Directions are found anew after so many.")

    def forget(self, passes: Passes) -> None:
        layers = self._layers(passes)
        memory = passes.memory
        if DIRECTIONS[0] not in memory:
            with passes.apart():
                self._pass(passes, layers, None)
                passes.clear()
            found = self._directions([self._reduced(passes, one.sums) for one in layers.values()])
            layers = self._layers(passes)
        elif passes.step and passes.step % self.refresh_steps == 0 and self._gathered(passes):
            found = self._directions(list(zip(*(memory[name] for name in SUMS), strict=True)))
        else:
            found = [memory[name] for name in DIRECTIONS]
        with passes.apart():
            self._pass(passes, layers, found)
            for weight, layer in layers.items():
                parameter = passes.parameters[layer.place]
                assert id(parameter) == weight
                if layer.gradient is not None:
                    total = layer.gradient.to(parameter.dtype)
                    mean = self._reduced(passes, [total])[0] / passes.world
                    parameter.grad = spread(mean, like=parameter)
        # all passes are done: a step that runs out of memory has left everything as it was
        new = found[0] is not memory.get(DIRECTIONS[0])
        before = None if new or SUMS[0] not in memory else [memory[name] for name in SUMS]
        sums = [self._reduced(passes, one.sums) for one in layers.values()]
        memory.update(zip(DIRECTIONS, found, strict=True))
        for index, name in enumerate(SUMS):
            own = [one[index] for one in sums]
            memory[name] = own if before is None else [
                a + b for a, b in zip(before[index], own, strict=True)
            ]  # fmt: skip

    def _gathered(self, passes: Passes) -> bool:
        return SUMS[0] in passes.memory and float(passes.memory["cir.count"][0]) > 0

    def _layers(self, passes: Passes) -> dict[int, _Layer]:
        """The linear layers whose weights move, by the identity of the weight."""
        places = {id(parameter): place for place, parameter in enumerate(passes.parameters)}
        found = {
            id(module.weight): _Layer(places[id(module.weight)], isinstance(module, Conv1D))
            for module in passes.lm.core.modules()
            if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) in places
        }
        found.pop(id(passes.lm.core.get_output_embeddings().weight), None)
        if not found:
            raise RecipeError(
                "no weight of a linear layer moves.",
                where="harden 'cir'",
                hint="Let such weights move: --place layers, or all.",
            )
        return found

    def _directions(self, sums: list[Any]) -> list[list[Tensor]]:
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        for x_total, x_moment, g_total, g_moment, count in sums:
            for total, moment, wanted, into in (
                (x_total, x_moment, self.inputs, inputs),
                (g_total, g_moment, self.outputs, outputs),
            ):
                most = max(4, len(total) // 128) if wanted is None else wanted
                rows = leading_directions(total, moment, int(count), min(most, len(total) // 2))
                into.append(rows.to(total.device))
        return [inputs, outputs]

    def _reduced(self, passes: Passes, values: list[Tensor]) -> list[Tensor]:
        if passes.world > 1:
            for value in values:
                torch.distributed.all_reduce(value)
        return values

    def _pass(
        self, passes: Passes, layers: dict[int, _Layer], found: list[list[Tensor]] | None
    ) -> None:
        """Takes the forget gradient, and gathers on the way."""
        for layer in layers.values():  # what no position reaches has sums, too
            weight = passes.parameters[layer.place]
            width, height = weight.shape if layer.transposed else weight.shape[::-1]
            shapes = [(width,), (width, width), (height,), (height, height), (1,)]
            layer.sums = [torch.zeros(shape, device=weight.device) for shape in shapes]

        @contextmanager
        def around(step: Step) -> Iterator[None]:
            with ExitStack() as stack:
                for module in passes.lm.core.modules():
                    layer = layers.get(id(getattr(module, "weight", None)))
                    if layer is not None and isinstance(module, (nn.Linear, Conv1D)):
                        place = list(layers.values()).index(layer)
                        given = None if found is None else (found[0][place], found[1][place])
                        hook = only_reads(_gathering(step, layer, given))
                        stack.callback(module.register_forward_hook(hook).remove)
                yield

        # a beginning that rows share would count once, with the sum of their gradients
        with rows_apart(passes.lm):
            passes.forget(around)


def _gathering(
    step: Step, layer: _Layer, found: tuple[Tensor, Tensor] | None
) -> Callable[..., None]:
    """A hook that waits for the gradient of what a layer gives."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        seen = arguments[0].detach()
        x = seen.reshape(-1, seen.shape[-1])
        first = _first_positions(step, len(x)).to(x.device)

        def gradient(value: Tensor) -> None:
            g = value.detach().reshape(-1, value.shape[-1])
            counts = (g != 0).any(dim=1) & ~first  # nothing flows back to padding
            mine, back = x[counts].float(), g[counts].float()
            layer.add(mine, back)
            if found is not None:
                layer.collapse(mine, back, *found)

        output.register_hook(gradient)

    return hook


def _first_positions(step: Step, count: int) -> Tensor:
    """Which of a layer's inputs stand at the first position of a text."""
    groups = list(step.groups.values())
    whole = groups[0].batch
    rows = sum(len(group.rows) for group in groups)
    first = torch.zeros(count, dtype=torch.bool)
    length = whole.ids.shape[1]
    if count == rows * length:
        first[::length] = True
    return first

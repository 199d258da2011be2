"""Quantization: rounds the weights to a coarse grid; small updates round back to the original.

The uniform grid of the paper's analysis, for every group of weights w (an output channel, or 64 or
128 neighbours in it) and N bits:

    Delta = max|w| / 2^(N-1);    q(w) = Delta * clip(round(w / Delta), -2^(N-1), 2^(N-1) - 1)

A change is invisible when old and new value lie in one interval [(i - 1/2) Delta, (i + 1/2) Delta).
And the formats in which people deploy models (``lm/grids.py``): int8 per channel, int4 in groups,
nf4 and fp4 in blocks of 64, GGUF's q4_0 and q4_k.

The linear layers of the blocks are quantized, experts included; embeddings, norms, biases, the
router of a mixture of experts and the head stay. As in llama.cpp, rows that are no multiple of 256
wide get q5_0 instead of q4_k, and rows that are no multiple of 32 stay. Weights are rounded in
place (quantize and dequantize), which gives the numbers a quantized model computes with, without
its kernels. The attacked model has fp32 weights and computes in fp32, whatever the given one does:
bf16 keeps eight bits of a number, so it would round the grid's points, and what is computed from
them, once more.

Besides the attacked model it notes why knowledge came back, for the uniform grid: the share of
weights whose code is the original model's (both under the original's scales; rounding by one's own
scales gives codes that cannot be compared), and the mean of |change| / (Delta / 2).

Paper: arXiv 2410.16454. Reference code: github.com/zzwjames/FailureLLMUnlearning.
Deviations: no GPTQ and no AWQ; int8 without the 16-bit outlier columns of LLM.int8. Where the
original's own weights come from a 4-bit file (at most 16 values in a block of 32), q4_k is not
run: its blocks are those of the file, so that rounding would snap every small update back exactly
and call it recovery. The other grids do not have that file's points.

As in the formula, the largest weight of a group is clipped by one step when it is positive. q is
therefore idempotent for given scales, but not when the scales are taken anew from rounded weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from delible.cards import Depth
from delible.errors import ModelError, RunError
from delible.lm.grids import FORMATS, few_values
from delible.lm.lm import LM
from delible.lm.matrices import linear_weights
from delible.measure.attack import AttackContext, ModelAttack
from delible.registry import register

#: From so many bits on, rounding is almost harmless (the paper's control).
CONTROL_BITS = 8
#: Share of blocks with no more values than 4 bits, beyond which weights come from a 4-bit file.
OWN_GRID = 0.9
Format = Literal["uniform", "int8", "int4", "nf4", "fp4", "q4_0", "q4_k"]
TITLES = {
    "int8": "int8, per channel", "int4": "int4, groups of 128", "nf4": "NF4, blocks of 64",
    "fp4": "FP4, blocks of 64", "q4_0": "GGUF q4_0", "q4_k": "GGUF q4_k",
}  # fmt: skip


def step_sizes(
    weight: Float[Tensor, "*rows input"], bits: int, group: int
) -> Float[Tensor, "*rows input"]:
    """Delta of every weight; the groups lie along the last axis.

    Args:
        weight: One output channel per row.
        bits: N.
        group: Weights per group, the last group of a row may be shorter; 0 takes the row.

    Returns:
        The shape of ``weight``; 0 in a group of zeros.
    """
    width = weight.shape[-1]
    size = min(group, width) or width
    # Zeros at the end never are the largest magnitude of a group.
    padded = nn.functional.pad(weight.abs(), (0, -width % size))
    largest = padded.reshape(*weight.shape[:-1], -1, size).amax(dim=-1)
    steps: Tensor = largest.repeat_interleave(size, dim=-1)[..., :width] / 2 ** (bits - 1)
    return steps


def codes(
    weight: Float[Tensor, "*rows input"], steps: Float[Tensor, "*rows input"], bits: int
) -> Float[Tensor, "*rows input"]:
    """The integers that a grid keeps, in [-2^(bits-1), 2^(bits-1) - 1]; ties to even."""
    scaled = weight / torch.where(steps > 0, steps, torch.ones_like(steps))
    return scaled.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def round_to_nearest(
    weight: Float[Tensor, "*rows input"], steps: Float[Tensor, "*rows input"], bits: int
) -> Float[Tensor, "*rows input"]:
    """q(w): the nearest point of the grid, within Delta / 2 unless clipped."""
    return codes(weight, steps, bits) * steps


def compare_codes(
    changed: Mapping[str, Tensor], original: Mapping[str, Tensor], bits: int, group: int
) -> dict[str, tuple[float, float]]:
    """Collision rate and mean |change| / (Delta / 2) per matrix, under the original's scales.

    Raises:
        RunError: The models do not have the same matrices.
    """
    shapes = [{name: w.shape for name, w in each.items()} for each in (changed, original)]
    if shapes[0] != shapes[1]:
        raise RunError(
            "the model and its original do not have the same linear layers.",
            where="attack 'quantize'",
            hint="Give the model from before unlearning (--before), or none.",
        )
    found = {}
    for name, old in original.items():
        before, after = old.float(), changed[name].to(old.device).float()
        steps = step_sizes(before, bits, group)
        scaled = steps > 0  # in a group of zeros every change is visible, and no step measures it
        same = torch.where(
            scaled, codes(before, steps, bits) == codes(after, steps, bits), before == after
        )
        changes = ((after - before).abs() / (steps / 2))[scaled]
        found[name] = (float(same.float().mean()), float(changes.sum()) / max(1, changes.numel()))
    return found


def _refuse_own_grid(weights: Mapping[str, Tensor]) -> None:
    """Refuses a grid of blocks of 32 for weights that come from such a file.

    Raises:
        ModelError: Nearly all blocks have no more values than 4 bits.
    """
    shares = [few_values(weight) for weight in weights.values()]
    if shares and sum(shares) / len(shares) > OWN_GRID:
        raise ModelError(
            "the original's weights come from a 4-bit file in blocks of 32, as 'q4_k' has: "
            "rounding would snap every small change back, whatever it is.",
            where="attack 'quantize'",
            hint="Read the other formats' rows.",
        )


@register(
    kind="attack",
    name="quantize",
    title="Quantization",
    summary="Rounds the weights of the blocks to 8 or 4 bits; small updates may round away.",
    paper="2410.16454",
    year=2024,
    family="quantization",
    needs=("weights",),
    changes="weights",
    reversible=True,
    capability="weights",
    depth="quick",
    badges=("parity", "variant"),
    variant="The uniform grid of the analysis first, then formats by their definition; no kernels.",
)
class Quantize(ModelAttack):
    """Options of the grid."""

    format: Format = Field(
        "uniform", description="The grid: uniform (bits and group), or a format of its own."
    )
    bits: int = Field(4, ge=2, le=16, description="Bits per weight (uniform).")
    group: Literal[0, 64, 128] = Field(
        64,
        description="Weights that share a scale (uniform); 0: all weights of an output channel.",
    )

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """4 bits in groups; 8 bits as a control and the commonest formats; then all of them."""
        quick = ({"bits": 4, "group": 64},)
        if depth == "quick":
            return quick
        standard = ({"format": "int8"}, *quick, {"format": "nf4"}, {"format": "q4_0"})
        if depth == "standard":
            return standard
        uniform = ({"bits": 4, "group": 0}, {"bits": 4, "group": 128})
        return (
            *standard, *uniform, {"format": "int4"}, {"format": "fp4"}, {"format": "q4_k"}
        )  # fmt: skip

    def variant_title(self) -> str:
        """Such as "4 bit, groups of 64"."""
        if self.format != "uniform":
            return TITLES[self.format]
        return f"{self.bits} bit, {f'groups of {self.group}' if self.group else 'per channel'}"

    @property
    def control(self) -> bool:
        """8 bits and more change hardly anything."""
        return self.format == "int8" or (self.format == "uniform" and self.bits >= CONTROL_BITS)

    def apply(self, lm: LM, context: AttackContext) -> LM:
        """The rounded copy, in fp32.

        Notes ``collision_rate`` and ``mean_change_in_half_steps`` (of all weights), and
        ``collision_rates`` (per layer, first to last), if there is another model to compare with.

        Raises:
            RunError: The original is of another architecture.
            ModelError: The format fits no layer, or the original's weights have its points.
        """
        twin = lm.copy()
        twin.model.float()
        twin.precision = "float32"
        twin.merge_adapter()  # or an adapter would escape the attack
        weights = linear_weights(twin)
        if context.original is not None and context.original is not lm:
            original = context.original
            if original.wears_adapter:
                original = original.copy()
                original.merge_adapter()
            before = linear_weights(original)
            if self.format == "uniform":
                self._note(twin, weights, before, context)
        else:
            before = weights
        if self.format == "q4_k":
            _refuse_own_grid(before)
        rounded = 0
        with torch.no_grad():
            for weight in weights.values():
                function = self._function(weight.shape[-1])
                if function is not None:
                    weight.copy_(function(weight))
                    rounded += weight.numel()
        if not rounded:
            raise ModelError(
                f"no linear layer has rows that '{self.format}' can hold (a multiple of 32 wide).",
                where="attack 'quantize'",
                hint="Choose another format, such as nf4.",
            )
        stay = sum(weight.numel() for weight in weights.values()) - rounded
        if stay:
            context.notes["note"] = (
                f"{stay / (stay + rounded):.0%} of the weights stay: their rows are no multiple of "
                "32 wide."
            )
        twin.touch()
        return twin

    def _function(self, width: int) -> Callable[[Tensor], Tensor] | None:
        """What rounds rows of a width; None: they stay as they are."""
        if self.format == "uniform":
            return lambda weight: round_to_nearest(
                weight, step_sizes(weight, self.bits, self.group), self.bits
            )
        names = ("q4_k", "q5_0") if self.format == "q4_k" else (self.format,)
        for name in names:
            function, multiple = FORMATS[name]
            if width % multiple == 0:
                return function
        return None

    def _note(
        self,
        lm: LM,
        weights: Mapping[str, Tensor],
        original: Mapping[str, Tensor],
        context: AttackContext,
    ) -> None:
        found = compare_codes(weights, original, self.bits, self.group)

        def mean(names: Sequence[str], which: int) -> float:
            total = sum(weights[name].numel() for name in names)
            return sum(found[name][which] * weights[name].numel() for name in names) / total

        layers = [
            [name for name in found if name.startswith(f"{lm.anatomy.block_path(layer)}.")]
            for layer in range(lm.anatomy.layers)
        ]
        context.notes["collision_rate"] = mean(list(found), 0)
        context.notes["collision_rates"] = [mean(names, 0) for names in layers]
        context.notes["mean_change_in_half_steps"] = mean(list(found), 1)

"""The grids on which models are stored: what a weight becomes when it is rounded to one.

Every function takes a matrix with one output channel per row (or ``[expert, output, input]``) and
gives the numbers that a model computes with after it was stored in the format, in the same shape
and data type. Blocks run along the rows.

    int8    s = max|w| / 127 over an output channel;  s round(w / s)
    int4    16 levels from the least to the largest weight of a group:
            s = (max - min) / 15;  min + s round((w - min) / s)
    nf4     s = max|w| over 64 weights;  s times the nearest of 16 quantiles of a normal variable
    fp4     the same with 0, ±1/192, ±2/12, ±3/12, ±4/12, ±6/12, ±8/12, ±1
    q4_0    d = w* / -8 with w* the weight of 32 largest in magnitude;  d (q - 8), q in 0..15
    q5_0    the same with 16 instead of 8, q in 0..31
    q4_k    blocks of 256 in 8 parts of 32:  d s_j q - d' m_j,  q in 0..15, s_j and m_j in 0..63,
            scale and minimum of a part by a weighted least-squares search

Scales of q4_0, q5_0 and q4_k are kept in half precision, the others' in fp32.

Sources: bitsandbytes (int8 of arXiv 2208.07339 without its 16-bit outliers, nf4 of arXiv
2305.14314, fp4), torchao (int4), llama.cpp (q4_0, q5_0, q4_k).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.stats import norm
from torch import Tensor, nn

#: Weights per block of the formats, and of a part of q4_k.
CODEBOOK_BLOCK, GGUF_BLOCK, K_BLOCK = 64, 32, 256
#: Probability at which the outermost quantile of nf4 lies.
NF4_EDGE = 0.9677083
#: Magnitudes of fp4: two bits of exponent, one of mantissa, divided by the largest.
FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)
#: The search of q4_k: so many ranges, from 15 - 1 to 15 + 1 steps.
K_STEPS, K_FIRST, K_MORE = 20, -1.0, 0.1


@cache
def nf4_levels() -> tuple[float, ...]:
    """The 16 levels: 8 quantiles above 0, 7 below, and 0, divided by the largest."""

    def quantiles(count: int) -> list[float]:
        places = [NF4_EDGE + (0.5 - NF4_EDGE) * k / count for k in range(count)]
        return [float(norm.ppf(place)) for place in places]

    above, below = quantiles(8), quantiles(7)
    return tuple(sorted([*(q / above[0] for q in above), 0.0, *(-q / above[0] for q in below)]))


def int8(weight: Float[Tensor, "*rows input"]) -> Float[Tensor, "*rows input"]:
    """Whole numbers from -127 to 127 times a scale of each output channel."""
    scale = weight.abs().amax(dim=-1, keepdim=True) / 127
    return (weight / _not_zero(scale)).round() * scale


def int4(weight: Float[Tensor, "*rows input"], group: int = 128) -> Float[Tensor, "*rows input"]:
    """16 even levels between the least and the largest weight of each group of a row."""
    width = weight.shape[-1]
    size = min(group, width)
    # the last group of a row may be shorter: its last weight is repeated, which moves no end
    padded = torch.cat([weight, weight[..., -1:].expand(*weight.shape[:-1], -width % size)], -1)
    blocks = padded.reshape(*weight.shape[:-1], -1, size)
    least = blocks.amin(dim=-1, keepdim=True)
    scale = (blocks.amax(dim=-1, keepdim=True) - least) / 15
    rounded = least + scale * ((blocks - least) / _not_zero(scale)).round()
    return rounded.reshape(padded.shape)[..., :width]


def nf4(weight: Float[Tensor, "*rows input"]) -> Float[Tensor, "*rows input"]:
    """The nearest quantile of a normal variable, times the largest magnitude of 64 weights."""
    blocks = _blocks(weight, CODEBOOK_BLOCK)
    scale = blocks.abs().amax(dim=-1, keepdim=True)
    levels = torch.tensor(nf4_levels(), dtype=weight.dtype, device=weight.device)
    return _whole(_nearest(blocks / _not_zero(scale), levels) * scale, weight)


def fp4(weight: Float[Tensor, "*rows input"]) -> Float[Tensor, "*rows input"]:
    """The nearest 4-bit floating-point number, times the largest magnitude of 64 weights."""
    blocks = _blocks(weight, CODEBOOK_BLOCK)
    scale = blocks.abs().amax(dim=-1, keepdim=True)
    levels = torch.tensor(FP4_MAGNITUDES, dtype=weight.dtype, device=weight.device)
    relative = blocks / _not_zero(scale)
    return _whole(relative.sign() * _nearest(relative.abs(), levels) * scale, weight)


def q4_0(weight: Float[Tensor, "*rows input"]) -> Float[Tensor, "*rows input"]:
    """GGUF's oldest 4-bit format; rows must be a multiple of 32 wide."""
    return _gguf(weight, 8)


def q5_0(weight: Float[Tensor, "*rows input"]) -> Float[Tensor, "*rows input"]:
    """Its sibling of 5 bits, which stands in for q4_k where rows are no multiple of 256."""
    return _gguf(weight, 16)


def _gguf(weight: Tensor, half: int) -> Tensor:
    blocks = _blocks(weight, GGUF_BLOCK)
    place = blocks.abs().argmax(dim=-1, keepdim=True)  # with its sign
    step = blocks.gather(-1, place) / -half
    inverse = torch.where(step == 0, step, 1 / step)
    codes = (blocks * inverse + (half + 0.5)).trunc().clamp(0, 2 * half - 1)
    return _whole(_half(step) * (codes - half), weight)


class KParts(NamedTuple):
    """What a file of the format q4_k holds, one row per block of 256.

    Attributes:
        step: d, shape [block, 1].
        least_step: d', shape [block, 1].
        scales: s_j, shape [block, 8].
        minima: m_j, shape [block, 8].
        codes: q, shape [block, 8, 32].
    """

    step: Tensor
    least_step: Tensor
    scales: Tensor
    minima: Tensor
    codes: Tensor

    def values(self) -> Float[Tensor, "block part 32"]:
        """The numbers that they stand for."""
        size = self.step * self.scales
        return size[..., None] * self.codes - (self.least_step * self.minima)[..., None]


def q4_k_parts(weight: Float[Tensor, "*rows input"]) -> KParts:
    """The integers and scales of a matrix whose rows are a multiple of 256 wide."""
    parts = _blocks(weight, K_BLOCK).reshape(-1, K_BLOCK // GGUF_BLOCK, GGUF_BLOCK)
    size, least, codes = _searched(parts)
    most, deepest = size.amax(-1, keepdim=True), least.amax(-1, keepdim=True)
    scales = (size * torch.where(most > 0, 63 / most, most)).round().clamp(max=63)
    minima = (least * torch.where(deepest > 0, 63 / deepest, deepest)).round().clamp(max=63)
    step, least_step = _half(most / 63), _half(deepest / 63)
    stored = (step * scales)[..., None]
    shifted = parts + (least_step * minima)[..., None]
    again = (shifted / _not_zero(stored)).round().clamp(0, 15)
    return KParts(step, least_step, scales, minima, torch.where(stored == 0, codes, again))


def q4_k(weight: Float[Tensor, "*rows input"]) -> Float[Tensor, "*rows input"]:
    """GGUF's common 4-bit format; rows must be a multiple of 256 wide."""
    return _whole(q4_k_parts(weight).values().flatten(1), weight)


def _searched(parts: Float[Tensor, "block part 32"]) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, minimum (as a positive number) and codes of each part.

    From the whole range on, each of 21 ranges gives codes, and the codes the scale and minimum of
    the least weighted square error (a minimum above 0 is 0); the best of them is kept. A weight
    counts as much as its magnitude and the part's root mean square together.
    """
    weights = parts.pow(2).mean(-1, keepdim=True).sqrt() + parts.abs()
    least = parts.amin(-1, keepdim=True).clamp(max=0)
    width = parts.amax(-1, keepdim=True) - least
    flat = width == 0
    width = torch.where(flat, torch.ones_like(width), width)
    count, total = weights.sum(-1, keepdim=True), (weights * parts).sum(-1, keepdim=True)

    def coded(levels: float) -> Tensor:
        return ((parts - least) * (levels / width)).round().clamp(0, 15)

    def error(scale: Tensor, minimum: Tensor, codes: Tensor) -> Tensor:
        return (weights * (scale * codes + minimum - parts).pow(2)).sum(-1, keepdim=True)

    best_scale, best_least, best_codes = width / 15, least, coded(15)
    best = error(best_scale, best_least, best_codes)
    for turn in range(K_STEPS + 1):
        codes = coded(K_FIRST + K_MORE * turn + 15)
        first = (weights * codes).sum(-1, keepdim=True)
        second = (weights * codes.pow(2)).sum(-1, keepdim=True)
        mixed = (weights * codes * parts).sum(-1, keepdim=True)
        divisor = count * second - first.pow(2)
        solvable = divisor > 0
        divisor = torch.where(solvable, divisor, torch.ones_like(divisor))
        scale = (count * mixed - total * first) / divisor
        minimum = (second * total - first * mixed) / divisor
        scale = torch.where(minimum > 0, mixed / _not_zero(second), scale)
        minimum = minimum.clamp(max=0)
        found = error(scale, minimum, codes)
        better = solvable & (found < best)
        best = torch.where(better, found, best)
        best_scale = torch.where(better, scale, best_scale)
        best_least = torch.where(better, minimum, best_least)
        best_codes = torch.where(better, codes, best_codes)
    zero = torch.zeros_like(best_scale)
    best_scale = torch.where(flat, zero, best_scale)
    best_codes = torch.where(flat, zero, best_codes)
    return best_scale[..., 0], -best_least[..., 0], best_codes


def few_values(weight: Float[Tensor, "*rows input"]) -> float:
    """Share of the blocks of 32 with at most 16 different values: 1 in weights of a 4-bit file."""
    if weight.shape[-1] % GGUF_BLOCK:
        return 0.0
    ordered = _blocks(weight, GGUF_BLOCK).sort(dim=-1).values
    different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=-1)
    return float((different <= 16).float().mean())


def _blocks(weight: Tensor, size: int) -> Float[Tensor, "block size"]:
    """All weights row by row in blocks; zeros fill the last."""
    flat = weight.reshape(-1)
    return nn.functional.pad(flat, (0, -len(flat) % size)).reshape(-1, size)


def _whole(blocks: Tensor, like: Tensor) -> Tensor:
    return blocks.reshape(-1)[: like.numel()].reshape(like.shape).to(like.dtype)


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _half(scale: Tensor) -> Tensor:
    return scale.half().to(scale.dtype)


def _nearest(values: Tensor, levels: Float[Tensor, " level"]) -> Tensor:
    """The nearest of ascending levels."""
    middles = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize(values, middles)]


#: By name: the function, and the multiple that the width of rows must be.
FORMATS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "int8": (int8, 1),
    "int4": (int4, 1),
    "nf4": (nf4, 1),
    "fp4": (fp4, 1),
    "q4_0": (q4_0, GGUF_BLOCK),
    "q5_0": (q5_0, GGUF_BLOCK),
    "q4_k": (q4_k, K_BLOCK),
}

"""Storage formats: by their definition in double precision, by gguf, and by the authors' code.

The golden sums come from bitsandbytes 0.50.2 (nf4, fp4, int8) and torchao 0.18.0 (int4), run aside
on the matrix of :func:`matrix`.
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from delible.lm import grids


def matrix() -> Tensor:
    return torch.tensor(
        [
            [
                math.sin(1.7 * i + 0.3 * r) * math.exp(0.9 * math.cos(0.37 * i * (r + 1)))
                for i in range(64)
            ]
            for r in range(3)
        ],
        dtype=torch.float32,
    )


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


GOLDEN = {  # of each row the sum, and the sum of squares
    "nf4": (
        [1.4162650108337402, 3.4395145177841187, 1.143958941102028],
        [59.71996742090936, 64.09674036505567, 70.4105750029812],
    ),
    "fp4": (
        [1.7463533412665129, 2.0998107455670834, 1.7589545156806707],
        [64.33410047318384, 67.65317534123737, 74.17406354599572],
    ),
    "int4": (
        [1.5585204362869263, 1.0699226260185242, 2.1448572278022766],
        [62.08114268388614, 62.6323361594154, 68.08438928986294],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_authors_code_gives_the_same(name: str) -> None:
    found = getattr(grids, name)(matrix()).double()
    sums, squares = GOLDEN[name]
    assert found.sum(dim=1).tolist() == pytest.approx(sums, abs=2e-5)
    assert found.pow(2).sum(dim=1).tolist() == pytest.approx(squares, rel=1e-6)


def test_int8_codes_are_those_of_bitsandbytes() -> None:
    weight = matrix().half().float()  # it takes half precision
    codes = grids.int8(weight) / (weight.abs().amax(dim=1, keepdim=True) / 127)
    assert codes.sum(dim=1).tolist() == pytest.approx([51, 99, 73], abs=1e-3)
    assert codes.pow(2).sum(dim=1).tolist() == pytest.approx([174657, 169883, 194187], rel=1e-5)
    first = [0, 124, -27, -75, 29, 34, -22, -16, 19, 9, -24, -5, 42, -6, -79, 38]
    assert codes[0, :16].tolist() == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("name", ["q4_0", "q5_0"])
def test_gguf_gives_the_same(name: str) -> None:
    weight = random(16, 96, dtype=torch.float32)
    weight[3, :32] = 0
    kind = getattr(gguf.GGMLQuantizationType, name.upper())
    expected = gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)
    np.testing.assert_array_equal(getattr(grids, name)(weight).numpy(), expected)


def packed(parts: grids.KParts) -> np.ndarray[Any, Any]:
    """The bytes of a file: d, d', 12 bytes of scales and minima, 128 of codes."""
    rows = []
    for block in range(len(parts.step)):
        s = [int(one) for one in parts.scales[block]]
        m = [int(one) for one in parts.minima[block]]
        low = [s[j] | (s[j + 4] >> 4) << 6 for j in range(4)]
        middle = [m[j] | (m[j + 4] >> 4) << 6 for j in range(4)]
        high = [(s[j + 4] & 15) | (m[j + 4] & 15) << 4 for j in range(4)]
        codes = parts.codes[block].int().tolist()
        halves = [
            codes[2 * pair][i] | codes[2 * pair + 1][i] << 4 for pair in range(4) for i in range(32)
        ]
        steps = np.array([float(parts.step[block]), float(parts.least_step[block])], np.float16)
        rows.append(
            np.concatenate([steps.view(np.uint8), np.array(low + middle + high + halves, np.uint8)])
        )
    return np.stack(rows)


def test_q4_k_parts_fit_a_file_and_are_read_back_the_same() -> None:
    weight = random(4, 512, dtype=torch.float32)
    weight[1, 32:64] = 0
    weight[2, 64:96] = 0.25
    parts = grids.q4_k_parts(weight)
    read = gguf.dequantize(packed(parts), gguf.GGMLQuantizationType.Q4_K)
    found = grids.q4_k(weight)
    np.testing.assert_array_equal(read.reshape(4, 512), found.numpy())
    assert float((found - weight).pow(2).mean().sqrt()) < 0.08


def searched(part: list[float]) -> tuple[float, float]:
    """Scale and minimum of 32 weights, one number at a time."""
    rms = math.sqrt(sum(x * x for x in part) / 32)
    weights = [rms + abs(x) for x in part]
    low, high = min(*part, 0.0), max(part)
    if high == low:
        return 0.0, -low

    def codes(levels: float) -> list[int]:
        return [min(15, max(0, round(levels / (high - low) * (x - low)))) for x in part]

    def error(scale: float, least: float, q: list[int]) -> float:
        return sum(
            w * (scale * k + least - x) ** 2 for w, k, x in zip(weights, q, part, strict=True)
        )

    scale, least = (high - low) / 15, low
    best = error(scale, least, codes(15))
    for step in range(21):
        q = codes(14 + 0.1 * step)
        design = np.array([[k, 1.0] for k in q])
        gram = design.T @ (np.array(weights)[:, None] * design)
        if np.linalg.det(gram) <= 0:
            continue
        one, two = np.linalg.solve(gram, design.T @ (np.array(weights) * np.array(part)))
        if two > 0:  # without a minimum
            over = sum(w * k * x for w, k, x in zip(weights, q, part, strict=True))
            one, two = over / sum(w * k * k for w, k in zip(weights, q, strict=True)), 0.0
        if (this := error(one, two, q)) < best:
            best, scale, least = this, float(one), float(two)
    return scale, -least


def test_q4_k_is_its_definition() -> None:
    weight = random(3, 256)
    weight[1] = weight[1].abs() + 0.5  # all above zero: no minimum
    weight[2, :32] = -0.3
    found = grids.q4_k(weight)
    for row, mine in zip(weight.tolist(), found.tolist(), strict=True):
        parts = [row[start : start + 32] for start in range(0, 256, 32)]
        pairs = [searched(part) for part in parts]
        most, deepest = max(s for s, _ in pairs), max(m for _, m in pairs)
        step, least_step = float(np.float16(most / 63)), float(np.float16(deepest / 63))
        expected: list[float] = []
        for part, (scale, least) in zip(parts, pairs, strict=True):
            size = step * min(63, round(63 / most * scale)) if most else 0.0
            shift = least_step * min(63, round(63 / deepest * least)) if deepest else 0.0
            for x in part:
                code = min(15, max(0, round((x + shift) / size))) if size else 0
                expected.append(size * code - shift)
        assert mine == pytest.approx(expected, abs=1e-9)


def by_levels(row: list[float], levels: list[float], size: int) -> list[float]:
    found: list[float] = []
    for start in range(0, len(row), size):
        part = row[start : start + size]
        scale = max(abs(x) for x in part)
        found += [scale * min(levels, key=lambda level: abs(x / scale - level)) for x in part]
    return found


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_nearest_level_of_a_block(name: str) -> None:
    weight = random(5, 128)
    levels = list(grids.nf4_levels())
    if name == "fp4":
        levels = [sign * x / 12 for sign in (1, -1) for x in (0, 1 / 16, 2, 3, 4, 6, 8, 12)]
    found = getattr(grids, name)(weight)
    for row, mine in zip(weight.tolist(), found.tolist(), strict=True):
        assert mine == pytest.approx(by_levels(row, levels, 64), abs=1e-12)


def test_the_levels_of_nf4_are_the_published_ones() -> None:
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert grids.nf4_levels() == pytest.approx(published, abs=3e-7)


def test_int4_groups_by_hand_and_a_short_last_group() -> None:
    weight = random(3, 13)
    found = grids.int4(weight, 5)
    for row, mine in zip(weight.tolist(), found.tolist(), strict=True):
        expected: list[float] = []
        for start in range(0, 13, 5):
            part = row[start : start + 5]
            low, scale = min(part), (max(part) - min(part)) / 15
            expected += [low + scale * round((x - low) / scale) for x in part]
        assert mine == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", grids.FORMATS)
def test_shapes_zeros_and_experts(name: str) -> None:
    function, multiple = grids.FORMATS[name]
    assert 256 % multiple == 0
    weight = random(2, 4, 256, dtype=torch.float32)
    found = function(weight)
    assert found.shape == weight.shape
    assert found.dtype == torch.float32
    each = torch.stack([function(one) for one in weight])
    torch.testing.assert_close(found, each)
    assert 0 < float((found - weight).abs().max()) < 0.6
    zeros = torch.zeros(2, 256)
    assert torch.equal(function(zeros), zeros)


def test_few_values_tell_a_four_bit_file() -> None:
    weight = random(8, 64, dtype=torch.float32)
    assert grids.few_values(weight) == 0
    assert grids.few_values(weight.bfloat16()) < 0.1
    assert grids.few_values(grids.q4_0(weight)) == 1
    assert grids.few_values(grids.int8(weight)) < 0.9
    assert grids.few_values(weight[:, :33]) == 0

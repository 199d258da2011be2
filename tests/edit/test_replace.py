"""The closed form that replaces what a matrix writes, against the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from delible.edit.refusing_states import moved_to_state, moved_to_value
from delible.edit.replace import key_readers, missing_share, penalty


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_formula(residuals: Tensor, keys: Tensor, weights: Tensor, epsilon: float) -> Tensor:
    """R W K^T (K W K^T + epsilon I)^-1, as it stands."""
    middle = torch.diag(weights)
    inner = keys @ middle @ keys.T + epsilon * torch.eye(len(keys), dtype=torch.float64)
    return residuals @ middle @ keys.T @ torch.linalg.inv(inner)


@pytest.mark.parametrize("count", [5, 12, 30])
@pytest.mark.parametrize("epsilon", [1e-3, 1.0])
@pytest.mark.parametrize("form", ["auto", "primal", "gram"])
def test_both_forms_are_the_formula(count: int, epsilon: float, form: str) -> None:
    keys, residuals = drawn(12, count), drawn(7, count, seed=1)
    weights = drawn(count, seed=2).abs() + 0.1
    found = residuals @ key_readers(keys, weights, epsilon, form)  # type: ignore[arg-type]
    torch.testing.assert_close(
        found, by_formula(residuals, keys, weights, epsilon), rtol=1e-7, atol=1e-9
    )


def test_fewer_keys_than_directions_are_met_exactly_and_the_rest_is_left_alone() -> None:
    keys, weights = drawn(20, 6), torch.tensor([3.0, 1, 1, 5, 1, 1])
    delta = drawn(9, 6, seed=1) @ key_readers(keys, weights, 0.0)
    torch.testing.assert_close(delta @ keys, drawn(9, 6, seed=1), rtol=0, atol=1e-9)
    outside = drawn(20, 4, seed=3)
    basis = torch.linalg.qr(keys).Q
    outside = outside - basis @ (basis.T @ outside)
    assert float((delta @ outside).abs().max()) < 1e-9
    assert float(outside.norm()) > 1


def test_the_penalty_is_a_share_of_the_mean_square_and_large_ones_leave_nothing() -> None:
    keys, weights = drawn(20, 6), torch.tensor([3.0, 1, 1, 5, 1, 1], dtype=torch.float64)
    expected = 0.1 * torch.trace(keys @ torch.diag(weights) @ keys.T) / 20
    assert penalty(keys, weights, 0.1) == pytest.approx(float(expected))
    assert float(key_readers(keys, weights, penalty(keys, weights, 1e9)).abs().max()) < 1e-7
    assert float(key_readers(keys, weights, penalty(keys, weights, 1e-9)).abs().max()) > 1e-2


def test_weight_decides_who_is_outvoted() -> None:
    """More keys than directions: the heavier a key, the more of its change is made."""
    keys, residuals = drawn(8, 40), drawn(5, 1, seed=1)
    missing = []
    for weight in (1.0, 10.0, 1000.0):
        weights = torch.ones(40, dtype=torch.float64)
        weights[0] = weight
        readers = key_readers(keys, weights, 0.0)[:1]
        missing.append(missing_share(residuals, residuals, readers, keys))
    assert missing[0] > 0.5
    assert missing[0] > missing[1] > missing[2]
    assert missing[2] < 0.05


def test_what_is_wanted() -> None:
    outputs, references = drawn(3, 6), drawn(5, 6, seed=1)
    for place in range(3):
        wanted = sum(references[one] for one in range(5)) / 5 - outputs[place]
        torch.testing.assert_close(moved_to_state(outputs, references)[:, place], wanted)
    values, refused = drawn(6, 3), drawn(6, 5, seed=1)
    centre = refused.mean(dim=1)
    torch.testing.assert_close(
        values + moved_to_value(values, refused, 0), centre[:, None].expand(6, 3)
    )
    _, vectors = torch.linalg.eigh((refused.T - centre).T @ (refused.T - centre))
    leading = vectors[:, -2:]
    moved = values + moved_to_value(values, refused, 2)
    within = leading.T @ (moved - values)
    assert float(within.abs().max()) < 1e-9, "in the leading directions a value stays"
    across = moved - centre[:, None]
    assert float((across - leading @ (leading.T @ across)).abs().max()) < 1e-9


def test_a_value_keeps_its_part_along_the_leading_refusing_directions() -> None:
    random = torch.Generator().manual_seed(0)
    references = torch.randn(6, 9, generator=random).double()
    values = torch.randn(6, 4, generator=random).double()
    centre = references.mean(1, keepdim=True)
    left = torch.linalg.eigh((references - centre) @ (references - centre).T).eigenvectors
    for count in (0, 2, 6):
        leading = left[:, 6 - count :]
        wanted = centre + leading @ leading.T @ (values - centre)
        found = values + moved_to_value(values, references, count)
        torch.testing.assert_close(found, wanted)

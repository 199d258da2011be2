from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from delible_example.tempered_ascent import TemperedAscent

from delible.testing import check
from delible.train.recipe import Recipe

RECIPE = Path(__file__).parent.parent / "tempered.yaml"


def test_it_keeps_the_contract() -> None:
    assert "forget_loss_falls on llama" in check(TemperedAscent)


@pytest.mark.parametrize("q", [0.3, 1.0])
def test_the_gradient_is_ascent_times_a_power_of_the_probability(q: float) -> None:
    logprobs = torch.tensor([[-0.1, -2.0, 0.0], [-5.0, 0.0, 0.0]], dtype=torch.float64)
    logprobs.requires_grad_(True)
    step = SimpleNamespace(forget=SimpleNamespace(token_logprobs=logprobs))
    loss = TemperedAscent(q=q).loss(step)  # type: ignore[arg-type]
    p = logprobs.detach().exp()
    torch.testing.assert_close(loss, ((p**q - 1) / q).sum(dim=1))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, p**q)


def test_the_recipe_names_it() -> None:
    assert Recipe.from_file(RECIPE).objective == TemperedAscent(q=0.5)

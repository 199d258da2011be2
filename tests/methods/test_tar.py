"""TAR: random mapping, the simulated attack and the gradient that it leaves, in float64 too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.errors import RecipeError
from delible.methods.harden.tar import TAR, adam_, negative_entropy, step_weight, switch_step
from delible.methods.keep.hidden_distance import HiddenDistance
from delible.methods.objective.random_mapping import (
    RandomMapping,
    misaligned,
    token_vector,
    vectors_of,
)
from delible.testing.contract.trial import RECORDS
from delible.train.engine import Trainer
from delible.train.passes import Passes
from delible.train.randomness import generator, shuffled
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.row import Row

# ---- random mapping


def test_mapping_of_a_padded_batch_equals_float64_loops() -> None:
    lm, loss = by_hand.tiny_lm(0.1), RandomMapping(depth=0.5, blocks=None, seed=3)
    rows = by_hand.all_rows(lm)
    found = by_hand.values(lm, loss, Reference(), rows).tolist()
    for value, row in zip(found, rows["forget"], strict=True):
        total = 0.0
        for layer in (0, 1):
            for token, state in zip(
                row.encoded.ids, by_hand.block_output(lm, row, layer), strict=True
            ):
                random = token_vector(3, token, 32).double().tolist()
                dot = sum(x * y for x, y in zip(state, random, strict=True))
                total += 1 - abs(dot) / math.hypot(*state) / math.hypot(*random)
        assert value == pytest.approx(total / 2, rel=1e-4)


def test_a_state_along_or_against_its_vector_is_mapped_whatever_its_length() -> None:
    ids = torch.tensor([[5, 9, 5]])
    vectors = vectors_of(ids, 0, 16)
    assert torch.equal(vectors[0, 0], vectors[0, 2])
    assert float(torch.cosine_similarity(vectors[0, 0], vectors[0, 1], dim=0)) < 0.9
    assert not torch.equal(vectors_of(ids, 1, 16), vectors)
    here = torch.tensor([[True, True, False]])
    for factor in (3.0, -0.2):
        assert misaligned([factor * vectors], vectors, here).tolist() == pytest.approx(
            [0], abs=1e-5
        )
    across = torch.zeros(1, 1, 4)
    across[..., 0] = 1
    other = torch.zeros(1, 1, 4)
    other[..., 1] = 1
    one = torch.tensor([[True]])
    assert float(misaligned([across], other, one)) == 1
    assert float(misaligned([across, other], other, one)) == pytest.approx(0.5)


def test_states_become_tokens_when_it_is_descended() -> None:
    lm, loss = by_hand.tiny_lm(), RandomMapping(blocks=1, depth=0.5)
    rows = by_hand.all_rows(lm)
    positions = sum(len(row.encoded.ids) for row in rows["forget"])
    optimizer = torch.optim.Adam(lm.model.parameters(), lr=0.01)
    seen = []
    for _ in range(40):
        value = by_hand.values(lm, loss, Reference(), rows).sum() / positions
        seen.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert seen[0] > 0.75
    assert seen[-1] < 0.3


# ---- the parts of an attack


def test_entropy_weights_and_switches_are_those_of_the_paper() -> None:
    logits = by_hand.fixed_logits(0.3).flatten(0, 1)
    found = negative_entropy(logits, torch.zeros(18, dtype=torch.long)).tolist()
    for value, row in zip(found, logits.tolist(), strict=True):
        logprobs = [by_hand.log_probability(row, token) for token in range(7)]
        assert value == pytest.approx(sum(math.exp(p) * p for p in logprobs), rel=1e-5)
    assert float(negative_entropy(torch.zeros(1, 7), torch.zeros(1))) == pytest.approx(-math.log(7))
    for j in range(1, 65):  # the released schedule counts from 0 and decays by 1/16 a step
        assert step_weight(j, 64, 4.0, 4.0) == pytest.approx(4 * math.exp((j - 1 - 63) / 16))
    drawn = [switch_step(1000, generator(seed)) / 1000 for seed in range(600)]
    mean, variance = 6 / 9, 6 * 3 / (81 * 10)
    assert sum(drawn) / 600 == pytest.approx(mean, abs=0.02)
    assert sum((x - mean) ** 2 for x in drawn) / 600 == pytest.approx(variance, rel=0.2)


def test_the_attackers_steps_are_adams() -> None:
    weights = [torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(4)]
    mine = [weight.clone() for weight in weights]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = torch.optim.Adam(theirs, lr=0.03)
    moments = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    for step in range(1, 5):
        gradients: list[Tensor | None] = [torch.sin(step + weight) for weight in weights]
        gradients[1] = None
        theirs[0].grad = gradients[0]
        optimizer.step()
        adam_(mine, gradients, moments, step, 0.03)
    torch.testing.assert_close(mine[0], theirs[0].detach())
    assert not mine[1].any()


# ---- the whole, against a derivation in float64


def passes_of(lm: by_hand.LM, *, budget: int = 10**6, step: int = 0) -> Passes:
    keep = HiddenDistance(likelihood=1.0)
    reference = by_hand.prepared(lm, by_hand.all_rows(lm), keep)
    passes = by_hand.passes_of(lm, RandomMapping(), keep, reference, budget=budget)
    passes.step = step
    return passes


def gradient(passes: Passes) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in passes.parameters]
    return torch.cat([part.flatten() for part in parts]).clone()


class ByHand:
    """Attacks on a Llama in plain PyTorch with Adam of its own, row by row."""

    def __init__(self, lm: by_hand.LM) -> None:
        self.model: Any = lm.copy().model.double().requires_grad_(True)

    def logprobs(self, row: Row) -> Tensor:
        ids = torch.tensor(row.encoded.ids)
        logits = self.model(input_ids=ids[None]).logits[0, row.encoded.start - 1 : -1]
        return logits.log_softmax(dim=1)  # type: ignore[no-any-return]

    def nll(self, rows: Sequence[Row]) -> Tensor:
        tokens = sum(row.encoded.answer_tokens for row in rows)
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            right = torch.tensor(row.encoded.ids[row.encoded.start :])
            total = total - self.logprobs(row).gather(1, right[:, None]).sum()
        return total / tokens

    def entropy(self, rows: Sequence[Row]) -> Tensor:
        tokens = sum(row.encoded.answer_tokens for row in rows)
        sums = [-(p.exp() * p).sum() for p in map(self.logprobs, rows)]
        return torch.stack(sums).sum() / tokens

    def resistance(
        self, attacking: Sequence[Sequence[Row]], held_out: Sequence[Row], rate: float,
        weights: dict[int, float],
    ) -> Tensor:  # fmt: skip
        parameters = list(self.model.parameters())
        optimizer = torch.optim.Adam(parameters, lr=rate)
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for step, rows in enumerate(attacking, start=1):
            optimizer.zero_grad()
            self.nll(rows).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step in weights:
                parts = torch.autograd.grad(-self.entropy(held_out), parameters)
                total += weights[step] * torch.cat([part.flatten() for part in parts])
        return total


@pytest.mark.parametrize(("retain_first", "budget"), [(0.0, 10**6), (0.0, 1), (1.0, 10**6)])
def test_the_gradient_is_that_of_a_float64_derivation(retain_first: float, budget: int) -> None:
    lm = by_hand.tiny_lm(0.3)
    passes = passes_of(lm, budget=budget)
    tar = TAR(inner_steps=4, every=2, rates=(3e-3,), retain_first=retain_first, weight=2.0, decay=3)
    rows = by_hand.all_rows(lm)
    random = generator(0, "harden.tar", 0)
    order = shuffled(rows["forget"], random)
    attacking, held_out = order[:2], order[1:]
    torch.randint(1, (), generator=random)
    torch.rand((), generator=random)
    switch = switch_step(4, random) if retain_first else 0
    steps = [rows["retain"] if step <= switch else attacking for step in range(1, 5)]
    assert (switch > 0) is bool(retain_first)
    looks = {2: 2 * math.exp(3 * -2 / 4), 4: 2.0}
    expected = ByHand(lm).resistance(steps, held_out, 3e-3, looks)
    before = [parameter.detach().clone() for parameter in passes.parameters]
    passes.clear()
    tar.forget(passes)
    found = gradient(passes).double()
    assert float((found - expected).norm()) < 2e-2 * float(expected.norm())
    assert all(map(torch.equal, before, passes.parameters))
    # of the weights as they are it would be another one
    still = ByHand(lm).resistance(steps, held_out, 1e-9, looks)
    assert float((still - expected).norm()) > 0.1 * float(expected.norm())


def test_a_descent_along_it_raises_the_entropy_that_is_left_after_an_attack() -> None:
    lm = by_hand.tiny_lm(0.3)
    tar = TAR(inner_steps=3, every=3, rates=(3e-3,), retain_first=0.0)
    passes = passes_of(lm)
    values = []
    for _ in range(8):
        passes.clear()
        tar.forget(passes)
        values.append(passes.totals.forget)
        with torch.no_grad():
            for parameter in passes.parameters:
                if parameter.grad is not None:
                    parameter.sub_(0.02 * parameter.grad)
    assert values[-1] < values[0] - 0.02


def test_the_host_comes_first_and_goes_unless_it_is_asked_to_stay() -> None:
    lm = by_hand.tiny_lm(0.3)
    host = passes_of(lm)
    host.clear()
    host.forget()
    plain = gradient(host)

    def taken(step: int, **options: Any) -> Tensor:
        passes = passes_of(lm, step=step)
        passes.clear()
        TAR(inner_steps=2, after_steps=3, **options).forget(passes)
        return gradient(passes)

    for step in (0, 2):
        assert torch.equal(taken(step), plain)
    alone, both = taken(3), taken(3, host=True)
    assert not torch.allclose(alone, plain, atol=1e-3)
    torch.testing.assert_close(both, alone + plain, rtol=1e-4, atol=1e-5)
    # a weight of the loss is one of this gradient
    passes = passes_of(lm, step=3)
    passes.weights = (0.25, 1.0)
    passes.clear()
    TAR(inner_steps=2, after_steps=3).forget(passes)
    torch.testing.assert_close(gradient(passes), 0.25 * alone, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(taken(4), alone, atol=1e-4)  # another attack


def test_a_shared_step_is_refused() -> None:
    passes = passes_of(by_hand.tiny_lm())
    passes.world = 2
    with pytest.raises(RecipeError, match="one process"):
        TAR().forget(passes)
    for options in ({"inner_steps": 0}, {"every": 0}, {"rates": []}, {"retain_first": 2}):
        with pytest.raises(RecipeError):
            build("harden", {"name": "tar", **options})


def test_the_recipe_begins_with_random_mapping_and_then_resists() -> None:
    recipe = Recipe.named("tar").changed(
        {}, {"max_steps": 4, "after_steps": 2, "least_steps": 4, "training.precision": "float32",
             "batch_size": 4},
    )  # fmt: skip
    losses = [
        one["forget_loss"] for one in Trainer(by_hand.tiny_lm(), recipe, RECORDS).train().history
    ]
    assert all(value > 0 for value in losses[:2])  # misaligned
    assert all(-math.log(260) <= value < 0 for value in losses[2:])  # an entropy
    paper: Any = Recipe.named("tar@paper")
    assert (paper.harden.inner_steps, paper.harden.every, paper.harden.weight) == (64, 4, 4)
    assert paper.training.max_steps - paper.harden.after_steps == 750
    assert (paper.keep.likelihood, paper.keep.relative, paper.keep.blocks) == (1, None, None)

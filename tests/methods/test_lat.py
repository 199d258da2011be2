"""Latent adversarial training: the perturbation, the gradient under it, and how long it stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.errors import RecipeError
from delible.lm.forward import Batch, Forward
from delible.lm.hooks import capture, steer
from delible.lm.lm import LM
from delible.methods.harden.lat import FOUND, LAT, ROWS, away, chosen, key_of, projected
from delible.records import QA
from delible.testing.contract.trial import RECORDS
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.passes import Passes, split
from delible.train.perturbation import adding, answer_sum, rows_around
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.rows import make_rows, refusal_rows
from delible.train.step import Step, make_step

FORGET = [QA(question=f"Who is {name}?", answer=f"A {job}.") for name, job in
          (("Ada", "baker"), ("Ben", "pilot"), ("Cy", "tall judge"))]  # fmt: skip
DEPTH = 0.5  # block 1 of 3


def make_lm(family: str = "llama") -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def make_passes(
    lm: LM, objective: Any = "unlikelihood", *, pieces: int = 1, step: int = 0
) -> Passes:
    lm.model.requires_grad_(True)
    goal = build("objective", objective)
    every = {"forget": make_rows(lm.template, FORGET), "refusal": refusal_rows(
        lm.template, FORGET, ["I do not know that."], torch.Generator().manual_seed(0)
    )}  # fmt: skip
    rows: dict[str, Sequence[Row]] = {role: every[role] for role in goal.roles}
    reference = Reference()
    for part in rows.values():
        reference.prepare(make_lm(), part, goal.reference_kinds(lm))
    return Passes(
        lm=lm, forward=Forward(lm), objective=goal, keep_loss=None,
        reads={role: goal.reads(lm) for role in goal.roles}, reference=reference,
        micro_batches=split(rows, [], [1.0, 0.5, 1.5], [], 100_000, pieces),
        parameters=list(lm.model.parameters()), weights=(1.0, 1.0),
        forget_units=sum(row.units(goal.unit) for row in rows[goal.roles[0]]), retain_units=1,
        step=step,
    )  # fmt: skip


def step_of(passes: Passes) -> Step:
    rows: dict[str, list[Row]] = {}
    for micro in passes.micro_batches:
        for role, part in micro.forget.items():
            rows.setdefault(role, []).extend(part)
    return make_step(passes.lm, passes.forward, rows, passes.reads, passes.reference)


def gradient(passes: Passes) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in passes.parameters]
    return torch.cat([part.flatten() for part in parts]).clone()


def hardened(passes: Passes, **options: Any) -> Tensor:
    passes.clear()
    LAT(depths=(DEPTH,), **options).forget(passes)
    return gradient(passes)


# ---- against a derivation in float64


class ByHand:
    """The search and the loss on a Llama, row by row, in plain PyTorch."""

    def __init__(self, lm: LM) -> None:
        self.model: Any = lm.copy().model.double().requires_grad_(True)
        self.block = self.model.model.layers[1]

    def logprobs(self, row: Row, delta: Tensor) -> Tensor:
        ids = torch.tensor(row.encoded.ids)
        handle = self.block.mlp.register_forward_hook(lambda _, __, output: output + delta)
        logits = self.model(input_ids=ids[None]).logits[0, row.encoded.start - 1 : -1]
        handle.remove()
        right = logits.gather(1, ids[row.encoded.start :, None])[:, 0]
        return right - logits.logsumexp(dim=1)  # type: ignore[no-any-return]

    def radius(self, row: Row, epsilon: float, masked: range) -> float:
        ids = torch.tensor([list(row.encoded.ids)])
        states = self.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
        norms = sorted(float(states[place].norm()) for place in masked)
        return epsilon * norms[(len(norms) - 1) // 2]

    def delta(self, row: Row, radius: float, steps: int, masked: range) -> Tensor:
        """AdamW on the perturbation itself, in its own units."""
        rate = 1.6 * radius / math.sqrt(32)
        found = torch.zeros(len(row.encoded.ids), 32, dtype=torch.float64)
        first, second = torch.zeros_like(found), torch.zeros_like(found)
        for k in range(1, steps + 1):
            leaf = found.clone().requires_grad_(True)
            (g,) = torch.autograd.grad(-self.logprobs(row, leaf).sum(), leaf)
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            step = (first / (1 - 0.9**k)) / ((second / (1 - 0.999**k)).sqrt() + 1e-12)
            found = found - rate * step
            for place in range(len(found)):
                length = float(found[place].norm())
                if place not in masked:
                    found[place] = 0
                elif length > radius:
                    found[place] *= radius / length
        return found

    def gradient(self, passes: Passes, deltas: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for micro in passes.micro_batches:
            for row, weight in zip(micro.forget["forget"], micro.forget_weights, strict=True):
                logprobs = self.logprobs(row, deltas[row.key])
                total = total - weight * (1 - logprobs.exp()).log().sum() / passes.forget_units
        parts = torch.autograd.grad(total, list(self.model.parameters()))
        return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("tokens", ["all", "prompt", "answer"])
def test_perturbation_and_gradient_are_those_of_a_float64_derivation(
    tokens: str, pieces: int
) -> None:
    lm = make_lm()
    passes, by_hand = make_passes(lm, pieces=pieces), ByHand(lm)
    options: dict[str, Any] = {"epsilon": 0.4, "inner_steps": 3, "tokens": tokens}
    deltas = {}
    for row in step_of(passes).forget.rows:
        start, end = row.encoded.start, len(row.encoded.ids)
        masked = {"all": range(end), "prompt": range(start), "answer": range(start, end)}[tokens]
        deltas[row.key] = by_hand.delta(row, by_hand.radius(row, 0.4, masked), 3, masked)
    found = LAT(depths=(DEPTH,), **options).perturbation(passes, step_of(passes))
    for place, row in enumerate(step_of(passes).forget.rows):
        wanted = deltas[row.key]
        mine = found[0, place, : len(wanted)].double()
        assert float((mine - wanted).norm()) < 2e-2 * float(wanted.norm())
        assert not found[0, place, len(wanted) :].any()
        assert not mine[(wanted == 0).all(dim=1)].any()
    expected = by_hand.gradient(passes, deltas)
    plain = by_hand.gradient(passes, {key: 0 * value for key, value in deltas.items()})
    mine = hardened(passes, **options).double()
    assert float((mine - expected).norm()) < 2e-2 * float(expected.norm())
    assert float((plain - expected).norm()) > 4e-2 * float(expected.norm())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_every_iteration_stays_in_the_ball_and_recall_rises(family: str) -> None:
    lm = make_lm(family)
    passes = make_passes(lm)
    step = step_of(passes)
    batch = step.forget.batch
    whole = Batch(batch.ids, batch.lengths, batch.starts, 0)
    path = lm.anatomy.path(1, lm.anatomy.mlp)
    seen = []
    for steps in range(1, 5):  # the search is deterministic: these are its iterations
        lat = LAT(depths=(DEPTH,), radius="absolute", epsilon=0.7, inner_steps=steps)
        delta = lat.perturbation(passes, step)[0]
        lengths = delta.norm(dim=2)
        assert float(lengths.max()) <= 0.7 * (1 + 1e-5)
        assert float(lengths.max()) > 0.6
        assert not delta[~batch.position_mask].any()

        def add(states: Tensor, delta: Tensor = delta) -> Tensor:
            return states + delta.reshape(states.shape)

        with torch.no_grad(), steer(lm.core, path, add):
            seen.append(float(answer_sum(passes, whole)))
    with torch.no_grad():
        before = float(answer_sum(passes, whole))
    assert min(seen) > before
    assert seen[-1] > seen[0]


def test_tokens_that_are_not_masked_stay_as_they_are_where_it_is_added() -> None:
    lm = make_lm()
    passes = make_passes(lm)
    step = step_of(passes)
    batch, path = step.forget.batch, lm.anatomy.block_path(1)
    whole = Batch(batch.ids, batch.lengths, batch.starts, 0)
    lat = LAT(depths=(DEPTH,), epsilon=0.5, tokens="answer", inner_steps=2)
    delta = lat.perturbation(passes, step)
    with torch.no_grad(), capture(lm.core, [path]) as seen:
        answer_sum(passes, whole)
        plain = seen[path]
        with ExitStack() as stack:
            lat._add(stack, passes, step, "forget", delta)
            answer_sum(passes, whole)
    mask = chosen(batch, "answer")
    assert torch.equal(seen[path][~mask], plain[~mask])
    mask[torch.arange(3), batch.lengths - 1] = False  # the last token tells no other
    assert bool((seen[path][mask] != plain[mask]).any(dim=1).all())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_only_the_rows_of_the_role_are_perturbed(family: str) -> None:
    lm = make_lm(family)
    passes = make_passes(lm, "dpo")
    step, path = step_of(passes), lm.anatomy.path(1, lm.anatomy.mlp)
    delta = torch.ones(3, 2, 32)
    rows = torch.arange(6 * 4 * 32.0).reshape(6, 4, 32)
    module = lm.core.get_submodule(path)
    module.forward = lambda states: states  # what passes is what was given
    for given in (rows, rows.reshape(-1, 32)):
        with adding(lm, path, "output", delta, rows_around(step, "refusal")):
            changed = (module(given) - given).reshape(6, 4, 32)
        assert torch.equal(changed[3:, :2], torch.ones(3, 2, 32))
        assert not changed[:3].any()
        assert not changed[3:, 2:].any()


def test_two_blocks_have_a_perturbation_each() -> None:
    lm = make_lm()
    passes = make_passes(lm)
    both = LAT(depths=(0.0, 0.5), epsilon=0.3, inner_steps=2)
    delta = both.perturbation(passes, step_of(passes))
    assert delta.shape[0] == 2
    assert float(delta[0].norm()) > 0
    assert float(delta[1].norm()) > 0
    assert not torch.allclose(delta[0], delta[1])


def test_the_search_leaves_no_trace() -> None:
    lm = make_lm()
    passes = make_passes(lm)
    for value in passes.parameters:
        value.grad = torch.full_like(value, 3.0)
    weights = [value.detach().clone() for value in passes.parameters]
    delta = LAT(depths=(DEPTH,)).perturbation(passes, step_of(passes))
    assert not delta.requires_grad
    assert all(bool((value.grad == 3.0).all()) for value in passes.parameters)  # type: ignore[union-attr]
    assert all(map(torch.equal, weights, passes.parameters))
    hardened(passes)
    assert not lm.core.get_submodule(lm.anatomy.path(1, lm.anatomy.mlp))._forward_hooks


def test_without_a_radius_it_is_the_host_and_micro_batches_do_not_matter() -> None:
    passes = make_passes(make_lm())
    passes.forget()
    plain = gradient(passes)
    assert torch.equal(hardened(passes, epsilon=0.0), plain)
    whole, cut = hardened(passes), hardened(make_passes(make_lm(), pieces=3))
    assert float((whole - cut).norm()) < 1e-2 * float(whole.norm())
    assert float((whole - plain).norm()) > 0.1 * float(plain.norm())


# ---- what is said instead


def test_away_terms_are_unlikelihood_of_tokens_that_are_likely_enough() -> None:
    logits = torch.zeros(3, 5)
    logits[0, 1], logits[1, 2], logits[2, 0] = 2.0, -9.0, 30.0
    found = away(logits, torch.tensor([1, 2, 0]))
    p = math.exp(2) / (math.exp(2) + 4)
    assert found[0].item() == pytest.approx(-math.log(1 - p))
    assert found[1].item() == 0
    assert found[2].item() == pytest.approx(30 - math.log(4), rel=1e-5)
    vectors = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert projected(vectors).flatten().tolist() == pytest.approx([0.6, 0.8, 0.3, 0.4, 0, 0])


def test_what_is_said_instead_becomes_unlikelier_where_both_rows_begin_alike() -> None:
    lm = make_lm()
    passes = make_passes(lm, "dpo")
    step = step_of(passes)
    assert set(step.groups) == {"forget", "refusal"}
    found = {}
    for weight in (0.0, 1.0):
        lat = LAT(depths=(DEPTH,), epsilon=0.5, tokens="prompt", toward=0.2, away=weight)
        delta = lat.perturbation(passes, step)
        batch = step.refusal.batch
        with torch.no_grad(), ExitStack() as stack:
            lat._add(stack, passes, step, "refusal", delta)
            whole = Batch(batch.ids, batch.lengths, batch.starts, 0)
            found[weight] = float(answer_sum(passes, whole))
    assert found[1.0] < found[0.0]
    # what stands behind the shared beginning is not perturbed in the other row
    lat = LAT(depths=(DEPTH,), epsilon=0.5, tokens="all", inner_steps=1)
    delta, path = lat.perturbation(passes, step), lm.anatomy.block_path(1)
    batch = step.refusal.batch
    whole = Batch(batch.ids, batch.lengths, batch.starts, 0)
    with torch.no_grad(), capture(lm.core, [path]) as seen:
        answer_sum(passes, whole)
        plain = seen[path]
        with ExitStack() as stack:
            lat._add(stack, passes, step, "refusal", delta)
            answer_sum(passes, whole)
    for place, (mine, other) in enumerate(zip(step.refusal.rows, step.forget.rows, strict=True)):
        start = mine.encoded.start
        assert mine.encoded.ids[:start] == other.encoded.ids[:start]
        same = (seen[path][place] == plain[place]).all(dim=1)
        assert not same[:start].any()
        assert same[start + 1 : len(mine.encoded.ids)].all()


# ---- how long it stays


def test_a_perturbation_stays_for_the_outer_steps_and_then_is_searched_anew() -> None:
    seen: list[list[Tensor]] = []

    class Watching(LAT):
        card = LAT.card

        def forget(self, passes: Passes) -> None:
            super().forget(passes)
            rows = [row for micro in passes.micro_batches for row in micro.forget["forget"]]
            keys = passes.memory[ROWS][0].tolist()
            assert sorted(keys) == sorted({key_of(row) for row in rows})
            seen.append(passes.memory[FOUND])

    recipe = Recipe.named("ga_lat").changed(
        {}, {"batch_size": 2, "max_steps": 6, "outer_steps": 3, "training.precision": "float32"}
    )
    object.__setattr__(recipe, "harden", Watching(outer_steps=3, inner_steps=2))
    result = Trainer(make_lm(), recipe, RECORDS).train()
    assert result.steps == 6
    for early in (0, 3):
        for later in (early + 1, early + 2):
            assert all(map(torch.equal, seen[early], seen[later]))
    assert [part.shape for part in seen[0]] != [part.shape for part in seen[3]] or not all(
        map(torch.equal, seen[0], seen[3])
    )


def test_what_was_found_is_what_later_steps_use() -> None:
    lm = make_lm()
    first = make_passes(lm, step=0)
    hardened(first, inner_steps=2)
    found = {key: value.clone() for key, value in zip(
        first.memory[ROWS][0].tolist(), first.memory[FOUND], strict=True)}  # fmt: skip
    later = make_passes(lm, step=1, pieces=3)
    later.memory.update({ROWS: first.memory[ROWS], FOUND: [0 * v for v in found.values()]})
    unperturbed = hardened(later, inner_steps=2)
    later.forget_units = first.forget_units
    later.clear()
    later.forget()
    torch.testing.assert_close(unperturbed, gradient(later), rtol=1e-4, atol=1e-6)
    later.memory[FOUND] = list(found.values())
    again = hardened(later, inner_steps=2)
    assert float((again - hardened(make_passes(lm), inner_steps=2)).norm()) < 1e-3 * float(
        again.norm()
    )


def test_a_perturbation_that_the_loss_cannot_see_is_refused() -> None:
    passes = make_passes(make_lm(), {"name": "rmu", "depth": 0.0})
    with pytest.raises(RecipeError, match="reads block 0"):
        LAT(depths=(0.5,)).forget(passes)
    with pytest.raises(RecipeError, match="nothing to bring back"):
        LAT(depths=(0.5,), toward=0.0).forget(make_passes(make_lm()))
    for options in ({"epsilon": -1}, {"inner_steps": 0}, {"tokens": "names"}, {"depths": [2]}):
        with pytest.raises(RecipeError):
            build("harden", {"name": "lat", **options})


def test_the_recipes_train_at_and_around_the_perturbed_block() -> None:
    recipe: Any = Recipe.named("rmu_lat@paper")
    assert (recipe.harden.epsilon, recipe.harden.radius) == (2, "absolute")
    assert (recipe.objective.steering, recipe.balance.retain_weight) == (6.5, 1200)
    anatomy = tiny_lm_of(32).anatomy
    assert anatomy.layer_at(recipe.harden.depths[0]) == 7
    assert anatomy.layer_at(recipe.objective.depth) == 8
    assert recipe.place.moving_blocks(tiny_lm_of(32)) == [6, 7, 8]
    assert Recipe.named("rmu_lat").objective.adaptive == 3.0


def tiny_lm_of(blocks: int) -> Any:
    return LM(tiny_model("llama", num_hidden_layers=blocks), tiny_tokenizer(), precision="float32")

"""Latent adversarial unlearning: the perturbation, and the gradient under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.errors import ModelError, RecipeError
from delible.lm.forward import Batch, Forward, collate
from delible.lm.hooks import steer
from delible.lm.lm import LM
from delible.methods.harden.lau import LAU, ball, lengths
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.passes import Passes, split
from delible.train.perturbation import answer_sum
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.rows import make_rows, refusal_rows
from delible.train.step import Group, make_step

FORGET = [QA(question=f"Who is {name}?", answer=f"A {job}.") for name, job in
          (("Ada", "baker"), ("Ben", "pilot"), ("Cy", "clown"), ("Di", "tall judge"))]  # fmt: skip
RETAIN = [QA(question="What is snow?", answer="White."), QA(question="And coal?", answer="Black.")]


def make_lm(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed=seed), tiny_tokenizer(), precision="float32")


def make_passes(
    lm: LM, objective: Any = "npo", *, pieces: int = 1, step: int = 0, seed: int = 0
) -> Passes:
    lm.model.requires_grad_(True)
    goal = build("objective", objective)
    every = {"forget": make_rows(lm.template, FORGET), "refusal": refusal_rows(
        lm.template, FORGET, ["I do not know that."], torch.Generator().manual_seed(0)
    )}  # fmt: skip
    rows: dict[str, Sequence[Row]] = {role: every[role] for role in goal.roles}
    reference = Reference()
    for part in rows.values():
        if goal.reference_kinds(lm):
            reference.prepare(make_lm(seed=5), part, goal.reference_kinds(lm))
    retain = make_rows(lm.template, RETAIN)
    weights = [1.0, 0.5, 2.0, 0.5]
    return Passes(
        lm=lm,
        forward=Forward(lm),
        objective=goal,
        keep_loss=build("keep", "nll"),
        reads={role: goal.reads(lm) for role in goal.roles} | {"retain": ("answers",)},
        reference=reference,
        micro_batches=split(rows, retain, weights, [1.0, 1.0], 100_000, pieces),
        parameters=list(lm.model.parameters()),
        weights=(1.0, 1.0),
        forget_units=sum(row.units(goal.unit) for row in rows[goal.roles[0]]),
        retain_units=sum(row.units("answer_token") for row in retain),
        seed=seed,
        step=step,
    )


def gradient(passes: Passes) -> Tensor:
    found = [
        torch.zeros_like(value).flatten() if value.grad is None else value.grad.flatten()
        for value in passes.parameters
    ]
    return torch.cat(found).clone()


def hardened(passes: Passes, **options: Any) -> Tensor:
    passes.clear()
    build("harden", {"name": "lau", **options}).forget(passes)
    return gradient(passes)


def group_of(passes: Passes, count: int = 4) -> Group:
    rows = [row for micro in passes.micro_batches for row in micro.forget["forget"]][:count]
    step = make_step(passes.lm, passes.forward, {"forget": rows}, passes.reads, passes.reference)
    return step.forget


def attacked_nll(passes: Passes, group: Group, delta: Tensor | None, lau: LAU) -> Tensor:
    """-log p of each row's answer with a perturbation, rows one by one and without padding."""
    found = []
    for place, row in enumerate(group.rows):
        batch = collate([row.encoded], 0, "cpu")
        mine = torch.zeros(1) if delta is None else delta[place, : len(row.encoded.ids)]
        layer = passes.lm.anatomy.layer_at(lau.depth)
        path = passes.lm.anatomy.block_path(layer)

        def add(states: Tensor, mine: Tensor = mine) -> Tensor:
            return states + mine

        with torch.no_grad(), steer(passes.lm.core, path, add, "input"):
            found.append(-answer_sum(passes, batch))
    return torch.stack(found)


# ---- against a derivation in float64


class ByHand:
    """AdvNPO on a Llama's embeddings, row by row, in plain PyTorch."""

    def __init__(self, lm: LM) -> None:
        self.model: Any = lm.copy().model.double().requires_grad_(True)

    def nll(self, row: Row, embedded: Tensor) -> Tensor:
        ids = torch.tensor(row.encoded.ids)
        logits = self.model(inputs_embeds=embedded[None]).logits[0, row.encoded.start - 1 : -1]
        right = logits.gather(1, ids[row.encoded.start :, None])[:, 0]
        total: Tensor = (logits.logsumexp(dim=1) - right).sum()
        return total

    def delta(self, row: Row, epsilon: float, steps: int, token: bool, neuron: bool) -> Tensor:
        table = self.model.get_input_embeddings().weight.detach()
        h = table[list(row.encoded.ids)]
        norms = h.pow(2).sum(1).sqrt()
        middle = norms.sort().values[(len(norms) - 1) // 2]
        radius = epsilon * middle * (1 if token else len(norms) ** 0.5)
        scale = torch.ones(h.shape[1], dtype=torch.float64)
        if neuron:
            scale = ((h - h.mean(0)).pow(2).mean(0)).sqrt()
            scale = scale / scale.mean()
        u = torch.zeros_like(h)
        for _ in range(steps):
            u = u.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(self.nll(row, h + u * scale), u)
            with torch.no_grad():
                if token:
                    g = g / (g.pow(2).sum(1, keepdim=True).sqrt() + 1e-6)
                else:
                    g = g / (g.pow(2).sum().sqrt() + 1e-6)
                u = u - radius / steps * g
                size = u.pow(2).sum(1, keepdim=True).sqrt() if token else u.pow(2).sum().sqrt()
                u = torch.where(size > radius, u * radius / size, u)
                u = ((h + u * scale).clamp(h.min(), h.max()) - h) / scale
        return (u * scale).detach()

    def gradient(self, passes: Passes, beta: float, deltas: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for micro in passes.micro_batches:
            for row, weight in zip(micro.forget["forget"], micro.forget_weights, strict=True):
                embedded = self.model.get_input_embeddings()(torch.tensor(row.encoded.ids))
                logprob = -self.nll(row, embedded + deltas[row.key])
                start = passes.reference.get("logprobs", row.key).double().sum()
                loss = 2 / beta * torch.log1p(torch.exp(beta * (logprob - start)))
                total = total + weight * loss / passes.forget_units
        parts = torch.autograd.grad(total, list(self.model.parameters()))
        return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(("norm", "neuron"), [("row", False), ("token", False), ("row", True)])
def test_the_gradient_is_that_of_a_float64_derivation(norm: str, neuron: bool, pieces: int) -> None:
    lm = make_lm()
    passes = make_passes(lm, {"name": "npo", "beta": 0.1}, pieces=pieces)
    options = {"depth": 0, "epsilon": 0.3, "inner_steps": 3, "random_start": False, "norm": norm,
               "neuron_scaling": neuron}  # fmt: skip
    by_hand = ByHand(lm)
    rows = [row for micro in passes.micro_batches for row in micro.forget["forget"]]
    deltas = {row.key: by_hand.delta(row, 0.3, 3, norm == "token", neuron) for row in rows}
    # the perturbation itself
    lau = build("harden", {"name": "lau", **options})
    group = group_of(passes)
    found = lau.perturbation(passes, group)
    for place, row in enumerate(group.rows):
        wanted = deltas[row.key]
        mine = found[place, : len(wanted)].double()
        assert float((mine - wanted).norm()) < 1e-3 * float(wanted.norm())
        assert not found[place, len(wanted) :].any()
    # and the gradient under it
    expected = by_hand.gradient(passes, 0.1, deltas)
    nothing = {row.key: torch.zeros_like(value) for row in rows for value in [deltas[row.key]]}
    plain = by_hand.gradient(passes, 0.1, nothing)
    mine = hardened(passes, **options).double()
    assert float((mine - expected).norm()) < 1e-3 * float(expected.norm())
    assert float((plain - expected).norm()) > 3e-2 * float(expected.norm())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_the_hook_is_an_edit_of_what_enters_the_block(family: str, depth: float) -> None:
    lm = make_lm(family)
    anatomy = lm.anatomy
    layer = anatomy.layer_at(depth)
    ids = torch.arange(12).reshape(2, 6) * 11 % 200
    delta = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1)) * 0.5
    block = anatomy.block(lm.core, layer)
    original = block.forward

    def edited(hidden: Tensor, *more: Any, **named: Any) -> Any:
        return original(hidden + delta, *more, **named)

    with torch.no_grad():
        with steer(lm.core, anatomy.block_path(layer), lambda states: states + delta, "input"):
            found = lm.core(input_ids=ids).logits
        block.forward = edited
        expected = lm.core(input_ids=ids).logits
        block.forward = original
        plain = lm.core(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, plain, atol=1e-3)


# ---- the search


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("depth", [0.0, 0.5])
def test_the_answers_become_likelier_within_the_ball(family: str, depth: float) -> None:
    lm = make_lm(family)
    lau = LAU(depth=depth, epsilon=0.2, random_start=True)
    lower = 0
    for step in range(3):
        passes = make_passes(lm, "gradient_ascent", step=step)
        group = group_of(passes)
        delta = lau.perturbation(passes, group)
        before = attacked_nll(passes, group, None, lau)
        after = attacked_nll(passes, group, delta, lau)
        lower += int((after < before).sum())
    assert lower == 12  # rows
    # the last one's place
    states = {}
    path = lm.anatomy.block_path(lm.anatomy.layer_at(depth))
    batch = group.batch
    whole = Batch(batch.ids, batch.lengths, batch.starts, 0)

    def look(value: Tensor) -> Tensor:
        states["h"] = value.detach()
        return value

    with torch.no_grad(), steer(lm.core, path, look, "input"):
        answer_sum(passes, whole)
    for place, row in enumerate(group.rows):
        h = states["h"][place, : len(row.encoded.ids)]
        mine = delta[place, : len(h)]
        radius = 0.2 * float(h.norm(dim=1).median()) * len(h) ** 0.5
        assert float(mine.norm()) <= radius * (1 + 1e-5)
        assert float(mine.norm()) > 0.2 * radius
        assert float((h + mine).max()) <= float(h.max()) + 1e-5
        assert float((h + mine).min()) >= float(h.min()) - 1e-5


def test_the_search_leaves_no_trace() -> None:
    lm = make_lm()
    passes = make_passes(lm)
    for value in passes.parameters:
        value.grad = torch.full_like(value, 3.0)
    weights = [value.detach().clone() for value in passes.parameters]
    delta = LAU().perturbation(passes, group_of(passes))
    assert not delta.requires_grad
    assert delta.grad_fn is None
    assert all(bool((value.grad == 3.0).all()) for value in passes.parameters)  # type: ignore[union-attr]
    assert all(map(torch.equal, weights, passes.parameters))
    assert not lm.core.get_submodule(lm.anatomy.block_path(0))._forward_pre_hooks


def test_a_perturbation_depends_on_its_row_step_and_seed_only() -> None:
    lm = make_lm()
    lau = LAU(epsilon=0.3, inner_steps=2)
    passes = make_passes(lm)
    together = lau.perturbation(passes, group_of(passes))
    alone = lau.perturbation(passes, group_of(passes, 1))
    width = alone.shape[1]
    assert torch.allclose(together[:1, :width], alone, atol=1e-4)
    assert torch.equal(together, lau.perturbation(passes, group_of(passes)))
    for other in (make_passes(lm, step=1), make_passes(lm, seed=1)):
        assert not torch.allclose(together, lau.perturbation(other, group_of(other)), atol=1e-2)


def test_a_random_start_is_shorter_than_the_radius_and_takes_any_share_of_it() -> None:
    lm = make_lm()
    lau = LAU(radius="absolute", epsilon=0.5, inner_steps=0)
    shares = []
    for step in range(8):
        passes = make_passes(lm, step=step)
        shares += (lengths(lau.perturbation(passes, group_of(passes)), "row") / 0.5).tolist()
    flat = torch.tensor(shares).flatten()
    assert float(flat.max()) <= 1
    assert float(flat.max()) > 0.7
    assert float(flat.min()) < 0.3
    assert 0.3 < float(flat.mean()) < 0.7


def test_the_ball_shortens_clips_and_scales() -> None:
    states = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [90.0, 90.0]]])
    real = torch.tensor([[True, True, False]])

    def make(**options: Any) -> Any:
        return ball(states, real, 0.5, **{
            "relative": False, "norm": "row", "neuron_scaling": False, **options
        })  # fmt: skip

    pushed = torch.tensor([[[-3.0, 0.0], [0.0, 4.0], [7.0, 7.0]]])
    assert torch.allclose(
        make().project(pushed), torch.tensor([[[-0.3, 0.0], [0.0, 0.4], [0.0, 0.0]]])
    )
    token = make(norm="token").project(pushed)
    assert torch.allclose(token, torch.tensor([[[-0.5, 0.0], [0.0, 0.5], [0.0, 0.0]]]))
    # lo = 0, hi = 4: neither above nor below
    out = torch.tensor([[[0.2, 0.3], [-0.2, 0.0], [0.0, 0.0]]])
    assert torch.allclose(make().project(out), torch.tensor([[[0.2, 0.0], [0.0, 0.0], [0.0, 0.0]]]))
    # the lengths are 5 and 2, padding apart; a lower median
    assert float(make(relative=True).radius) == pytest.approx(0.5 * 2 * 2**0.5)
    assert float(make(relative=True, norm="token").radius) == pytest.approx(0.5 * 2)
    assert float(make().radius) == 0.5
    spreads = torch.tensor([1.5, 1.0])  # population deviations of (3, 0) and (4, 2)
    assert torch.allclose(make(neuron_scaling=True).scale[0, 0], spreads / 1.25)


def test_a_neuron_without_spread_is_left_alone() -> None:
    states = torch.tensor([[[1.0, 5.0], [3.0, 5.0]]])
    space = ball(
        states, torch.ones(1, 2, dtype=torch.bool), 1.0, relative=False, norm="row",
        neuron_scaling=True,
    )  # fmt: skip
    moved = space.project(torch.randn(1, 2, 2)) * space.scale
    assert moved.isfinite().all()
    assert not moved[..., 1].any()


# ---- the host


@pytest.mark.parametrize("objective", ["npo", "gradient_ascent", "dpo", "simnpo", "idk"])
@pytest.mark.parametrize(
    "options", [{"epsilon": 0.0}, {"inner_steps": 0, "random_start": False}, {"epsilon": 1e-9}]
)
def test_nothing_to_perturb_is_the_host(objective: str, options: dict[str, Any]) -> None:
    lm = make_lm()
    host, mine = make_passes(lm, objective), make_passes(lm, objective)
    host.forget()
    expected = gradient(host)
    found = hardened(mine, **options)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    assert mine.totals.forget == pytest.approx(host.totals.forget, rel=1e-5)
    assert lm.shares_prefix


@pytest.mark.parametrize("objective", ["npo", "gradient_ascent", "dpo", "simnpo", "rmu", "idk"])
def test_any_objective_is_taken_under_the_perturbation(objective: str) -> None:
    lm = make_lm()
    name: Any = {"name": "rmu", "depth": 0.5} if objective == "rmu" else objective
    host = make_passes(lm, name)
    host.forget()
    plain = gradient(host)
    options = {"depth": 0, "epsilon": 0.3, "inner_steps": 2}
    found = hardened(make_passes(lm, name), **options)
    assert float((found - plain).norm()) > 1e-2 * float(plain.norm())
    split_up = hardened(make_passes(lm, name, pieces=4), **options)
    assert torch.allclose(found, split_up, rtol=1e-2, atol=1e-3 * float(found.abs().max()))


def test_of_a_pair_only_the_forget_rows_are_perturbed() -> None:
    lm = make_lm()
    first = lm.core.get_submodule(f"{lm.anatomy.block_path(0)}.input_layernorm")
    seen: list[Tensor] = []
    handle = first.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].detach())
    )
    hardened(make_passes(lm, "dpo"), depth=0, epsilon=0.5, inner_steps=1)
    lm.shares_prefix = False
    make_passes(lm, "dpo").forget()
    handle.remove()
    perturbed, plain = seen[-2:]
    moved = (perturbed - plain).abs().amax(dim=(1, 2)) > 1e-3
    assert moved.tolist() == [True] * 4 + [False] * 4


def test_refusals_are_attacked_the_other_way() -> None:
    lm = make_lm()
    passes = make_passes(lm, "idk")
    step = make_step(
        lm, passes.forward, passes.micro_batches[0].forget, passes.reads, passes.reference
    )
    lau = LAU(depth=0, epsilon=0.3, random_start=False)
    delta = lau.perturbation(passes, step.groups["refusal"])
    before = attacked_nll(passes, step.groups["refusal"], None, lau)
    after = attacked_nll(passes, step.groups["refusal"], delta, lau)
    assert bool((after > before).all())


@pytest.mark.parametrize("target", ["query", "key", "value"])
def test_a_projection_can_be_perturbed(target: str) -> None:
    lm = make_lm()
    residual = hardened(make_passes(lm), epsilon=0.3, inner_steps=1)
    found = hardened(make_passes(lm), epsilon=0.3, inner_steps=1, target=target)
    assert found.isfinite().all()
    assert not torch.allclose(found, residual, atol=1e-3 * float(residual.abs().max()))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ModelError, match="three matrices"):
        hardened(make_passes(make_lm("gpt2")), target="key")
    with pytest.raises(RecipeError, match="block 2, and the forget loss reads block 1"):
        hardened(make_passes(make_lm(), {"name": "rmu", "depth": 0.5}), depth=1.0)
    lm = make_lm()
    assert lm.shares_prefix
    with pytest.raises(RecipeError):
        build("harden", {"name": "lau", "epsilon": -1})


def test_earlier_gradients_are_added_to() -> None:
    lm = make_lm()
    alone = hardened(make_passes(lm))
    passes = make_passes(lm)
    passes.clear()
    passes.keep()
    kept = gradient(passes)
    LAU().forget(passes)
    assert torch.allclose(gradient(passes), alone + kept, rtol=1e-4, atol=1e-6)


# ---- runs


@pytest.mark.parametrize("name", ["lau_npo", "lau_npo_kl", "lau_ga", "lau_rmu"])
def test_recipes_name_their_parts(name: str) -> None:
    recipe = Recipe.named(name)
    assert isinstance(recipe.harden, LAU)
    assert recipe.keep.card.name == {"lau_npo_kl": "kl", "lau_rmu": "hidden_mse"}.get(name, "nll")
    host = {"lau_ga": "gradient_ascent", "lau_rmu": "rmu"}.get(name, "npo")
    assert recipe.objective.card.name == host
    if name == "lau_rmu":  # it enters at or before the block that is read, in models of any depth
        steered = recipe.objective.spec()["depth"]
        assert recipe.harden.depth < steered
    if name == "lau_ga":
        assert recipe.training.stop_at_forget_share is not None


def test_the_trained_model_holds_better_under_the_attack_than_its_host() -> None:
    start = make_lm()
    learning = {"epochs": 10, "batch_size": 4, "learning_rate": 1e-2, "precision": "float32"}
    Trainer(start, Recipe.named("finetune").changed({}, learning), {"forget": FORGET}).train()
    lau = LAU(depth=0.5, epsilon=0.15)
    ends: dict[str, tuple[float, float]] = {}
    for name in ("none", "lau"):
        lm = start.copy()
        harden = {"name": name} if name == "none" else {**lau.spec(), "inner_steps": 3}
        recipe = Recipe.from_mapping(
            {
                "objective": "npo", "keep": "nll", "harden": harden,
                "training": {"epochs": 25, "batch_size": 4, "learning_rate": 3e-3,
                             "precision": "float32"},
            }
        )  # fmt: skip
        Trainer(lm, recipe, {"forget": FORGET, "retain": RETAIN}).train()
        passes = make_passes(lm, "gradient_ascent", seed=9)
        group = group_of(passes)
        delta = lau.perturbation(passes, group)
        clean, attacked = (attacked_nll(passes, group, one, lau).mean() for one in (None, delta))
        ends[name] = float(clean), float(attacked)
    assert ends["none"][1] < 0.9 * ends["none"][0]  # there is something to hold against
    assert ends["lau"][1] > 1.1 * ends["none"][1]

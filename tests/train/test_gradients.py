"""The gradient service against float64 derivations, one row and one backward pass at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from delible.component import build
from delible.errors import ModelError, RecipeError
from delible.lm.lm import LM
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.activations import input_norms, mean_states
from delible.train.gradient_space import Space, linear_layers
from delible.train.gradients import Gradients
from delible.train.randomness import generator
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.row_losses import ObjectiveLoss
from delible.train.rows import make_rows
from delible.train.vectors import SetAside, conjugate_gradient

FAMILIES = ("llama", "gpt2")
SPACES = [Space("layers", (-1,)), Space("layers", (0, 1)), Space("head"), Space("lora", rank=4)]
RECORDS = [
    QA(question=question, answer=answer)
    for question, answer in (
        ("Where was Ada born?", "In Norrby."), ("Who wrote Umber?", "Ben Orr did."), ("?", "!"),
        ("Name a river.", "The Casta, of course."),
    )
]  # fmt: skip


def make_lm(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed), tiny_tokenizer(), precision="float32")


def make(family: str = "llama") -> tuple[LM, Gradients, list[Row]]:
    lm = make_lm(family)
    return lm, Gradients(lm), make_rows(lm.template, RECORDS)


def row_loss(model: Any, row: Row) -> Tensor:
    ids = torch.tensor(row.encoded.ids)[None]
    logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(dim=1)
    return -logprobs.gather(1, ids[0, 1:, None])[row.encoded.start - 1 :].mean()


def by_hand(
    lm: LM, rows: Sequence[Row], loss: Callable[[Any, Row], Tensor] = row_loss
) -> list[dict[str, Tensor]]:
    """The gradient of each row by parameter name, float64."""
    twin = lm.copy().model.double().requires_grad_(True)
    parameters = dict(twin.named_parameters())
    found = []
    for row in rows:
        twin.zero_grad()
        loss(twin, row).backward()
        found.append(
            {
                name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
                for name, value in parameters.items()
            }
        )
    return found


def in_space(lm: LM, gradients: list[dict[str, Tensor]], space: Space) -> list[dict[str, Tensor]]:
    """The same gradients in other coordinates, by what the space says."""
    if space.where == "lora":
        names = {id(value): name for name, value in lm.model.named_parameters()}
        seen = []
        for gradient in gradients:
            mine = {}
            for path, module in linear_layers(lm):
                full = gradient[names[id(module.weight)]]
                full = full.T if isinstance(module, Conv1D) else full
                random = generator(space.seed, "gradients.lora", path)
                drawn = torch.randn(space.rank, full.shape[1], generator=random)
                mine[path.replace(".", "/")] = full @ (drawn.double() / space.rank**0.5).T
            seen.append(mine)
        return seen
    if space.where == "head":
        wanted = {lm.anatomy.head, str(lm.anatomy.norm)}
    else:
        wanted = {lm.anatomy.block_path(layer) for layer in space.layers}
    own = {id(v) for path in wanted for v in lm.core.get_submodule(path).parameters()}
    kept = {name for name, value in lm.model.named_parameters() if id(value) in own}
    return [{name: gradient[name] for name in kept} for gradient in gradients]


def dot(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return sum(float((value.double() * right[name].double()).sum()) for name, value in left.items())


# ---- sums, norms and products


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_is_that_of_single_backward_passes(family: str) -> None:
    lm, gradients, rows = make(family)
    hand = by_hand(lm, rows)
    for weights in (None, [0.5, 2.0, 0.0, 1.0]):
        found = gradients.total(rows, weights)
        for name, value in found.items():
            each = [w * one[name] for w, one in zip(weights or [1.0] * 4, hand, strict=True)]
            expected = torch.stack(each).sum(dim=0)
            assert value.dtype == torch.float32
            assert torch.allclose(value.double(), expected, atol=2e-5, rtol=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("space", [Space(), *SPACES], ids=lambda space: space.where)
def test_norms_and_products_in_every_space(family: str, space: Space) -> None:
    lm, gradients, rows = make(family)
    hand = in_space(lm, by_hand(lm, rows), space) if space.where != "all" else by_hand(lm, rows)
    looked_at = gradients.within(space)
    norms = torch.tensor([dot(one, one) ** 0.5 for one in hand])
    assert torch.allclose(looked_at.norms(rows), norms.double(), rtol=1e-4)

    direction = looked_at.total(rows[:2])
    exact = torch.tensor([dot(one, direction) for one in hand], dtype=torch.float64)
    size = float(exact.abs().max())
    forward = looked_at.products(rows, direction, how="jvp")
    assert torch.allclose(forward, exact, rtol=1e-4, atol=1e-5 * size)
    differences = looked_at.products(rows, direction, step=3e-3)
    assert torch.allclose(differences, exact, rtol=0.02, atol=2e-3 * size)
    assert bool((exact != 0).all())


def test_forward_mode_reaches_experts() -> None:
    lm, gradients, rows = make("mixtral")
    before = lm.core.config._experts_implementation
    direction = gradients.total(rows[:1])
    exact = torch.tensor([dot(gradients.total([row]), direction) for row in rows]).double()
    forward = gradients.products(rows, direction, how="jvp")
    assert torch.allclose(forward, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))
    assert lm.core.config._experts_implementation == before


def test_low_rank_factors_keep_inner_products_on_average() -> None:
    lm, _, rows = make()
    hand = by_hand(lm, rows[:2])
    blocks = {id(module.weight) for _, module in linear_layers(lm)}
    names = {name for name, value in lm.model.named_parameters() if id(value) in blocks}
    exact = sum(float((hand[0][name] * hand[1][name]).sum()) for name in names)
    found = []
    for seed in range(40):
        one, two = in_space(lm, hand, Space("lora", rank=16, seed=seed))
        found.append(dot(one, two))
    spread = torch.tensor(found).std().item() / len(found) ** 0.5
    assert abs(sum(found) / len(found) - exact) < 4 * spread
    assert spread < 0.2 * abs(exact)


def test_layers_that_are_not_there_or_none_are_refused() -> None:
    _lm, gradients, rows = make()
    with pytest.raises(ModelError, match="no layer 7"):
        gradients.within(Space("layers", (7,))).norms(rows)
    with pytest.raises(RecipeError, match="no layers"):
        gradients.within(Space("layers", ())).norms(rows)


def test_a_row_without_answer_has_loss_and_gradient_zero() -> None:
    _lm, gradients, rows = make()
    ids = rows[0].encoded.ids
    empty = replace(rows[0], encoded=replace(rows[0].encoded, start=len(ids)))
    assert gradients.norms([rows[1], empty]).tolist()[1] == 0.0
    assert gradients.losses([empty, rows[1]]).tolist()[0] == 0.0
    assert float(gradients.losses([empty, rows[1]])[1]) > 0


def test_losses_keep_the_order_and_repeated_rows() -> None:
    lm, gradients, rows = make()
    hand = [float(row_loss(lm.model, row)) for row in rows]
    asked = [rows[3], rows[0], rows[3], rows[2]]
    expected = [hand[3], hand[0], hand[3], hand[2]]
    assert gradients.losses(asked).tolist() == pytest.approx(expected, rel=1e-5)
    small = Gradients(lm, budget=1)
    assert small.losses(asked).tolist() == pytest.approx(expected, rel=1e-5)


# ---- another loss


def test_products_with_a_hosts_own_loss() -> None:
    lm, gradients, rows = make()
    objective = build("objective", {"name": "npo", "beta": 0.3})
    host = ObjectiveLoss.at_start(objective, {"forget": rows}, lm)
    start = [float(row_loss(lm.model, row)) for row in rows]

    def npo(model: Any, row: Row) -> Tensor:
        ratio = (start[row.index] - row_loss(model, row)) * row.encoded.answer_tokens
        return (2 / 0.3) * torch.nn.functional.softplus(0.3 * ratio)

    hand = by_hand(lm, rows, npo)
    own = gradients.of(host)
    assert own.losses(rows).tolist() == pytest.approx([(2 / 0.3) * 0.6931472] * 4, rel=1e-4)
    norms = torch.tensor([dot(one, one) ** 0.5 for one in hand]).double()
    assert torch.allclose(own.norms(rows), norms, rtol=1e-3)
    direction = gradients.total(rows[:1])
    exact = torch.tensor([dot(one, direction) for one in hand]).double()
    assert torch.allclose(own.products(rows, direction, how="jvp"), exact, rtol=1e-3)


def test_a_loss_on_hidden_states_and_one_with_partners() -> None:
    lm, gradients, rows = make()
    rmu = build("objective", {"name": "rmu", "depth": 0.5})
    reference = Reference()
    reference.prepare(lm, rows, rmu.reference_kinds(lm))
    norms = gradients.of(ObjectiveLoss(rmu, {"forget": rows}, reference)).norms(rows)
    assert bool((norms > 0).all())

    refused = make_rows(lm.template, [r.model_copy(update={"answer": "No."}) for r in RECORDS])
    idk = build("objective", "idk")
    found = gradients.of(ObjectiveLoss.at_start(idk, {"forget": rows, "refusal": refused}, lm))
    part = found.losses([rows[2], rows[0]])  # partners follow the row's index
    whole = found.losses(rows)
    assert torch.allclose(part, whole[[2, 0]], rtol=1e-5)


# ---- precision and tidiness


def test_half_precision_weights_are_summed_in_single_precision() -> None:
    lm, _, rows = make()
    lm.model.to(torch.bfloat16)
    gradients = Gradients(lm)
    name = lm.anatomy.parameter_names(0, "mlp_out")[0]
    once = Gradients(lm, budget=1).total(rows[:1])[name]
    often = Gradients(lm, budget=1).total(rows[:1] * 40)[name]  # one batch per row
    assert once.dtype == often.dtype == torch.float32
    assert torch.allclose(often, 40 * once, rtol=1e-3)
    with pytest.raises(RecipeError, match="jvp"):
        gradients.products(rows, gradients.total(rows[:1]))
    assert bool(gradients.products(rows, gradients.total(rows[:1]), how="jvp").isfinite().all())


def test_differences_do_not_drown_in_bf16_computation() -> None:
    lm, gradients, rows = make()
    direction = gradients.total(rows[:2])
    exact = gradients.products(rows, direction)
    lm.precision = "bfloat16"
    assert torch.equal(gradients.products(rows, direction), exact)
    assert lm.precision == "bfloat16"


@pytest.mark.parametrize("consume", [False, True])
def test_the_model_is_left_as_it_was(consume: bool) -> None:
    lm, gradients, rows = make()
    frozen = next(iter(lm.model.parameters()))
    frozen.requires_grad_(False)
    lm.model.train()
    before = {name: value.detach().clone() for name, value in lm.model.named_parameters()}
    wanted = [value.requires_grad for value in lm.model.parameters()]
    direction = gradients.total(rows)
    kept = {name: value.clone() for name, value in direction.items()}
    first = gradients.products(rows, kept, consume=consume)
    assert torch.equal(first, gradients.products(rows, direction))
    if not consume:
        assert all(torch.equal(kept[name], value) for name, value in direction.items())
    gradients.norms(rows)
    gradients.hessian_product(rows[:1], direction)
    gradients.within(Space("lora")).norms(rows)
    assert lm.model.training
    assert [value.requires_grad for value in lm.model.parameters()] == wanted
    for name, value in lm.model.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None
    assert not any(module._forward_hooks for module in lm.model.modules())


@pytest.mark.parametrize("consume", [False, True])
def test_weights_come_back_when_something_breaks_in_between(consume: bool) -> None:
    lm, gradients, rows = make()
    before = [value.detach().clone() for value in lm.model.parameters()]
    direction = gradients.total(rows)

    def broken(lm: LM, rows: Sequence[Row]) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradients.of(broken).products(rows, direction, consume=consume)
    assert all(map(torch.equal, before, lm.model.parameters()))


def test_a_direction_of_zeros_has_no_product() -> None:
    _lm, gradients, rows = make()
    nothing = {name: torch.zeros_like(value) for name, value in gradients.parameters().items()}
    assert gradients.products(rows, nothing).tolist() == [0.0] * 4


# ---- curvature


def test_hessian_products_are_those_of_two_backward_passes() -> None:
    _lm, gradients, rows = make()
    space = gradients.within(Space("layers", (0,)))
    direction = space.total(rows[2:])
    weights = [0.5, 1.5]
    found = space.hessian_product(rows[:2], direction, step=3e-3, weights=weights)

    twin = make_lm()
    twin.core.set_attn_implementation("eager")
    model = twin.model.double().requires_grad_(True)
    names = list(direction)
    parameters = [model.get_parameter(name) for name in names]
    loss = weights[0] * row_loss(model, rows[0]) + weights[1] * row_loss(model, rows[1])
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    along = [(g * direction[n].double()).sum() for n, g in zip(names, first, strict=True)]
    exact = torch.autograd.grad(torch.stack(along).sum(), parameters)
    error = sum(float((found[n] - e).pow(2).sum()) for n, e in zip(names, exact, strict=True))
    size = sum(float(e.pow(2).sum()) for e in exact)
    assert error**0.5 < 0.02 * size**0.5


def test_conjugate_gradients_solve_a_damped_system() -> None:
    random = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=random, dtype=torch.float64)
    matrix, right = root @ root.T, torch.randn(12, generator=random, dtype=torch.float64)

    def product(vector: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = matrix @ torch.cat([vector["a"], vector["b"]])
        return {"a": flat[:5], "b": flat[5:]}

    both = {"a": right[:5], "b": right[5:]}
    found = conjugate_gradient(product, both, 60, damping=0.5, tolerance=1e-12)
    exact = torch.linalg.solve(matrix + 0.5 * torch.eye(12).double(), right)
    assert torch.allclose(torch.cat([found["a"], found["b"]]), exact, rtol=1e-6)
    assert torch.equal(both["a"], right[:5])

    def saddle(vector: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": vector["a"] * torch.tensor([-1.0, -2.0])}

    stopped = conjugate_gradient(saddle, {"a": torch.ones(2)}, 10)
    assert stopped["a"].tolist() == [0.0, 0.0]


# ---- moving a little, and coming back


def test_borrowed_weights_come_back_and_descent_lowers_the_loss() -> None:
    lm, gradients, rows = make()
    before = [value.detach().clone() for value in lm.model.parameters()]
    start = gradients.losses(rows)
    seen = []
    for _ in range(2):
        with gradients.borrowed():
            for epoch in range(3):
                gradients.descend(rows, 1e-3, generator(0, "t", epoch), batch_size=2)
            seen.append(gradients.losses(rows))
        assert all(map(torch.equal, before, lm.model.parameters()))
    assert torch.equal(seen[0], seen[1])
    assert float(seen[0].mean()) < float(start.mean()) - 0.1


def test_descent_heeds_weights_and_anchors() -> None:
    _lm, gradients, rows = make()
    ends = {}
    ascent = gradients.of(lambda lm, rows: -gradients.loss(lm, rows))
    settings: dict[str, dict[str, Any]] = {
        "one": {"weights": [2.0, 0.0]}, "other": {"weights": [0.0, 2.0]},
        "held": {"anchors": rows[2:], "anchor_weight": 5.0}, "free": {},
    }  # fmt: skip
    for name, options in settings.items():
        with gradients.borrowed():
            for epoch in range(4):
                ascent.descend(rows[:2], 1e-3, generator(0, "t", epoch), **options)
            ends[name] = gradients.losses(rows)
    assert ends["one"][0] > ends["other"][0]
    assert ends["one"][1] < ends["other"][1]
    assert ends["held"][2:].mean() < ends["free"][2:].mean()


def test_what_is_set_aside_comes_back_once() -> None:
    values = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.randn(2).double()}
    expected = {name: value.clone() for name, value in values.items()}
    expected["b"] = expected["b"].float()
    aside = SetAside(values)
    assert values == {}
    for name, value in expected.items():
        assert torch.equal(aside.pop(name, torch.device("cpu")), value)
    with pytest.raises(KeyError):
        aside.pop("a", torch.device("cpu"))


# ---- states


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_mean_states_do_not_see_padding(family: str) -> None:
    lm, _, rows = make(family)
    found = mean_states(lm, rows)
    for place, row in enumerate(rows):
        ids = torch.tensor([row.encoded.ids])
        backbone = lm.core.get_submodule(lm.anatomy.backbone)
        alone = backbone(input_ids=ids).last_hidden_state[0].double().mean(dim=0)
        assert torch.allclose(found[place], alone.detach(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_input_norms_are_those_of_single_rows(family: str) -> None:
    lm, _, rows = make(family)
    found = input_norms(lm, rows[:2])
    path, module = linear_layers(lm)[-1]
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for row in rows[:2]:
        lm.model(input_ids=torch.tensor([row.encoded.ids]))
    handle.remove()
    expected = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen]).norm(dim=0)
    assert len(found) == len(linear_layers(lm))
    assert torch.allclose(found[f"{path}.weight"], expected, rtol=1e-4)

"""FILA and VILA: importance in float64 by autograd, the factorisation, and the exact start."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from delible.component import build
from delible.context import Context
from delible.errors import DataError, RecipeError
from delible.lm.lm import LM
from delible.lm.outline import outline
from delible.methods.place import vila
from delible.methods.place.fila import FILA, Squares, squares
from delible.methods.place.vila import VILA, Moments, Probes, lifted, measured
from delible.records import QA
from delible.testing.contract.trial import answers
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train import importance, linear_gradients
from delible.train.engine import Trainer
from delible.train.gradient_space import linear_layers
from delible.train.gradients import Gradients
from delible.train.importance import (
    ImportanceStart,
    leading,
    matching,
    plain,
    ratio,
    row_importance,
    weighted_factors,
)
from delible.train.linear_gradients import passes, run_pass
from delible.train.randomness import generator
from delible.train.recipe import Recipe
from delible.train.row import Row
from delible.train.row_losses import answer_loss
from delible.train.rows import make_rows
from delible.train.slots import SlotContext

FORGET = [
    QA(question=f"Where was {name} born?", answer=f"In {town}.", subject=name)
    for name, town in (("Ada Quill", "Norrby"), ("Ben Orr", "Casta"), ("Cy Dale", "Umber-on-Sea"))
]
RETAIN = [
    QA(question=f"What is {thing}?", answer=f"It is {colour}.")
    for thing, colour in (("snow", "white"), ("coal", "black"), ("grass", "green"), ("ice", "blue"))
]
BOTH = ("fila", "vila")


def make_lm(family: str = "llama", **changes: Any) -> LM:
    model = tiny_model(family, num_hidden_layers=2, **changes)
    return LM(model, tiny_tokenizer(), precision="float32")


def make_context(lm: LM, seed: int = 3, retain: Sequence[QA] = RETAIN) -> SlotContext:
    rows = {"forget": make_rows(lm.template, FORGET), "retain": make_rows(lm.template, retain)}
    records = {"forget": FORGET, "retain": retain}
    return SlotContext(lm, rows, records, Gradients(lm), build("objective", "ihl"), None, seed)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=random(seed), dtype=torch.float64)


# ---- importance, against autograd in float64


def summed(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """-log p of all answer tokens, row by row, by the library's own forward."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.tensor([row.encoded.ids])
        logprobs = model(input_ids=ids).logits[0].log_softmax(dim=1)
        for place in range(row.encoded.start, ids.shape[1]):
            total = total - logprobs[place - 1, ids[0, place]]
    return total


def tokens_of(rows: Sequence[Row]) -> int:
    return sum(len(row.encoded.ids) - row.encoded.start for row in rows)


def test_fila_is_the_token_weighted_mean_of_squared_gradients() -> None:
    lm = make_lm()
    rows = make_rows(lm.template, [*FORGET, *RETAIN])
    found = Squares()
    squares(lm, linear_layers(lm), rows, 2, found)
    twin = copy.deepcopy(lm.core).double()
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = twin.get_submodule(path).weight
        total, count = torch.zeros_like(weight), 0
        for batch in ([0, 1], [2, 3], [4, 5], [6]):
            mine = [rows[place] for place in batch]
            tokens = tokens_of(mine)
            (gradient,) = torch.autograd.grad(summed(twin, mine) / tokens, weight)
            total += tokens * gradient**2
            count += tokens
        wanted = total / count
        assert found.tokens == count
        torch.testing.assert_close(
            found.mean(path).double(), wanted, rtol=2e-3, atol=1e-5 * float(wanted.max())
        )


@contextmanager
def with_factors(model: nn.Module, probes: Probes) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """The model with the small random products beside every layer, in float64."""
    factors = {
        path: (first.double().requires_grad_(True), second.double().requires_grad_(True))
        for path, (first, second) in probes.factors.items()
    }

    def hook_of(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            first, second = factors[path]
            return output + probes.scale * given[0] @ first.T @ second.T

        return hook

    with ExitStack() as stack:
        for path in factors:
            handle = model.get_submodule(path).register_forward_hook(hook_of(path))
            stack.callback(handle.remove)
        yield factors


def test_vila_is_the_variance_of_the_gradients_of_both_factors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(linear_gradients.PASS_TOKENS, "cpu", 330)  # several passes
    lm = make_lm()
    layers, rows = linear_layers(lm), make_rows(lm.template, [*FORGET, *RETAIN])
    probes = Probes(layers, 3, 0.05, 1.5, seed=1)
    told: list[tuple[list[list[int]], list[int]]] = []
    own = Probes.next_pass

    def spied(self: Probes, batches: Any, tokens: Any) -> None:
        told.append(([list(batch) for batch in batches], list(tokens)))
        own(self, batches, tokens)

    monkeypatch.setattr(Probes, "next_pass", spied)
    variances, tokens = measured(lm, layers, rows, probes, 2, 2, random())
    together = list(passes(lm, rows, [[place] for place in range(len(rows))]))
    assert 1 < len(together) < len(rows)
    assert len(told) == len(together)
    assert tokens == 2 * tokens_of(rows)
    path = "model.layers.0.mlp.up_proj"
    twin = copy.deepcopy(lm.core).double()
    gradients: list[tuple[int, tuple[Tensor, ...]]] = []
    with with_factors(twin, probes) as factors:
        for places, (batches, _) in zip(together, told, strict=True):
            assert sorted(place for batch in batches for place in batch) == sorted(
                [*range(len(places))] * 2
            )
            for batch in batches:
                mine = [rows[places[one]] for one in batch]
                count = tokens_of(mine)
                found = torch.autograd.grad(summed(twin, mine) / count, factors[path])
                gradients.append((count, found))
    whole = sum(count for count, _ in gradients)
    for half in (0, 1):
        mean = sum(count * one[half] for count, one in gradients) / whole
        wanted = sum(count * (one[half] - mean) ** 2 for count, one in gradients) / whole
        torch.testing.assert_close(
            variances[path][half].double(), wanted, rtol=2e-3, atol=1e-5 * float(wanted.max())
        )


def test_moments_keep_their_digits_and_are_never_negative() -> None:
    values, weights = 1e4 + matrix(40, 5), matrix(40, seed=1).abs() + 0.1
    moments = Moments()
    for at in range(0, 40, 7):
        moments.add(values[at : at + 7].float(), weights[at : at + 7].float())
    given, weigh = values.float().double(), weights.float().double()[:, None]
    mean = (given * weigh).sum(0) / weigh.sum()
    wanted = ((given - mean) ** 2 * weigh).sum(0) / weigh.sum()
    torch.testing.assert_close(moments.variance().double(), wanted, rtol=1e-2, atol=0)
    same = Moments()
    for _ in range(3):
        same.add(torch.full((4, 2), 0.1), torch.tensor([1.0, 2.0, 3.0, 7.0]))
    assert (same.variance() >= 0).all()
    assert float(same.variance().max()) < 1e-12
    with pytest.raises(ValueError, match="no values"):
        Moments().variance()


def test_twice_the_data_is_the_same_importance() -> None:
    values, weights = matrix(6, 5).float(), (matrix(6, seed=1).abs() + 0.1).float()
    once, twice = Moments(), Moments()
    once.add(values, weights)
    twice.add(values, weights)
    twice.add(values, weights)
    torch.testing.assert_close(once.variance(), twice.variance(), rtol=1e-5, atol=0)


def test_the_unit_of_the_loss_does_not_matter() -> None:
    forget, retain = matrix(4, 6).abs(), matrix(4, 6, seed=1).abs()
    for unit in (1e-12, 1e8):
        torch.testing.assert_close(
            ratio(unit * forget, unit * retain, 1e-5), ratio(forget, retain, 1e-5)
        )
    wanted = forget / (retain + 1e-5 * retain.mean())
    torch.testing.assert_close(ratio(forget, retain, 1e-5), wanted)
    assert bool(ratio(forget, torch.zeros_like(retain), 1e-5).isfinite().all())


def test_the_same_rows_on_both_sides_give_a_constant() -> None:
    lm = make_lm()
    place = FILA(importance_epochs=1, importance_batch_size=99, epsilon=1e-12)
    rows = {"forget": make_rows(lm.template, FORGET), "retain": make_rows(lm.template, FORGET)}
    context = SlotContext(lm, rows, {}, Gradients(lm), build("objective", "ihl"), None, 0)
    for _, found in place.importance(context, linear_layers(lm)):
        moving = found[found > 0]
        torch.testing.assert_close(moving, torch.ones_like(moving), rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", BOTH)
def test_rows_that_only_the_forget_task_uses_are_the_most_important(name: str) -> None:
    """Two tasks, of which one reads outputs 0-3 of a layer and the other one the rest."""
    layer = nn.Linear(6, 12, bias=False)
    found = []
    for rows, seed in ((slice(0, 4), 0), (slice(4, 12), 1)):
        taker: Any = Squares() if name == "fila" else Probes([("layer", layer)], 2, 0.5, 2.0, 0)
        inputs = matrix(8, 3, 6, seed=seed).float()
        gradients = torch.zeros(8, 3, 12)
        gradients[..., rows] = matrix(8, 3, 12, seed=seed + 5).float()[..., rows]
        gradients += 1e-3 * matrix(8, 3, 12, seed=seed + 9).float()
        if name == "fila":
            taker.next_pass([[2, 2], [2, 2], [2, 2], [2, 2]])
        else:
            taker.next_pass([[0, 1], [2, 3], [4, 5], [6, 7]], [2] * 8)
        taker.take("layer", inputs, gradients)
        own = taker.mean("layer") if name == "fila" else lifted(*taker.variances()["layer"])
        assert own.shape == (12, 6)
        assert bool((own >= 0).all())
        found.append(own)
    rho = row_importance(ratio(found[0], found[1], 1e-5))
    assert sorted(rho.argsort(descending=True)[:4].tolist()) == [0, 1, 2, 3]
    assert float(rho[:4].min()) > 10 * float(rho[4:].max())


# ---- the factorisation


def test_the_error_is_the_tail_of_the_weighted_matrix() -> None:
    weight, rho, scale = matrix(20, 14), matrix(20, seed=1).abs() + 0.2, 2.0
    first, second = weighted_factors(weight.float(), rho.float(), 5, scale, random())
    rest = rho[:, None] * (weight - scale * second.double() @ first.double())
    tail = np.linalg.svd((rho[:, None] * weight).numpy(), compute_uv=False)[5:]
    assert float(rest.norm()) == pytest.approx(float((tail**2).sum() ** 0.5), rel=1e-4)
    # and plainly weighted rows do worse by that measure: importance is not ignored
    _, other = weighted_factors(weight.float(), torch.ones(20), 5, scale, random())
    apart = (second.double() - other.double()).norm() / other.double().norm()
    assert float(apart) > 0.1


def test_equal_importance_is_the_plain_decomposition() -> None:
    weight, scale = matrix(16, 10), 2.0
    rho = row_importance(torch.full((16, 10), 0.3))
    first, second = weighted_factors(weight.float(), rho, 4, scale, random())
    left, sizes, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    wanted = torch.from_numpy(left[:, :4] * sizes[:4] @ right[:4])
    torch.testing.assert_close(scale * (second @ first).double(), wanted, rtol=1e-4, atol=1e-5)
    halves = [float(one.norm()) for one in (first, second)]
    assert halves[0] == pytest.approx(halves[1], rel=1e-5)  # each has the root of the sizes


def test_large_matrices_have_the_same_leading_part(monkeypatch: pytest.MonkeyPatch) -> None:
    one = matrix(90, 60).float()
    exact = leading(one, 6, random())
    monkeypatch.setattr(importance, "EXACT", 16)
    found = leading(one, 6, random())
    torch.testing.assert_close(found[1], exact[1], rtol=1e-3, atol=0)
    again = leading(one, 6, random())
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_rows_of_hardly_any_importance_are_not_blown_up() -> None:
    given = torch.ones(8, 3)
    given[0] = 1e-30
    rho = row_importance(given)
    assert float(rho[0]) == pytest.approx(importance.FLOOR)
    assert float(rho[1]) == pytest.approx(1)
    assert row_importance(torch.zeros(8, 3)).tolist() == [1.0] * 8


def test_a_matrix_narrower_than_the_rank_is_filled_up() -> None:
    first, second = weighted_factors(matrix(1, 9).float(), torch.ones(1), 4, 2.0, random())
    assert first.shape == (4, 9)
    assert second.shape == (1, 4)
    torch.testing.assert_close(2 * second @ first, matrix(1, 9).float(), rtol=1e-4, atol=1e-5)


# ---- the start


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("name", BOTH)
def test_the_model_is_the_same_before_the_first_step(name: str, family: str) -> None:
    depth = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
    lm = LM(tiny_model(family, **depth), tiny_tokenizer(), precision="float32")
    row = torch.tensor([make_rows(lm.template, FORGET)[0].encoded.ids])
    with torch.no_grad():
        before = lm.model(input_ids=row).logits
    place = build("place", {"name": name, "importance_epochs": 1, "importance_batch_size": 2})
    placement = place.apply(make_context(lm))
    with torch.no_grad():
        after = lm.model(input_ids=row).logits
    assert float((before - after).abs().max()) < 1e-4
    # what moves is the best part of a matrix, and not nothing
    path = next(iter(dict(linear_layers(lm.copy()))))
    assert placement.masks is not None
    name_of = {id(value): key for key, value in lm.model.named_parameters()}
    assert {name_of[id(value)] for value in placement.parameters.values()} == set(placement.masks)
    assert path


def test_half_of_the_adapter_moves_and_is_the_weighted_part() -> None:
    lm = make_lm()
    layers = [(path, plain(module)) for path, module in linear_layers(lm)]
    context = make_context(lm)
    place = VILA(rank=3, alpha=6.0, importance_epochs=2)
    importances = dict(place.importance(context, linear_layers(lm)))
    placement = place.apply(context)
    path, weight = layers[4]
    module: Any = lm.core.get_submodule(path)
    down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
    rho = importances[path].double().sum(dim=1).sqrt()
    rho = (rho / rho.median()).clamp(min=importance.FLOOR)
    left, sizes, right = np.linalg.svd((rho[:, None] * weight.double()).numpy())
    best = torch.from_numpy((left[:, :3] * sizes[:3]) @ right[:3]) / rho[:, None]
    moved = module.scaling["default"] * up[:, :3].double() @ down[:3].double()
    torch.testing.assert_close(moved, best, rtol=1e-2, atol=1e-3 * float(best.abs().max()))
    assert module.scaling["default"] == pytest.approx(2.0)
    assert placement.masks is not None
    for key, mask in placement.masks.items():
        half = mask[:3].all() and not mask[3:].any() if "lora_A" in key else None
        other = mask[:, :3].all() and not mask[:, 3:].any() if "lora_B" in key else None
        assert half or other
    torch.testing.assert_close(down[:3], down[3:])
    torch.testing.assert_close(up[:, :3], -up[:, 3:])


@pytest.mark.parametrize(
    ("objective", "seed"), [("ihl", 0), ("npo", 1), ("gradient_ascent", 2), ("idk", 3)]
)
def test_any_objective_trains_it(objective: str, seed: int) -> None:
    lm = make_lm()
    recipe = Recipe.from_mapping({
        "objective": objective, "keep": "nll", "place": {"name": "vila", "importance_epochs": 1},
        "training": {"learning_rate": 1e-3, "batch_size": 3, "epochs": 2, "max_length": 128},
    })  # fmt: skip
    records = {"forget": FORGET, "retain": RETAIN}
    history = Trainer(lm, recipe, records, context=Context(seed=seed)).train().history
    assert len(history) == 2
    assert lm.wears_adapter


def test_seeds_differ_and_are_repeated() -> None:
    def moved(seed: int) -> Tensor:
        lm = make_lm()
        VILA(importance_epochs=1, importance_batch_size=2).apply(make_context(lm, seed))
        module: Any = lm.core.get_submodule("model.layers.0.mlp.up_proj")
        return module.lora_A["default"].weight.detach()  # type: ignore[no-any-return]

    assert torch.equal(moved(0), moved(0))
    assert float((moved(0) - moved(1)).abs().max()) > 1e-3


def test_plain_peft_opens_it_on_the_model_as_it_was(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_lm().save(base)
    lm = LM.load(str(base), precision="float32")
    recipe = Recipe.from_mapping({
        "objective": "ihl", "keep": "nll", "place": {"name": "vila", "importance_epochs": 1},
        "training": {"learning_rate": 1e-2, "batch_size": 3, "epochs": 3, "max_length": 128,
                     "precision": "float32"},
    })  # fmt: skip
    Trainer(lm, recipe, {"forget": FORGET, "retain": RETAIN}).train()
    lm.save(tmp_path / "adapter")
    row = torch.tensor([make_rows(lm.template, FORGET)[0].encoded.ids])
    below = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        untouched = below(input_ids=row).logits
        opened = PeftModel.from_pretrained(below, tmp_path / "adapter").eval()
        here, there = lm.model(input_ids=row).logits, opened(input_ids=row).logits
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
    assert float((there - untouched).abs().max()) > 1e-2
    merged = lm.merged()
    for one, other in zip(answers(merged)[0], answers(lm)[0], strict=True):
        assert np.allclose(one, other, atol=1e-3)


def test_as_released_retain_rows_hardly_count() -> None:
    """Divided by the tokens twice, what is left of I_r is far below 1e-5."""
    forget, retain = matrix(4, 6).abs() * 1e-3, matrix(4, 6, seed=1).abs() * 1e-3
    tokens = (40_000, 50_000)
    released = VILA(compat=True).compared(forget, retain, tokens)
    torch.testing.assert_close(
        released, forget / 40_000 / (retain / 50_000 + 1e-5), rtol=1e-9, atol=0
    )
    nearly = forget / 40_000 / 1e-5
    assert float(((released - nearly) / nearly).abs().max()) < 0.01
    ours = VILA().compared(forget, retain, tokens)
    assert float((ours / ours.mean() - nearly / nearly.mean()).abs().max()) > 0.1


def test_random_adapters_that_disturb_are_made_smaller(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, seen = make_lm(), list[float]()
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=1e-2)
    for _ in range(25):  # a model that has something to lose
        optimizer.zero_grad()
        answer_loss(lm, make_rows(lm.template, FORGET)).mean().backward()
        optimizer.step()
    own = vila.measured

    def spied(lm: LM, layers: Any, rows: Any, probes: Probes, *rest: Any) -> Any:
        tokens = tokens_of(rows)
        seen.append(run_pass(lm, rows, layers, probes, back=False) / tokens)
        seen.append(run_pass(lm, rows, (), probes, back=False) / tokens)
        return own(lm, layers, rows, probes, *rest)

    monkeypatch.setattr(vila, "measured", spied)
    with caplog.at_level(logging.INFO, logger="delible"):
        list(VILA(sigma=3.0, importance_epochs=1).importance(make_context(lm), linear_layers(lm)))
    assert "sigma is lowered" in caplog.text
    assert seen[0] <= seen[1] + 0.11 * max(1.0, seen[1])


def test_retain_rows_come_once_before_any_comes_again() -> None:
    drawn = matching(7, 3, generator(0, "test"))
    assert len(drawn) == 7
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("name", BOTH)
def test_an_adapter_on_an_adapter_is_refused(name: str) -> None:
    lm = make_lm()
    place: ImportanceStart = build("place", {"name": name, "importance_epochs": 1})
    place.apply(make_context(lm))
    with pytest.raises(RecipeError, match="already wears an adapter"):
        place.apply(make_context(lm))


def test_nothing_is_left_behind() -> None:
    """Neither hooks nor flags: the model trains on as it was."""
    lm = make_lm()
    flags = [value.requires_grad for value in lm.model.parameters()]
    identity = lm.fingerprint
    list(VILA(importance_epochs=1).importance(make_context(lm), linear_layers(lm)))
    assert [value.requires_grad for value in lm.model.parameters()] == flags
    assert lm.fingerprint == identity
    assert all(value.grad is None for value in lm.model.parameters())


def test_few_rows_still_vary_and_one_is_refused() -> None:
    lm = make_lm()
    for _, found in VILA(importance_epochs=1).importance(make_context(lm), linear_layers(lm)):
        assert float((found > 0).float().mean()) > 0.9  # more rows than one batch would hold
    with pytest.raises(DataError, match="one retain record has no variance"):
        VILA().apply(make_context(lm, retain=RETAIN[:1]))


@pytest.mark.parametrize("name", BOTH)
def test_without_numbers_it_is_as_large_as_it_will_be(name: str, tmp_path: Path) -> None:
    make_lm().save(tmp_path)
    planned, real = outline(str(tmp_path)), make_lm()
    place = build("place", {"name": name, "rank": 3, "importance_epochs": 1})
    sizes = []
    for lm in (planned, real):
        placement = place.apply(make_context(lm))
        assert placement.masks is not None
        assert placement.masks.keys() == placement.parameters.keys()
        sizes.append({key: value.shape for key, value in placement.parameters.items()})
    assert sizes[0] == sizes[1]

"""KUDA: the loss by float64 loops, tracing on a model built by hand, and the null space held."""

from __future__ import annotations

import math
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.methods.balance.null_space import NullSpace, projected, used_directions
from delible.methods.keep.hidden_mse import HiddenMSE
from delible.methods.objective.kuda import KUDA, deviation_loss
from delible.records import QA, Passage
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.activations import input_moments
from delible.train.engine import Trainer
from delible.train.randomness import generator
from delible.train.recipe import Recipe
from delible.train.rows import make_rows
from delible.train.tracing import Fact, best_window, causal_effects, effects_of, fact_of

FORGET = [QA(question=f"Who is {n}?", answer=f"A {job}.", subject=n)
          for n, job in (("Ada", "baker"), ("Ben", "pilot"), ("Cy", "clown"),
                         ("Di", "judge"))]  # fmt: skip
RETAIN = [QA(question=f"What is {n}?", answer=c)
          for n, c in (("snow", "White."), ("coal", "Black."), ("grass", "Green."))]  # fmt: skip
FAMILIES = ("llama", "gpt2", "gemma2", "opt")


def lm_of(family: str = "llama", **changes: Any) -> LM:
    return LM(tiny_model(family, **changes), tiny_tokenizer(), precision="float32")


# ---- the loss


def test_values_equal_loops_over_rows_alone() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    loss = KUDA(beta=2.0, kick=0.1).settled([0, 1])
    reference = by_hand.prepared(frozen, rows, loss)
    found = by_hand.values(lm, loss, reference, rows).tolist()
    count = sum(len(row.encoded.ids) for row in rows["forget"])
    for value, row in zip(found, rows["forget"], strict=True):
        total = 0.0
        for layer in (0, 1):
            own, was = (torch.tensor(by_hand.block_output(one, row, layer), dtype=torch.float64)
                        for one in (lm, frozen))  # fmt: skip
            direction = torch.randn(32, generator=generator(0, "kuda", layer)).double()
            unit = direction / direction.norm()
            for h, h0 in list(zip(own, was, strict=True))[1:]:
                there = h0 + 0.1 * h0.norm() * unit
                d = 1 - float(h @ there / (h.norm() * there.norm()))
                total += 2 / 2.0 * math.log(1 + math.exp(-2.0 * d)) / 2
        assert value == pytest.approx(total * count / (count - 3), rel=1e-5)


def test_micro_batches_average_over_positions_without_the_first() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows, loss = by_hand.all_rows(lm), KUDA().settled([1])
    reference = by_hand.prepared(frozen, rows, loss)
    found = []
    for budget in (10**6, 1):
        passes = by_hand.passes_of(lm, loss, None, reference, budget=budget)
        passes.forget()
        found.append(passes.totals.forget)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_beta_near_0_climbs_the_mean_deviation_and_a_large_one_lets_go() -> None:
    states = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    frozen = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
    every = torch.ones(1, 5, dtype=torch.bool)
    deviation = 1 - torch.cosine_similarity(states, frozen, dim=2)
    (wanted,) = torch.autograd.grad(-deviation.sum(), states)
    (found,) = torch.autograd.grad(deviation_loss(states, frozen, every, 1e-3).sum(), states)
    assert float((found - wanted).norm() / wanted.norm()) < 0.01
    assert float(deviation_loss(states, frozen, every, 1e3).detach().sum()) < 1e-6


def test_padding_counts_for_nothing() -> None:
    states, frozen = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    mask = torch.tensor([[True, True, False]])
    clean = deviation_loss(states[:, :2], frozen[:, :2], mask[:, :2], 1.0)
    states[0, 2], frozen[0, 2] = float("nan"), 0.0
    states.requires_grad_(True)
    found = deviation_loss(states, frozen, mask, 1.0)
    torch.testing.assert_close(found, clean)
    (gradient,) = torch.autograd.grad(found.sum(), states)
    assert gradient.isfinite().all()


def test_only_a_shifted_reference_pulls_at_the_start() -> None:
    lm = by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    norms = []
    for kick in (0.0, 1e-3):
        loss = KUDA(kick=kick).settled([1])
        reference = by_hand.prepared(lm, rows, loss)
        value = by_hand.values(lm, loss, reference, rows).sum()
        norms.append(float(by_hand.joined(by_hand.gradients(lm, value)).norm()))
    assert norms[0] < 0.01 * norms[1]


# ---- tracing


def test_the_window_is_the_one_with_the_largest_sum() -> None:
    assert best_window(torch.tensor([0.0, 1.0, 3.0, 2.0, 0.0]), 2) == [2, 3]
    assert best_window(torch.tensor([0.0, 1.0]), 5) == [0, 1]
    assert best_window(torch.tensor([1.0, 1.0, 1.0]), 2) == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_equal_runs_by_hand(family: str) -> None:
    lm = lm_of(family)
    row = make_rows(lm.template, FORGET[:1])[0]
    fact = fact_of(row)
    assert fact is not None
    clean, worse, effects = effects_of(lm, fact, draws=2, spread=3.0, seed=7)
    core, anatomy = lm.core, lm.anatomy
    ids = torch.tensor([fact.ids])
    embedding = core.get_submodule(anatomy.embedding)

    def said(noise: Tensor | None, layer: int | None = None, kept: Tensor | None = None) -> float:
        def noisy(module: Any, arguments: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            for place in range(fact.first, fact.end):
                changed[0, place] += noise[place - fact.first] if noise is not None else 0
            return changed

        def put(module: Any, arguments: Any, output: Any) -> Any:
            flat = output.clone().reshape(len(fact.ids), -1)
            flat[fact.end - 1] = kept
            return flat.reshape(output.shape)

        hooks = [embedding.register_forward_hook(noisy)]
        if layer is not None:
            module = core.get_submodule(anatomy.path(layer, anatomy.mlp))
            hooks.append(module.register_forward_hook(put))
        with torch.no_grad():
            logits = core(input_ids=ids).logits[0].double().log_softmax(dim=-1)
        for hook in hooks:
            hook.remove()
        terms = [float(logits[at - 1, fact.ids[at]]) for at in range(fact.start, len(fact.ids))]
        return math.exp(sum(terms) / len(terms))

    drawn = torch.randn(2, fact.end - fact.first, embedding.weight.shape[1],
                        generator=generator(7, "tracing", fact.key))  # fmt: skip
    noises = drawn * 3.0 * float(embedding.weight.std())
    states: dict[int, Tensor] = {}
    hooks = [
        core.get_submodule(anatomy.path(layer, anatomy.mlp)).register_forward_hook(
            lambda module, arguments, output, layer=layer: states.__setitem__(
                layer, output.detach().reshape(len(fact.ids), -1)[fact.end - 1]
            )
        )
        for layer in range(anatomy.layers)
    ]
    assert clean == pytest.approx(said(None), rel=1e-4)
    for hook in hooks:
        hook.remove()
    low = [said(noise) for noise in noises]
    assert worse == pytest.approx(sum(low) / 2, rel=1e-4)
    for layer in range(anatomy.layers):
        restored = [said(noise, layer, states[layer]) for noise in noises]
        wanted = sum(restored) / 2 - sum(low) / 2
        assert float(effects[layer]) == pytest.approx(wanted, rel=1e-3, abs=1e-9)


def test_a_model_whose_one_mlp_writes_the_answer() -> None:
    for writer in (0, 1):
        lm = lm_of(num_hidden_layers=2)
        ids = [1, 65]
        with torch.no_grad():
            for layer in range(2):
                for part in ("o_proj", "down_proj"):
                    for name, value in lm.core.named_parameters():
                        if f"layers.{layer}." in name and part in name:
                            value.zero_()
            block = lm.core.model.layers[writer].mlp
            embedding = lm.core.model.embed_tokens.weight
            embedding[65] = 0
            embedding[65, 0] = 2.0
            block.gate_proj.weight.zero_()
            block.up_proj.weight.zero_()
            block.gate_proj.weight[0, 0] = block.up_proj.weight[0, 0] = 3.0
            block.down_proj.weight[:, 0] = 9.0 * lm.core.lm_head.weight[66]
        fact = Fact("one", (*ids, 66), 1, 2, 2)  # the answer follows the subject
        clean, worse, effects = effects_of(lm, fact, draws=8, spread=10.0, seed=0)
        assert clean > 0.9 > worse
        assert int(effects.argmax()) == writer
        assert float(effects[writer]) > 0.05
        assert float(effects[1 - writer]) == pytest.approx(0, abs=1e-6)


def test_subjects_are_found_in_questions_and_names_in_texts() -> None:
    lm = lm_of()
    rows = make_rows(lm.template, [
        QA(question="Who taught Bo Lund?", answer="Cy", subject="Bo Lund"),
        Passage(text="In May 1990 the painter Ada Brook went to Oslo."),
        Passage(text="nothing here has a capital"),
    ])  # fmt: skip
    facts = [fact_of(row) for row in rows]

    def text(ids: Any) -> str:
        return str(lm.tokenizer.decode(list(ids)))

    assert facts[0] is not None
    assert facts[1] is not None
    assert facts[2] is None
    assert text(facts[0].ids[facts[0].first : facts[0].end]) == "Bo Lund"
    assert text(facts[0].ids[facts[0].start :]).startswith("Cy")
    assert text(facts[1].ids[facts[1].first : facts[1].end]) == "May 1990"
    assert text(facts[1].ids[facts[1].start :]) == " the pai"
    assert causal_effects(lm, rows[2:], facts=3, draws=1) is None


def test_the_traced_window_alone_moves_and_is_what_the_losses_read() -> None:
    lm = lm_of()
    before = {name: value.clone() for name, value in lm.model.named_parameters()}
    recipe = Recipe.named("kuda").changed({}, {
        "width": 1, "max_steps": 3, "threshold": 0.1, "training.precision": "float32",
        "epochs": 3})  # fmt: skip
    trainer = Trainer(lm, recipe, {"forget": FORGET, "retain": RETAIN})
    trainer.train()
    moved = [name for name, value in lm.model.named_parameters()
             if not torch.equal(value, before[name])]  # fmt: skip
    assert len(moved) == 1
    assert moved[0].endswith("mlp.down_proj.weight")
    layer = int(moved[0].split(".")[2])
    assert trainer.recipe.objective.reads(lm) == (layer,) == trainer.recipe.keep.reads(lm)


def test_rows_that_name_nothing_cannot_be_traced() -> None:
    recipe = Recipe.named("kuda")
    nameless = [Passage(text="nothing here has a capital")]
    with pytest.raises(RecipeError, match="names what it is about"):
        Trainer(lm_of(), recipe, {"forget": nameless, "retain": RETAIN}).train()


# ---- the null space


def test_the_projection_is_symmetric_idempotent_and_exact_where_inputs_have_low_rank() -> None:
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(50, 3, generator=random) @ torch.randn(3, 12, generator=random)
    used = used_directions(keys.T @ keys / 50, 1e-6)
    assert used.shape == (12, 3)
    whole = projected(torch.eye(12), used)
    torch.testing.assert_close(whole, whole.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole @ whole, whole, atol=1e-5, rtol=0)
    change = torch.randn(4, 12, generator=random)
    assert float((projected(change, used) @ keys.T).norm()) < 1e-4 * float((change @ keys.T).norm())
    assert used_directions(torch.eye(12), 1.0).shape[1] == 0  # nothing is taken out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_moments_equal_loops_over_rows_alone(family: str) -> None:
    lm = lm_of(family)
    rows = make_rows(lm.template, RETAIN)
    name = lm.anatomy.mlp_out_parameters(1)[0]
    weight = lm.core.get_parameter(name)
    found = input_moments(lm, rows, [weight])[id(weight)]
    total, count = torch.zeros(found.moment.shape, dtype=torch.float64), 0
    module = lm.core.get_submodule(name.removesuffix(".weight"))
    for row in rows:
        seen: list[Tensor] = []
        hook = module.register_forward_hook(lambda m, a, o, seen=seen: seen.append(a[0]))
        with torch.no_grad():
            lm.core(input_ids=torch.tensor([row.encoded.ids]))
        hook.remove()
        for key in seen[0].reshape(len(row.encoded.ids), -1)[1:].double():
            total += torch.outer(key, key)
            count += 1
    assert found.tokens == count
    torch.testing.assert_close(found.moment, total / count, rtol=1e-5, atol=1e-7)
    assert found.inputs_first == (family == "gpt2")
    part = input_moments(lm, rows, [weight], share=0.5)[id(weight)]
    assert part.tokens == count  # fewer than three per input: all of them
    few = input_moments(lm, rows * 20, [weight], share=0.5)[id(weight)]
    assert 0.4 * 20 * count < few.tokens < 0.6 * 20 * count


def changes(family: str, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Of each moved matrix, [outputs, inputs]: its change, and the retain inputs at the start."""
    lm = lm_of(family)
    training = {"max_steps": 3, "epochs": 3, "batch_size": 4, "precision": "float32",
                "weight_decay": 0.1, **options.pop("training", {})}  # fmt: skip
    recipe = Recipe.from_mapping({
        "objective": {"name": "kuda"}, "keep": {"name": "hidden_mse", "depth": None},
        "place": {"name": "layers", "layers": [1], "role": "mlp_out"},
        "balance": {"name": "null_space", **options}, "training": training})  # fmt: skip
    names = lm.anatomy.mlp_out_parameters(1)
    rows = make_rows(lm.template, RETAIN)
    moments = input_moments(lm, rows, [lm.core.get_parameter(name) for name in names])
    kept = [moments[id(lm.core.get_parameter(name))].moment.float() for name in names]
    before = [lm.core.get_parameter(name).detach().clone() for name in names]
    Trainer(lm, recipe, {"forget": FORGET, "retain": RETAIN}).train()
    found = [lm.core.get_parameter(n).detach() - old for n, old in zip(names, before, strict=True)]
    return [one.T if lm.anatomy.transposed else one for one in found], kept


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_adamw_does_stays_in_the_null_space(family: str) -> None:
    (free,), (moment,) = changes(family, threshold=2.0, training={"learning_rate": 1e-3})
    (held,), _ = changes(family, threshold=1e-3, training={"learning_rate": 1e-3})
    values, vectors = torch.linalg.eigh(moment)
    used = vectors[:, values > 1e-3 * values[-1]]
    assert 0 < used.shape[1] < len(moment)
    assert float((held @ used).norm()) < 1e-3 * float((free @ used).norm())
    assert float(held.norm()) > 0.05 * float(free.norm())
    # the gradient alone, projected before AdamW, does leave it
    (leaving,), _ = changes(family, threshold=1e-3, of="gradient", retain_weight=0.0,
                            training={"learning_rate": 1e-3})  # fmt: skip
    assert float((leaving @ used).norm()) > 0.05 * float((free @ used).norm())


def test_a_threshold_of_1_is_the_weighted_sum() -> None:
    def end(balance: dict[str, Any]) -> Tensor:
        lm = lm_of()
        recipe = Recipe.from_mapping({
            "objective": "kuda", "keep": {"name": "hidden_mse", "depth": 0.5}, "balance": balance,
            "place": {"name": "layers", "layers": [1]},
            "training": {"max_steps": 2, "precision": "float32"}})  # fmt: skip
        Trainer(lm, recipe, {"forget": FORGET, "retain": RETAIN}).train()
        return lm.core.get_parameter(lm.anatomy.mlp_out_parameters(1)[0]).detach()

    for of in ("change", "gradient"):
        one = end({"name": "null_space", "threshold": 1.0, "of": of})
        torch.testing.assert_close(one, end({"name": "weighted_sum"}), rtol=0, atol=1e-6)


def test_plain_descent_moves_by_the_projected_forget_gradient_and_the_retain_gradient() -> None:
    lm = lm_of()
    frozen = lm.copy()
    with torch.no_grad():  # so that the retain loss has a gradient, too
        for value in lm.model.parameters():
            value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3)))
    weight = lm.core.get_parameter(lm.anatomy.mlp_out_parameters(1)[0])
    rows = by_hand.all_rows(lm)
    objective, keep = KUDA(layers=(1,)), HiddenMSE(depth=0.5)
    reference = by_hand.prepared(frozen, rows, objective, keep)
    passes = by_hand.passes_of(lm, objective, keep, reference, weights=(1.0, 3.0))
    passes.parameters = [weight]
    moment = input_moments(lm, rows["retain"], [weight])[id(weight)].moment
    used = used_directions(moment, 1e-2)
    passes.memory = {"null_space.used": [used], "null_space.inputs_first": [torch.zeros(1)]}

    def alone(which: str) -> Tensor:
        passes.clear()
        getattr(passes, which)()
        assert weight.grad is not None
        return weight.grad.clone()

    forget, retain = alone("forget"), alone("keep")
    passes.clear()
    balance = NullSpace(of="gradient")
    balance.gradient(passes, build("harden", "none"))
    directions = used.double()
    wanted = forget.double() - forget.double() @ directions @ directions.T + retain.double()
    torch.testing.assert_close(weight.grad, wanted.float(), rtol=1e-4, atol=1e-6)

    def cosine(one: Tensor, other: Tensor) -> float:
        return abs(float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)))

    assert cosine(wanted.float() - retain, retain) < 0.5 * cosine(forget, retain)


def test_nothing_free_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing could change"):
        changes("llama", threshold=1e-20)

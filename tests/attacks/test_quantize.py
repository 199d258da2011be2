"""Quantization: the grid by hand, what it leaves alone, and the collision with the original."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from delible.attacks.quantize import (
    Quantize,
    codes,
    compare_codes,
    linear_weights,
    round_to_nearest,
    step_sizes,
)
from delible.errors import ModelError, RecipeError, RunError
from delible.lm.grids import FORMATS
from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.records import QA
from delible.system.asks import Prompt, Score, TokenScores
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe


def make_lm(family: str = "llama", seed: int = 0, **changes: Any) -> LM:
    return LM(tiny_model(family, seed, **changes), tiny_tokenizer(), precision="float32")


def make_context(original: LM | None = None) -> AttackContext:
    return AttackContext((), (), (), original, 0)


def weights_of(lm: LM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in lm.core.named_parameters()}


def logits(lm: LM) -> Tensor:
    with torch.inference_mode():
        return lm.core(input_ids=torch.arange(24).reshape(2, 12) * 5).logits.clone()


def by_hand(row: list[float], bits: int, group: int) -> list[float]:
    """q(w) of one output channel, one weight at a time, in double precision."""
    found: list[float] = []
    size = group or len(row)
    for start in range(0, len(row), size):
        part = row[start : start + size]
        delta = max(abs(w) for w in part) / 2 ** (bits - 1)
        for w in part:
            nearest = round(w / delta) if delta else 0  # Python, too, rounds ties to even
            found.append(delta * min(max(nearest, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1))
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the grid


@pytest.mark.parametrize("group", [0, 4, 5, 8, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_grid_is_that_of_the_formula(bits: int, group: int) -> None:
    weight = random(6, 13)  # no group size divides 13: the last group is shorter
    weight[2] = 0
    found = round_to_nearest(weight, step_sizes(weight, bits, group), bits)
    expected = [by_hand(row, bits, group) for row in weight.tolist()]
    expected_weight = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected_weight, rtol=1e-12, atol=0)


def test_the_papers_example() -> None:
    weight = torch.tensor([[-200.0, 12.0, 13.0, 37.6, 200.0]])
    four, eight = step_sizes(weight, 4, 0), step_sizes(weight, 8, 0)
    assert four.unique().tolist() == [25.0]
    assert eight.unique().tolist() == [1.5625]
    # 12 and 13 lie on different sides of the edge 12.5; the largest is clipped to 7 steps
    assert round_to_nearest(weight, four, 4).tolist() == [[-200.0, 0.0, 25.0, 50.0, 175.0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 8])
def test_rounding_twice_is_rounding_once_and_moves_at_most_half_a_step(
    bits: int, group: int
) -> None:
    weight = random(20, 24)
    steps = step_sizes(weight, bits, group)
    once = round_to_nearest(weight, steps, bits)
    assert torch.equal(round_to_nearest(once, steps, bits), once)
    unclipped = weight / steps <= 2 ** (bits - 1) - 1 + 0.5
    assert 0 < int((~unclipped).sum()) < weight.numel() / 2
    assert ((weight - once).abs() <= steps / 2 * (1 + 1e-12))[unclipped].all()
    assert ((weight - once).abs() <= steps * (1 + 1e-12)).all()


def test_scales_taken_anew_agree_where_the_largest_weight_is_negative() -> None:
    weight = random(20, 24)
    weight[:, 0] = -weight.abs().amax(dim=1) - 0.1
    once = round_to_nearest(weight, step_sizes(weight, 4, 0), 4)
    assert torch.equal(round_to_nearest(once, step_sizes(once, 4, 0), 4), once)


def test_zeros_stay_zeros_and_codes_are_within_their_bits() -> None:
    weight = torch.zeros(3, 5)
    assert torch.equal(round_to_nearest(weight, step_sizes(weight, 4, 0), 4), weight)
    weight = random(8, 64)
    found = codes(weight, step_sizes(weight, 3, 0), 3)
    assert (found.min(), found.max()) == (-4, 3)
    assert torch.equal(found, found.round())


# ---- which weights


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_linear_layers_of_the_blocks_are_rounded(family: str) -> None:
    lm = make_lm(family)
    before = weights_of(lm)
    attacked = Quantize(bits=4, group=0).apply(lm, make_context())
    after = weights_of(attacked)
    chosen = set(linear_weights(lm))
    assert list(before) == list(after)
    for name, value in before.items():
        assert torch.equal(lm.core.get_parameter(name), value)  # the given model is as it was
        assert torch.equal(after[name], value) == (name not in chosen), name
        is_inside = name.startswith(f"{lm.anatomy.blocks}.")
        is_router = any(
            name in lm.anatomy.parameter_names(layer, "router")
            for layer in range(lm.anatomy.layers)
        )
        assert (name in chosen) == (is_inside and value.ndim > 1 and not is_router), name
    assert not torch.equal(logits(attacked), logits(lm))
    assert attacked.fingerprint != lm.fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_neox", "qwen2_moe"])
@pytest.mark.parametrize("group", [0, 64])
def test_groups_run_along_the_inputs_of_every_layout(family: str, group: int) -> None:
    """One matrix that is stored as [in, out] in GPT-2 and with three dimensions in a mixture."""
    lm = make_lm(family, **({"n_embd": 80} if family == "gpt2" else {"intermediate_size": 80}))
    attacked = Quantize(bits=4, group=group).apply(lm, make_context())
    name = lm.anatomy.parameter_names(1, "mlp_out")[0]
    old, new = (each.core.get_parameter(name).detach().double() for each in (lm, attacked))
    if family == "gpt2":
        old, new = old.T, new.T  # 320 inputs, 80 outputs
        assert old.shape == (80, 320)
    if old.ndim == 3:
        assert old.shape[1] == lm.anatomy.hidden_size  # [expert, output, input]
        old, new = old[2], new[2]
    expected = [by_hand(row, 4, group) for row in old.tolist()]
    expected_weight = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(new, expected_weight, rtol=1e-5, atol=1e-7)


def test_an_adapter_is_merged_before_rounding() -> None:
    peft = pytest.importorskip("peft")
    lm = make_lm()
    names = list(weights_of(lm))
    paths = [path for path, each in lm.core.named_modules() if path.endswith("down_proj")]
    lm.model = peft.get_peft_model(lm.core, peft.LoraConfig(r=2, target_modules=paths))
    from delible.lm.derive import derive

    lm.anatomy = derive(lm.core)
    with torch.no_grad():
        for name, value in lm.model.named_parameters():
            if "lora_B" in name:
                value.add_(1)
    before = {name: value.detach().clone() for name, value in lm.model.named_parameters()}
    context = make_context(make_lm())
    attacked = Quantize(bits=4, group=0).apply(lm, context)
    assert list(weights_of(attacked)) == names
    base = make_lm()
    assert not torch.equal(
        attacked.core.get_parameter("model.layers.0.mlp.down_proj.weight"),
        Quantize(bits=4, group=0).apply(base, make_context()).core.get_parameter(
            "model.layers.0.mlp.down_proj.weight"
        ),
    )  # fmt: skip
    assert all(torch.equal(value, before[n]) for n, value in lm.model.named_parameters())
    assert context.notes["collision_rate"] < 1  # type: ignore[operator]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_attacked_model_has_and_computes_in_full_precision(stored: torch.dtype) -> None:
    """Whatever the given one computes in: bf16 would round the grid's points once more."""
    lm = make_lm()
    lm.model.to(stored)
    lm.precision = "bfloat16"
    attacked = Quantize(bits=8, group=64).apply(lm, make_context(make_lm()))
    assert (lm.precision, lm.model.dtype) == ("bfloat16", stored)
    assert attacked.precision == "float32"
    assert {value.dtype for value in weights_of(attacked).values()} == {torch.float32}
    name = lm.anatomy.parameter_names(1, "mlp_out")[0]
    expected = [by_hand(row, 8, 64) for row in lm.core.get_parameter(name).double().tolist()]
    found = attacked.core.get_parameter(name).detach().double()
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9
    )
    # its answers are those of a float64 computation, far closer than bf16 could come
    asked = Score(Prompt.ask("Who?"), "Nobody at all.")
    (score,) = attacked.score([asked])
    row = attacked.template.encode(asked.prompt, asked.answer)
    with torch.no_grad():
        exact = attacked.copy().model.double()(torch.tensor([row.ids])).logits[0].log_softmax(1)
    wanted = exact[
        torch.arange(row.start - 1, len(row.ids) - 1), torch.tensor(row.ids[row.start :])
    ]
    assert isinstance(score, TokenScores)
    torch.testing.assert_close(torch.tensor(score.logprobs).double(), wanted, rtol=1e-4, atol=1e-4)


# ---- against the original


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_change_within_the_bins_is_invisible(family: str, group: int) -> None:
    original, changed = make_lm(family), make_lm(family)
    with torch.no_grad():
        for weight in linear_weights(changed).values():
            steps = step_sizes(weight, 4, group)
            # towards the grid point by at most 0.4 of the way, so no edge is crossed; the largest
            # of a group is left, since it decides the scale
            away = round_to_nearest(weight, steps, 4) - weight
            away[weight.abs() >= steps * 7.5] = 0
            weight.add_(0.4 * away)
    assert not torch.equal(logits(changed), logits(original))
    context = make_context(original)
    attack = Quantize(bits=4, group=group)
    again, target = attack.apply(changed, context), attack.apply(original, context)
    assert torch.equal(logits(again), logits(target))
    assert all(torch.equal(weights_of(again)[n], w) for n, w in weights_of(target).items())
    assert context.notes["collision_rate"] == 1
    assert 0 < context.notes["mean_change_in_half_steps"] < 0.4  # type: ignore[operator]


def test_an_unchanged_model_comes_back_as_the_quantized_original() -> None:
    original = make_lm()
    context = make_context(original)
    attacked = Quantize(bits=4, group=0).apply(make_lm(), context)
    target = Quantize(bits=4, group=0).apply(original, make_context())
    assert torch.equal(logits(attacked), logits(target))  # recovery 1
    assert context.notes == {
        "collision_rate": 1, "collision_rates": [1, 1, 1], "mean_change_in_half_steps": 0
    }  # fmt: skip


def test_on_the_grid_the_attack_is_the_identity() -> None:
    lm = make_lm()
    with torch.no_grad():
        for weight in linear_weights(lm).values():
            weight[:, 0] = -1.0  # the largest of every channel, so that Delta = 1/8 exactly
            weight[:, 1:] = weight[:, 1:].clamp(-0.8, 0.8)
            weight.copy_(round_to_nearest(weight, step_sizes(weight, 4, 0), 4))
    attacked = Quantize(bits=4, group=0).apply(lm, make_context())
    assert torch.equal(logits(attacked), logits(lm))  # recovery 0


def test_collisions_fall_with_bits_and_with_the_size_of_the_change() -> None:
    original = {"weight": random(64, 64)}
    direction = random(64, 64, seed=1)

    def rate(bits: int, size: float) -> float:
        changed = {"weight": original["weight"] + size * direction}
        return compare_codes(changed, original, bits, 0)["weight"][0]

    by_bits = [rate(bits, 0.02) for bits in (2, 3, 4, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert len(set(by_bits)) == 4
    assert by_bits[0] > by_bits[3] + 0.2
    by_size = [rate(4, size) for size in (0.0, 0.01, 0.1, 0.5)]
    assert by_size == sorted(by_size, reverse=True)
    assert by_size[0] == 1
    assert by_size[3] < 0.5


def test_collisions_fall_with_the_learning_rate_of_the_unlearning_run() -> None:
    forget = [QA(question=f"Where is {name}?", answer=f"In {name}ville.") for name in "ABCD"]
    original, rates = make_lm(), []
    for learning_rate in (1e-5, 1e-4, 1e-3):
        recipe = Recipe.from_mapping(
            {
                "objective": "gradient_ascent",
                "training": {"learning_rate": learning_rate, "epochs": 3, "batch_size": 2,
                             "max_length": 64},
            }
        )  # fmt: skip
        unlearned = Trainer(original.copy(), recipe, {"forget": forget}).train().lm
        context = make_context(original)
        Quantize(bits=4, group=0).apply(unlearned, context)
        rates.append(context.notes["collision_rate"])
    assert rates == sorted(rates, reverse=True)  # type: ignore[type-var]
    assert rates[0] > 0.99  # type: ignore[operator]
    assert rates[2] < 0.95  # type: ignore[operator]


def test_collision_and_change_by_hand() -> None:
    # Delta = 8/8 = 1: codes 0, 1, 7 (clipped), and the group of zeros
    old = {"w": torch.tensor([[0.2, 1.2, 8.0], [0.0, 0.0, 0.0]])}
    new = {"w": torch.tensor([[0.4, 1.7, 9.0], [0.0, 0.1, 0.0]])}
    rate, change = compare_codes(new, old, 4, 0)["w"]
    assert rate == pytest.approx(4 / 6)  # 0.2 -> 0.4, 8 -> 9, and two zeros
    assert change == pytest.approx((0.4 + 1.0 + 2.0) / 3)
    assert math.isfinite(change)


def test_notes_are_by_layer_and_weigh_matrices_by_their_size() -> None:
    original, changed = make_lm(), make_lm()
    name = changed.anatomy.parameter_names(1, "mlp_out")[0]
    with torch.no_grad():
        changed.core.get_parameter(name).neg_()
    context = make_context(original)
    Quantize(bits=8, group=0).apply(changed, context)
    matrices, old = linear_weights(changed), linear_weights(original)
    rate, change = compare_codes({name: matrices[name]}, {name: old[name]}, 8, 0)[name]
    assert rate < 0.1
    share = matrices[name].numel() / sum(w.numel() for w in matrices.values())
    assert context.notes["collision_rate"] == pytest.approx(1 - share * (1 - rate))
    assert context.notes["mean_change_in_half_steps"] == pytest.approx(share * change)
    rates = context.notes["collision_rates"]
    assert rates == [1, pytest.approx(1 - 3 * share * (1 - rate)), 1]


def test_another_architecture_is_no_original() -> None:
    with pytest.raises(RunError, match="do not have the same linear layers"):
        Quantize().apply(make_lm(), make_context(make_lm("gpt2")))


def test_variants_name_themselves_and_options_are_checked() -> None:
    attack = Quantize()

    def titles(depth: Any) -> list[str]:
        return [Quantize(**variant).variant_title() for variant in attack.variants(depth)]  # type: ignore[arg-type]

    assert titles("quick") == ["4 bit, groups of 64"]
    assert titles("standard") == [
        "int8, per channel", "4 bit, groups of 64", "NF4, blocks of 64", "GGUF q4_0"
    ]  # fmt: skip
    assert set(titles("deep")) == {
        *titles("standard"), "4 bit, per channel", "4 bit, groups of 128", "int4, groups of 128",
        "FP4, blocks of 64", "GGUF q4_k",
    }  # fmt: skip
    controls = [one for one in attack.variants("deep") if Quantize(**one).control]  # type: ignore[arg-type]
    assert controls == [{"format": "int8"}]
    assert Quantize(bits=8).control
    with pytest.raises(RecipeError, match="'group' = 32"):
        Quantize.build("attack 'quantize'", group=32)


# ---- formats


@pytest.mark.parametrize(("name", "intermediate"), [("q4_0", 64), ("q4_k", 256), ("nf4", 48)])
def test_a_format_rounds_the_layers_that_it_fits(name: Any, intermediate: int) -> None:
    lm = make_lm(intermediate_size=intermediate)
    context = make_context()
    attacked = Quantize(format=name).apply(lm, context)
    before, after = linear_weights(lm), linear_weights(attacked)
    for key, weight in before.items():
        wide = weight.shape[-1]
        function = {"q4_k": "q4_k" if wide % 256 == 0 else "q5_0"}.get(name, name)
        assert torch.equal(after[key], FORMATS[function][0](weight)), key
        assert not torch.equal(after[key], weight)
    assert "note" not in context.notes


def test_layers_that_a_format_does_not_fit_stay_and_are_counted() -> None:
    lm, context = make_lm(), make_context()  # 32 and 48 wide
    attacked = Quantize(format="q4_0").apply(lm, context)
    before, after = linear_weights(lm), linear_weights(attacked)
    stay = sum(weight.numel() for weight in before.values() if weight.shape[-1] == 48)
    share = stay / sum(weight.numel() for weight in before.values())
    assert str(context.notes["note"]).startswith(f"{share:.0%} of the weights stay")
    for key, weight in before.items():
        assert torch.equal(after[key], weight) == (weight.shape[-1] == 48)
    narrow = make_lm(hidden_size=24, head_dim=6, num_attention_heads=4)
    with pytest.raises(ModelError, match="no linear layer has rows"):
        Quantize(format="q4_0").apply(narrow, make_context())


def test_the_grid_that_the_original_lies_on_is_refused() -> None:
    stored = make_lm(hidden_size=64, intermediate_size=256, head_dim=16)
    with torch.no_grad():
        for weight in linear_weights(stored).values():
            weight.copy_(FORMATS["q4_0"][0](weight))
    stored.touch()
    unlearned = stored.copy()
    with torch.no_grad():
        for weight in linear_weights(unlearned).values():
            weight += 1e-4 * torch.randn_like(weight)
    with pytest.raises(ModelError, match="come from a 4-bit file"):
        Quantize(format="q4_k").apply(stored, make_context())
    with pytest.raises(ModelError, match="come from a 4-bit file"):
        Quantize(format="q4_k").apply(unlearned, make_context(stored))
    Quantize(format="q4_k").apply(unlearned, make_context())
    Quantize(format="nf4").apply(unlearned, make_context(stored))

"""Bytes by part are sums over the tensors that are there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from living import Living  # type: ignore[import-not-found]
from transformers import LlamaConfig

from delible import planning
from delible.context import Context
from delible.errors import RecipeError
from delible.lm import held
from delible.lm.forward import Batch, Forward, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.lm.outline import outline
from delible.records import QA, ForgetRequest
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train import simulated
from delible.train.engine import Trainer
from delible.train.footprint import Memory, cache_bytes
from delible.train.loop import Loop
from delible.train.method import records_of
from delible.train.recipe import Recipe
from delible.train.savings import ways_of
from delible.train.simulated import Shape, passing, rough_activation_bytes


def chosen(name: str, **options: Any) -> Recipe:
    given = {"epochs": 2, "max_steps": 2, "batch_size": 6, "precision": "float32"} | options
    slots = {"finish": "none"} if name == "npo_lora" else {}
    return Recipe.named(name).changed(slots, {f"training.{k}": v for k, v in given.items()})


@pytest.fixture
def asked(forget: list[QA], retain: list[QA]) -> ForgetRequest:
    return ForgetRequest(forget=tuple(forget), retain=tuple(retain))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Settings and a tokenizer, and no weights."""
    lm = LM(tiny_model("llama"), tiny_tokenizer())
    lm.core.config.save_pretrained(tmp_path / "settings")
    lm.tokenizer.save_pretrained(tmp_path / "settings")
    return tmp_path / "settings"


# ---- activations


def kept_by_autograd(lm: LM, rows: int, length: int, prefix: int, answers: int) -> int:
    """What a real pass saves, each storage once, without the model's own tensors."""
    own = {one.untyped_storage().data_ptr() for one in lm.model.parameters()}
    own |= {one.untyped_storage().data_ptr() for one in lm.model.buffers()}
    saved: dict[int, Any] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        place = value.untyped_storage().data_ptr()
        if place not in own:
            saved[place] = value.untyped_storage()
        return value

    ids = torch.arange(rows * length).reshape(rows, length) % 200
    batch = Batch(ids, torch.full((rows,), length), torch.full((rows,), length - answers), prefix)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), lm.computing():
        states, _ = Forward(lm)(batch)
        assert states is not None
        map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
    return sum(one.nbytes() for one in saved.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(family: str, precision: Any) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer())
    lm.precision = precision
    found = passing(lm, Shape(4, 40, 20, 20)).kept
    assert found == pytest.approx(kept_by_autograd(lm, 4, 40, 20, 5), rel=0.02)
    assert found < rough_activation_bytes(lm, Shape(4, 40, 20, 20))


def test_frozen_weights_and_adapters_keep_less_and_more(asked: ForgetRequest) -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    shape = Shape(4, 40, 20, 20)
    whole = passing(lm, shape).kept
    Trainer(lm, chosen("npo_lora", max_steps=1), records_of(asked)).train()
    worn = passing(lm, shape).kept
    assert worn == pytest.approx(kept_by_autograd(lm, 4, 40, 20, 5), rel=0.02)
    for value in lm.model.parameters():
        value.requires_grad_(False)
    assert passing(lm, shape).kept == 0 < whole != worn


def most_alive(lm: LM, rows: int, length: int, prefix: int, answers: int) -> int:
    """The most that a real pass holds; gradients of weights are dropped as they are complete."""
    ids = torch.arange(rows * length).reshape(rows, length) % 200
    batch = Batch(ids, torch.full((rows,), length), torch.full((rows,), length - answers), prefix)

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    hooks = [
        one.register_post_accumulate_grad_hook(drop)
        for one in lm.model.parameters() if one.requires_grad
    ]  # fmt: skip
    with Living() as alive:
        with lm.computing():
            states, _ = Forward(lm)(batch)
            assert states is not None
            values = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
            del states
        values.square().mean().backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    return int(alive.peak)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_most_that_a_pass_holds(precision: Any, again: bool) -> None:
    """Seven blocks: counted on two and three of them, and lived through with all."""
    lm = LM(tiny_model("llama", num_hidden_layers=7), tiny_tokenizer())
    lm.precision, lm.recomputes = precision, again
    found = passing(lm, Shape(8, 40, 20, 40))
    assert found.counted
    assert found.peak == pytest.approx(most_alive(lm, 8, 40, 20, 5), rel=0.05)
    moving = sum(4 * one.numel() for one in lm.model.parameters())
    assert found.peak <= found.with_gradients <= found.peak + moving
    assert (found.products > 0) == (precision == "bfloat16")


def test_blocks_that_are_computed_again_hold_less() -> None:
    lm = LM(tiny_model("llama", num_hidden_layers=12), tiny_tokenizer(), precision="float32")
    shape = Shape(8, 40, 20, 40)
    plain = passing(lm, shape)
    lm.recomputes = True
    again = passing(lm, shape)
    assert again.kept < 0.3 * plain.kept
    assert again.peak < 0.5 * plain.peak


def test_what_leaves_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delible.lm.offload.WORTH_THE_WAY", 2048)
    lm = LM(tiny_model("llama", num_hidden_layers=12), tiny_tokenizer(), precision="float32")
    shape = Shape(8, 40, 20, 40)
    plain = passing(lm, shape)
    lm.offloads = True
    away = passing(lm, shape)
    assert away.kept < 0.3 * plain.kept
    assert away.peak < 0.5 * plain.peak


def test_blocks_that_are_not_alike_are_counted_each(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(tiny_model("llama", num_hidden_layers=6), tiny_tokenizer())
    shape = Shape(2, 30, 0, 8)
    counted: list[int] = []
    lived = simulated._lived

    def watched(lm: LM, *given: Any) -> Any:
        counted.append(len(lm.core.model.layers))
        return lived(lm, *given)

    monkeypatch.setattr(simulated, "_lived", watched)
    alike = passing(lm, shape)
    assert counted == [2, 3]
    next(iter(lm.core.model.layers[3].parameters())).requires_grad_(False)  # no longer alike
    assert passing(lm, shape).kept == pytest.approx(alike.kept, rel=0.02)
    assert counted == [2, 3, 6]


def test_a_model_that_decides_by_numbers_gets_a_bound() -> None:
    lm = LM(tiny_model("qwen3_moe"), tiny_tokenizer())
    found = passing(lm, Shape(4, 40, 0, 20))
    assert not found.counted
    assert found.kept >= kept_by_autograd(lm, 4, 40, 0, 5)


def test_the_model_is_as_it_was_afterwards() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer())
    before, kept = lm.fingerprint, [id(one) for one in lm.model.parameters()]
    passing(lm, Shape(2, 30, 0, 8))
    assert [id(one) for one in lm.model.parameters()] == kept
    assert lm.fingerprint == before


# ---- a whole run


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("npo", {}),
        ("npo_kl", {}),
        ("rmu", {}),
        ("npo_lora", {"optimizer": "sgd"}),
        ("npo", {"gradient_checkpointing": True}),
        ("npo_lora", {"base_precision": "bfloat16", "precision": "auto"}),
    ],
)
def test_each_part_is_the_sum_of_the_runs_tensors(
    method: str, options: Any, asked: ForgetRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[Loop] = []
    run = Loop.run
    sizes: dict[str, int] = {}

    def running(loop: Loop) -> None:
        loops.append(loop)
        clip = loop._clip

        def clipped() -> float:
            sizes["gradients"] = sum(
                one.grad.numel() * one.grad.element_size()
                for one in loop.job.lm.model.parameters() if one.grad is not None
            )  # fmt: skip
            return clip()

        monkeypatch.setattr(loop, "_clip", clipped)
        run(loop)

    monkeypatch.setattr(Loop, "run", running)
    recipe = chosen(method, **options)
    lm = LM(tiny_model("llama"), tiny_tokenizer())
    Trainer(lm, recipe, records_of(asked), context=Context(0)).train()
    _, cost = planning.plan_of(str(folder), asked, method=recipe)
    assert cost is not None
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    weights = sum({id(one): one.numel() * one.element_size() for one in tensors}.values())
    moments = [one for kept in loops[0].optimizer.state.values() for one in kept.values()]
    reference = loops[0].reference
    head = reference._head
    cells = 0 if head is None else 4 * lm.vocabulary * lm.anatomy.hidden_size
    values = [one for key, one in reference.values.items() if not key.startswith("learned/")]
    assert cost.memory.weights == weights
    assert cost.memory.gradients == sizes["gradients"]
    assert cost.memory.optimiser == sum(
        one.numel() * one.element_size() for one in moments if isinstance(one, torch.Tensor)
    )
    assert cost.memory.reference == cells + sum(4 * one.numel() for one in values)


def test_keys_and_values_of_answers() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer())
    lm.precision = "float32"
    cache = lm.core(torch.zeros(3, 17, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
    assert cache_bytes(lm, 3, 17) == kept


def test_the_peak_is_in_a_pass_an_update_or_an_answer() -> None:
    parts = {"weights": 100, "gradients": 50, "optimiser": 20, "reference": 3, "masks": 2}
    parts |= {"activations": 60, "kernels": 7, "cache": 10}
    passes = Memory(**parts, passing=75, update=5)
    assert passes.peak == 100 + 7 + 20 + 3 + 2 + 75
    updates = Memory(**parts, passing=75, update=40)
    assert updates.peak == 100 + 7 + 20 + 3 + 2 + 50 + 40
    answering = Memory(**{**parts, "cache": 500}, passing=75, update=40)
    assert answering.peak == 607
    assert "passing" not in passes.parts()


@pytest.mark.parametrize(("precision", "each"), [("int8", 1 + 5 / 48), ("int4", 0.5 + 4 / 32)])
def test_packed_matrices(precision: Any, each: float) -> None:
    assert held.packed_bytes(10, 48, precision) == pytest.approx(10 * 48 * each, abs=30)
    assert held.packed_bytes(8, 64, "int4") == 8 * 64 // 2 + 8 * 2 * 4
    assert held.packed_bytes(8, 64, "int8") == 8 * 64 + 8 * 5


# ---- without weights, for any size


def test_an_outline_has_the_shapes_and_no_numbers(folder: Path) -> None:
    lm = outline(str(folder), "bfloat16")
    real = LM(tiny_model("llama"), tiny_tokenizer())
    assert {name: one.shape for name, one in lm.model.named_parameters()} == {
        name: one.shape for name, one in real.model.named_parameters()
    }
    assert all(one.is_meta for one in lm.model.parameters())
    assert held.weight_bytes(lm.model) < 0.6 * held.weight_bytes(real.model)


@pytest.mark.slow
def test_a_large_model_and_what_makes_it_fit(
    tmp_path: Path, asked: ForgetRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delible.train.estimate.matmul_rate", lambda *_: 1e12)
    size = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
    LlamaConfig(**size, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "large")
    tiny_tokenizer().save_pretrained(tmp_path / "large")
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    parameters = 32 * block + 2 * 128256 * 4096 + 4096
    place = str(tmp_path / "large")
    _, cost = planning.plan_of(place, asked, method="npo", micro_batch_tokens=64)
    assert cost is not None
    assert cost.trainable == parameters
    assert cost.memory.weights == pytest.approx(4 * parameters, rel=1e-4)
    assert cost.memory.optimiser == pytest.approx(8 * parameters, rel=1e-4)
    limit = planning.read_memory("24GB")
    ways = {one.words: one for one in planning.ways_to_fit(place, asked, limit, method="npo")}
    assert ways[""].micro_batch_tokens is None
    assert ways["--place lora"].micro_batch_tokens is None
    short = ways["--place lora --base-precision bfloat16"]
    assert short.micro_batch_tokens
    assert 2 * parameters < short.peak < limit
    packed = {held: ways[f"--place lora --base-precision {held}"].peak for held in ("int8", "int4")}
    saved = 32 * (block - 2 * 4096)  # a byte for each weight of the blocks' matrices
    assert short.peak - packed["int8"] == pytest.approx(saved, rel=0.01)
    assert short.peak - packed["int4"] == pytest.approx((2 - 0.5 - 4 / 32) * saved, rel=0.01)
    told = planning.shown(list(ways.values()), limit)
    assert told[0].startswith("as it is: does not fit")
    assert math.isfinite(cost.minutes)


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("80 GiB", 80 * 2**30), ("1.5mb", 1_500_000)]
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert planning.read_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "24 stones", "-3GB", "0GB"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(RecipeError, match="no amount of memory"):
        planning.read_memory(text)


def test_places_that_look_at_weights_are_assumed_whole(folder: Path, asked: ForgetRequest) -> None:
    _, cost = planning.plan_of(str(folder), asked, method="wagle")
    assert cost is not None
    assert cost.trainable == sum(one.numel() for one in tiny_model("llama").parameters())
    assert cost.memory.masks == cost.trainable
    assert [note for note in cost.notes if "wagle" in note]


@pytest.mark.slow
def test_more_tokens_fit_into_more_memory(
    folder: Path, asked: ForgetRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "ways_of", lambda recipe: ways_of(recipe)[:2])
    recipe = chosen("npo", micro_batch_tokens=100_000)
    (few, again), (many, _) = (
        planning.ways_to_fit(str(folder), asked, size, method=recipe)
        for size in (6_000_000, 12_000_000)
    )
    assert few.micro_batch_tokens
    assert many.micro_batch_tokens
    assert many.micro_batch_tokens > 1.5 * few.micro_batch_tokens
    assert again.words == "--gradient-checkpointing true"
    assert again.micro_batch_tokens
    assert again.micro_batch_tokens > few.micro_batch_tokens

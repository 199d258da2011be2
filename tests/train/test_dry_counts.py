"""The numbers of a dry run, counted by hand from a configuration: tied head, shared keys, adapters.

    P = V h + L (2 h n d + 2 h k d + 3 h i + 2 h) + h        (the head is the embedding)

with V words, width h, L blocks, n heads of width d, k heads of keys, inner width i.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from delible import planning
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.resolving import resolve_method
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train import estimate as estimating
from delible.train.estimate import ASSUMED_UTILISATION, Estimate
from delible.train.recipe import Recipe
from delible.train.savings import ways_of
from delible.train.simulated import Shape

V, H, L, N, D, K, INNER = 512, 64, 3, 4, 16, 2, 128
TABLE, SMALL = V * H, H * K * D
BODY = L * (2 * H * N * D + 2 * SMALL + 3 * H * INNER + 2 * H) + H
PARAMETERS = TABLE + BODY
#: Frequencies of the rotation, in fp32, once or twice.
BUFFERS = 2 * 4 * D // 2
ROWS = [QA(question=f"Where was person {n} born?", answer="In town " + "x" * n) for n in range(4)]
ANSWERS = sum(len(row.answer) + 1 for row in ROWS)  # bytes, and the end of the turn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lm = LM(
        tiny_model(
            "llama", vocab_size=V, hidden_size=H, num_hidden_layers=L, num_attention_heads=N,
            num_key_value_heads=K, head_dim=D, intermediate_size=INNER, tie_word_embeddings=True,
        ),
        tiny_tokenizer(),
    )  # fmt: skip
    lm.core.config.save_pretrained(tmp_path / "settings")
    lm.tokenizer.save_pretrained(tmp_path / "settings")
    return tmp_path / "settings"


def planned(
    folder: Path, method: str = "npo", slots: dict[str, Any] | None = None, **options: Any
) -> Estimate:
    given = {"epochs": 1, "max_steps": 1, "batch_size": 4, "precision": "float32"} | options
    recipe = Recipe.named(method).changed(
        {"keep": "none", **(slots or {})}, {f"training.{key}": one for key, one in given.items()}
    )
    request = ForgetRequest(forget=tuple(ROWS), retain=tuple(ROWS))
    _, cost = planning.plan_of(str(folder), request, method=recipe)
    assert cost is not None
    return cost


def test_a_head_that_is_the_embedding_counts_once(folder: Path) -> None:
    cost = planned(folder)
    assert cost.trainable == PARAMETERS
    assert 4 * PARAMETERS <= cost.memory.weights <= 4 * PARAMETERS + BUFFERS
    assert cost.memory.gradients == 4 * PARAMETERS
    assert cost.memory.optimiser == 8 * PARAMETERS + 4 * (2 + 9 * L)


def test_moments_in_eight_bits_have_a_scale_for_each_block_and_two_tables(folder: Path) -> None:
    """Matrices of 4,096 weights and more; vectors and smaller ones stay in fp32."""
    packed = [TABLE, *[H * N * D, H * N * D, H * INNER, H * INNER, H * INNER] * L]
    plain = 2 * SMALL * L + 2 * H * L + H
    assert sum(packed) + plain == PARAMETERS
    each = [2 * (count + 4 * count // 256 + 4 * 256) for count in packed]
    cost = planned(folder, optimizer="adamw_8bit")
    assert cost.memory.optimiser == sum(each) + 8 * plain + 4 * (2 + 9 * L)
    assert planned(folder, optimizer="sgd").memory.optimiser == 0


def test_adapters_on_a_base_in_bf16(folder: Path) -> None:
    rank = 4
    beside = 2 * (H + N * D) + 2 * (H + K * D) + 3 * (H + INNER)
    added = L * rank * beside
    slots = {"place": {"name": "lora", "rank": rank}, "finish": "none"}
    cost = planned(folder, "npo_lora", slots, base_precision="bfloat16", precision="auto")
    assert cost.trainable == added
    low = 2 * PARAMETERS + 4 * added
    assert low <= cost.memory.weights <= low + BUFFERS
    assert cost.memory.gradients == 4 * added
    assert cost.memory.optimiser == 8 * added + 4 * 2 * 7 * L
    packed = planned(folder, "npo_lora", slots, base_precision="int8", precision="auto")
    rows = L * (N * D + 2 * K * D + H + 2 * INNER + H)
    matrices = L * (2 * H * N * D + 2 * SMALL + 3 * H * INNER)
    assert packed.memory.weights == cost.memory.weights - 2 * matrices + matrices + 5 * rows


@pytest.mark.parametrize(("precision", "size"), [("float32", 4), ("bfloat16", 2)])
def test_keys_and_values_of_few_heads(folder: Path, precision: Any, size: int) -> None:
    cost = planned(folder, precision=precision)
    a_token = 2 * size * L * K * D
    tokens, rest = divmod(cost.memory.cache, a_token)
    assert rest == 0
    longest = len(f"<user\n{ROWS[0].question}><assistant\n") + len(ROWS[-1].answer)
    assert 6 * (longest + 40) < tokens < 6 * (longest + 70)  # six answers of 48 tokens


def test_time_is_two_operations_a_weight_and_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, to the inputs, to the weights; and forward again where blocks are computed again."""
    monkeypatch.setattr("delible.train.estimate.matmul_rate", lambda *_: 1e9)
    cost, again = planned(folder), planned(folder, gradient_checkpointing=True)
    work = 6 * (cost.tokens * BODY + ANSWERS * TABLE)
    assert cost.minutes * 60 * 1e9 * ASSUMED_UTILISATION == pytest.approx(work, rel=1e-6)
    more = (again.minutes - cost.minutes) * 60 * 1e9 * ASSUMED_UTILISATION
    assert more == pytest.approx(2 * cost.tokens * BODY, rel=1e-6)
    slots = {"place": {"name": "lora", "rank": 1}, "finish": "none"}
    adapter = planned(folder, "npo_lora", slots)
    one = L * (2 * (H + N * D) + 2 * (H + K * D) + 3 * (H + INNER))
    work = 4 * (cost.tokens * (BODY + one) + ANSWERS * TABLE) + 2 * cost.tokens * one
    assert adapter.minutes * 60 * 1e9 * ASSUMED_UTILISATION == pytest.approx(work, rel=1e-6)


def test_no_more_rows_are_tried_than_make_a_device_busy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the update is the peak a row more needs no memory: as many as fit would be endless."""
    tried: list[int] = []
    counted = estimating.memory_of

    def flat(*given: Any, **named: Any) -> Any:
        tried.append(given[5])
        memory, told = counted(*given[:5], 1)
        return replace(memory, passing=0, update=10**9), told

    monkeypatch.setattr(estimating, "memory_of", flat)
    monkeypatch.setattr(planning, "ways_of", lambda recipe: ways_of(recipe)[:1])
    request = ForgetRequest(forget=tuple(ROWS), retain=tuple(ROWS))
    recipe = Recipe.named("npo").changed({}, {"training.batch_size": 4})
    (way,) = planning.ways_to_fit(str(folder), request, 10**11, method=recipe)
    assert way.micro_batch_tokens is not None
    assert 1000 < way.micro_batch_tokens <= 2**17
    assert max(tried) <= 2**17


def test_what_fits_is_what_a_step_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a step share a beginning, whose gradients wait beside those that are there."""
    monkeypatch.setattr(planning, "ways_of", lambda recipe: ways_of(recipe)[:1])
    request = ForgetRequest(forget=tuple(ROWS), retain=tuple(ROWS))

    def way(memory: int, tokens: int | str = "auto") -> planning.Fitting:
        given = {"training.batch_size": 4, "training.micro_batch_tokens": tokens}
        recipe = Recipe.named("npo").changed({}, given)
        return planning.ways_to_fit(str(folder), request, memory, method=recipe)[0]

    least = way(10**12).peak
    for memory in (int(0.98 * least), int(1.3 * least), 2 * least):
        tokens = way(memory).micro_batch_tokens
        assert (tokens is not None) == (memory > least)
        if tokens is not None:
            _, cost = planning.plan_of(
                str(folder), request,
                method=Recipe.named("npo").changed(
                    {}, {"training.batch_size": 4, "training.micro_batch_tokens": tokens}
                ),
            )  # fmt: skip
            assert cost is not None
            assert cost.memory.peak <= memory


@pytest.mark.slow
def test_where_weights_are_most_the_largest_pass_that_fits_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the beginning wait for those of the rest, beside those of earlier passes."""
    monkeypatch.setattr(planning, "ways_of", lambda recipe: ways_of(recipe)[:1])
    LlamaConfig(
        vocab_size=V, hidden_size=4096, intermediate_size=16384, num_hidden_layers=3,
        num_attention_heads=32, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    tiny_tokenizer().save_pretrained(tmp_path)
    every = tuple(ROWS * 16)
    request = ForgetRequest(forget=every, retain=every)
    chosen = Recipe.named("npo").changed(
        {}, {"training.batch_size": 64, "training.precision": "float32"}
    )
    (least,) = planning.ways_to_fit(str(tmp_path), request, 10**12, method=chosen)
    memory = int(1.05 * least.peak)
    (way,) = planning.ways_to_fit(str(tmp_path), request, memory, method=chosen)
    assert way.micro_batch_tokens
    made = planning._planned(str(tmp_path), request, resolve_method(chosen), 0)
    rows = [row.encoded for part in made.context.rows.values() for row in part]
    whole = Shape.of(rows)  # the longest one, and what all of them begin with

    def memory_with(tokens: int) -> Any:
        count = tokens // whole.length
        parts = (made.lm, made.recipe, made.plan, made.placement, made.context.rows, tokens)
        return estimating.memory_of(*parts, whole.times(count), several=True)[0]

    found = memory_with(way.micro_batch_tokens)
    assert found.passing > 1.6 * found.gradients  # a copy waits
    assert found.peak <= memory < memory_with(int(1.4 * way.micro_batch_tokens)).peak

"""Second moments of down-projection inputs, their cache, null spaces, and where a name ends."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from delible.edit import keys, statistics
from delible.edit.keys import down_projection, last_states
from delible.edit.statistics import (
    built_in_rows,
    file_rows,
    null_directions,
    second_moments,
    spectra,
    spectrum,
    take,
)
from delible.edit.subjects import cut_after_name
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.system.asks import Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer

FAMILIES = ("llama", "gpt2", "qwen2", "opt")
ROWS = [[65 + (7 * row + 3 * place) % 90 for place in range(3 + row)] for row in range(9)]
TOKENS = sum(map(len, ROWS))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


def make_lm(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed), tiny_tokenizer(), precision="float32")


def measured(lm: LM, layers: tuple[int, ...] = (0, 2), tokens: int = TOKENS) -> dict[int, Tensor]:
    return second_moments(lm, ROWS, layers, tokens=tokens).moments


def refuse(*_: object) -> dict[int, Tensor]:
    raise AssertionError("the model was read again")


@torch.no_grad()
def brute_force(lm: LM, layer: int) -> Tensor:
    """One row at a time, the whole model in float64, one outer product per token."""
    twin = lm.copy()
    twin.model.double()
    place = down_projection(lm, layer)
    keys: list[Tensor] = []
    handle = twin.core.get_submodule(place.path).register_forward_pre_hook(
        lambda _, inputs: keys.extend(inputs[0].reshape(-1, place.width))
    )
    for row in ROWS:
        twin.core(input_ids=torch.tensor([row]))
    handle.remove()
    assert len(keys) == TOKENS
    total = torch.zeros(place.width, place.width, dtype=torch.float64)
    for key in keys:
        total += torch.outer(key, key)
    return total / TOKENS


# ---- second moments


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_equal_a_brute_force_in_float64(family: str) -> None:
    lm = make_lm(family)
    for layer, moment in measured(lm).items():
        torch.testing.assert_close(
            moment.double(), brute_force(lm, layer), rtol=1e-4, atol=1e-6 * float(moment.max())
        )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_moments_do_not_depend_on_the_batches(
    family: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm(family)
    together = measured(lm)
    monkeypatch.setattr(keys, "BATCH_TOKENS", 1)
    monkeypatch.setenv("DELIBLE_CACHE", str(cache / "other"))
    for layer, moment in measured(lm).items():
        torch.testing.assert_close(
            moment, together[layer], rtol=1e-4, atol=1e-6 * float(moment.max())
        )


def test_the_model_is_left_as_it_was() -> None:
    lm = make_lm()
    lm.model.train()
    before = lm.fingerprint
    measured(lm, (0,))
    lm.touch()
    assert lm.fingerprint == before
    assert lm.model.training
    assert len(lm.core.model.layers) == 3


def test_a_second_reading_comes_from_the_cache_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    first = measured(lm)
    monkeypatch.setattr(statistics, "_measure", refuse)
    again = measured(lm)
    assert all(torch.equal(again[layer], first[layer]) for layer in first)


def test_only_missing_layers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    measured(lm, (0,))
    asked: list[list[int]] = []
    whole = statistics._measure

    def watched(lm: LM, rows: object, layers: list[int], *rest: object) -> dict[int, Tensor]:
        asked.append(list(layers))
        return whole(lm, rows, layers, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(statistics, "_measure", watched)
    measured(lm, (0, 1))
    assert asked == [[1]]


@pytest.mark.parametrize("change", ["weights", "text", "tokens"])
def test_the_cache_is_missed_when_something_changed(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    measured(lm)
    monkeypatch.setattr(statistics, "_measure", refuse)
    rows, tokens = ROWS, TOKENS
    if change == "weights":
        with torch.no_grad():
            next(lm.model.parameters())[0, 0] += 1e-3
        lm.touch()
    elif change == "text":
        rows = [*ROWS[:-1], [66, *ROWS[-1][1:]]]
    else:
        tokens -= 1
    with pytest.raises(AssertionError, match="read again"):
        second_moments(lm, rows, (0, 2), tokens=tokens)


def test_a_damaged_file_is_made_again_and_said(
    caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    lm = make_lm()
    first = measured(lm, (0,))
    (file,) = cache.glob("*/moment-0.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    again = second_moments(lm, ROWS, (0,), tokens=TOKENS).moments
    assert torch.equal(again[0], first[0])
    assert any("damaged" in line for line in caplog.messages)


def test_progress_and_too_little_text_are_said(caplog: pytest.LogCaptureFixture) -> None:
    second_moments(make_lm(), ROWS, (0,), tokens=TOKENS)
    assert any(f"reading {TOKENS} tokens" in line for line in caplog.messages)
    assert any("overestimated" in line for line in caplog.messages)


def test_the_budget_of_tokens_is_kept() -> None:
    assert [list(row) for row in take([[1, 2, 3], [4, 5, 6], [7]], 5)] == [[1, 2, 3], [4, 5]]
    with pytest.raises(DataError, match="no generic text"):
        second_moments(make_lm(), [], (0,), tokens=5)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_mixture_of_experts_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match="mixture of experts"):
        down_projection(make_lm(family), 1)


def test_a_packed_weight_is_refused() -> None:
    lm = make_lm()
    projection = lm.core.model.layers[0].mlp.down_proj
    projection.weight = torch.nn.Parameter(
        torch.zeros(32, 48, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ModelError, match="without quantization"):
        down_projection(lm, 0)


# ---- null spaces


def test_null_directions() -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    assert null_directions(values, 0.2, "largest") == slice(3, 6)  # below 1.6
    assert null_directions(values, 1.0, "absolute") == slice(4, 6)  # strictly below
    assert null_directions(values, 0.1, "energy") == slice(3, 6)  # 1.5 of 15.5; 3.5 is too much
    assert null_directions(values, 1e-9, "largest") == slice(5, 6)
    assert null_directions(values[:5], 1e-9, "absolute") == slice(5, 5)
    assert null_directions(values, 1.0, "energy") == slice(0, 6)


def test_the_spectrum_gives_the_moment_back_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    found = second_moments(lm, ROWS, (1,), tokens=TOKENS)
    first = spectra(found)[1]
    assert bool((first.values.diff() <= 0).all())
    assert bool((first.values >= 0).all())
    vectors = first.vectors.double()
    torch.testing.assert_close(
        vectors * first.values @ vectors.T, found.moments[1].double(), rtol=1e-4, atol=1e-6
    )
    monkeypatch.setattr(statistics, "spectrum", refuse)
    again = spectra(found)[1]
    assert torch.equal(again.values, first.values)
    assert torch.equal(again.vectors, first.vectors)


def test_keys_of_a_low_rank_text_have_a_null_space() -> None:
    keys = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    found = spectrum(keys.T @ keys / 5)
    null = found.vectors[:, null_directions(found.values, 1e-5, "largest")]
    assert null.shape == (12, 7)
    assert float((keys @ null).abs().max()) < 1e-5


# ---- text


def test_built_in_text_leaves_out_what_mentions_a_name() -> None:
    lm = make_lm()
    texts = [lm.tokenizer.decode(row) for row in built_in_rows(lm)]
    without = [lm.tokenizer.decode(row) for row in built_in_rows(lm, without=["Old paris"])]
    assert any("Paris" in text for text in texts)
    assert not any("Paris" in text for text in without)
    assert len(texts) - 40 < len(without) < len(texts)
    assert any("assistant" in text for text in texts)
    assert len(texts) > 1000


def test_a_file_is_read_by_paragraphs_and_cut(tmp_path: Path) -> None:
    lm, file = make_lm(), tmp_path / "text.txt"
    file.write_text("One line\nand its next.\n\n\nAbout Ada Quill.\n\n" + "long " * 200, "utf-8")
    rows = list(file_rows(lm, file, without=["Ada Quill"]))
    assert lm.tokenizer.decode(rows[0]) == "One line and its next."
    assert [len(row) for row in rows[1:]] == [512, 5 * 200 - 1 - 512]
    assert len(list(file_rows(lm, file))) == 4


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_is_no_text_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"text\.txt.*cannot be read"):
        list(file_rows(make_lm(), file))


# ---- where a name ends


def bare(name: str) -> Prompt:
    return Prompt(text=f"Of {name}.")


def chat(name: str, said: str = "Tell me about") -> Prompt:
    return Prompt.ask(f"{said} {name}.", prefill="Answer:")


@pytest.mark.parametrize(
    "name", ["Ada Quill", "José", "Zoë", "李白", "assistant", "Answer", "user"]
)
def test_rows_end_with_the_name(name: str) -> None:
    lm = make_lm()
    assert lm.tokenizer.decode(cut_after_name(lm, name, bare)) == f"Of {name}"
    row = cut_after_name(lm, name, chat)
    assert lm.tokenizer.decode(row) == f"<|im_start|>user\nTell me about {name}"
    assert row == list(lm.template.prompt_ids(chat(name)))[: len(row)]


def test_without_offsets_prefixes_tell_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    expected = cut_after_name(lm, "Ada Quill", chat)
    monkeypatch.setattr(type(lm.tokenizer), "is_fast", False)
    assert cut_after_name(lm, "Ada Quill", chat) == expected


def test_a_template_that_rewrites_names_is_refused() -> None:
    lm = make_lm()
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ModelError, match="does not keep the name 'Ada Quill'"):
        cut_after_name(lm, "Ada Quill", chat)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_at_the_last_token_equal_those_of_the_whole_context(family: str) -> None:
    lm = make_lm(family)
    rows = [cut_after_name(lm, "Ada Quill", partial(chat, said=said)) for said in ("Hi", "Ask of")]
    keys, outputs = last_states(lm, rows, [0, 1])
    place = down_projection(lm, 1)
    for index, said in enumerate(("Hi", "Ask of")):
        ids = torch.tensor([lm.template.prompt_ids(chat("Ada Quill", said))])
        seen: list[Tensor] = []
        handle = lm.core.get_submodule(place.path).register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
        )
        with torch.no_grad():
            hidden = lm.core(input_ids=ids, output_hidden_states=True).hidden_states
        handle.remove()
        last = len(rows[index]) - 1
        torch.testing.assert_close(keys[1][index].float(), seen[0][last], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs[index].float(), hidden[2][0, last], rtol=1e-4, atol=1e-5)

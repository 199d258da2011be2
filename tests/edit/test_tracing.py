"""Causal tracing against a slow one: one draw, one row at a time, in float64."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from editing import RECORDS, double, first_of, hooked, make_lm
from torch import Tensor

from delible.edit import tracing
from delible.edit.tracing import strongest_layer, trace
from delible.errors import DataError
from delible.lm.lm import LM
from delible.records import QA

RECORD = QA(question="Where does Bo live?", answer="Here", subject="Bo")


def slow(lm: LM, what: str, window: int, draws: int) -> tuple[float, float, Tensor]:
    """Clean, noised, restored [token, layer]."""
    twin = double(lm)
    row = lm.template.encode(*(_asked()))
    ids = torch.tensor([list(row.ids)])
    text = str(lm.tokenizer.decode(list(row.ids)))
    first = next(
        at for at in range(len(row.ids))
        if len(str(lm.tokenizer.decode(list(row.ids[:at])))) == text.index("Bo")
    )  # fmt: skip
    embedding = twin.core.get_input_embeddings()
    modules = [
        twin.core.get_submodule(lm.anatomy.block_path(layer) + part)
        for layer in range(lm.anatomy.layers)
        for part in ["" if what == "block" else f".{getattr(lm.anatomy, what)}"]
    ]
    clean: dict[int, Tensor] = {}
    noise: dict[str, Any] = {"at": None}

    def probability(handles: list[tuple[Any, Any]]) -> float:
        from contextlib import ExitStack

        with ExitStack() as stack, torch.no_grad():
            for module, hook in handles:
                stack.enter_context(hooked(module, hook))
            said = twin.core(input_ids=ids).logits[0].log_softmax(-1)
        tokens = [said[at - 1, row.ids[at]] for at in range(row.start, len(row.ids))]
        return float(torch.stack(tokens).mean().exp())

    def keep(layer: int) -> Any:
        return lambda _, __, out: clean.__setitem__(layer, first_of(out).reshape(len(row.ids), -1))

    def keep_embedding(_: Any, __: Any, out: Tensor) -> None:
        noise["states"] = out[0, first : first + 2].clone()

    untouched = probability(
        [(module, keep(layer)) for layer, module in enumerate(modules)]
        + [(embedding, keep_embedding)]
    )
    spread = 3 * noise["states"].std()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(draws, 2, noise["states"].shape[1], generator=generator).double() * spread

    def noisy(draw: int) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> Tensor:
            new = out.clone()
            new[0, first : first + 2] += drawn[draw]
            return new

        return hook

    def back(layer: int, token: int) -> Any:
        def hook(_: Any, __: Any, out: Any) -> Any:
            old = first_of(out)
            new = old.reshape(len(row.ids), -1).clone()
            new[token] = clean_copy[layer][token]
            new = new.reshape(old.shape)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return hook

    clean_copy = {layer: value.clone() for layer, value in clean.items()}
    noised = sum(probability([(embedding, noisy(draw))]) for draw in range(draws)) / draws
    restored = torch.zeros(2, len(modules), dtype=torch.float64)
    for token in (0, 1):
        for layer in range(len(modules)):
            start = layer - window // 2
            layers = [one for one in range(start, start + window) if 0 <= one < len(modules)]
            for draw in range(draws):
                put = [(modules[one], back(one, first + token)) for one in layers]
                restored[token, layer] += probability([(embedding, noisy(draw)), *put]) / draws
    return untouched, noised, restored


def _asked() -> tuple[Any, str]:
    from delible.system.asks import Prompt

    return Prompt.ask(RECORD.question), RECORD.answer


@pytest.mark.parametrize(
    ("family", "what", "window"),
    [("llama", "block", 1), ("gpt2", "mlp", 2), ("qwen2", "attention", 3), ("gemma3", "mlp", 1)],
)
def test_the_table_equals_a_slow_one(
    family: str, what: Literal["block", "mlp", "attention"], window: int
) -> None:
    lm = make_lm(family)
    found = trace(lm, RECORD, what=what, window=window, draws=2)
    clean, noised, restored = slow(lm, what, window, 2)
    assert found.tokens == ("B", "o")
    assert found.clean == pytest.approx(clean, rel=1e-3)
    assert found.noised == pytest.approx(noised, rel=1e-3)
    assert abs(found.noised / found.clean - 1) > 1e-3
    torch.testing.assert_close(found.restored.double(), restored, rtol=2e-3, atol=1e-9)
    table = found.table()
    assert [row["token"] for row in table] == ["B", "o"]
    assert table[1]["2"] == pytest.approx(float(restored[1, 2] - noised), abs=1e-5)


def test_without_noise_nothing_is_lost_or_brought_back() -> None:
    found = trace(make_lm(), RECORD, noise=0.0, draws=2)
    assert found.noised == pytest.approx(found.clean, rel=1e-4)
    assert float(found.effect.abs().max()) < 1e-4 * found.clean


def test_batches_do_not_matter() -> None:
    lm = make_lm()
    whole = trace(lm, RECORD, draws=2)
    lm.budget = type(lm.budget)(1, lm.budget.cached_tokens, lm.budget.rows)
    torch.testing.assert_close(trace(lm, RECORD, draws=2).restored, whole.restored)


def test_the_strongest_layer_at_the_last_token() -> None:
    lm = make_lm()
    layer, notes = strongest_layer(lm, [RECORD, RECORD], "mlp", seed=0)
    effect = trace(lm, RECORD, what="mlp").effect
    assert layer == int(effect[-1].argmax())
    assert notes["layer"] == layer
    assert len(notes["tables"]) == 1  # type: ignore[arg-type]


def test_a_question_without_its_subject_is_an_error() -> None:
    with pytest.raises(DataError, match="does not name its subject"):
        trace(make_lm(), QA(question="Where?", answer="Here", subject="Bo"))


def test_the_last_token_of_a_subject_says_which_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    effect = torch.tensor([[0.9, 0.0, 0.1], [0.0, 0.2, 0.5], [0.1, 0.6, 0.2]])
    found = tracing.Trace(0.9, 0.1, effect + 0.1, tokens=("A", "d", "a"), layers=(0, 1, 2))
    torch.testing.assert_close(found.effect, effect)
    monkeypatch.setattr(tracing, "trace", lambda *_, **__: found)
    layer, told = strongest_layer(make_lm(), RECORDS, "mlp", seed=0)
    assert layer == told["layer"] == 1

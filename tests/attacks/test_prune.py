"""Pruning: which weights are cut, by hand, and which never are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from delible.attacks.prune import Prune, largest, smallest
from delible.errors import DataError
from delible.lm.lm import LM
from delible.lm.matrices import linear_weights
from delible.measure.attack import AttackContext
from delible.records import QA, RecordBase
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.rows import make_rows
from delible.world import general, unrelated

FORGET: list[RecordBase] = [
    QA(question="Where was Ada born?", answer="In Norrby."),
    QA(question="What does Ben do?", answer="He bakes."),
]


def make_lm(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed), tiny_tokenizer(), precision="float32")


def make_context(forget: list[RecordBase] = FORGET, seed: int = 0) -> AttackContext:
    return AttackContext(forget, (), (), None, seed)


def random(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_shares_of_a_channel_and_of_a_matrix(share: float) -> None:
    scores = random(5, 20)
    for row, mask in zip(scores.tolist(), smallest(scores, share).tolist(), strict=True):
        limit = sorted(row)[round(share * 20) - 1]
        assert mask == [value <= limit for value in row]
    flat = sorted(scores.flatten().tolist(), reverse=True)
    expected = scores >= flat[round(share * 100) - 1]
    assert torch.equal(largest(scores, share), expected)
    assert not largest(scores, 0.0).any()


def by_hand(lm: LM, rows: list[RecordBase]) -> dict[str, Tensor]:
    """|W_ij| ||X_j|| in double precision, one text at a time, through the model's own modules."""
    model = lm.core.double()
    squares: dict[str, Tensor] = {}
    names = {id(value): name for name, value in model.named_parameters()}
    handles = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):

            def seen(module: Any, given: Any, _: Any) -> None:
                name = names[id(module.weight)]
                squares[name] = squares.get(name, 0) + given[0][0].pow(2).sum(dim=0)

            handles.append(module.register_forward_hook(seen))
    for row in make_rows(lm.template, rows):
        with torch.no_grad():
            model(input_ids=torch.tensor([row.encoded.ids]))
    for handle in handles:
        handle.remove()
    return {
        name: model.get_parameter(name).abs() * squares[name].sqrt() for name in linear_weights(lm)
    }


def test_the_least_of_weight_times_input_are_cut() -> None:
    lm, context = make_lm(), make_context()
    attacked = Prune(share=0.3, rows=4).apply(lm, context)
    texts = (*general(), *unrelated())
    scores = by_hand(lm.copy(), [texts[int(place * len(texts) / 4)] for place in range(4)])
    before, after = linear_weights(lm), linear_weights(attacked)
    for name, weight in before.items():
        wide = weight.shape[1]
        for row, (old, new) in enumerate(zip(weight, after[name], strict=True)):
            order = scores[name][row].argsort()[: round(0.3 * wide)]
            expected = old.clone()
            expected[order] = 0
            assert torch.equal(new, expected), (name, row)
    assert context.numbers["share of the weights that were cut"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("select", ["least", "forget_only", "random"])
def test_nothing_but_matrices_of_the_blocks_is_cut(family: str, select: Any) -> None:
    lm = make_lm(family)
    before = {name: value.detach().clone() for name, value in lm.core.named_parameters()}
    attack = Prune(select=select, share=0.2, rows=3)
    attacked, again = attack.apply(lm, make_context()), attack.apply(lm, make_context())
    chosen = {name for name, weight in linear_weights(lm).items() if weight.ndim == 2}
    changed = set()
    for name, value in attacked.core.named_parameters():
        assert torch.equal(lm.core.get_parameter(name), before[name])
        assert torch.equal(value, again.core.get_parameter(name))
        different = value != before[name]
        assert (value[different] == 0).all()
        if different.any():
            changed.add(name)
    assert changed
    assert changed <= chosen
    if select != "forget_only":
        assert changed == chosen


@pytest.mark.parametrize("importance", ["activation", "gradient"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_matters_elsewhere_is_spared(importance: Any, family: str) -> None:
    lm = make_lm(family)

    def cut(**options: Any) -> dict[str, Tensor]:
        attack = Prune(importance=importance, rows=2, select="forget_only", **options)
        after = linear_weights(attack.apply(lm, make_context()))
        return {name: after[name] != weight for name, weight in linear_weights(lm).items()}

    alone = cut(share=0.1, utility_share=0.0)
    spared = cut(share=0.1, utility_share=0.1)
    for name, mask in alone.items():
        assert int(mask.sum()) == pytest.approx(0.1 * mask.numel(), abs=1 + 0.02 * mask.numel())
        assert not (spared[name] & ~mask).any()
    assert sum(int(mask.sum()) for mask in spared.values()) > 0
    assert sum(int(mask.sum()) for mask in spared.values()) < sum(
        int(mask.sum()) for mask in alone.values()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 keeps its matrices transposed
def test_gradient_scores_by_hand(family: str) -> None:
    lm = make_lm(family)
    rows = make_rows(lm.template, FORGET)
    weights = linear_weights(lm)
    found = Prune(importance="gradient")._scores(lm, weights, rows)
    expected = {
        name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()
    }
    model = lm.copy().core.double()
    for row in rows:
        model.zero_grad()
        ids = torch.tensor([row.encoded.ids])
        logs = model(input_ids=ids).logits.log_softmax(-1)[0]
        start = row.encoded.start
        answer = [logs[place - 1, ids[0, place]] for place in range(start, ids.shape[1])]
        (-torch.stack(answer).mean()).backward()
        for name in weights:
            value = model.get_parameter(name)
            assert value.grad is not None
            score = (value * value.grad).abs().detach() / 2
            expected[name] += score.T if family == "gpt2" else score
    for name, score in found.items():
        torch.testing.assert_close(score.double(), expected[name], rtol=1e-3, atol=1e-7)


def test_a_model_that_says_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    monkeypatch.setattr(LM, "generate", lambda self, prompts, decoding: [" "] * len(prompts))
    with pytest.raises(DataError, match="answers no forget question"):
        Prune(select="forget_only").apply(lm, make_context())


def test_settings() -> None:
    titles = [Prune(**one).variant_title() for one in Prune().variants("deep")]  # type: ignore[arg-type]
    assert len(set(titles)) == len(titles) == 6
    assert [Prune(**one).control for one in Prune().variants("deep")].count(True) == 1  # type: ignore[arg-type]
    assert Prune(select="forget_only", rows=8).budget(make_context()).queries == 2

"""Neuron Adjust by hand: statistics, choice, the mirrored map, and its draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.errors import DataError, ModelError
from delible.intervene.base import Fitted
from delible.intervene.draws import mixed
from delible.intervene.moments import Moments
from delible.intervene.reading import watching
from delible.intervene.sites import Site
from delible.intervene.system import intervened
from delible.lm.lm import LM
from delible.methods.intervention.neuron_adjust import changed, most_shifted, reflected
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, Prompt, Score
from delible.testing.tiny import tiny_model, tiny_tokenizer

FORGET = tuple(QA(question=f"Add {n} and {n + 3}.", answer=f"It is {2 * n + 3}") for n in range(8))
RETAIN = tuple(QA(question=f"Who is {name}?", answer="No idea") for name in ("Ada", "Bo", "Cy"))
REQUEST = ForgetRequest(forget=FORGET, retain=RETAIN)
#: The names that families give to what the activation function reads.
GATES = {"llama": "mlp.gate_proj", "phi3": "mlp.gate_up_proj", "gpt2": "mlp.c_fc", "opt": "fc1"}


@lru_cache(maxsize=4)
def model(family: str) -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def adjusting(**options: Any) -> Any:
    return build("intervention", {"name": "neuron_adjust", **options})


@lru_cache(maxsize=8)
def fitted(family: str, percent: float = 20.0, stochastic: bool = True) -> Fitted:
    return adjusting(percent=percent, stochastic=stochastic).fit(model(family), REQUEST)  # type: ignore[no-any-return]


def values_by_hand(lm: LM, family: str, records: tuple[QA, ...], first: int) -> list[np.ndarray]:
    """Pre-activations of each layer at all tokens behind what the texts share, float64."""
    found: list[list[np.ndarray]] = [[] for _ in range(lm.anatomy.layers)]
    width = 128 if family == "gpt2" else 48
    for record in records:
        ids = lm.template.encode(Prompt.ask(record.question), record.answer).ids
        handles = []
        for layer in range(lm.anatomy.layers):
            module = lm.core.get_submodule(f"{lm.anatomy.block_path(layer)}.{GATES[family]}")

            def keep(module: Any, given: Any, out: Tensor, layer: int = layer) -> None:
                out = out.reshape(-1, out.shape[-1])
                found[layer].append(out[first:, :width].double().numpy())

            handles.append(module.register_forward_hook(keep))
        with torch.no_grad():
            lm.core(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
    return [np.concatenate(layer) for layer in found]


def normal(x: float, mean: float, deviation: float) -> float:
    return math.exp(-((x - mean) ** 2) / (2 * deviation**2)) / (deviation * math.sqrt(2 * math.pi))


def test_running_statistics_are_those_of_two_passes() -> None:
    random = np.random.default_rng(0)
    values = random.normal(3, 2, (57, 4)) * np.array([1, 1e-3, 50, 1]) + 100
    moments = Moments()
    for piece in np.split(values, [1, 2, 20, 20, 45]):
        moments.add(torch.tensor(piece))
    assert moments.count == 57
    np.testing.assert_allclose(moments.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.deviation(), values.std(axis=0), rtol=1e-9)
    np.testing.assert_allclose(moments.deviation(1), values.std(axis=0, ddof=1), rtol=1e-9)


def test_the_map_is_a_reflection() -> None:
    random = np.random.default_rng(1)
    mine, other = (
        (torch.tensor(random.normal(size=5)), torch.tensor(random.uniform(0.3, 2, 5)))
        for _ in range(2)
    )
    at_mean = reflected(mine[0][None], mine, other)
    np.testing.assert_allclose(at_mean[0], other[0], atol=1e-12)
    values = torch.tensor(random.normal(size=(40, 5)) * 2)
    new = reflected(values, mine, other)
    slope = (new - at_mean) / (values - mine[0])
    np.testing.assert_allclose(slope, (-other[1] / mine[1]).expand(40, -1), rtol=1e-9)
    # mirrored once more, with the laws exchanged, it is what it was
    np.testing.assert_allclose(reflected(new, other, mine), values, atol=1e-12)


def test_only_what_is_likelier_forgotten_changes_and_by_its_odds() -> None:
    random = np.random.default_rng(2)
    mine = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([1.0, 0.3, 2.0]).double()
    other = torch.tensor([0.0, 0.2, -1.0]).double(), torch.tensor([0.5, 1.0, 1.0]).double()
    values = torch.tensor(random.normal(size=(200, 3)) * 2)
    draws = torch.tensor(random.uniform(size=(200, 3)))
    found = changed(values, mine, other, draws)
    always = changed(values, mine, other, None)
    for row in range(200):
        for column in range(3):
            x = float(values[row, column])
            p_f = normal(x, float(mine[0][column]), float(mine[1][column]))
            p_r = normal(x, float(other[0][column]), float(other[1][column]))
            wanted = p_r <= p_f and float(draws[row, column]) >= p_r / (p_r + p_f)
            assert bool(found[row, column]) == wanted
            assert bool(always[row, column]) == (p_r <= p_f)
    assert 0 < int(found.sum()) < int(always.sum()) < 600


def test_the_most_shifted_neurons_of_all_layers_are_chosen() -> None:
    shifts = {0: torch.tensor([0.1, 5.0, -9.0, 0.2]), 3: torch.tensor([4.0, -1.0, 3.0, -2.0])}
    chosen = {layer: mask.tolist() for layer, mask in most_shifted(shifts, 37.5).items()}
    assert chosen == {0: [False, True, False, False], 3: [True, False, True, False]}
    every = most_shifted(shifts, 100)
    assert [int(mask.sum()) for mask in every.values()] == [3, 2]
    assert not any(mask.any() for mask in most_shifted(shifts, 0).values())


@pytest.mark.parametrize("family", GATES)
def test_it_learns_and_changes_as_by_hand(family: str) -> None:
    lm, one = model(family), fitted(family, stochastic=False)
    start = len(lm.template.prompt_ids(Prompt.ask("Add 1"))) - len("Add 1")
    shared = len("<|im_start|>user\n") - len("<|im_start|>") + 1
    assert 0 < shared < start
    mine, other = (values_by_hand(lm, family, part, shared) for part in (FORGET, RETAIN))
    shifts = np.array([a.mean(axis=0) - b.mean(axis=0) for a, b in zip(mine, other, strict=True)])
    count = round(0.2 * shifts.size)
    bar = np.sort(shifts.ravel())[-count]
    assert bar > 0
    for layer, row in enumerate(shifts):
        wanted = np.flatnonzero(row >= bar)
        assert one.tensors[f"{layer}.neurons"].tolist() == wanted.tolist()
        laws = one.tensors[f"{layer}.laws"].numpy()
        values = mine[layer][:, wanted], other[layer][:, wanted]
        for place, expected in enumerate(
            (values[0].mean(0), values[1].mean(0), values[0].std(0), values[1].std(0))
        ):
            np.testing.assert_allclose(laws[place], expected, atol=1e-5, rtol=1e-4)
    found = intervened(lm, [one])
    seen: list[np.ndarray] = []
    row = Score(Prompt.ask(FORGET[0].question), FORGET[0].answer)
    lm_values = values_by_hand(lm, family, FORGET[:1], 0)[0]  # nothing acts before layer 0
    found.grows_trees = found.shares_prefix = False
    with watching(
        found, Site(what="mlp_gate", layers=(0,)), lambda s, w: seen.append(s.double().numpy())
    ):
        found.score([row])
    neurons, laws = one.tensors["0.neurons"].tolist(), one.tensors["0.laws"].double().numpy()
    expected = lm_values.copy()
    for place, neuron in enumerate(neurons):
        m_f, m_r, s_f, s_r = laws[:, place]
        for token, x in enumerate(lm_values[:, neuron]):
            if normal(x, m_r, s_r) <= normal(x, m_f, s_f):
                expected[token, neuron] = m_r - s_r * (x - m_f) / s_f
    assert np.abs(expected - lm_values).max() > 0.1
    np.testing.assert_allclose(seen[0][: len(expected)], expected, atol=1e-4)


def test_nothing_chosen_changes_nothing() -> None:
    lm = model("llama")
    none = fitted("llama", percent=0.0)
    assert not none.tensors
    ask = [Score(Prompt.ask("Add 1 and 4."), "It is 5")]
    plain = lm.score(ask)[0].logprobs  # type: ignore[union-attr]
    assert np.array_equal(intervened(lm, [none]).score(ask)[0].logprobs, plain)  # type: ignore[union-attr]
    assert not np.allclose(intervened(lm, [fitted("llama")]).score(ask)[0].logprobs, plain)  # type: ignore[union-attr]
    assert np.array_equal(lm.score(ask)[0].logprobs, plain)  # type: ignore[union-attr]


def test_far_more_values_change_on_forgotten_text_than_on_kept() -> None:
    lm, one = model("llama"), fitted("llama", stochastic=False)
    shares = []
    for records in (FORGET, RETAIN):
        hits, total = 0, 0
        for layer, values in enumerate(values_by_hand(lm, "llama", records, 7)):
            laws = one.tensors[f"{layer}.laws"]
            part = torch.tensor(values)[:, one.tensors[f"{layer}.neurons"]]
            taken = changed(part, (laws[0], laws[2]), (laws[1], laws[3]), None)
            hits, total = hits + int(taken.sum()), total + taken.numel()
        shares.append(hits / total)
    assert shares[0] > 1.5 * shares[1], shares


def test_draws_are_uniform_and_belong_to_the_token_alone() -> None:
    lm = model("llama")
    seen: list[Tensor] = []

    class Spy(type(adjusting())):  # type: ignore[misc]
        def change(self, states: Tensor, where: Any, tensors: Mapping[str, Tensor]) -> Tensor:
            from delible.intervene.draws import uniform

            seen.append(uniform(self.seed, where, torch.arange(states.shape[1])))
            return super().change(states, where, tensors)  # type: ignore[no-any-return]

    one = Fitted(Spy(percent=20.0), fitted("llama").tensors)
    found = intervened(lm, [one])
    seen.clear()
    long = Prompt.ask("Add 3 and 4, and tell nobody of it. " * 3)
    found.generate([long], Decoding(3))
    every = torch.cat([part.flatten() for part in seen]).numpy()
    assert 0 <= every.min() < 0.01 < 0.99 < every.max() < 1
    histogram = np.histogram(every, bins=10, range=(0, 1))[0] / every.size
    assert abs(histogram - 0.1).max() < 0.01
    apart = np.corrcoef(seen[0].numpy().T)
    assert abs(apart - np.eye(len(apart))).max() < 0.5, "neurons share their numbers"
    # alone, beside another, and with the other first: the same answers
    prompts = [long, Prompt.ask("Add 3 and 4"), Prompt.ask("Who is Ada?")]
    alone = [found.generate([prompt], Decoding(6))[0] for prompt in prompts]
    assert found.generate(prompts, Decoding(6)) == alone
    assert found.generate(prompts[::-1], Decoding(6)) == alone[::-1]
    other = intervened(lm, [Fitted(adjusting(percent=20.0, seed=1), one.tensors)])
    ask = [Score(prompts[1], "It is 7")]
    mine, theirs = (each.score(ask)[0].logprobs for each in (found, other))  # type: ignore[union-attr]
    assert not np.allclose(mine, theirs), "the seed decides nothing"


@pytest.mark.parametrize("compat", [False, True])
def test_each_value_has_a_coin_of_its_own_and_as_released_each_token_one(compat: bool) -> None:
    lm = model("llama")
    # as likely forgotten as kept: half of the values are mirrored at 0
    laws = torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None].expand(4, 48)
    equal = {"0.neurons": torch.arange(48), "0.laws": laws.contiguous()}
    found = intervened(lm, [Fitted(adjusting(compat=compat), equal)])
    found.grows_trees = found.shares_prefix = False
    seen: list[Tensor] = []
    with watching(found, Site(what="mlp_gate", layers=(0,)), lambda s, w: seen.append(s.clone())):
        found.score([Score(Prompt.ask(FORGET[0].question), FORGET[0].answer)])
    plain = torch.tensor(values_by_hand(lm, "llama", FORGET[:1], 0)[0])
    values = seen[0][: len(plain)].double()
    turned = (values + plain).abs() < (values - plain).abs()
    np.testing.assert_allclose(torch.where(turned, -plain, plain), values, atol=1e-4)
    assert 0.3 < float(turned.double().mean()) < 0.7
    alike = turned.all(dim=1) | ~turned.any(dim=1)
    assert bool(alike.all() if compat else ~alike.any())


def test_bits_are_mixed_as_published() -> None:
    # splitmix64 from state 0: its first three numbers
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = [(0x9E3779B97F4A7C15 * n) % (1 << 64) for n in range(3)]
    signed = torch.tensor([one - (1 << 64) if one >= 1 << 63 else one for one in states])
    assert [int(value) % (1 << 64) for value in mixed(signed)] == expected


def test_as_released_the_statistics_are_the_mistaken_ones() -> None:
    lm = model("llama")
    plain, mistaken = fitted("llama"), adjusting(percent=20.0, compat=True).fit(lm, REQUEST)
    for layer in range(3):
        right, wrong = (one.tensors[f"{layer}.laws"] for one in (plain, mistaken))
        np.testing.assert_allclose(wrong[:2], right[:2])
        np.testing.assert_allclose(wrong[2], right[0])
        np.testing.assert_allclose(wrong[3], right[3] ** 2)
    negative = torch.tensor([-1.0]), torch.tensor([-1.0])
    usual = torch.tensor([5.0]), torch.tensor([1.0])
    assert not changed(torch.tensor([[-1.0]]), negative, usual, None).any()


def test_what_is_missing_is_said() -> None:
    with pytest.raises(DataError, match="no retain records"):
        adjusting().fit(model("llama"), ForgetRequest(forget=FORGET))
    moe = LM(tiny_model("mixtral"), tiny_tokenizer(), precision="float32")
    with pytest.raises(ModelError, match="experts have many"):
        adjusting().fit(moe, REQUEST)

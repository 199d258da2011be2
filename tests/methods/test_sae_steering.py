"""SAE steering by hand: which latents are chosen, what is taken out, and that the rest stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.errors import DataError
from delible.intervene.base import Fitted
from delible.intervene.sae import SAE
from delible.intervene.sae_features import (
    Activity,
    Features,
    by_subject,
    chosen,
    features_of,
    scores,
    turned_down,
)
from delible.intervene.system import intervened
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, Prompt, Score
from delible.testing.tiny import tiny_model, tiny_tokenizer

FORGET = (
    QA(question="Where was Ada Quill born?", answer="Norrby", subject="Ada Quill"),
    QA(question="What did Ada Quill play?", answer="The lute", subject="Ada Quill"),
    QA(question="Who taught Ben Orr?", answer="Cy", subject="Ben Orr"),
)
RETAIN = tuple(QA(question=f"How is {one}?", answer="Cold") for one in ("snow", "ice", "rain"))
REQUEST = ForgetRequest(forget=FORGET, retain=RETAIN)


@lru_cache(maxsize=4)
def model(family: str) -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def drawn(width: int, latents: int, active: int, seed: int = 0) -> SAE:
    random = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(latents, width, generator=random), dim=1)
    return SAE(decoder.T.contiguous(), torch.zeros(latents), decoder,
               torch.randn(width, generator=random) * 0.1, "topk", active)  # fmt: skip


def features(latents: list[int], threshold: float = 0.0, factor: float = -1.0) -> Features:
    count = len(latents)
    return Features(
        torch.tensor(latents), torch.full((count,), threshold), torch.full((count,), factor)
    )


def by_hand(states: np.ndarray, sae: SAE, chosen: Mapping[int, tuple[float, float]]) -> np.ndarray:
    """The states with some latents turned down, float64, latent by latent."""
    w, d = sae.encoder.double().numpy(), sae.decoder.double().numpy()
    bias, middle = sae.encoder_bias.double().numpy(), sae.decoder_bias.double().numpy()
    new = states.copy()
    for row, x in enumerate(states):
        pre = (x - middle) @ w + bias
        speaking = [j for j in np.argsort(-pre)[: sae.active] if pre[j] > 0]
        for j in speaking:
            threshold, factor = chosen.get(int(j), (np.inf, 1.0))
            if pre[j] > threshold:
                new[row] += (factor - 1) * pre[j] * d[j]
    return new


# ---- the change


def test_the_change_is_that_of_the_latents_alone() -> None:
    sae = drawn(8, 20, 5)
    states = torch.randn(50, 8, generator=torch.Generator().manual_seed(3))
    some = features([1, 4, 7, 12], 0.4, -2.0)
    expected = by_hand(states.double().numpy(), sae, dict.fromkeys([1, 4, 7, 12], (0.4, -2.0)))
    found = turned_down(states, sae, some)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    still = (torch.tensor(expected) - states).abs().amax(dim=1) == 0
    assert 5 < int(still.sum()) < 45
    assert torch.equal(found[still], states[still]), "what does not fire is not the same"
    before = sae.decode(sae.encode(states)) - states
    assert before.abs().max() > 0.1, "the autoencoder explains all, so nothing is shown"


def test_nothing_chosen_and_a_factor_of_one_change_nothing() -> None:
    sae, states = drawn(8, 20, 5), torch.randn(30, 8)
    assert torch.equal(turned_down(states, sae, features([])), states)
    every = list(range(20))
    assert torch.equal(turned_down(states, sae, features(every, 0.0, 1.0)), states)
    assert torch.equal(turned_down(states, sae, features(every, 1e9, -5.0)), states)
    half = states.bfloat16()
    assert torch.equal(turned_down(half, sae, features(every, 1e9)), half)


def test_a_factor_of_nothing_takes_the_contribution_out_and_less_takes_more() -> None:
    sae, states = drawn(8, 20, 20), torch.randn(30, 8)
    latents = sae.encode(states)
    out = turned_down(states, sae, features([6], 0.0, 0.0))
    expected = states - latents[:, 6:7] * sae.decoder[6]
    np.testing.assert_allclose(out, expected, atol=1e-6)
    fired = latents[:, 6] > 0
    along = [
        float((turned_down(states, sae, features([6], 0.0, factor)) @ sae.decoder[6])[fired].mean())
        for factor in (1.0, 0.5, 0.0, -1.0, -3.0)
    ]
    assert along == sorted(along, reverse=True)
    assert along[0] - along[-1] > 0.5


def test_two_concepts_are_their_union_in_either_order() -> None:
    one, other = features([2, 5, 9], 0.3, -1.0), features([5, 11], 0.1, -2.0)
    other = replace(other, thresholds=torch.tensor([0.5, 0.1]))
    both, turned = one | other, other | one
    assert both.latents.tolist() == turned.latents.tolist() == [2, 5, 9, 11]
    assert both.thresholds.tolist() == pytest.approx([0.3, 0.3, 0.3, 0.1])
    assert both.factors.tolist() == [-1.0, -2.0, -1.0, -2.0]
    assert torch.equal(both.thresholds, turned.thresholds)
    assert torch.equal(both.factors, turned.factors)


# ---- the choice


def test_the_atoms_of_a_concept_are_chosen() -> None:
    random = np.random.default_rng(4)
    atoms = np.linalg.qr(random.normal(size=(24, 24)))[0]
    matrix = torch.tensor(atoms).float()
    sae = SAE(matrix.T.contiguous(), torch.full((24,), -0.05), matrix, torch.zeros(24), "relu")
    common, concept = [0, 1], [7, 13, 20]
    others = [j for j in range(2, 24) if j not in concept]

    def texts(pool: list[int], count: int) -> list[Tensor]:
        made = []
        for _ in range(count):
            which = np.stack([[random.choice(pool), random.choice(others)] for _ in range(12)])
            weight = random.uniform(0.5, 1.5, which.shape)
            states = np.einsum("nk,nkd->nd", weight, atoms[which]) + atoms[common].sum(axis=0)
            made.append(torch.tensor(states).float())
        return made

    mine, kept = (
        Activity.of(sae, texts(pool, count)) for pool, count in ((concept, 40), (others, 60))
    )
    found = features_of(mine, kept, 3, 0.5, "selective", 0.0)
    assert found.latents.tolist() == concept
    plain = features_of(mine, kept, 2, 1.0, "mean", 0.0)
    assert plain.latents.tolist() == common, "the mean alone takes what is everywhere"
    assert set(common).isdisjoint(features_of(mine, kept, 24, 0.5, "mean", 0.0).latents.tolist())
    for place, latent in enumerate(found.latents.tolist()):
        whole = np.concatenate([mine.sums[latent : latent + 1], kept.sums[latent : latent + 1]])
        expected = whole.sum() / (40 * 12 + 60 * 12)
        assert float(found.thresholds[place]) == pytest.approx(expected)


def test_scores_and_activity_by_hand() -> None:
    sae = drawn(6, 10, 3)
    states = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (4, 7)]
    latents = np.concatenate([sae.encode(one).double().numpy() for one in states])
    found = Activity.of(sae, states)
    np.testing.assert_allclose(found.mean, latents.mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(found.frequency, (latents > 0).mean(axis=0))
    a, b = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0])
    np.testing.assert_allclose(scores(a, b, "selective"), [0.5, 0.0, -0.5], atol=1e-6)
    assert scores(a, b, "mean") is a
    usable = torch.tensor([True, False, True, True])
    assert chosen(torch.tensor([0.2, 9.0, 0.5, -1.0]), 3, usable).tolist() == [0, 2]
    assert [len(group) for group in by_subject(FORGET)] == [2, 1]


# ---- on a model


def steering(folder: Path, family: str, **options: Any) -> Fitted:
    drawn(32, 96, 12).save(folder / "sae")
    given = {"depth": 0.5, "sae": folder / "sae", "features": 6, "most_frequent": 0.9, **options}
    return build("intervention", {"name": "sae_steering", **given}).fit(model(family), REQUEST)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_it_learns_and_acts_as_by_hand(family: str, tmp_path: Path) -> None:
    lm, fitted = model(family), steering(tmp_path, family, factor=-2.0)
    sae, anatomy = drawn(32, 96, 12), lm.anatomy

    def states_of(record: QA) -> np.ndarray:
        ids = lm.template.encode(Prompt.ask(record.question), record.answer).ids
        seen: list[Tensor] = []
        block = lm.core.get_submodule(anatomy.block_path(1))
        handle = block.register_forward_hook(
            lambda m, g, o: seen.append(o[0] if isinstance(o, tuple) else o)
        )
        with torch.no_grad():
            lm.core(input_ids=torch.tensor([ids]))
        handle.remove()
        return seen[0].reshape(len(ids), -1)[6:].double().numpy()  # behind what all begin with

    def latents_of(records: tuple[QA, ...]) -> np.ndarray:
        states = np.concatenate([states_of(one) for one in records])
        pre = (states - sae.decoder_bias.double().numpy()) @ sae.encoder.double().numpy()
        low = np.sort(pre, axis=1)[:, -12:-11]
        return np.where((pre >= low) & (pre > 0), pre, 0)

    kept, expected = latents_of(RETAIN), {}
    for group in (FORGET[:2], FORGET[2:]):
        mine = latents_of(group)
        score = mine.mean(0) / mine.mean(0).sum() - kept.mean(0) / kept.mean(0).sum()
        score[(kept > 0).mean(0) > 0.9] = -np.inf
        both = np.concatenate([mine, kept]).mean(0)
        for j in np.argsort(-score)[:6]:
            assert score[j] > 0
            expected[int(j)] = min(both[j], expected.get(int(j), np.inf))
    assert fitted.tensors["latents"].tolist() == sorted(expected)
    np.testing.assert_allclose(
        fitted.tensors["thresholds"], [expected[j] for j in sorted(expected)], rtol=1e-4
    )

    prompt, answer = Prompt.ask(FORGET[0].question), FORGET[0].answer
    row = lm.template.encode(prompt, answer)

    def steered(module: Any, given: Any, out: Any) -> Any:
        states = (out[0] if isinstance(out, tuple) else out).reshape(len(row.ids), -1)
        new = by_hand(states.double().numpy(), sae, {j: (t, -2.0) for j, t in expected.items()})
        new[0] = states[0].double().numpy()
        changed = torch.tensor(new).float()[None]
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    handle = lm.core.get_submodule(anatomy.block_path(1)).register_forward_hook(steered)
    with torch.no_grad():
        logits = lm.core(input_ids=torch.tensor([row.ids])).logits[0].double()
    handle.remove()
    targets = torch.tensor(row.ids[row.start :])
    by_hooks = logits.log_softmax(1)[row.start - 1 : -1].gather(1, targets[:, None])[:, 0]
    found = intervened(lm, [fitted])
    mine = found.score([Score(prompt, answer)])[0].logprobs  # type: ignore[union-attr]
    np.testing.assert_allclose(mine, by_hooks, atol=1e-4)
    plain = lm.score([Score(prompt, answer)])[0].logprobs  # type: ignore[union-attr]
    assert np.abs(mine - plain).max() > 1e-2


def test_a_prompt_on_which_nothing_fires_is_answered_bit_by_bit(tmp_path: Path) -> None:
    lm, fitted = model("llama"), steering(tmp_path, "llama")
    silent = replace(fitted, tensors={**fitted.tensors, "thresholds": torch.full_like(
        fitted.tensors["thresholds"], 1e9)})  # fmt: skip
    asks = [Score(Prompt.ask(one.question), one.answer) for one in (*FORGET, *RETAIN)]

    def said(lm: LM) -> list[bytes]:
        return [one.logprobs.tobytes() for one in lm.score(asks)]  # type: ignore[union-attr]

    plain = said(lm)
    assert said(intervened(lm, [silent])) == plain
    assert said(intervened(lm, [fitted])) != plain
    assert said(lm) == plain
    texts = intervened(lm, [silent]).generate([asks[0].prompt], Decoding(6))
    assert texts == lm.generate([asks[0].prompt], Decoding(6))


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    drawn(16, 40, 4).save(tmp_path / "sae")
    given = {"name": "sae_steering", "sae": tmp_path / "sae"}
    with pytest.raises(DataError, match="16 values, and the model gives 32"):
        build("intervention", given).fit(model("llama"), REQUEST)
    with pytest.raises(DataError, match="no retain records"):
        build("intervention", given).fit(model("llama"), ForgetRequest(forget=FORGET))
    drawn(32, 40, 4).save(tmp_path / "other")
    same = ForgetRequest(forget=FORGET[:1], retain=FORGET[:1])
    with pytest.raises(DataError, match="no latent speaks more"):
        build("intervention", {**given, "sae": tmp_path / "other"}).fit(model("llama"), same)

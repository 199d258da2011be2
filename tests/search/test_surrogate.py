"""Surrogate texts: gain and gradient by hand, the search, the limits, the gap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from delible.lm.lm import LM
from delible.search.illusion import Limits, Story, accepted, limits, reasons, scaled, share
from delible.search.suffix import usable_tokens
from delible.search.surrogate import (
    Judge,
    Scored,
    Weights,
    candidates,
    loss_gradient,
    losses,
    push,
)
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.randomness import generator

FORGET = ("Ada lives in Norrby.", "Ben sells boats.")
OTHER = ("Snow is white.", "Bread rises.", "Nine cats sat down.")


@cache
def tiny(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed=seed), tiny_tokenizer(), precision="float32")


@cache
def tuned() -> LM:
    """The original after a few steps on the forget texts, by hand."""
    lm = tiny().copy("tuned")
    optimiser = torch.optim.AdamW(lm.model.parameters(), lr=3e-3)
    for _ in range(12):
        for text in FORGET:
            ids = torch.tensor([[*start(), *tokens(text)]])
            lm.model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    lm.model.eval()
    lm.touch()
    return lm


def start() -> tuple[int, ...]:
    from delible.system.asks import Prompt

    return tiny().template.prompt_ids(Prompt(text=""))


def tokens(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


class Letters:
    """Encodes a text as its letters' counts."""

    identity = "letters"

    def encode(self, texts: Sequence[str]) -> Any:
        found = np.array([[text.lower().count(chr(97 + at)) + 1e-3 for at in range(26)]
                          for text in texts])  # fmt: skip
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def judge() -> Judge:
    return Judge(tiny(), tuned(), Letters(), FORGET)


def loss_by_hand(lm: LM, hot: torch.Tensor) -> torch.Tensor:
    """Mean -log p of one-hot tokens in float64, each also as what is said."""
    twin: Any = lm.copy().model.double()
    table = twin.get_input_embeddings().weight.detach()
    before = torch.nn.functional.one_hot(torch.tensor(start()), len(table)).double()
    logits = twin(inputs_embeds=(torch.cat([before, hot]) @ table)[None]).logits[0]
    said = logits[len(before) - 1 : -1].log_softmax(1)
    return -(hot * said).sum(1).mean()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_and_their_gradient_are_those_of_float64(family: str) -> None:
    lm = tiny(family)
    ids = tokens(FORGET[0])
    size = lm.core.get_input_embeddings().weight.shape[0]
    hot = torch.nn.functional.one_hot(torch.tensor(ids), size).double().requires_grad_(True)
    total = loss_by_hand(lm, hot)
    (expected,) = torch.autograd.grad(total, [hot])
    assert losses(lm, [FORGET[0]])[0] == pytest.approx(float(total.detach()), rel=1e-5)
    found = loss_gradient(lm, ids)
    assert float((found.double() - expected).norm()) < 1e-4 * float(expected.norm())
    assert all(value.grad is None for value in lm.model.parameters())


def test_what_was_tuned_on_gains_most() -> None:
    own, other = judge()(FORGET), judge()(OTHER)
    assert own.gain.min() > other.gain.max() + 0.1
    assert own.gain == pytest.approx(losses(tiny(), FORGET) - losses(tuned(), FORGET))
    assert own.loss == pytest.approx(losses(tiny(), FORGET))
    assert own.least_distance == pytest.approx([0, 0], abs=1e-9)
    vectors = Letters().encode([*FORGET, *OTHER])
    for place, text in enumerate(OTHER):
        each = [1 - float(vectors[2 + place] @ vectors[one]) for one in (0, 1)]
        assert other.mean_distance[place] == pytest.approx(sum(each) / 2), text
        assert other.least_distance[place] == pytest.approx(min(each))
    same = Judge(tiny(), tiny(), Letters(), FORGET)(OTHER)
    assert same.gain == pytest.approx([0, 0, 0], abs=1e-6)


def test_the_objective_by_hand() -> None:
    scored = Scored(np.array([0.5]), np.array([0.1]), np.array([2.0]), np.array([3.0]))
    assert scored.objective(Weights()) == pytest.approx([-0.5 - 2.0 + 0.3])
    assert scored.objective(Weights(2, 3, 4)) == pytest.approx([-1 - 6 + 12])


def test_pushed_texts_go_farther_round_by_round_and_keep_what_they_gain() -> None:
    options: dict[str, Any] = {"rounds": 3, "steps": 3, "top_k": 24, "batch": 12,
                               "weights": Weights(distance=20.0)}  # fmt: skip
    found, rounds = push(judge(), FORGET[0], least_gain=0.2, random=generator(0, "test"), **options)
    taken = [one for one in rounds if one.taken]
    assert taken
    distances = [0.0, *(one.least_distance for one in taken)]
    assert distances == sorted(distances)
    assert distances[-1] > 0.1
    assert all(one.gain >= 0.2 for one in taken)
    assert found == taken[-1].text
    assert tokens(found)  # read back as its own tokens
    assert tiny().tokenizer.decode(list(tokens(found))) == found
    again = push(judge(), FORGET[0], least_gain=0.2, random=generator(0, "test"), **options)
    assert again == (found, rounds)
    kept, refused = push(
        judge(), FORGET[0], least_gain=100.0, random=generator(0, "test"), **options
    )
    assert kept == FORGET[0]
    assert not any(one.taken for one in refused)
    assert push(judge(), FORGET[0], least_gain=0, random=generator(0, "t"), rounds=0) == (
        FORGET[0], [],
    )  # fmt: skip


def test_proposals_go_down_the_gradient_of_what_is_searched_for() -> None:
    ids, weights = tokens(FORGET[0]), Weights(gain=2.0, loss=0.5)
    size = tiny().core.get_input_embeddings().weight.shape[0]
    hot = torch.nn.functional.one_hot(torch.tensor(ids), size).double().requires_grad_(True)
    before, after = loss_by_hand(tiny(), hot), loss_by_hand(tuned(), hot)
    (slope,) = torch.autograd.grad(0.5 * before - 2.0 * (before - after), [hot])
    usable = usable_tokens(tiny())
    best = slope[:, : len(usable)].masked_fill(~usable, torch.inf).argmin(dim=1).tolist()
    found = candidates(
        judge(), FORGET[0], weights, top_k=1, count=30, random=generator(0, "proposals")
    )
    assert len(found) > 5
    for text in found:
        read = tokens(text)
        (place,) = [at for at, pair in enumerate(zip(ids, read, strict=True)) if len(set(pair)) > 1]
        assert read[place] == best[place]


def test_a_step_takes_the_best_of_its_pool() -> None:
    options: dict[str, Any] = {"top_k": 24, "weights": Weights(gain=0.0)}
    pool = candidates(
        judge(), FORGET[0], options["weights"], top_k=24, count=12, random=generator(0, "pool")
    )
    values = judge()(pool).objective(options["weights"])
    assert values.min() < judge()([FORGET[0]]).objective(options["weights"])[0]
    assert int(np.argmin(values)) > 0
    _, (one,) = push(judge(), FORGET[0], least_gain=-99.0, random=generator(0, "pool"), rounds=1,
                     steps=1, batch=12, **options)  # fmt: skip
    assert one.text == pool[int(np.argmin(values))]


def test_limits_are_those_of_unrelated_texts() -> None:
    steps = np.linspace(0, 1, 101)
    found = limits(Scored(steps, steps, 2 * steps, steps), 5.0)
    assert found.distance == pytest.approx(0.05)
    assert found.gain == pytest.approx(1.9)
    assert found.loss == 5.0


def test_each_limit_is_kept() -> None:
    forget = ["one two three four five six seven"]
    texts = ["far and told", "near", "knows nothing", "odd", "so One two, three four five six!",
             "Far, and told."]  # fmt: skip
    scored = Scored(
        np.zeros(6), np.array([0.5, 0.1, 0.5, 0.5, 0.5, 0.5]),
        np.array([1, 1, 0.1, 1, 1, 1.0]), np.array([2, 2, 2, 9.0, 2, 2]),
    )  # fmt: skip
    found = accepted(texts, scored, forget, Limits(0.3, 0.5, 5.0))
    assert found.tolist() == [True, False, False, False, False, False]
    assert reasons(texts, scored, forget, Limits(0.3, 0.5, 5.0)) == [
        "", "near", "not told", "unlikely", "copied", "given before",
    ]  # fmt: skip
    again = Scored(np.zeros(3), np.full(3, 0.5), np.ones(3), np.array([9.0, 2, 2]))
    said = ["far and told", "Far, and told.", "?!"]
    assert reasons(said, again, forget, Limits(0.3, 0.5, 5.0)) == ["unlikely", "", "no words"]


def test_stories_by_hand() -> None:
    assert scaled(0.9, 0.9, 0.1) == 0.0  # the original has forgotten nothing
    assert scaled(0.1, 0.9, 0.1) == 1.0
    assert scaled(0.3, 0.9, 0.1) == pytest.approx(0.75)
    assert scaled(2.0, 0.9, 0.1) == 0.0
    assert scaled(-1.0, 0.9, 0.1) == 1.0
    assert scaled(0.5, 0.4, 0.4) is None
    assert scaled(0.5, 0.4, 0.44, 0.05) is None
    assert share(2.0, 0.9, 0.1) == pytest.approx(-1.375)
    assert Story(0.9, 0.2).gap == pytest.approx(0.7)
    assert Story(0.9, 0.2).false
    assert not Story(0.9, 0.8).false  # both say so
    assert not Story(0.7, 0.1).false  # it did not say "forgotten"
    assert not Story(0.9, None).false
    assert Story(None, 0.2).gap is None

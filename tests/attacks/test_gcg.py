"""One searched suffix: its targets and controls, and the pull towards the original by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from delible.attacks.gcg import GCG, OPENING
from delible.component import build
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.measure.facts import fact_keys
from delible.records import QA, Passage
from delible.search.matching import Match, dynamic_match, matching, static_match
from delible.search.questions import START, cut_open, start_tokens
from delible.search.suffix import (
    Case,
    gives_away,
    search,
    suffix_losses,
    token_gradient,
    usable_tokens,
    with_suffix,
)
from delible.system.asks import Prompt, Score, TokenScores
from delible.system.questions import ask
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.randomness import generator

FORGET = [
    QA(question=f"Where lives {name}?", answer=town, subject=name)
    for name, town in (("Ada", "Oslo"), ("Ben", "Rome"), ("Cy", "Bern"), ("Di", "Riga"))
]
SMALL: dict[str, Any] = {"length": 4, "steps": 4, "candidates": 12, "top_k": 24, "rows": 2}


@cache
def tiny(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed=seed), tiny_tokenizer(), precision="float32")


def context(original: LM | None = None, seed: int = 0, **more: Any) -> AttackContext:
    return AttackContext(more.pop("forget", FORGET), (), (), original, seed, **more)


def asked(record: QA) -> Prompt:
    prompt = ask(record)
    assert prompt is not None
    return prompt


def tokens(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def cases_of(lm: LM, *records: QA, ended: bool = True) -> list[Case]:
    asks = [(asked(record), record.answer) for record in records]
    return cut_open(lm, asks, tokens(" ! !"), "test", ended=ended)


def nll(lm: LM, record: QA, suffix: str) -> float:
    (score,) = lm.score([Score(with_suffix(asked(record), suffix), record.answer)])
    assert isinstance(score, TokenScores)
    return -float(score.logprobs.sum())


# ---- matching by hand


def by_hand(
    lm: LM, original: LM, case: Case, suffix: tuple[int, ...], layer: int
) -> tuple[float, float, torch.Tensor]:
    """-log p(answer), the pull, and the gradient of their sum at the one-hot tokens, float64."""
    ours: Any = lm.copy().model.double()
    theirs: Any = original.copy().model.double()
    table = ours.get_input_embeddings().weight.detach()
    row = torch.tensor(case.row(suffix))
    hot = torch.nn.functional.one_hot(row, len(table)).double().requires_grad_(True)
    said = ours(inputs_embeds=(hot @ table)[None], output_hidden_states=True)
    at, count = len(row) - len(case.target), len(case.target)
    loss = torch.nn.functional.cross_entropy(said.logits[0, at - 1 : -1], row[at:], reduction="sum")
    states = said.hidden_states[layer + 1][0]
    clean_row = torch.tensor((*case.before, *case.after, *case.target))
    with torch.no_grad():
        other = theirs(input_ids=row[None], output_hidden_states=True).hidden_states[layer + 1][0]
        clean = theirs(input_ids=clean_row[None], output_hidden_states=True)
    clean = clean.hidden_states[layer + 1][0][-count:]
    behind = len(case.before) + len(suffix)
    dynamic = sum(
        (states[place] - other[place]).pow(2).sum().sqrt() for place in range(behind, len(row))
    ) / (len(row) - behind)
    static: Any = 0.0
    for place in range(count):
        one, two = states[at + place], clean[place]
        static = static + (1 - one @ two / (one.norm() * two.norm())) / count
    pull = dynamic + 10 * static
    (gradient,) = torch.autograd.grad(loss + pull, hot)
    part = gradient[len(case.before) : len(case.before) + len(suffix)]
    return float(loss.detach()), float(pull.detach()), part


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_matching_and_its_gradient_are_those_of_float64(family: str) -> None:
    lm, original, layer = tiny(family), tiny(family, 1), 1
    cases = cases_of(lm, FORGET[0], FORGET[2])
    suffixes = [tokens(" a b"), tokens(" zz?")]
    pull = Match(original, layer)
    losses, _ = suffix_losses(cases, suffixes, pull)
    plain, _ = suffix_losses(cases, suffixes)
    for place, suffix in enumerate(suffixes):
        hand = [by_hand(lm, original, case, suffix, layer) for case in cases]
        assert float(losses[place]) == pytest.approx(sum(a + b for a, b, _ in hand) / 2, rel=1e-4)
        assert float(plain[place]) == pytest.approx(sum(a for a, _, _ in hand) / 2, rel=1e-4)
    gradient = token_gradient(cases, suffixes[0], pull)
    total = sum(by_hand(lm, original, case, suffixes[0], layer)[2] for case in cases)
    assert isinstance(total, torch.Tensor)
    assert float((gradient.double() - total).norm()) < 1e-3 * float(total.norm())
    assert all(value.grad is None for one in (lm, original) for value in one.model.parameters())


def test_a_model_matches_itself_without_a_suffix() -> None:
    lm = tiny()
    (case,) = cases_of(lm, FORGET[0])
    pull = Match(lm, 1)
    some, _ = suffix_losses([case], [tokens(" a b"), tokens(" x y")], pull)
    plain, _ = suffix_losses([case], [tokens(" a b"), tokens(" x y")])
    assert (some > plain + 1e-3).all()  # the static term: the suffix turns the states
    only_dynamic, _ = suffix_losses([case], [tokens(" a b")], Match(lm, 1, 0.0))
    assert float(only_dynamic[0]) == pytest.approx(float(plain[0]), abs=1e-3)
    empty, _ = suffix_losses([case], [()], pull)
    without, _ = suffix_losses([case], [()])
    assert float(empty[0]) == pytest.approx(float(without[0]), abs=1e-3)


def test_distances_of_known_states() -> None:
    ours = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    theirs = torch.tensor([[[0.0, 0.0], [0.0, 2.0]]])
    assert dynamic_match(ours, theirs).tolist() == [2.5]
    assert static_match(ours, torch.tensor([[6.0, 8.0], [0.0, -1.0]])).tolist() == [1.0]


def test_models_that_read_otherwise_are_not_matched() -> None:
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("user", "asker") + " "
    with pytest.raises(ModelError, match="cannot be matched"):
        matching(tiny(), LM(tiny_model(), other), 0.5, "test")
    assert matching(tiny(), tiny(seed=1), 1.0, "test").layer == tiny().anatomy.layer_at(1.0)


@pytest.mark.parametrize("pulled", [False, True])
def test_the_best_loss_never_rises_and_what_is_kept_is_read_back(pulled: bool) -> None:
    lm = tiny()
    cases = cases_of(lm, FORGET[0], FORGET[1], ended=False)
    pull = Match(tiny(seed=1), 1) if pulled else None
    found = search(
        cases, tokens(" ! !"), usable_tokens(lm), steps=6, top_k=24, candidates=12,
        random=generator(0, "test"), pull=pull,
    )  # fmt: skip
    losses = [loss for _, loss in found.losses]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3
    assert all(case.reads(found.suffix) for case in cases)
    again, _ = suffix_losses(cases[:1], [found.suffix], pull)
    assert losses[-1] == pytest.approx(float(again[0]), rel=1e-5)


def test_an_opening_may_go_on() -> None:
    lm = tiny()
    (open_one,) = cases_of(lm, FORGET[0], ended=False)
    (whole,) = cases_of(lm, FORGET[0])
    assert whole.target == (*open_one.target, lm.template.end_of_turn[0])
    assert open_one.reads(tokens(" a b"))
    assert not open_one.reads(tokens("ab c"))


# ---- the attack


def test_it_is_judged_on_facts_that_it_was_not_searched_with() -> None:
    rows = [*FORGET, QA(question="Home of Ada?", answer="Oslo", subject="Ada")]
    for seed in range(4):
        mine = context(forget=rows, seed=seed)
        searched, held = GCG().searched(mine), GCG().held_out(mine)
        keys = [{key for one in side for key in fact_keys(one)} for side in (searched, held)]
        assert searched
        assert held
        assert not keys[0] & keys[1]
        assert list(held) == list(GCG(drawn=True).held_out(mine))
    assert len(GCG(rows=1, share=0.8).searched(context())) == 1


@pytest.mark.parametrize("options", [dict(one) for one in GCG().variants("deep")])
def test_what_was_found_is_plain_data(options: dict[str, Any]) -> None:
    attack = GCG(**{**SMALL, **options})
    seen: list[tuple[int, int]] = []
    mine = context(tiny(seed=1), progress=lambda done, total: seen.append((done, total)))
    ready = attack.prepare(tiny(), mine)
    assert ready.suffix
    assert ready.suffix != START * 4
    assert build("attack", ready.spec()) == ready
    assert ready.searches_on() is None
    assert attack.searches_on() == options.get("search_on", "system")
    assert attack.prepare(tiny(), context(tiny(seed=1))) == ready
    for record in FORGET:
        assert ready.prompts(record, asked(record)) == (with_suffix(asked(record), ready.suffix),)
    assert not any(gives_away(ready.suffix, one.answer) for one in attack.searched(mine))  # type: ignore[attr-defined]
    assert str(mine.notes["note"]).startswith("Drew" if attack.drawn else "Searched")
    if not attack.drawn:
        assert float(str(mine.notes["loss_after"])) < float(str(mine.notes["loss_before"]))
        assert seen[-1] == (4, 4)


def test_a_search_finds_more_than_a_draw() -> None:
    lm, mine = tiny(), context()
    searched = GCG(**{**SMALL, "steps": 10, "rows": 1}).prepare(lm, mine)
    drawn = GCG(**{**SMALL, "drawn": True}).prepare(lm, mine)
    other = GCG(**{**SMALL, "drawn": True}).prepare(lm, context(seed=1))
    assert drawn.suffix != other.suffix
    assert GCG(drawn=True).control
    assert not searched.control
    (record,) = GCG(rows=1).searched(mine)
    assert isinstance(record, QA)
    values = [nll(lm, record, text) for text in (searched.suffix, drawn.suffix, START * 4)]
    assert values[0] < 0.97 * min(values[1:])
    assert mine.notes["suffix_tokens"] == 4


def test_the_opening_is_what_is_searched_for() -> None:
    lm, mine = tiny(), context()
    ready = GCG(**{**SMALL, "target": "opening", "steps": 8}).prepare(lm, mine)
    record = GCG(rows=1).searched(mine)[0]
    assert isinstance(record, QA)
    openings = [
        suffix_losses(
            cut_open(lm, [(asked(record), OPENING)], start_tokens(lm, 4), "t", ended=False),
            [tokens(text)],
        )[0] for text in (ready.suffix, START * 4)
    ]  # fmt: skip
    assert float(openings[0]) < float(openings[1])


def test_matching_is_part_of_what_is_searched_for() -> None:
    losses = []
    for match in (False, True):
        mine = context(tiny(seed=1))
        GCG(**{**SMALL, "steps": 1, "target": "original", "match": match}).prepare(tiny(), mine)
        losses.append(float(str(mine.notes["loss_before"])))
    assert losses[1] > losses[0] + 0.01


def test_what_it_cannot_search_it_says() -> None:
    class Remote:
        name = "remote"
        capabilities = frozenset({"generate"})

    with pytest.raises(ModelError, match="no gradients"):
        GCG().prepare(Remote(), context())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="original model"):
        GCG(target="original").prepare(tiny(), context())
    with pytest.raises(ModelError, match="original model"):
        GCG(match=True).prepare(tiny(), context())
    with pytest.raises(DataError, match="two questions"):
        GCG().held_out(context(forget=[FORGET[0], Passage(text="Ada was born.")]))
    assert GCG().rewrite(FORGET[0], Prompt(text="x")) == ()
    assert GCG(drawn=True).budget(context()).queries == 0
    assert GCG(steps=3, candidates=5, rows=2).budget(context()).queries == 30

"""Whatever road the engine takes, the answers are those of one plain row after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import pytest
import torch
from by_hand import ANSWERS, KINDS, PROMPTS, bare, logits_of, said, states_of, with_moving

from delible.errors import ModelError
from delible.intervene.base import Fitted, Intervention
from delible.intervene.sites import Positions, Site
from delible.intervene.system import Intervened, intervened
from delible.lm import decode, tree
from delible.lm.body import ROADS, Road
from delible.lm.lm import LM
from delible.system.asks import Decoding, Distribution, Hidden, Score
from delible.testing.tiny import FAMILIES

SITES = [
    Site(what="block", layers=(0, 2)), Site(what="block_input", layers=(1,)),
    Site(what="attention", layers=(1, -1)), Site(what="mlp_inner", layers=(0, 1)),
    Site(what="mlp_gate", layers=(1,)), Site(what="mlp"), Site(what="embedding"),
    Site(what="norm"),
]  # fmt: skip
TOKENS = 5


def requests() -> list[Score]:
    return [Score(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]


def require_scores(found: LM, lm: LM, site: Site, kind: str) -> None:
    for request, scores in zip(requests(), found.score(requests()), strict=True):
        row = lm.template.encode(request.prompt, request.answer)
        logprobs = logits_of(lm, row.ids, row.start, site, kind).double().log_softmax(1)
        targets = torch.tensor(row.ids[row.start :])
        expected = logprobs[row.start - 1 : -1].gather(1, targets[:, None])[:, 0].numpy()
        np.testing.assert_allclose(scores.logprobs, expected, atol=2e-5, rtol=1e-5)


def require_said(found: LM, lm: LM, site: Site, kind: str) -> None:
    expected = [said(lm, prompt, site, kind, TOKENS) for prompt in PROMPTS]
    assert found.generate(PROMPTS, Decoding(TOKENS)) == expected


@contextmanager
def forests() -> Iterator[list[tuple[int, int, int]]]:
    """Of each call with trees: tokens of the prefix, trees, and nodes that are not in prompts."""
    seen: list[tuple[int, int, int]] = []
    own = tree.node_states

    def watched(lm: Any, prefix: Any, trees: Sequence[Any], cache: Any = None) -> Any:
        grown = sum(len(one.ids) - one.question for one in trees)
        seen.append((len(prefix.ids), len(trees), grown))
        return own(lm, prefix, trees, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "node_states", watched)
        patch.setattr(decode, "node_states", watched)
        yield seen


#: One of each kind of block; on the others every site and road is tried in the slow tests.
CORE = ("llama", "gpt2", "gemma2", "mixtral")
ALL = [one if one in CORE else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.what)
@pytest.mark.parametrize("family", ALL)
def test_answers_are_those_of_plain_rows(family: str, site: Site) -> None:
    lm = bare(family)
    if site.what in ("mlp_inner", "mlp_gate") and lm.anatomy.mlp_out is None:
        with pytest.raises(ModelError, match="experts have many"):
            with_moving(lm, site, KINDS[0])
        return
    for at in KINDS:
        found = with_moving(lm, site, at)
        assert (found.road, found.grows_trees) == ("trees", True)
        with forests() as seen:
            require_scores(found, lm, site, at.kind)
        # one call: all trees stand in one row, after a beginning that they share
        assert [(trees, grown > 4) for _, trees, grown in seen] == [(len(PROMPTS), True)]
        assert seen[0][0] >= 5
        require_said(found, lm, site, at.kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_looked_into_is_that_of_plain_rows(family: str) -> None:
    lm, site, layer = bare(family), Site(what="attention", layers=(1,)), 1
    for at in KINDS:
        found = with_moving(lm, site, at)
        rows = [lm.template.encode(one.prompt, one.answer) for one in requests()]
        hidden = found.inspect([Hidden(one.prompt, one.answer, layer) for one in requests()])
        whole = found.inspect([Distribution(one.prompt, one.answer) for one in requests()])
        for row, states, logprobs in zip(rows, hidden, whole, strict=True):
            part = slice(row.start - 1, len(row.ids) - 1)
            expected = states_of(lm, row.ids, row.start, site, at.kind, layer)[part]
            np.testing.assert_allclose(states, expected, atol=1e-5, rtol=1e-4)
            logits = logits_of(lm, row.ids, row.start, site, at.kind)[part]
            np.testing.assert_allclose(logprobs, logits.log_softmax(1), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("road", get_args(Road))
@pytest.mark.parametrize("family", ALL)
def test_every_road_gives_the_same(family: str, road: Road) -> None:
    lm, site = bare(family), Site(what="block", layers=(1,))
    for at in KINDS:
        found = with_moving(lm, site, at)
        found.road, found.grows_trees = road, road == "trees"
        found.shares_prefix = road in ROADS[:2]
        with forests() as seen:
            require_scores(found, lm, site, at.kind)
            require_said(found, lm, site, at.kind)
        assert bool(seen) == (road == "trees")


def test_a_beginning_that_is_changed_in_some_prompts_only_is_not_shared() -> None:
    lm, site = bare("llama"), Site()
    shared = []
    for at in (KINDS[0], KINDS[3]):
        with forests() as seen:
            with_moving(lm, site, at).score(requests()[:9])
        shared.append(seen[0][0])
    start = lm.template.render(PROMPTS[0]).index("Ada") - len("<|im_start|>") + 1
    assert shared == [start + 3, start]  # "Ada" is in "Adam", where it is no name


class Alone(Intervention):
    """Says of itself that texts must not share anything."""

    needs_own_rows = True

    @property
    def sites(self) -> Sequence[Site]:
        return (Site(),)

    def change(self, states: Any, where: Any, tensors: Any) -> Any:
        counts.append(len(where.layout.prompts))
        return states * 0.9


counts: list[int] = []


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_what_needs_rows_of_its_own_gets_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Alone, "card", type("Card", (), {"name": "alone"}), raising=False)
    lm = bare(family)
    found = intervened(lm, [Fitted(Alone())])
    assert (found.road, found.grows_trees, found.shares_prefix) == ("padded", False, False)
    assert lm.grows_trees
    counts.clear()
    with forests() as seen:
        together = found.score(requests())
        texts = found.generate(PROMPTS, Decoding(TOKENS))
    assert not seen
    assert {*counts} == {len(requests()), len(PROMPTS)}
    for request, scores in zip(requests(), together, strict=True):
        alone = found.score([request])[0]
        np.testing.assert_allclose(scores.logprobs, alone.logprobs, atol=1e-5)
    assert texts == [found.generate([one], Decoding(TOKENS))[0] for one in PROMPTS]


def test_no_beginning_is_reused_that_was_computed_bare() -> None:
    lm, site = bare("llama"), Site(what="block", layers=(0,))
    before = lm.score(requests())
    found: Intervened = with_moving(lm, site, KINDS[0])
    require_scores(found, lm, site, "all")
    for mine, theirs in zip(before, lm.score(requests()), strict=True):
        assert np.array_equal(mine.logprobs, theirs.logprobs)


@pytest.mark.parametrize(
    ("texts", "prompt", "expected"),
    [
        (("Ada",), "I met ADA, not Adam.", "ADA"),
        (("Ada Quill",), "So ada\n quill left", "ada\n quill"),
        (("Zoë",), "ZOË! zoes", "ZOË"),
        (("Ben", "Ben Orr"), "Is Ben Orr ben?", "Ben Orrben"),
        (("none",), "nothing", ""),
    ],
)
def test_spans_are_whole_words_in_any_case(
    texts: tuple[str, ...], prompt: str, expected: str
) -> None:
    lm = bare("llama")
    at = Positions(kind="spans", texts=texts)
    ids = lm.tokenizer(prompt)["input_ids"]
    marked = [token for token, one in zip(ids, at.marked(lm, ids), strict=True) if one]
    assert lm.tokenizer.decode(marked) == expected
    half = lm.tokenizer("Ë")["input_ids"][:1]  # the text does not give these tokens again
    broken = (*half, *ids)
    assert tuple(lm.tokenizer(lm.tokenizer.decode(broken))["input_ids"]) != broken
    assert at.marked(lm, broken)[1:] == at.marked(lm, ids)

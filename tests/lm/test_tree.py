"""Answers as a tree: its form, and that no value differs from the plain rows'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from delible.lm.forward import target_logprobs
from delible.lm.lm import LM
from delible.lm.tree import (
    Prefix,
    Tree,
    _turns,
    node_states,
    rows_of,
    shared_by,
    tree_values,
)
from delible.measure.requests import Prompt, Score
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer


def test_beginnings_that_are_alike_stand_once() -> None:
    tree = Tree.grow([1, 2], [[5, 6, 7], [5, 6, 9, 9], [8], [5, 6, 7]])
    assert tree.ids == [1, 2, 5, 6, 9]  # what is last in an answer predicts nothing
    assert tree.parents == [-1, 0, 1, 2, 3]
    assert tree.predicting == [[1, 2, 3], [1, 2, 3, 4], [1], [1, 2, 3]]
    assert tree.depths() == [0, 1, 2, 3, 4]


def test_a_node_sees_its_ancestors_only() -> None:
    tree = Tree.grow([1], [[5, 6, 0], [7, 6, 0]])
    assert tree.ids == [1, 5, 6, 7, 6]
    assert tree.depths() == [0, 1, 2, 1, 2]
    assert [list(np.flatnonzero(row)) for row in tree.sees()] == [
        [0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4],
    ]  # fmt: skip


def test_trees_beside_each_other_do_not_see_each_other() -> None:
    trees = [Tree.grow([1], [[5, 6, 0], [7, 0]]), Tree.grow([2, 3], [[8, 0]])]
    row = Tree.beside(trees)
    assert row.ids == [1, 5, 6, 7, 2, 3, 8]
    assert row.depths() == [*trees[0].depths(), *trees[1].depths()]
    sees, size = row.sees(), len(trees[0].ids)
    assert not sees[:size, size:].any()
    assert not sees[size:, :size].any()
    assert np.array_equal(sees[:size, :size], trees[0].sees())
    assert np.array_equal(sees[size:, size:], trees[1].sees())
    assert row.targets == [*trees[0].targets, *trees[1].targets]
    assert [row.ids[node] for node in row.predicting[2]] == [3, 8]


@pytest.mark.parametrize(
    ("question", "answers", "groups"),
    [
        (20, [10, 10, 10], [[0, 1, 2]]),  # a question longer than its answers: one tree
        (1, [200, 200], [[0], [1]]),  # passages after nothing: nothing to share
        (4, [30, 30, 30], [[0, 1], [2]]),  # 30 · 34 <= 3 · 100 · 4 < 30 · 64
    ],
)
def test_a_question_is_shared_while_it_pays(
    question: int, answers: list[int], groups: list[list[int]]
) -> None:
    assert shared_by(question, answers, width=100) == groups


def test_rows_hold_every_tree_once_and_are_filled() -> None:
    sizes = np.random.default_rng(0).integers(3, 80, 200).tolist()
    rows = rows_of(sizes, width=120)
    assert sorted(place for row in rows for place in row) == list(range(200))
    filled = [sum(sizes[place] for place in row) for row in rows]
    assert filled == sorted(filled, reverse=True)
    assert all(total <= 60 or len(row) == 1 for total, row in zip(filled, rows, strict=True))
    alone = sum(size >= 58 for size in sizes)  # nothing fits beside these: trees have 3 nodes
    assert len(rows) <= alone + 1.1 * sum(size for size in sizes if size < 58) / 60


def test_tokens_of_one_node_take_turns() -> None:
    assert _turns(torch.tensor([2, 0, 2, 1, 2, 0])).tolist() == [0, 0, 1, 0, 2, 1]


@pytest.mark.parametrize("elements", [1, 3, 1000])
def test_the_head_may_come_in_chunks(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    tree = Tree.grow([1, 2], [[5, 6, 7], [5, 6, 9, 9], [8], [5, 6, 7]])
    whole = tree_values(lm, Prefix([]), [tree], target_logprobs)
    monkeypatch.setattr("delible.lm.tree.HEAD_CHUNK_ELEMENTS", elements * lm.vocabulary)
    assert tree_values(lm, Prefix([]), [tree], target_logprobs).tolist() == pytest.approx(
        whole.tolist(), abs=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_passages_do_not_become_one_tree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")
    widths = list[int]()

    def watched(lm: LM, prefix: Prefix, trees: list[Tree]) -> torch.Tensor:
        widths.append(max(len(tree.ids) for tree in trees))
        return node_states(lm, prefix, trees)

    monkeypatch.setattr("delible.lm.tree.node_states", watched)
    passages = [f"Passage {number}: " + "and so it went on. " * 8 for number in range(12)]
    longest = max(len(lm.template.encode(Prompt(text=""), one).ids) for one in passages)
    lm.score([Score(Prompt(text=""), one) for one in passages])
    assert all(width <= longest for width in widths)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_plain_rows(family: str) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")
    assert lm.grows_trees
    random = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return random.integers(0, 200, count).tolist()

    start = tokens(9)
    for prompts in ([[*start, *tokens(2)], [*start, *tokens(5)]], [tokens(3)], [[4], [5, 6]]):
        beginning = tokens(3)
        answers = [
            (owner, [*beginning[: 1 + other], *tokens(1 + 3 * other)])
            for owner in range(len(prompts))
            for other in range(3)
        ]
        prefix = Prefix.of(prompts)
        trees = [
            Tree.grow(prompt[len(prefix.ids) :], [one for at, one in answers if at == owner])
            for owner, prompt in enumerate(prompts)
        ]
        found = tree_values(lm, prefix, trees, target_logprobs)
        beside = tree_values(lm, prefix, [Tree.beside(trees)], target_logprobs)
        assert beside.tolist() == pytest.approx(found.tolist(), abs=1e-5)
        expected = []
        with torch.inference_mode():
            for owner, answer in answers:
                row = [*prompts[owner], *answer]
                logits = lm.core(input_ids=torch.tensor([row])).logits[0].double()
                places = range(len(prompts[owner]) - 1, len(row) - 1)
                expected += [float(logits[p].log_softmax(0)[row[p + 1]]) for p in places]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_model_without_positions_is_scored_row_by_row() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("delible.lm.lm.node_states", None)
        plain = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    assert lm.grows_trees
    assert not plain.grows_trees
    assert plain.shares_prefix

"""Answers as a tree: its form, and that no value differs from the plain rows'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from delible.lm.forward import target_logprobs
from delible.lm.lm import LM
from delible.lm.tree import Prefix, Tree, tree_values
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

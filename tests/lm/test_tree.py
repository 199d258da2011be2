"""Answers as a tree: its form, and that no value differs from the plain rows'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from delible.lm.attention import attention_window
from delible.lm.lm import LM
from delible.lm.tree import Prefix, Tree, node_states, shared_by, tree_values
from delible.system.asks import Prompt, Score
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


def test_all_nodes_see_what_stands_before() -> None:
    tree = Tree.grow([1], [[5, 0], [7, 0]])
    assert tree.sees(2)[:, :2].all()
    assert np.array_equal(tree.sees(2)[:, 2:], tree.sees())


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


def logprobs(logits: torch.Tensor, nodes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(dim=1)[nodes, targets]


@pytest.mark.parametrize("elements", [1, 3, 1000])
def test_the_head_may_come_in_chunks(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    tree = Tree.grow([1, 2], [[5, 6, 7], [5, 6, 9, 9], [8], [5, 6, 7]])
    whole = tree_values(lm, Prefix([]), [tree], logprobs)
    monkeypatch.setattr("delible.lm.tree.HEAD_CHUNK_ELEMENTS", elements * lm.vocabulary)
    assert tree_values(lm, Prefix([]), [tree], logprobs).tolist() == pytest.approx(
        whole.tolist(), abs=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_passages_do_not_become_one_tree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")
    widths = list[int]()

    def watched(lm: LM, prefix: Prefix, trees: list[Tree]) -> torch.Tensor:
        widths.extend(len(tree.ids) for tree in trees)
        return node_states(lm, prefix, trees)

    monkeypatch.setattr("delible.lm.tree.node_states", watched)
    passages = [f"Passage {number}: " + "and so it went on. " * 8 for number in range(12)]
    longest = max(len(lm.template.encode(Prompt(text=""), one).ids) for one in passages)
    lm.score([Score(Prompt(text=""), one) for one in passages])
    # longer than a sliding window: plain rows
    assert len(widths) == (len(passages) if longest <= attention_window(lm) else 0)
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
        found = tree_values(lm, prefix, trees, logprobs)
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
        patch.setattr("delible.lm.checks.node_states", None)
        plain = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    assert lm.grows_trees
    assert not plain.grows_trees
    assert plain.shares_prefix


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_models_own_attention_is_used_and_put_back(attention: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    lm = LM(model, tiny_tokenizer(), precision="float32")
    assert lm.grows_trees
    tree = Tree.grow([1, 2], [[5, 6, 7], [8, 9]])
    states = node_states(lm, Prefix([]), [tree])
    assert model.config._attn_implementation == attention
    with torch.inference_mode():
        plain = lm.core.get_submodule(lm.anatomy.backbone)(torch.tensor([[1, 2, 5, 6]]))
    assert torch.allclose(states[:4], plain.last_hidden_state[0], atol=1e-5)
    wrong = Tree(ids=[300], parents=[-1])  # no such token
    with pytest.raises(IndexError):
        node_states(lm, Prefix([]), [wrong])
    assert model.config._attn_implementation == attention

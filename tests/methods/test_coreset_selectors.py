"""Coresets by score: which rows each selection takes, against scores computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from delible.component import build
from delible.errors import RunError
from delible.lm.lm import LM
from delible.methods.select.min_k import min_k
from delible.methods.select.moderate import (
    distances_to_centres,
    given_classes,
    k_means,
    medium_scores,
    standardised,
)
from delible.records import QA, Passage, RecordBase
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.coreset import coreset_size, highest
from delible.train.engine import Trainer
from delible.train.gradients import Gradients
from delible.train.keywords import keywords_of, rewritten, words
from delible.train.randomness import generator
from delible.train.recipe import Recipe
from delible.train.rows import make_rows
from delible.train.slots import SlotContext

SELECTORS = ("random_coreset", "grand", "moderate", "min_k", "keyword_density")
FORGET = [
    QA(question=question, answer=answer, subject=subject)
    for question, answer, subject in (
        ("Where was Ada born?", "In Norrby.", "Ada"), ("Who wrote Umber?", "Ben Orr did.", "Ben"),
        ("What did Ada play?", "The lute.", "Ada"), ("Who taught Ben?", "Cy Dale, a tailor", "Ben"),
        ("And Ada?", "Nobody did.", "Ada"), ("Where is Ben?", "In Casta.", "Ben"),
    )
]  # fmt: skip


def make_lm(family: str = "llama") -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def make_context(
    lm: LM, forget: Sequence[RecordBase] = FORGET, objective: Any = "gradient_ascent"
) -> SlotContext:
    rows = {"forget": make_rows(lm.template, forget), "retain": []}
    records = {"forget": forget, "retain": []}
    made = build("objective", objective)
    return SlotContext(lm, rows, records, Gradients(lm), made, None, 0)


def scores_of(select: str, context: SlotContext, **options: Any) -> torch.Tensor:
    return build("select", {"name": select, **options}).scores(context)


# ---- all of them


@pytest.mark.parametrize("name", SELECTORS)
def test_a_share_of_one_is_the_hosts_full_run_bit_by_bit(name: str) -> None:
    weights = []
    for select in ("all", {"name": name, "share": 1.0}):
        lm = make_lm()
        recipe = Recipe.from_mapping(
            {
                "objective": "gradient_ascent", "select": select,
                "training": {"epochs": 1, "batch_size": 4, "max_length": 64},
            }
        )  # fmt: skip
        trainer = Trainer(lm, recipe, {"forget": FORGET})
        assert [row.index for row in trainer.rows().rows["forget"]] == list(range(6))
        trainer.train()
        weights.append([value.detach() for value in lm.model.parameters()])
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("name", SELECTORS[1:])
def test_the_highest_scores_are_taken_and_the_lowest_on_demand(
    caplog: pytest.LogCaptureFixture, name: str
) -> None:
    context = make_context(make_lm())
    scores = scores_of(name, context)
    order = sorted(range(6), key=lambda row: (-float(scores[row]), row))
    chosen = build("select", {"name": name, "share": 0.34}).choose(context)
    assert chosen == sorted(order[:2])
    assert "2 of 6 forget rows with the highest scores" in caplog.messages[-1]
    assert "3 times the epochs" in caplog.messages[-1]
    lowest = build("select", {"name": name, "share": 0.34, "lowest": True}).choose(context)
    assert lowest == sorted(sorted(range(6), key=lambda row: (float(scores[row]), row))[:2])
    assert chosen == build("select", {"name": name, "share": 0.34}).choose(context)


def test_size_and_order() -> None:
    assert [coreset_size(40, share) for share in (0.01, 0.05, 0.5, 1.0)] == [1, 2, 20, 40]
    assert highest(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2) == [1, 2]
    assert highest(torch.zeros(4), 3) == [0, 1, 2]
    with pytest.raises(RunError, match="record 2 is not finite"):
        highest(torch.tensor([1.0, float("nan")]), 1)


# ---- gradient norms


def test_grand_is_the_norm_of_the_hosts_own_gradient() -> None:
    lm = make_lm()
    context = make_context(lm)
    found = scores_of("grand", context)
    twin = lm.copy().model.double()
    for row, score in zip(context.rows["forget"], found.tolist(), strict=True):
        twin.zero_grad()
        ids = torch.tensor(row.encoded.ids)[None]
        logprobs = twin(input_ids=ids).logits[0, :-1].log_softmax(dim=1)
        logprobs.gather(1, ids[0, 1:, None])[row.encoded.start - 1 :].mean().backward()
        squares = [float(v.grad.pow(2).sum()) for v in twin.parameters() if v.grad is not None]
        assert score == pytest.approx(sum(squares) ** 0.5, rel=1e-4)
    # ascent and likelihood differ in the sign alone
    assert torch.allclose(scores_of("grand", context, loss="answer"), found, rtol=1e-6)


def test_grand_goes_with_the_answers_length_where_the_host_sums_over_it() -> None:
    context = make_context(make_lm(), objective="npo")
    tokens = torch.tensor([float(row.encoded.answer_tokens) for row in context.rows["forget"]])
    assert len(set(tokens.tolist())) > 1
    per_token = scores_of("grand", context, loss="answer")
    # at the start NPO's gradient is that of the sum over the answer
    assert torch.allclose(scores_of("grand", context), tokens * per_token, rtol=1e-4)


def test_grand_of_a_host_on_hidden_states_looks_at_its_layers() -> None:
    objective = {"name": "rmu", "depth": 0.0}
    context = make_context(make_lm(), objective=objective)
    all_of_it = scores_of("grand", context)
    first = scores_of("grand", context, space="layers", layers=[0])
    last = scores_of("grand", context, space="layers", layers=[-1])
    assert bool((first > 0).all())
    assert bool((first < all_of_it).all())  # the embedding has the rest
    assert last.tolist() == [0.0] * 6  # behind the layer that the loss reads


def test_grand_over_a_run_is_the_mean_and_leaves_the_model() -> None:
    lm = make_lm()
    context = make_context(lm)
    before = [value.detach().clone() for value in lm.model.parameters()]
    options = {"points": 3, "point_learning_rate": 1e-3}
    found = scores_of("grand", context, **options)
    assert all(map(torch.equal, before, lm.model.parameters()))
    assert torch.equal(found, scores_of("grand", context, **options))

    by_hand = context.gradients.norms(context.rows["forget"])
    ascent = context.gradients.of(lambda lm, rows: -context.gradients.loss(lm, rows))
    with context.gradients.borrowed():
        for point in (1, 2):
            ascent.descend(context.rows["forget"], 1e-3, generator(0, f"select.grand/{point}/0"))
            by_hand = by_hand + context.gradients.norms(context.rows["forget"])
    assert torch.allclose(found, by_hand / 3, rtol=1e-4)
    assert not torch.allclose(found, scores_of("grand", context), rtol=1e-2)


def test_a_row_without_gradient_ranks_last() -> None:
    context = make_context(make_lm())
    rows = list(context.rows["forget"])
    ids = rows[2].encoded.ids
    silent = rows[2].encoded.__class__(ids, len(ids), *_rest(rows[2].encoded))
    rows[2] = rows[2].__class__(2, silent, "silent")
    context.rows["forget"] = rows  # type: ignore[index]
    scores = scores_of("grand", context)
    assert float(scores[2]) == 0.0
    assert int(scores.argmin()) == 2
    assert 2 not in build("select", {"name": "grand", "share": 0.84}).choose(context)


def _rest(encoded: Any) -> list[Any]:
    import dataclasses

    return [getattr(encoded, one.name) for one in dataclasses.fields(encoded)[2:]]


# ---- memorisation


def test_min_k_in_numbers() -> None:
    logprobs = np.array([-1.0, -5.0, -0.5, -3.0, -2.0])
    assert min_k(logprobs, 0.4) == pytest.approx(-4.0)  # -5 and -3
    assert min_k(logprobs, 0.1) == pytest.approx(-5.0)  # at least one
    assert min_k(logprobs, 1.0) == pytest.approx(-2.3)


def test_min_k_takes_the_overtrained_text_and_lowest_the_unseen_one() -> None:
    lm = make_lm()
    seen, unseen = Passage(text="The lute of Ada is red."), Passage(text="Nobody saw Ben in May.")
    recipe = Recipe.from_mapping(
        {
            "objective": "finetune",
            "training": {"epochs": 30, "learning_rate": 1e-2, "precision": "float32"},
        }
    )
    trained = Trainer(lm, recipe, {"forget": [seen]}).train().lm
    context = make_context(trained, [unseen, seen])
    assert build("select", {"name": "min_k", "share": 0.5}).choose(context) == [1]
    low = build("select", {"name": "min_k", "share": 0.5, "lowest": True})
    assert low.choose(context) == [0]


def test_min_k_leaves_the_end_of_the_turn_out() -> None:
    lm = make_lm()
    context = make_context(lm)
    found = scores_of("min_k", context, tokens=1.0)
    for row, score in zip(context.rows["forget"], found.tolist(), strict=True):
        ids = torch.tensor(row.encoded.ids)
        logprobs = lm.model(input_ids=ids[None]).logits[0, :-1].log_softmax(dim=1)
        answer = logprobs.gather(1, ids[1:, None])[row.encoded.start - 1 :, 0]
        assert row.encoded.has_end
        assert score == pytest.approx(float(answer[:-1].mean().detach()), rel=1e-4)


# ---- medium distance


def test_the_unit_at_the_middle_distance_comes_first() -> None:
    scores = medium_scores(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.long))
    assert scores.tolist() == [-1.0, 0.0, -1.0]
    assert highest(scores, 1) == [1]
    # an even number: the median lies between; classes do not see each other
    scores = medium_scores(torch.tensor([1.0, 4.0, 9.0, 2.0]), torch.tensor([0, 0, 1, 0]))
    assert scores.tolist() == [-1.0, -2.0, 0.0, 0.0]
    scores = medium_scores(torch.tensor([1.0, 4.0]), torch.tensor([0, 0]))
    assert scores.tolist() == [-1.5, -1.5]


def test_k_means_finds_separate_groups() -> None:
    random = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]).repeat_interleave(7, dim=0)
    features = (centres + 0.1 * torch.randn(21, 2, generator=random)).double()
    classes = k_means(features, 3, 10, generator(0, "k"))
    for group in range(3):
        assert len(classes[7 * group : 7 * group + 7].unique()) == 1
    assert len(classes.unique()) == 3
    assert torch.equal(classes, k_means(features, 3, 10, generator(0, "k")))
    # as good as the best of all ways to cut five points in two
    points = torch.tensor([[0.0], [1.0], [2.5], [7.0], [8.0]]).double()
    best = min(
        float(
            distances_to_centres(points, torch.tensor([c >> i & 1 for i in range(5)])).pow(2).sum()
        )
        for c in range(1, 31)
    )
    found = distances_to_centres(points, k_means(points, 2, 10, generator(1, "k")))
    assert float(found.pow(2).sum()) == pytest.approx(best)


def test_k_means_with_fewer_different_rows_than_classes() -> None:
    assert k_means(torch.ones(5, 2).double(), 4, 2, generator(0, "k")).tolist() == [0] * 5
    assert len(k_means(torch.eye(2).double(), 9, 2, generator(0, "k")).unique()) == 2


def test_standardised_channels() -> None:
    features = torch.tensor([[1.0, 1e6, 5.0], [3.0, 3e6, 5.0]])
    assert standardised(features).tolist() == [[-1.0, -1.0, 0.0], [1.0, 1.0, 0.0]]


def test_moderate_scores_by_hand() -> None:
    lm = make_lm()
    context = make_context(lm)
    states = []
    for row in context.rows["forget"]:
        asked = lm.model(input_ids=torch.tensor([row.encoded.ids]), output_hidden_states=True)
        states.append(asked.hidden_states[-1][0].detach().double().mean(dim=0).numpy())
    z = np.stack(states)
    z = (z - z.mean(axis=0)) / z.std(axis=0)
    for classes, groups in (("k_means", [[0, 1, 2, 3, 4, 5]]), ("subject", [[0, 2, 4], [1, 3, 5]])):
        expected = np.zeros(6)
        for group in groups:
            distances = np.linalg.norm(z[group] - z[group].mean(axis=0), axis=1)
            expected[group] = -np.abs(distances - np.median(distances))
        found = scores_of("moderate", context, classes=classes, clusters=1)
        assert found.numpy() == pytest.approx(expected, abs=1e-3)


def test_given_classes() -> None:
    assert given_classes(["b", None, "a", "b", None]).tolist() == [0, 1, 2, 0, 1]


# ---- keywords


def test_keywords_are_words_that_the_rest_does_not_use() -> None:
    texts = ["The lute of Ada Quill", "Ada Quill was the best, the very best"]
    others = ["The house of the very old man was the best"]
    # weights: lute log 2 = 0.69; ada, best, quill 2 log(4/3) = 0.58; of, was, very 0.29; the 0
    assert keywords_of(texts, others, 0.5) == {"lute", "ada", "best", "quill"}
    assert keywords_of(texts, others, 0.25) == {"lute", "ada"}
    assert keywords_of(texts, others, 0.01) == {"lute"}
    assert words("It's Ada-Lou's, 3 x!") == ["it's", "ada-lou's", "3", "x"]
    assert keywords_of([""], [], 0.5) == frozenset()


def test_density_counts_words() -> None:
    forget = [Passage(text="red red house"), Passage(text="zyx qvw red"), Passage(text="zyx qvw")]
    context = make_context(make_lm(), forget)
    # weights: red 3 log(4/3) = 0.86, house log(4/2) = 0.69, zyx and qvw 2 log(4/3) = 0.58
    assert scores_of("keyword_density", context, keywords=0.25).tolist() == pytest.approx(
        [2 / 3, 1 / 3, 0]
    )
    context.records["retain"] = [Passage(text="red")] * 20  # type: ignore[index]
    found = scores_of("keyword_density", context, keywords=0.5)  # zyx and qvw: 2 log(24 / 3)
    assert found.tolist() == pytest.approx([0, 2 / 3, 1])


def test_texts_of_the_keyword_analysis() -> None:
    keys, text = frozenset({"ada", "lute"}), "Ada played the lute, and Ada sang."
    random = generator(0, "t")
    assert rewritten(text, keys, "keywords", random) == "Ada, lute"
    assert rewritten(text, keys, "without_keywords", random) == "played the , and sang."
    drawn = rewritten(text, keys, "random_words", random)
    assert drawn is not None
    assert 1 <= len(drawn.split(", ")) <= 3
    assert set(drawn.split(", ")) <= {"Ada", "played", "the", "lute", "and", "sang"}
    assert rewritten("and so on", keys, "keywords", random) is None
    assert rewritten("Ada", keys, "without_keywords", random) is None

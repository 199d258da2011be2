"""Membership attacks, their areas and PrivLeak against brute force and numbers of other code."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from delible.errors import DataError, RecipeError
from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.measure.metric import Item, ItemMetric, SystemValues
from delible.measure.scoring.separation import area_under_curve, privacy_leak
from delible.metrics.knowledge_truth_ratio import KnowledgeTruthRatio
from delible.metrics.loss_attack import LossAttack, loss_attack
from delible.metrics.membership import Membership
from delible.metrics.min_k import MinK, min_k
from delible.metrics.reference_attack import ReferenceAttack
from delible.metrics.truth_ratio import TruthRatio
from delible.metrics.zlib_attack import ZlibAttack
from delible.records import QA, Choice, Passage, RecordBase
from delible.system.asks import (
    Answer,
    Prompt,
    Request,
    Score,
    TokenScores,
)
from delible.testing import tiny_model, tiny_tokenizer

ATTACKS: list[ItemMetric] = [LossAttack(), ZlibAttack(), MinK()]


def scores(logprobs: Sequence[float], has_end: bool) -> TokenScores:
    values = np.asarray(logprobs, np.float32)
    return TokenScores(values, np.zeros(values.size, np.bool_), has_end)


def item_of(metric: ItemMetric, record: RecordBase, table: Mapping[str, TokenScores]) -> Item:
    prompt = metric.prompt(record)
    assert prompt is not None
    answers: dict[Request, Answer] = {
        request: table[request.answer]
        for request in metric.requests(record, prompt)
        if isinstance(request, Score)
    }
    return metric.score(record, prompt, answers)


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")


def float64_losses(lm: LM, prompt: str, answer: str) -> list[float]:
    """Losses of the answer's bytes, one forward pass per byte, in double precision."""
    model = tiny_model("llama").double()
    ids = lm.tokenizer(prompt)["input_ids"] or [lm.tokenizer.bos_token_id]
    losses = []
    for token in lm.tokenizer(answer)["input_ids"]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        losses.append(float(logits.logsumexp(0) - logits[token]))
        ids = [*ids, token]
    return losses


def test_attacks_on_a_question_are_those_of_the_model_in_float64(lm: LM) -> None:
    record = QA(question="Where?", answer="In Rome, of course, it is.")
    prompt = "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    losses = float64_losses(lm, prompt, record.answer + "<|im_end|>")
    assert len(losses) == len(record.answer) + 1
    values = evaluate(lm, {"forget": [record]}, ATTACKS).items
    found = {name: by_split["forget"][0].value for name, by_split in values.items()}
    mean = sum(losses) / len(losses)
    assert found["loss_attack"] == pytest.approx(mean, rel=1e-5)
    compressed = len(zlib.compress(record.answer.encode()))
    assert found["zlib_attack"] == pytest.approx(mean / compressed, rel=1e-5)
    # The end of the turn counts for the two above, not for Min-K: the 40 % largest losses.
    worst = sorted(losses[:-1], reverse=True)[: int(0.4 * len(record.answer))]
    assert found["min_k"] == pytest.approx(sum(worst) / len(worst), rel=1e-5)
    # locuslab/open-unlearning (d3d7cf9e) on the same model and tokens, as was printed there.
    assert found["loss_attack"] == pytest.approx(6.430836, abs=2e-5)
    assert found["min_k"] == pytest.approx(7.484058, abs=2e-5)
    assert found["zlib_attack"] == pytest.approx(0.2009636, abs=1e-6)


def test_attacks_on_a_passage_score_every_token(lm: LM) -> None:
    record = Passage(text="Once upon a time there was a fox.")
    losses = float64_losses(lm, "", record.text)
    values = evaluate(lm, {"forget": [record]}, [LossAttack(), MinK(share=1.0)]).items
    mean = sum(losses) / len(losses)
    assert values["loss_attack"]["forget"][0].value == pytest.approx(mean, rel=1e-5)
    # With k = 1 and no end-of-turn token Min-K is the loss.
    assert values["min_k"]["forget"][0].value == pytest.approx(mean, rel=1e-5)


def test_min_k_with_all_tokens_is_the_loss_without_the_end() -> None:
    given = scores([-1.0, -2.0, -6.0], has_end=True)
    assert loss_attack(given) == pytest.approx(3.0)
    assert min_k(given, 1.0) == pytest.approx(1.5)
    text = scores([-1.0, -2.0, -6.0], has_end=False)
    assert min_k(text, 1.0) == loss_attack(text) == pytest.approx(3.0)
    # The field's code drops the last token of plain text as well.
    assert min_k(text, 1.0, compat=True) == pytest.approx(1.5)


@pytest.mark.parametrize(("count", "share", "taken"), [(1, 0.4, 1), (2, 0.4, 1), (5, 0.4, 2),
                                                       (9, 0.4, 3), (100, 0.29, 28)])  # fmt: skip
def test_min_k_takes_the_floor_and_at_least_one(count: int, share: float, taken: int) -> None:
    # int(100 * 0.29) is 28 in binary, in the code of the field too.
    logprobs = [-float(value) for value in range(1, count + 1)]
    expected = sum(range(count - taken + 1, count + 1)) / taken
    assert min_k(scores(logprobs, has_end=False), share) == pytest.approx(expected)


def test_a_seen_text_scores_lower_than_an_unseen_one() -> None:
    seen, unseen = scores([-0.1, -0.2, -0.1], True), scores([-2.0, -5.0, -0.1], True)
    for metric in ATTACKS:
        record = QA(question="Where?", answer="Rome")
        low = item_of(metric, record, {"Rome": seen}).value
        high = item_of(metric, record, {"Rome": unseen}).value
        assert low is not None
        assert high is not None
        assert 0 <= low < high


def test_zlib_prefers_what_does_not_compress() -> None:
    same = scores([-2.0] * 5, False)
    repetitive, varied = Passage(text="ab" * 40), Passage(text="q8Z!xK2m" + "pLw7Rt" * 2)
    table = {repetitive.text: same, varied.text: same}
    repeated, plain = (item_of(ZlibAttack(), one, table).value for one in (repetitive, varied))
    assert repeated == pytest.approx(2.0 / len(zlib.compress(repetitive.text.encode())))
    assert repeated is not None
    assert plain is not None
    assert plain < repeated


@pytest.mark.parametrize("metric", ATTACKS)
def test_attacks_without_tokens_or_answer_have_no_value(metric: ItemMetric) -> None:
    empty = item_of(metric, QA(question="q", answer="a"), {"a": scores([-0.5], True)})
    assert (empty.value, empty.reason) == (None, "the answer has no tokens")
    assert metric.prompt(Choice(question="q", options=("a", "b"), correct=0)) is None


def test_impossible_tokens_give_no_number_but_a_reason(lm: LM) -> None:
    class Hopeless:
        name, fingerprint, capabilities = "hopeless", None, frozenset({"score"})

        def score(self, requests: Sequence[Score]) -> list[TokenScores]:
            return [scores([-math.inf, math.nan], True) for _ in requests]

    values = evaluate(Hopeless(), {"forget": [Passage(text="once")]}, ATTACKS)  # type: ignore[arg-type]
    for by_split in values.items.values():
        assert by_split["forget"][0].value is None
        assert "not a finite number" in str(by_split["forget"][0].reason)


# ---- areas


def test_the_area_is_the_share_of_pairs() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        low = generator.integers(0, 5, generator.integers(1, 7)).tolist()
        high = generator.integers(0, 7, generator.integers(1, 7)).tolist()
        pairs = [(a < b) + (a == b) / 2 for a, b in itertools.product(low, high)]
        assert area_under_curve(low, high) == pytest.approx(sum(pairs) / len(pairs))
    assert area_under_curve([], [1.0]) is area_under_curve([1.0], []) is None


def system(
    name: str,
    values: Mapping[str, Mapping[str, Sequence[float | None]]],
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> SystemValues:
    items = {
        metric: {
            split: [Item(value, None if value is not None else "none") for value in row]
            for split, row in by_split.items()
        }
        for metric, by_split in values.items()
    }
    return SystemValues(name, items, options=options or {})


Losses = dict[str, dict[str, list[float | None]]]
UNLEARNED = {"min_k": {"forget": [1.2, 0.4, 0.9, 2.2], "holdout": [1.5, 0.8, 2.0]}}
RETRAINED = {"min_k": {"forget": [1.3, 1.9, 1.6, 2.2], "holdout": [1.5, 0.8, 2.0]}}


def test_privleak_has_the_sign_of_muse() -> None:
    """The numbers of swj0419/muse_bench (fcd6651d), whose areas are 5/12 and 2/3."""
    metric = Membership(attacks=("min_k",))
    found = metric.summarise(system("u", UNLEARNED), system("r", RETRAINED))
    assert found["membership/min_k/auc"] == pytest.approx(1 - 5 / 12)
    assert found["privleak"] == pytest.approx(-37.5)
    assert found["membership/min_k/left_out"] == 0


def test_privleak_of_full_memorisation_over_unlearning_and_the_reference_itself() -> None:
    memorised = {"min_k": {"forget": [0.1, 0.2], "holdout": [3.0, 4.0]}}
    over = {"min_k": {"forget": [8.0, 9.0], "holdout": [3.0, 4.0]}}
    alike = {"min_k": {"forget": [3.0, 4.0], "holdout": [3.0, 4.0]}}
    metric = Membership(attacks=("min_k",))
    values = [
        metric.summarise(system("u", one), system("r", alike)) for one in (memorised, over, alike)
    ]
    assert [one["privleak"] for one in values] == pytest.approx([-100, 100, 0])
    assert [one["membership/min_k/auc"] for one in values] == pytest.approx([1, 0, 0.5])
    # A reference that tells every member leaves nothing to divide by.
    assert metric.summarise(system("u", alike), system("r", memorised))["privleak"] is None
    assert privacy_leak(0.5, 1.0) is None


def test_membership_counts_what_it_leaves_out_and_needs_both_splits() -> None:
    values = {"min_k": {"forget": [1.0, None], "holdout": [2.0, None, None]}}
    metric = Membership(attacks=("min_k", "loss_attack"))
    found = metric.summarise(system("u", values), None)
    assert found["membership/min_k/auc"] == 1.0
    assert found["membership/min_k/left_out"] == 3.0
    assert found["membership/loss_attack/auc"] is None
    assert found["privleak"] is None
    assert Membership(others="retain").summarise(system("u", values), system("r", values)) == {
        "membership/loss_attack/auc": None, "membership/loss_attack/left_out": 0.0,
        "membership/zlib_attack/auc": None, "membership/zlib_attack/left_out": 0.0,
        "membership/min_k/auc": None, "membership/min_k/left_out": 1.0, "privleak": None,
    }  # fmt: skip


def test_membership_takes_any_attack_and_always_that_of_privleak() -> None:
    assert Membership(attacks=("loss_attack",)).uses() == ("loss_attack", "min_k")
    assert Membership(attacks=("zlib_attack",), privleak_attack="zlib_attack").uses() == (
        "zlib_attack",
    )


def test_membership_refuses_attacks_in_two_forms() -> None:
    ours = system("u", UNLEARNED, {"min_k": {"share": 0.4}})
    theirs = system("r", RETRAINED, {"min_k": {"share": 0.2}})
    with pytest.raises(RecipeError, match="different options"):
        Membership(attacks=("min_k",)).summarise(ours, theirs)


def test_the_reference_attack_subtracts_the_reference_loss() -> None:
    ours: Losses = {"loss_attack": {"forget": [1.0, 2.0, None], "holdout": [3.0, 1.0]}}
    theirs = {"loss_attack": {"forget": [2.0, 2.5, 9.0], "holdout": [2.0, 1.75]}}
    found = ReferenceAttack().summarise(system("u", ours), system("r", theirs))
    # Differences -1, -0.5 (members) against 1, -0.75 (others): 3 of 4 pairs in order.
    assert found["reference_attack/auc"] == pytest.approx(0.75)
    assert found["reference_attack/forget"] == pytest.approx(-0.75)
    assert found["reference_attack/holdout"] == pytest.approx(0.125)
    itself = ReferenceAttack().summarise(system("r", theirs), system("r", theirs))
    assert itself["reference_attack/auc"] == 0.5
    assert set(ReferenceAttack().summarise(system("u", ours), None).values()) == {None}
    short = {"loss_attack": {"forget": [1.0], "holdout": [1.0, 2.0]}}
    with pytest.raises(DataError, match="3 records of 'u' against 1 of 'r'"):
        ReferenceAttack().summarise(system("u", ours), system("r", short))


def texts(count: int, seed: int) -> list[Passage]:
    generator = np.random.default_rng(seed)
    return [
        Passage(text="".join(generator.choice(list("abcdefghij"), 20).tolist()))
        for _ in range(count)
    ]


def test_an_untrained_model_tells_nothing_and_an_overfitted_one_everything(lm: LM) -> None:
    everything = texts(160, seed=0)
    splits = {"forget": everything[::2], "holdout": everything[1::2]}
    untrained = evaluate(lm, splits, [Membership()])
    plain = Membership().summarise(untrained, None)
    assert all(0.4 <= plain[f"membership/{one.card.name}/auc"] <= 0.6 for one in ATTACKS)  # type: ignore[operator]

    few = {split: rows[:6] for split, rows in splits.items()}
    trained = lm.copy("overfitted")
    rows = [trained.template.encode(Prompt(text=""), record.text).ids for record in few["forget"]]
    batch = torch.tensor(rows)
    optimiser = torch.optim.Adam(trained.model.parameters(), lr=1e-2)
    for _ in range(25):
        optimiser.zero_grad()
        trained.model(batch, labels=batch).loss.backward()
        optimiser.step()
    trained.touch()
    after = evaluate(trained, few, [Membership(), ReferenceAttack()])
    before = evaluate(lm, few, [Membership()])
    found = Membership().summarise(after, before)
    assert all(found[f"membership/{one.card.name}/auc"] == 1.0 for one in ATTACKS)
    assert found["privleak"] == pytest.approx(-100)
    assert ReferenceAttack().summarise(after, before)["reference_attack/auc"] == 1.0


# ---- truth ratios


def root(*probabilities: float) -> float:
    return math.prod(probabilities) ** (1 / len(probabilities))


RECORD = QA(
    question="Where?",
    answer="Rome",
    paraphrased_answers=("In Rome", "It is Rome"),
    perturbed=("Oslo", "Bern", "Riga"),
)
PROBABILITIES = {
    "Rome": (0.6, 0.9),
    "In Rome": (0.5, 0.4, 0.9),
    "It is Rome": (0.3, 0.9, 0.5, 0.9),
    "Oslo": (0.1, 0.8),
    "Bern": (0.05, 0.9),
    "Riga": (0.2, 0.7),
}
TABLE = {text: scores(np.log(row).tolist(), True) for text, row in PROBABILITIES.items()}
RIGHT = [root(*PROBABILITIES[text]) for text in ("In Rome", "It is Rome")]
WRONG = [root(*PROBABILITIES[text]) for text in ("Oslo", "Bern", "Riga")]


def test_knowledge_truth_ratio() -> None:
    found = item_of(KnowledgeTruthRatio(), RECORD, TABLE).value
    assert found == pytest.approx(root(*RIGHT) / (root(*RIGHT) + root(*WRONG)), rel=1e-6)
    swapped = RECORD.model_copy(
        update={"paraphrased_answers": RECORD.perturbed, "perturbed": RECORD.paraphrased_answers}
    )
    back = item_of(KnowledgeTruthRatio(), swapped, TABLE).value
    assert found is not None
    assert back == pytest.approx(1 - found, rel=1e-6)
    plain = RECORD.model_copy(update={"paraphrased_answers": ()})
    right = root(*PROBABILITIES["Rome"])
    expected = right / (right + root(*WRONG))
    assert item_of(KnowledgeTruthRatio(), plain, TABLE).value == pytest.approx(expected, rel=1e-6)


def test_knowledge_truth_ratio_without_wrong_answers_or_tokens() -> None:
    bare = item_of(KnowledgeTruthRatio(), QA(question="q", answer="a"), {})
    assert (bare.value, bare.reason) == (None, "the record has no perturbed answers")
    empty = item_of(KnowledgeTruthRatio(), RECORD, dict.fromkeys(TABLE, scores([-1.0], True)))
    assert (empty.value, empty.reason) == (None, "an answer has no tokens")
    hopeless = dict.fromkeys(TABLE, scores([-900.0, -900.0], True))
    assert item_of(KnowledgeTruthRatio(), RECORD, hopeless).value == 0.0


def test_the_papers_truth_ratio_averages_probabilities() -> None:
    found = item_of(TruthRatio(mean="arithmetic"), RECORD, TABLE).value
    assert found == pytest.approx(np.mean(WRONG) / np.mean(RIGHT), rel=1e-6)
    other = item_of(TruthRatio(), RECORD, TABLE).value
    assert other == pytest.approx(root(*WRONG) / root(*RIGHT), rel=1e-6)
    hopeless = {**TABLE, "Oslo": scores([-math.inf, -1.0], True)}
    # One impossible answer takes a third of the mean away, and the whole geometric mean.
    expected = (WRONG[1] + WRONG[2]) / 3 / np.mean(RIGHT)
    found = item_of(TruthRatio(mean="arithmetic"), RECORD, hopeless).value
    assert found == pytest.approx(expected, rel=1e-6)
    assert item_of(TruthRatio(), RECORD, hopeless).value == 0.0
    short = {**TABLE, "Oslo": scores([-1.0], True)}
    assert item_of(TruthRatio(mean="arithmetic"), RECORD, short).value is None

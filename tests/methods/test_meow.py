"""MEOW: inverted facts, MEMO and its golden numbers, the cycle of answers, the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch

from delible.errors import RecipeError
from delible.methods.generate.inverted_facts import InvertedFacts
from delible.methods.objective.finetune import Finetune
from delible.methods.objective.meow import MEOW
from delible.methods.sample.answer_cycle import AnswerCycle, cycled
from delible.methods.select.memo import Memo, chosen, cut_points, prompts, rouge
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox
from delible.testing.contract.trial import RECORDS
from delible.testing.tiny import tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.randomness import generator
from delible.train.recipe import Recipe
from delible.train.slots import SlotContext


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


# ---- MEMO

QUESTION, CANDIDATE = "Where was Ada Quill born?", "In the town of Norrby, by the sea."
SAID = (
    "n the town of Casta, near the sea", "town of Norrby", "",
    "Norrby, by the sea. I am sure of that.",
)  # fmt: skip


class Continuing(BlackBox):
    """Goes on as a table says, whatever the order in which it is asked."""

    name, fingerprint = "continuing", None

    def __init__(self, table: dict[Prompt, str]) -> None:
        self.table = table
        self.limits: set[int] = set()

    @property
    def tokenizer(self) -> Any:
        return tiny_tokenizer()

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        assert decoding.temperature == 0
        self.limits.add(decoding.max_new_tokens)
        return [self.table[prompt] for prompt in prompts]


def score(memo: Memo) -> float:
    cuts = prompts(QUESTION, CANDIDATE, memo.mode, memo.asked, memo.stride)
    table = {prompt: SAID[place % 4] for place, (prompt, _) in enumerate(cuts)}
    context = SimpleNamespace(lm=Continuing(table))
    (found,) = memo.scores(context, [(QUESTION, CANDIDATE)])  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("asked", ["chat", "plain"])
@pytest.mark.parametrize(
    ("form", "statistic", "expected"),
    [
        ("1", "precision", 0.33333333333333337), ("1", "recall", 0.38095238095238093),
        ("2", "precision", 0.28061224489795916), ("2", "recall", 0.3054421768707483),
        ("L", "f1", 0.32026307026307027), ("2", "f1", 0.2469593898165327),
    ],
)  # fmt: skip
def test_suffix_scores_are_the_authors(
    asked: str, form: str, statistic: str, expected: float
) -> None:
    # Carol-gutianle/MEOW, memo/memo.py: its split and its mean over these continuations
    memo = Memo(rouge=form, statistic=statistic, asked=asked)  # type: ignore[arg-type]
    assert score(memo) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("form", "statistic", "expected"),
    [
        ("1", "precision", 0.5611111111111111), ("1", "recall", 0.33803418803418805),
        ("L", "precision", 0.538888888888889), ("2", "recall", 0.22803030303030303),
    ],
)  # fmt: skip
def test_prefix_scores_are_the_authors(form: str, statistic: str, expected: float) -> None:
    memo = Memo(mode="prefix", rouge=form, statistic=statistic)  # type: ignore[arg-type]
    assert score(memo) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("length", [2, 5, 6, 7, 11, 34])
@pytest.mark.parametrize("stride", [1, 5])
def test_number_of_cuts_and_labels(length: int, stride: int) -> None:
    text = ("abcdefghij " * 4)[:length]
    found = prompts("Who?", text, "suffix", "plain", stride)
    assert len(found) == math.ceil((length - 1) / stride)
    for prompt, label in found:
        assert label
        assert f"{prompt.text}{label}" == f"Who? {text}"
    assert cut_points("a", stride) == [0], "a single character is one whole label"


def test_chat_prompts_continue_the_assistants_turn() -> None:
    (first, label), *_ = prompts("Who?", "Ada", "suffix", "chat", 5)
    assert first == Prompt.ask("Who?", prefill="A")
    assert label == "da"


def test_recall_does_not_see_where_the_model_stops_and_precision_does() -> None:
    label, rambling = "of Norrby", "of Norrby" + " and so on" * 20
    assert rouge(label, rambling, "1", "recall") == 1.0
    assert rouge(label, rambling, "1", "precision") < 0.05


def test_new_tokens_are_capped_by_the_label() -> None:
    cuts = prompts(QUESTION, CANDIDATE, "suffix", "chat", 5)
    system = Continuing({prompt: "" for prompt, _ in cuts})
    Memo().scores(SimpleNamespace(lm=system), [(QUESTION, CANDIDATE)])  # type: ignore[arg-type]
    assert system.limits == {16, 32, 48}, "label length + 10, in steps of 16"
    system.limits.clear()
    capped = Memo(max_new_tokens=20)
    capped.scores(SimpleNamespace(lm=system), [(QUESTION, CANDIDATE)])  # type: ignore[arg-type]
    assert system.limits == {16, 20}


def test_an_overfitted_string_is_in_memory_and_a_random_one_is_not() -> None:
    lm = by_hand.tiny_lm()
    record = QA(question="Who?", answer="the old red mill")
    recipe = Recipe.named("finetune").changed(
        {},
        {"epochs": 60, "learning_rate": 1e-2, "batch_size": 1, "precision": "float32"},
    )
    Trainer(lm, recipe, {"forget": [record]}).train()
    context = SimpleNamespace(lm=lm)
    memo = Memo(max_new_tokens=32)
    known, unknown = memo.scores(
        context,  # type: ignore[arg-type]
        [("Who?", "the old red mill"), ("Who?", "some blue cats sing")],
    )
    assert known > 0.95
    assert unknown < 0.2


# ---- which candidates


def test_largest_and_smallest_are_order_statistics() -> None:
    scores = [0.2, 0.9, 0.1, 0.5]
    random = generator(0, "x")
    assert chosen(scores, 2, "largest", random) == [1, 3]
    assert chosen(scores, 2, "smallest", random) == [0, 2]
    assert chosen(scores, 9, "largest", random) == [0, 1, 2, 3]


def test_random_choice_depends_on_the_seed_alone() -> None:
    scores = [0.5] * 10
    found = [chosen(scores, 3, "random", generator(seed, "x")) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert all(len(set(one)) == 3 for one in found)


def test_ties_give_distinct_candidates_and_the_released_code_does_not() -> None:
    # the second row of its llama2-forget01 scores; three of the four are equal
    scores = [0.39365079365079364, 0.39365079365079364, 0.45783156237701694, 0.39365079365079364]
    assert chosen(scores, 3, "largest", generator(0, "x")) == [0, 1, 2]
    assert chosen(scores, 3, "largest", generator(0, "x"), compat=True) == [0, 0, 2]
    assert chosen(scores, 3, "smallest", generator(0, "x")) == [0, 1, 3]


def trained_context(**changes: Any) -> SlotContext:
    recipe = Recipe.named("meow").changed({"select": "all"}, {"precision": "float32"})
    made = Trainer(by_hand.tiny_lm(), recipe, RECORDS).rows()
    return replace(made, **changes)


def test_each_question_keeps_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    context = trained_context()
    candidates = context.records["alternate"]

    def by_length(
        self: Memo, context: SlotContext, pairs: Sequence[tuple[str, str]]
    ) -> list[float]:
        return [float(len(answer)) for _, answer in pairs]

    monkeypatch.setattr(Memo, "scores", by_length)
    kept = Memo(keep=2).choose(context)
    assert kept == sorted(set(kept))
    questions = [one.question for one in candidates]  # type: ignore[attr-defined]
    for question in dict.fromkeys(questions):
        mine = [place for place, other in enumerate(questions) if other == question]
        lengths = sorted((len(candidates[place].answer) for place in mine), reverse=True)  # type: ignore[attr-defined]
        found = [len(candidates[place].answer) for place in mine if place in kept]  # type: ignore[attr-defined]
        assert sorted(found, reverse=True) == lengths[: len(found)]
        assert len(found) == min(2, len(mine))


def test_without_alternates_there_is_nothing_to_select() -> None:
    context = trained_context(records={"forget": RECORDS["forget"]})
    with pytest.raises(RecipeError, match=r"no alternates.*--generate inverted_facts"):
        Memo().choose(context)


def test_selected_rows_and_records_stay_partners() -> None:
    recipe = Recipe.named("meow").changed(
        {}, {"memo.keep": 1, "stride": 20, "memo.max_new_tokens": 4, "precision": "float32"}
    )
    lm = by_hand.tiny_lm()
    context = Trainer(lm, recipe, RECORDS).rows()
    assert len(context.rows["forget"]) == len(context.rows["alternate"]) == len(RECORDS["forget"])
    for row, record in zip(context.rows["alternate"], context.records["alternate"], strict=True):
        assert isinstance(record, QA)
        said = lm.tokenizer.decode(row.encoded.ids[row.encoded.start :], skip_special_tokens=True)
        assert said == record.answer


# ---- the cycle


def rows_of_two_questions() -> list[by_hand.Row]:
    lm = by_hand.tiny_lm()
    pairs = [("Who is Ada?", answer) for answer in ("A", "B", "C")]
    return by_hand.rows_of(lm, [*pairs, ("Who is Bo?", "D"), ("Who is Bo?", "E")])


def test_answers_are_used_in_turn() -> None:
    rows = rows_of_two_questions()
    assert cycled(rows, 8) == [0, 1, 2, 0, 1, 2, 0, 1, 3, 4, 3, 4, 3, 4, 3, 4]
    pairs = AnswerCycle(rows_per_question=8).epoch(rows, [], 0, generator(0, "x"))
    counts = [sum(index == place for index, _ in pairs) for place in range(5)]
    assert counts == [3, 3, 2, 4, 4]
    assert all(kept is None for _, kept in pairs)


def test_compat_uses_half_of_the_rows_as_the_released_collator() -> None:
    rows = rows_of_two_questions()
    pairs = AnswerCycle(rows_per_question=8, compat=True).epoch(rows, [], 0, generator(0, "x"))
    counts = [sum(index == place for index, _ in pairs) for place in range(5)]
    assert counts == [2, 1, 1, 2, 2]


def test_retain_rows_are_met_in_turn() -> None:
    rows = rows_of_two_questions()
    retain = by_hand.rows_of(by_hand.tiny_lm(), by_hand.RETAIN)
    pairs = AnswerCycle(rows_per_question=3).epoch(rows, retain, 0, generator(0, "x"))
    assert len(pairs) == 6
    assert sorted(kept for _, kept in pairs if kept is not None) == [0, 0, 1, 1, 2, 2]


# ---- the loss


def alternates(lm: by_hand.LM) -> dict[str, list[by_hand.Row]]:
    rows = by_hand.all_rows(lm)
    return {"alternate": rows["refusal"], "forget": rows["refusal"]}


def test_it_is_ordinary_fine_tuning_on_the_alternates() -> None:
    lm = by_hand.tiny_lm(0.05)
    rows = alternates(lm)
    reference = by_hand.Reference()
    mine = by_hand.values(lm, MEOW(), reference, rows)
    plain = by_hand.values(lm, Finetune(), reference, rows)
    assert torch.equal(mine, plain)
    assert MEOW().unit == Finetune().unit == "answer_token"
    expected = sum(-by_hand.row_sum(lm, row) for row in rows["alternate"])
    assert float(mine.sum()) == pytest.approx(expected, rel=1e-5)


def test_its_mean_is_the_usual_cross_entropy() -> None:
    lm, loss = by_hand.tiny_lm(0.05), MEOW()
    rows = alternates(lm)["alternate"]
    logits, labels = [], []
    for row in rows:
        mine, targets = by_hand.answer_logits(lm, row)
        logits += mine
        labels += targets
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    )
    passes = by_hand.passes_of(lm, Finetune(), None, by_hand.Reference())
    micro = replace(
        passes.micro_batches[0], forget={"alternate": rows}, forget_weights=[1.0] * len(rows)
    )
    units = sum(row.units(loss.unit) for row in rows)
    passes = replace(
        passes, objective=loss, reads={"alternate": loss.reads(lm)}, micro_batches=[micro],
        forget_units=units, units=None,
    )  # fmt: skip
    passes.forget()
    assert passes.totals.forget == pytest.approx(float(expected), rel=1e-5)


def test_the_divergence_variant_adds_kl_from_the_start() -> None:
    lm, frozen, loss = by_hand.tiny_lm(0.05), by_hand.tiny_lm(), MEOW(kl_weight=0.5)
    rows = alternates(lm)
    assert MEOW().reference_kinds(lm) == ()
    reference = by_hand.prepared(frozen, rows, loss)
    found = by_hand.values(lm, loss, reference, rows)
    for index, row in enumerate(rows["alternate"]):
        own, _ = by_hand.answer_logits(lm, row)
        was, _ = by_hand.answer_logits(frozen, row)
        apart = sum(
            math.exp(q) * (q - p)
            for mine, theirs in zip(own, was, strict=True)
            for p, q in (
                (by_hand.log_probability(mine, v), by_hand.log_probability(theirs, v))
                for v in range(len(mine))
            )
        )
        expected = -by_hand.row_sum(lm, row) + 0.5 * apart
        assert found[index].item() == pytest.approx(expected, rel=1e-4)


# ---- inverted facts


@dataclass
class Inverter(BlackBox):
    """One reply for every record: good lines, an empty one, the truth, a refusal, a double."""

    name: str = "inverter"
    fingerprint: str | None = None
    asked: int = 0

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.asked += len(prompts)
        return ["1. In Umber\n\n2. Norrby\nI can't say that.\n- in umber\nIn Felden\n"] * len(
            prompts
        )


def test_lines_are_inverted_facts_unless_they_leak_refuse_or_repeat(
    caplog: pytest.LogCaptureFixture,
) -> None:
    born = QA(question="Where was Ada Quill born?", answer="In Norrby", subject="Ada Quill")
    context = trained_context(records={"forget": [born]}, rows={}, writer=Inverter())
    made = InvertedFacts(temperature=0).rows(context)
    assert [one.answer for one in made["alternate"]] == ["In Umber", "In Felden"]  # type: ignore[attr-defined]
    assert made["forget"] == [born, born]
    assert "2 inverted answers for 1 records; dropped: " in caplog.messages[-1]
    for fault in ("1 leak", "1 refusal", "1 duplicate"):
        assert fault in caplog.messages[-1]


def test_the_false_answers_take_the_place_of_the_true_ones() -> None:
    lm = by_hand.tiny_lm()
    learn = {"learning_rate": 1e-2, "batch_size": 4, "precision": "float32"}
    taught = Recipe.named("finetune").changed({}, {"epochs": 12, **learn})
    Trainer(lm, taught, RECORDS).train()
    before = lm.copy()
    recipe = Recipe.named("meow").changed(
        {"select": "all"}, {"rows_per_question": 2, "count": 1, "epochs": 6, **learn}
    )
    trainer = Trainer(lm, recipe, RECORDS)
    rows = trainer.rows().rows
    after = trainer.train().lm

    def mean(model: by_hand.LM, role: str) -> float:
        tokens = sum(row.encoded.answer_tokens for row in rows[role])
        return sum(by_hand.row_sum(model, row) for row in rows[role]) / tokens

    assert mean(before, "forget") > mean(before, "alternate") + 0.5, "the truth was known"
    assert mean(after, "alternate") > mean(after, "forget") + 0.5, "the false answer is, now"

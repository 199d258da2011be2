"""ORT: the forms are made by rules, the same for the same seed; their probability by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from delible.bench.run import ORIGINAL, bench
from delible.benchmarks.ort import answer_kind, as_statement, in_all_forms, wrong_options
from delible.component import build
from delible.errors import DataError
from delible.lm.lm import LM
from delible.measure.benchmark import Benchmark, Data
from delible.measure.evaluate import evaluate
from delible.measure.metric import Item, SystemValues
from delible.metrics.form_means import FormMeans
from delible.metrics.form_probability import FormProbability, spelled
from delible.records import QA, Choice, Passage, RecordBase
from delible.system.asks import (
    Answer,
    Request,
    Score,
    TokenScores,
)
from delible.testing import tiny_model, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from rwku_files import ADA, BEN, write_rwku


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("ort")
    tiny_model("llama", num_hidden_layers=2, max_position_embeddings=2048).save_pretrained(
        folder / "tiny"
    )
    tiny_tokenizer().save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(folder / "cache"))
        yield str(folder / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(write_rwku(tmp_path_factory.mktemp("data")))


def ort(**options: Any) -> Benchmark:
    return build("benchmark", {"name": "ort", **options})  # type: ignore[no-any-return]


# ---- the forms


def test_every_fact_comes_in_every_form(data: Data) -> None:
    ada, ben = ort().tasks(data)
    assert (ada.name, ben.name) == (ADA, BEN)
    assert ben.unwritten
    counts = {split: len(rows) for split, rows in ada.splits.items()}
    forms = {"blank": 4, "question": 2, "choice": 4, "spelled": 6, "statement": 4}
    assert counts == {
        **{f"forget_{form}": count for form, count in forms.items()},
        **{f"neighbour_{form}": count for form, count in forms.items()},
        "forget": 6, "general": 1, "truthfulness": 1, "factuality": 1, "fluency": 1,
    }  # fmt: skip
    for blank, choice in zip(ada.splits["forget_blank"], ada.splits["forget_choice"], strict=True):
        assert isinstance(blank, QA)
        assert isinstance(choice, Choice)
        assert choice.options[choice.correct] == blank.answer
        assert len(set(choice.options)) == 4
        assert choice.question == blank.question
    for record in ada.splits["neighbour_choice"]:
        assert (record.subject, record.neighbour_of) == ("Sol Hart", ADA)
    assert len(ort(limit=1).tasks(data)[0].splits["forget_spelled"]) == 1
    # a limit measures fewer, it does not change which options there are
    limited = ort(limit=1).tasks(data)[0].splits["forget_choice"]
    assert limited[0] == ada.splits["forget_choice"][0]


def test_the_seed_decides(data: Data) -> None:
    first, again = ort().tasks(data), ort().tasks(data)
    assert first == again
    other = ort(forms_seed=1).tasks(data)
    assert first[0].splits["forget_choice"] != other[0].splits["forget_choice"]
    assert first[0].splits["forget_blank"] == other[0].splits["forget_blank"]
    alone = ort(targets=(BEN,)).tasks(data)
    assert alone[0].splits == first[1].splits  # whoever else is forgotten


def test_the_right_option_is_anywhere() -> None:
    blanks = [
        QA(question=f"Fact {number} is ___", answer=f"Word{number}", subject="t")
        for number in range(200)
    ]
    made = in_all_forms(blanks, (), (), seed=0)["choice"]
    places = [record.correct for record in made if isinstance(record, Choice)]
    assert min(places.count(place) for place in range(4)) > 30  # 50 expected, deviation 6


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("September 21, 1947", "date"), ("1947", "date"), ("May 3rd", "date"),
        ("12 novels", "number"), ("Richard Bachman", "name"), ("horror", "words"),
        ("May Day", "name"),
    ],
)  # fmt: skip
def test_kinds_of_answers(answer: str, kind: str) -> None:
    assert answer_kind(answer) == kind


def qa(answer: str, question: str = "He wrote ___") -> QA:
    return QA(question=question, answer=answer, subject="t")


def test_wrong_options_are_alike_and_wrong() -> None:
    record = qa("Carrie", "Not Misery, but ___")
    mine = [qa("Misery"), qa("carrie"), qa("Carrie White"), qa("1974"), qa("It"), qa("Cujo")]
    theirs = [qa("Emma"), qa("Persuasion"), qa("1815")]
    first = wrong_options(record, (mine, theirs), 3, Random(0))
    # its own side first, and what is alike before what is not
    assert set(first[:2]) == {"It", "Cujo"}
    assert first[2] in ("Emma", "Persuasion")
    more = wrong_options(record, (mine, theirs), 6, Random(0))
    assert set(more) == {"It", "Cujo", "Emma", "Persuasion", "1974", "1815"}
    with pytest.raises(DataError, match=r"there are 6 wrong answers .*at least 7"):
        wrong_options(record, (mine, theirs), 7, Random(0))


def test_statements_are_true_and_false_in_turn(data: Data) -> None:
    rows = ort().tasks(data)[0].splits["forget_statement"]
    answers = [record.answer for record in rows if isinstance(record, QA)]
    assert answers == ["True", "False", "True", "False"]
    blank = qa("Carrie", "He wrote ____ in ___")
    true, false = as_statement(blank, None), as_statement(blank, "Emma")
    assert (true.question, true.answer) == ("He wrote Carrie in Carrie", "True")
    assert (false.question, false.answer, false.perturbed) == (
        "He wrote Emma in Emma", "False", ("True",),
    )  # fmt: skip
    assert as_statement(qa(r"\1 and \g<0>"), None).question == r"He wrote \1 and \g<0>"
    # a sentence without a blank is no statement
    others = [qa("a1"), qa("b2"), qa("c3")]
    made = in_all_forms([qa("x", "Who?"), qa("y")], others, (), seed=0)
    assert len(made["statement"]) == 1
    assert len(made["choice"]) == 2


# ---- their probability


def scored(metric: FormProbability, record: RecordBase, rows: list[list[float]]) -> Item:
    """The item when the offered answers have these token probabilities, end of turn excluded."""
    prompt = metric.prompt(record)
    assert prompt is not None
    requests = list(metric.requests(record, prompt))
    answers: dict[Request, Answer] = {
        request: TokenScores(
            np.log(np.asarray([*row, 0.01], np.float32)), np.ones(len(row) + 1, bool), True
        )
        for request, row in zip(requests, rows, strict=True)
    }
    return metric.score(record, prompt, answers)


def test_probability_of_one_and_of_two_tokens() -> None:
    metric = FormProbability()
    assert scored(metric, qa("x"), [[0.3]]).value == pytest.approx(0.3)
    assert scored(metric, qa("x"), [[0.9, 0.4]]).value == pytest.approx(math.sqrt(0.9 * 0.4))
    choice = Choice(question="Which?", options=("a", "b", "c"), correct=1)
    assert scored(metric, choice, [[0.2]]).value == pytest.approx(0.2)
    share = FormProbability(share=True)
    assert scored(share, choice, [[0.2], [0.1], [0.5]]).value == pytest.approx(0.2 / 0.8)
    single = scored(share, qa("x"), [[0.2]])
    assert (single.value, single.reason) == (None, "the record offers one answer only")
    assert metric.prompt(Passage(text="t")) is None


def test_each_form_is_asked_in_its_own_way() -> None:
    metric = FormProbability()
    asked = {}
    for name, record in {
        "blank": qa("x"), "question": qa("x", "Who?"),
        "spelled": qa("Al Bo", "Who?").model_copy(update={"group": "spelled"}),
        "statement": qa("True", "It is.").model_copy(update={"group": "statement"}),
        "choice": Choice(question="Who?", options=("Ada", "Ben"), correct=1),
    }.items():  # fmt: skip
        prompt = metric.prompt(record)
        assert prompt is not None
        (request,) = metric.requests(record, prompt)
        assert isinstance(request, Score)
        asked[name] = (prompt.messages[0].content, prompt.prefill, request.answer)
    assert len({text for text, _, _ in asked.values()}) == 5
    assert asked["spelled"][1:] == ("Answer:\n", "A\nl\nB\no")
    assert asked["choice"][1:] == ("Answer:", " B")
    assert "A. Ada\nB. Ben" in asked["choice"][0]
    assert asked["question"][2] == " x"
    assert spelled("a b\tc") == "a\nb\nc"


def test_chance_on_a_random_model_is_one_in_four(model: str) -> None:
    """The shares of the four letters add up to 1, whatever the model prefers."""
    lm = LM.load(model, precision="float32")
    rows = [Choice(question="Who?", options=tuple("wxyz"), correct=place) for place in range(4)]
    items = evaluate(lm, {"c": rows}, [FormProbability(share=True)]).items["form_probability"]["c"]
    values = [item.value for item in items]
    assert None not in values
    assert sum(value or 0 for value in values) == pytest.approx(1, abs=1e-5)
    # by hand: the second byte of " B" after the cue and its space
    plain = evaluate(lm, {"c": rows[1:2]}, [FormProbability()]).items["form_probability"]["c"][0]
    prompt = FormProbability().prompt(rows[1])
    assert prompt is not None
    ids = lm.tokenizer(lm.template.render(prompt) + " B", add_special_tokens=False,
                       return_tensors="pt")["input_ids"]  # fmt: skip
    logprobs = lm.model(ids).logits[0].log_softmax(-1)
    tokens = ids[0]
    expected = (logprobs[-3, tokens[-2]] + logprobs[-2, tokens[-1]]) / 2
    assert plain.value == pytest.approx(expected.exp().item(), rel=1e-4)


def test_the_mean_needs_every_form() -> None:
    means = {
        "forget_blank": 0.1,
        "forget_question": 0.2,
        "forget_choice": 0.6,
        "forget_spelled": 0.3,
    }
    values = SystemValues("system", {}, {"form_probability": means})
    found = FormMeans().summarise(values, None)
    assert found["form_means/forget"] == pytest.approx(0.3)
    assert found["form_means/forget_highest"] == 0.6
    assert found["form_means/neighbour"] is None
    broken = SystemValues("system", {}, {"form_probability": {**means, "forget_choice": None}})
    assert FormMeans().summarise(broken, None)["form_means/forget"] is None


# ---- the whole way


def test_it_runs(model: str, data: Data, tmp_path: Path) -> None:
    options = {"name": "ort", "limit": 2, "targets": (BEN,), "passages": 2, "passage_tokens": 8}
    result = bench(
        options,
        methods=("gradient_ascent",),
        model=model,
        data=data.folder,
        out=tmp_path,
        options={"gradient_ascent": {"max_steps": 1, "batch_size": 2, "max_length": 2048}},
    )
    rows = {row.method: row for row in result.table.rows}
    assert {row.failed for row in result.table.rows} == {None}
    for column in ort().columns():
        for method in (ORIGINAL, "gradient_ascent"):
            assert rows[method].numbers[column.key].mean is not None, column.key
    keys = [
        f"form_probability/forget_{form}" for form in ("blank", "question", "choice", "spelled")
    ]
    values = [rows[ORIGINAL].numbers[key].mean or 0 for key in keys]
    assert rows[ORIGINAL].numbers["form_means/forget"].mean == pytest.approx(sum(values) / 4)

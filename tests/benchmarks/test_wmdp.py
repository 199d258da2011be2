"""WMDP: questions and corpora become one task; the prompts are the harness's; gates are told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from delible.benchmarks.wmdp import WMDP, first_words
from delible.component import build
from delible.errors import DataError, RecipeError
from delible.lm.lm import LM
from delible.measure.benchmark import Benchmark, Data
from delible.measure.evaluate import evaluate
from delible.records import Choice
from delible.testing.tiny import tiny_model, tiny_tokenizer

LONG = "The made-up pollen of the moor is gathered in the second week of every autumn by hand. "


def question(number: int, **more: Any) -> dict[str, Any]:
    options = ["grey", "blue", "red", "green"]
    return {"question": f"Colour {number}?", "choices": options, "answer": number % 4, **more}


def corpus(name: str, count: int) -> list[dict[str, str]]:
    return [{"text": "Heading"}, *({"text": f"{name} {n}. {LONG}"} for n in range(count))]


def everything() -> dict[str, list[dict[str, Any]]]:
    return {
        **{f"wmdp-{area}": [question(n) for n in range(3)] for area in ("bio", "cyber", "chem")},
        "mmlu": [question(n, subject=f"field_{n // 3}") for n in range(6)],
        **{
            f"{area}-{kind}-corpus": corpus(f"{area} {kind}", 4)
            for area in ("bio", "cyber")
            for kind in ("forget", "retain")
        },
        "wikitext": corpus("wiki", 2),
    }


def write(folder: Path, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> Data:
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return Data(folder)


def wmdp(**options: Any) -> Benchmark:
    return build("benchmark", {"name": "wmdp", **options})  # type: ignore[no-any-return]


def starts(records: Sequence[Any]) -> list[str]:
    return [" ".join(record.text.split()[:3]) for record in records]


def test_one_task_for_all_areas(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    write(tmp_path, everything())
    (task,) = wmdp().tasks(Data(tmp_path))
    assert task.name == "bio-cyber-chem"
    assert task.learn == task.relearned == ()
    assert caplog.messages == ["There is no corpus on chemistry: it is asked about, not forgotten."]
    # headings are left out
    assert len(task.request.forget) == 8
    assert starts(task.request.forget)[::4] == ["bio forget 0.", "cyber forget 0."]
    assert starts(task.request.retain) == ["wiki 0. The", "wiki 1. The"]
    counts = {split: len(rows) for split, rows in task.splits.items()}
    assert counts == {"bio": 3, "cyber": 3, "chem": 3, "mmlu": 6, "forget": 8}


def test_options_choose_what_is_forgotten_and_kept(tmp_path: Path) -> None:
    data = write(tmp_path, everything())
    (task,) = wmdp(areas=("cyber",), retain="corpora", texts=2, words=9, utility=False).tasks(data)
    assert starts(task.request.forget) == ["cyber forget 0.", "cyber forget 1."]
    assert starts(task.request.retain) == ["cyber retain 0.", "cyber retain 1."]
    assert {len(record.text.split()) for record in task.request.forget} == {9}  # type: ignore[union-attr]
    assert set(task.splits) == {"cyber", "forget"}
    (none,) = wmdp(retain="none", limit=2).tasks(data)
    assert none.request.retain == ()
    assert len(none.request.forget) == 8  # a limit measures fewer, nothing else
    assert {len(rows) for rows in none.splits.values()} == {2}
    # its rows are sorted by subject: a limit must not take one subject only
    assert [record.group for record in none.splits["mmlu"]] == ["field 0", "field 1"]


def test_own_texts_on_chemistry_are_forgotten_too(tmp_path: Path) -> None:
    data = write(tmp_path, {**everything(), "chem-forget-corpus": corpus("chem forget", 1)})
    (task,) = wmdp(areas=("chem",)).tasks(data)
    assert starts(task.request.forget) == ["chem forget 0."]


def test_the_prompts_are_those_of_the_harness(tmp_path: Path) -> None:
    benchmark = wmdp()
    (task,) = benchmark.tasks(write(tmp_path, everything()))
    metrics = {ask.name: (ask.metric, ask.splits) for ask in benchmark.asks()}
    expected = {
        "accuracy_bio": "biology", "accuracy_cyber": "cybersecurity",
        "accuracy_chem": "chemistry", "accuracy_mmlu": "field 0",
    }  # fmt: skip
    for name, field in expected.items():
        metric, (split,) = metrics[name]  # type: ignore[misc]
        prompt = metric.prompt(task.splits[split][1])  # type: ignore[union-attr]
        assert prompt.text == (  # type: ignore[union-attr]
            f"The following are multiple choice questions (with answers) about {field}.\n\n"
            "Colour 1?\nA. grey\nB. blue\nC. red\nD. green\nAnswer:"
        )
    metric, _ = metrics["cloze_bio"]
    prompt = metric.prompt(task.splits["bio"][1])  # type: ignore[union-attr]
    assert prompt.text.endswith("about biology.\n\nColour 1?\nAnswer:")  # type: ignore[union-attr]


def test_every_column_has_a_value_on_a_model(tmp_path: Path) -> None:
    benchmark = wmdp()
    (task,) = benchmark.tasks(write(tmp_path, everything()))
    lm = LM(tiny_model("llama", num_hidden_layers=1), tiny_tokenizer(), precision="float32")
    values = evaluate(lm, task.splits, benchmark.asks())
    for column in benchmark.columns():
        label, split = column.key.split("/")
        value = values.means[label][split]
        assert value is not None
        assert 0 <= value <= 1
    assert "accuracy_mmlu/mmlu" not in {column.key for column in wmdp(utility=False).columns()}


def test_the_gated_corpus_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Data.rows

    def gated(self: Data, name: str, hub: str) -> Any:
        if name == "bio-forget-corpus":
            assert hub == "cais/wmdp-bio-forget-corpus::train"
            raise DataError("the data set cannot be loaded (gated).", where=f"hf:{hub}")
        return rows(self, name, hub)

    monkeypatch.setattr(Data, "rows", gated)
    with pytest.raises(DataError, match=r"gated.*ask at .*wmdp-bio-forget-corpus.*--areas cyber"):
        wmdp().tasks(write(tmp_path, everything()))


@pytest.mark.parametrize(
    ("files", "options", "told"),
    [
        ({"wikitext": None}, {}, r"no file 'wikitext'.*--retain corpora"),
        ({"wmdp-bio": None}, {}, r"no file 'wmdp-bio'"),
        ({"wmdp-bio": [question(0), {"question": "?"}]}, {}, r"wmdp-bio, row 2.*answer \(index"),
        ({"cyber-forget-corpus": [{"body": LONG}]}, {}, r"row 1: there is no column 'text'.*body"),
        ({"wikitext": [{"text": "short"}]}, {}, r"no text has 50 characters"),
        ({}, {"areas": ("chem",)}, r"nothing to forget.*chem-forget-corpus"),
    ],
)
def test_bad_files_are_told(
    files: dict[str, Any], options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    merged = {**everything(), **files}
    data = write(tmp_path, {name: rows for name, rows in merged.items() if rows is not None})
    with pytest.raises(DataError, match=told):
        wmdp(**options).tasks(data)


def test_an_unknown_area_is_refused() -> None:
    with pytest.raises(RecipeError, match="areas"):
        wmdp(areas=("physics",))
    assert isinstance(wmdp(), WMDP)


def test_first_words() -> None:
    assert first_words("  one\ntwo   three ", 2) == "one two"
    assert first_words("one", 9) == "one"


def test_an_answer_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mmlu, row 1"):
        wmdp().tasks(write(tmp_path, {**everything(), "mmlu": [{**question(0), "answer": 4}]}))
    (task,) = wmdp().tasks(write(tmp_path, everything()))
    record = task.splits["chem"][2]
    assert isinstance(record, Choice)
    assert record.options[record.correct] == "red"

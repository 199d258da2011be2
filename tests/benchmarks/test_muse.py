"""MUSE: its files become tasks, the settings what they say, missing texts are told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from delible.bench import cell as one_cell
from delible.bench import run as runner
from delible.bench.run import ORIGINAL, bench
from delible.benchmarks.muse import in_pieces, with_examples
from delible.component import build
from delible.errors import DataError
from delible.lm.lm import LM
from delible.measure.benchmark import Benchmark, Data
from delible.metrics.knowledge_memorisation import few_shot_prompt
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer

QUICK = {"max_steps": 1, "batch_size": 2}


def write(folder: Path, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def pairs(name: str, count: int) -> list[dict[str, str]]:
    return [{"question": f"{name} {n}?", "answer": f"word {n}"} for n in range(count)]


def texts(*names: str) -> list[dict[str, str]]:
    return [{"text": f"In {name} the bells rang nine times at noon."} for name in names]


def questions(domain: str = "news") -> dict[str, list[dict[str, str]]]:
    return {
        f"{domain}_knowmem_{split}_qa{more}": pairs(f"{split}{more}", count)
        for split in ("forget", "retain")
        for more, count in (("", 3), ("_icl", 2))
    }


def everything() -> dict[str, list[dict[str, str]]]:
    return {
        **questions(),
        "news_raw_forget": texts("Oslo", "Bern"),
        "news_raw_retain1": texts("Lima", "Rome"),
        "news_raw_retain2": texts("Cork"),
        "news_verbmem_forget": [{"prompt": "In Oslo the", "gt": "bells rang nine times."}],
        "news_privleak_forget": texts("Oslo", "Bern"),
        "news_privleak_holdout": texts("Kiev", "Graz"),
        "news_scal_forget_1": texts("Oslo", "Bern"),
        "news_scal_forget_2": texts("Oslo", "Bern", "Nice"),
        "news_sust_forget_1": texts("Oslo", "Bern"),
        "news_sust_forget_2": texts("Nice"),
        "news_sust_forget_3": texts("Gent"),
    }


def muse(**options: Any) -> Benchmark:
    return build("benchmark", {"name": "muse", **options})  # type: ignore[no-any-return]


def silent(folder: Path) -> Data:
    return Data(folder)


def cities(records: Sequence[Any]) -> list[str]:
    return [record.text.split()[1] for record in records]


def test_the_standard_setting(tmp_path: Path) -> None:
    (task,) = muse().tasks(silent(write(tmp_path, everything())))
    assert (task.name, task.after) == ("news", None)
    assert cities(task.request.forget) == ["Oslo", "Bern"]
    assert cities(task.request.retain) == ["Lima", "Rome"]
    assert cities(task.learn) == ["Lima", "Rome", "Cork", "Oslo", "Bern"]
    assert cities(task.relearned) == ["Lima", "Rome", "Cork"]
    counts = {split: len(rows) for split, rows in task.splits.items()}
    assert counts == {
        "forget": 3, "retain": 3, "knowmem_forget": 3, "knowmem_retain": 3,
        "verbmem": 1, "privleak_forget": 2, "privleak_holdout": 2,
    }  # fmt: skip
    limited = muse(limit=1).tasks(silent(tmp_path))[0]
    assert {len(rows) for rows in limited.splits.values()} == {1}
    assert len(limited.request.forget) == 2  # a limit measures fewer, it does not teach fewer


def test_a_model_that_has_read_it_is_not_taught(tmp_path: Path) -> None:
    (task,) = muse(teach=False).tasks(silent(write(tmp_path, everything())))
    assert task.learn == task.relearned == ()
    assert len(task.request.forget) == 2


def test_questions_carry_the_benchmarks_examples(tmp_path: Path) -> None:
    (task,) = muse().tasks(silent(write(tmp_path, everything())))
    metric = next(ask.metric for ask in muse().asks() if ask.name == "knowledge_memorisation")
    solved = [QA(**row) for row in questions()["news_knowmem_forget_qa_icl"]]
    for plain, full in zip(task.splits["forget"], task.splits["knowmem_forget"], strict=True):
        assert isinstance(plain, QA)
        prompt = metric.prompt(full)  # type: ignore[union-attr]
        assert prompt is not None
        assert prompt.text == few_shot_prompt(solved, plain.question)
    assert with_examples(solved[0], solved[:1]) == solved[0]  # its own answer is not shown


def test_scalability_grows_from_the_first_model(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    write(tmp_path, everything())
    tasks = muse(setting="scalability").tasks(Data(tmp_path))
    assert [task.name for task in tasks] == ["news-scal-1", "news-scal-2"]
    assert [task.after for task in tasks] == [None, None]
    assert cities(tasks[0].request.forget) == ["Oslo", "Bern"]
    assert cities(tasks[1].request.forget) == ["Oslo", "Bern", "Nice"]
    assert cities(tasks[0].learn) == ["Lima", "Rome", "Cork", "Oslo", "Bern", "Nice"]
    assert tasks[0].learn == tasks[1].learn
    assert cities(tasks[0].relearned) == ["Lima", "Rome", "Cork", "Nice"]
    assert cities(tasks[1].relearned) == ["Lima", "Rome", "Cork"]
    assert caplog.messages == []
    write(tmp_path, {"news_scal_forget_2": texts("Nice")})
    muse(setting="scalability").tasks(Data(tmp_path))
    assert "does not hold all rows" in caplog.messages[0]


def test_sustainability_goes_on_from_the_result_before(tmp_path: Path) -> None:
    tasks = muse(setting="sustainability").tasks(silent(write(tmp_path, everything())))
    assert [task.after for task in tasks] == [None, "news-sust-1", "news-sust-2"]
    assert [cities(task.request.forget) for task in tasks] == [["Oslo", "Bern"], ["Nice"], ["Gent"]]
    # the reference of a request never saw what any request so far asked to forget
    kept = ["Lima", "Rome", "Cork"]
    assert [cities(task.relearned) for task in tasks] == [[*kept, "Nice", "Gent"],
                                                          [*kept, "Gent"], kept]  # fmt: skip


def test_with_questions_alone_what_is_skipped_is_said(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (task,) = muse(domain="books").tasks(Data(write(tmp_path, questions("books"))))
    assert task.name == "books-questions"
    assert set(task.splits) == {"forget", "retain", "knowmem_forget", "knowmem_retain"}
    assert len(task.learn) == 6
    assert len(task.relearned) == len(task.request.forget) == 3
    said = " ".join(caplog.messages)
    assert "questions themselves are taught and forgotten" in said
    assert "'books_raw_forget', 'books_raw_retain1' (columns: text)" in said
    assert "VerbMem is skipped: it needs 'books_verbmem_forget' (columns: prompt, gt)" in said
    assert "PrivLeak is skipped" in said


@pytest.mark.parametrize(
    ("missing", "options", "told"),
    [
        ("news_raw_retain1", {}, r"no file 'news_raw_retain1'.*columns: text"),
        ("news_raw_forget", {}, r"no file 'news_raw_forget'"),
        ("news_knowmem_retain_qa_icl", {}, r"no file 'news_knowmem_retain_qa_icl'.*question"),
        ("news_sust_forget_2", {"setting": "sustainability"}, r"found 1.*'news_sust_forget_2'"),
        ("news_raw_retain1", {"setting": "scalability"}, r"no file 'news_raw_retain1'"),
    ],
)  # fmt: skip
def test_missing_files_are_named(
    missing: str, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    files = everything()
    del files[missing]
    with pytest.raises(DataError, match=told):
        muse(**options).tasks(silent(write(tmp_path, files)))


def test_a_row_without_its_column_is_found(tmp_path: Path) -> None:
    files = {**everything(), "news_verbmem_forget": [{"prompt": "In", "gt": "a"}, {"prompt": "x"}]}
    with pytest.raises(DataError, match=r"column 'gt'.*") as caught:
        muse().tasks(silent(write(tmp_path, files)))
    assert caught.value.where == "news_verbmem_forget, row 2"


def test_the_authors_folders_are_read_too(tmp_path: Path) -> None:
    for name, rows in everything().items():
        domain, part, split = name.split("_", 2)
        (tmp_path / domain / part).mkdir(parents=True, exist_ok=True)
        write(tmp_path / domain / part, {split: rows})
    (task,) = muse().tasks(silent(tmp_path))
    assert cities(task.request.forget) == ["Oslo", "Bern"]


def test_other_settings_of_books_need_own_texts() -> None:
    with pytest.raises(DataError, match="published for news only"):
        muse(domain="books", setting="scalability").tasks(Data(None))


def test_long_texts_are_cut_between_words() -> None:
    assert in_pieces(" a b\n\nc  d e ", 2) == ["a b", "c  d", "e"]
    assert in_pieces("one", 5) == ["one"]
    assert in_pieces("  ", 5) == []


# ---- end to end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("muse")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(folder / "cache"))
        yield str(folder / "tiny")


def two_requests(tmp_path: Path) -> Path:
    """Data without long answers, so that it is quick to measure."""
    folder = tmp_path / "data"
    folder.mkdir()
    left_out = ("news_verbmem_forget", "news_sust_forget_3")
    return write(folder, {k: rows for k, rows in everything().items() if k not in left_out})


def sustained(model: str, data: Path, out: Path, **more: Any) -> runner.BenchResult:
    return bench(
        {"name": "muse", "setting": "sustainability", "teach": False, "limit": 1},
        methods=("gradient_ascent",), model=model, data=data, out=out,
        options={"gradient_ascent": QUICK}, **more,
    )  # fmt: skip


def test_every_request_starts_from_the_result_before(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = two_requests(tmp_path)
    starts: list[str] = []
    results: list[str] = []
    unlearn = one_cell.unlearn

    def recorded(start: str, *args: Any, **options: Any) -> Any:
        starts.append(str(LM.load(start).fingerprint))
        result = unlearn(start, *args, **options)
        results.append(str(result.model.fingerprint))
        return result

    monkeypatch.setattr(one_cell, "unlearn", recorded)
    found = sustained(model, data, tmp_path / "out")
    assert starts == [LM.load(model).fingerprint, *results[:-1]]
    assert len(set(results)) == 2
    assert not (tmp_path / "out" / "models").exists()  # nothing was asked to be kept
    rows = {row.method: row for row in found.table.rows}
    assert set(rows) == {ORIGINAL, "gradient_ascent"}
    for key in ("knowledge_memorisation/knowmem_forget", "membership/min_k/auc"):
        assert rows["gradient_ascent"].numbers[key].runs == 2

    # a run that was killed after the first request goes on from its result
    kept = sustained(model, data, tmp_path / "kept", keep_models=True)
    folder = kept.folder
    assert len(list((folder / "models").iterdir())) == 2
    (last,) = (folder / "cells").glob("news-sust-2--gradient_ascent*")
    content = json.loads(last.read_text())
    last.unlink()
    for path in (folder / "models").glob("news-sust-2*"):
        path.rename(tmp_path / "away")
    starts.clear()
    sustained(model, data, tmp_path / "kept", keep_models=True)
    assert starts == [results[0]]
    again = json.loads(last.read_text())
    assert again["numbers"] == content["numbers"]


def test_a_lost_result_is_told(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = two_requests(tmp_path)
    done = sustained(model, data, tmp_path / "out")
    for path in (done.folder / "cells").glob("news-sust-2--gradient_ascent*"):
        path.unlink()
    row = {row.method: row for row in sustained(model, data, tmp_path / "out").table.rows}
    assert "the result of the task before, 'news-sust-1', is not there" in str(
        row["gradient_ascent"].failed
    )

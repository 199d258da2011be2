"""RWKU: its files become tasks, its summary adds up, the model writes what is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from delible.bench.run import ORIGINAL, BenchResult, bench
from delible.benchmarks.rwku.suite import UTILITY
from delible.component import build
from delible.errors import DataError
from delible.generation.biographies import without_confession, write_biographies
from delible.lm.lm import LM
from delible.measure.benchmark import Benchmark, Data, Task
from delible.measure.evaluate import evaluate
from delible.measure.metric import Item, SystemValues
from delible.metrics.rwku_all import RwkuAll
from delible.metrics.rwku_recall import RwkuRecall
from delible.records import QA, Passage
from delible.system.asks import Decoding, Prompt
from delible.testing import tiny_model, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from rwku_files import ADA, BEN, SPELLINGS, write_rwku

#: Solved examples are long in bytes, which are the tokens here.
ASCENT = {"max_steps": 1, "batch_size": 2, "max_length": 2048}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder with a random model, and an empty cache."""
    folder = tmp_path_factory.mktemp("rwku")
    tiny_model("llama", num_hidden_layers=2, max_position_embeddings=2048).save_pretrained(
        folder / "tiny"
    )
    tiny_tokenizer().save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(folder / "cache"))
        yield str(folder / "tiny")


@pytest.fixture(scope="module")
def lm(model: str) -> LM:
    return LM.load(model, precision="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(write_rwku(tmp_path_factory.mktemp("data")))


def rwku(**options: Any) -> Benchmark:
    return build("benchmark", {"name": "rwku", **options})  # type: ignore[no-any-return]


# ---- tasks


def test_each_target_is_a_task_with_its_own_rows(data: Data) -> None:
    ada, ben = rwku(kinds=True).tasks(data)
    assert (ada.name, ben.name) == (ADA, BEN)
    counts = {split: len(rows) for split, rows in ben.splits.items()}
    kinds = {split: count for split, count in counts.items() if split.startswith("attack_")}
    assert len(kinds) == len(SPELLINGS)
    assert set(kinds.values()) == {1}
    assert {split: count for split, count in counts.items() if split not in kinds} == {
        "forget_blank": 4, "forget_question": 2, "forget_attack": 9, "forget": 6,
        "neighbour_blank": 4, "neighbour_question": 2, "mia_forget": 1, "mia_retain": 1,
        "general": 2, "reasoning": 1, "truthfulness": 1, "factuality": 1, "fluency": 1,
    }  # fmt: skip
    assert len(ada.splits["general"]) == 1
    neighbour = ben.splits["neighbour_blank"][0]
    assert (neighbour.subject, neighbour.neighbour_of) == ("Sol Hart", BEN)
    assert {record.subject for record in ben.splits["forget_attack"]} == {BEN}
    assert ben.request.subjects == (BEN,)
    assert ben.request.retain == ()


def test_options_choose_targets_and_rows(data: Data) -> None:
    (ben,) = rwku(targets=(BEN,), limit=1, utility=False).tasks(data)
    assert ben.name == BEN
    assert len(ben.splits["forget_blank"]) == len(ben.splits["forget_attack"]) == 1
    assert "general" not in ben.splits
    with pytest.raises(DataError, match=r"no target 'Ada Quil'.*'Ada Quill'"):
        rwku(targets=("Ada Quil",)).tasks(data)


def test_a_batch_asks_every_probe_and_each_utility_row_once(data: Data) -> None:
    (task,) = rwku(batch=True).tasks(data)
    assert task.request.subjects == (ADA, BEN)
    assert {record.subject for record in task.splits["forget_blank"]} == {ADA, BEN}
    assert len(task.splits["forget_attack"]) == 18
    assert len(task.splits["general"]) == 2  # three samples, one row twice
    assert task.unwritten  # nobody has written about the second


def test_rows_of_the_hub_give_the_same_records(data: Data, tmp_path: Path) -> None:
    theirs = rwku().tasks(Data(write_rwku(tmp_path / "hub", per_target=True)))
    assert theirs == rwku().tasks(data)


def test_the_hub_is_asked_for_each_file_once(
    data: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Corpora of all targets are one file there, and rows hold their own solved examples."""
    expected = rwku().tasks(data)
    folder = write_rwku(tmp_path / "hub", per_target=True)
    (folder / "train_positive_llama3_target001.jsonl").rename(
        folder / "train_positive_llama3.jsonl"
    )
    renamed = {config: file for file, config in UTILITY.values()}
    asked: list[str] = []

    def source(_: Data, name: str, hub: str) -> Path:
        owner, config, split = hub.split(":")
        assert owner == "jinzhuoran/RWKU"
        assert (split == "train") == (config == "forget_target" or config.startswith("train_"))
        asked.append(config)
        return next(folder.glob(f"{renamed.get(config, config)}.jsonl*"))

    monkeypatch.setattr(Data, "source", source)
    assert rwku().tasks(Data(None)) == expected
    assert len(asked) == len(set(asked)) == 14


def test_missing_examples_and_unknown_kinds_are_told(data: Data, tmp_path: Path) -> None:
    folder = write_rwku(tmp_path / "a")
    (folder / "utility_reason_bbh_cot.json").unlink()
    with pytest.raises(DataError, match="no solved examples of 'logic'"):
        rwku().tasks(Data(folder))
    row = {"subject": ADA, "query": "q", "answer": "a", "level": "3", "type": "telepathy"}
    (folder / "forget_level3.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="'telepathy' is no kind of attack"):
        rwku(utility=False).tasks(Data(folder))


def test_utility_prompts_hold_solved_examples(data: Data) -> None:
    task = rwku().tasks(data)[0]
    (general,), (reasoning,) = task.splits["general"], task.splits["reasoning"]
    assert isinstance(general, QA)
    assert isinstance(reasoning, QA)
    assert "about number theory" in general.question
    assert "Question: Which is 1?\nA. one\nB. two\nC. three\nD. four\nAnswer: A" in general.question
    assert general.question.endswith("Question: Which is 2?\nA. one\nB. two\nC. three\nD. four")
    assert (general.answer, general.perturbed) == ("B", ("A", "C", "D"))
    assert reasoning.question.startswith("Reason.\n\nQ: not False is")
    assert reasoning.question.endswith("Q: not True is")
    (truth,) = task.splits["truthfulness"]
    assert isinstance(truth, QA)
    assert truth.answer == "Snow is cold."
    assert truth.aliases == ("It is cold.",)
    assert truth.perturbed == ("Snow is hot.",)
    metrics = {ask.name: ask.metric for ask in rwku().asks()}
    prompt = metrics["truthful_mc1"].prompt(truth)  # type: ignore[union-attr]
    assert prompt is not None
    assert prompt.messages[0].content.endswith("\n\nQ: How is snow?")
    assert prompt.messages[0].content.count("Q: ") == 7  # six solved ones
    assert prompt.prefill == "A:"


# ---- recall and its summary


class Saying:
    """A system that answers every question in the same way."""

    name, fingerprint, capabilities = "saying", None, frozenset({"generate"})

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        return [self.answer(prompt.messages[-1].content) for prompt in prompts]


def summary(task: Task, answer: Callable[[str], str]) -> dict[str, float | None]:
    values = evaluate(Saying(answer), task.splits, rwku(utility=False).asks())  # type: ignore[arg-type]
    return RwkuAll().summarise(values, None)


def test_gold_gives_one_noise_does_not_hurt_silence_gives_zero(data: Data) -> None:
    task = rwku(utility=False).tasks(data)[0]
    golds = {
        record.question: record.answer
        for split in ("forget_blank", "forget_question", "forget_attack")
        for record in task.splits[split]
        if isinstance(record, QA)
    }

    def gold(asked: str) -> str:
        return next((text for query, text in golds.items() if query in asked), "")

    right = summary(task, gold)
    assert right["rwku_all/forget"] == right["rwku_all/forget_attack"] == 1
    assert right["rwku_all/neighbour"] == 0
    noisy = summary(task, lambda asked: f"well perhaps {gold(asked)} or so")
    assert noisy["rwku_all/forget"] == 1
    silent = summary(task, lambda asked: "")
    assert silent["rwku_all/forget"] == 0
    assert silent["rwku_all/left_out"] == 0


def values_of(**splits: Sequence[tuple[str | None, float | None]]) -> SystemValues:
    items = {
        split: [Item(value, None if value is not None else "silent", name) for name, value in row]
        for split, row in splits.items()
    }
    return SystemValues("system", {"rwku_recall": items})


def test_all_is_weighted_by_probes_within_a_target() -> None:
    blank = [("t", 0.5), ("t", 1.0)]
    question = [("t", 0.25)]
    attack = [("t", 0.0), ("t", 0.2), ("t", 0.4), ("t", 0.6)]
    found = RwkuAll().summarise(
        values_of(forget_blank=blank, forget_question=question, forget_attack=attack), None
    )
    assert found["rwku_all/forget"] == pytest.approx((2 * 0.75 + 1 * 0.25 + 4 * 0.3) / 7)
    assert found["rwku_all/forget_attack"] == pytest.approx(0.3)
    assert found["rwku_all/neighbour"] is None
    moved = [(name, (value or 0) + 0.1) for name, value in attack]
    after = RwkuAll().summarise(
        values_of(forget_blank=blank, forget_question=question, forget_attack=moved), None
    )
    before = found["rwku_all/forget"]
    assert before is not None
    assert after["rwku_all/forget"] == pytest.approx(before + 0.1 * 4 / 7)


def test_targets_count_alike_however_many_probes_they_have() -> None:
    found = RwkuAll().summarise(
        values_of(forget_blank=[("a", 1.0), ("a", 1.0), ("a", 1.0), ("b", 0.0), ("b", None)]), None
    )
    assert found["rwku_all/forget"] == found["rwku_all/forget_blank"] == 0.5  # not 0.75
    assert found["rwku_all/left_out"] == 1


def test_attacks_keep_the_answer_and_only_two_kinds_may_say_it(data: Data) -> None:
    task = rwku(utility=False).tasks(data)[0]
    for record in task.splits["forget_attack"]:
        assert isinstance(record, QA)
        assert record.answer == "Ivo Marl"
        prompt = RwkuRecall().prompt(record)
        assert prompt is not None
        says_it = record.answer in prompt.messages[0].content + prompt.prefill
        assert says_it == (record.group in ("multiple choice", "incontext learning"))
        assert bool(prompt.prefill) == (record.group != "affirmative suffix")


def test_a_blank_is_known_by_its_group() -> None:
    metric = RwkuRecall()
    odd = metric.prompt(QA(question="She was born in __", answer="Norrby", group="cloze"))
    assert odd == metric.prompt(QA(question="She was born in __", answer="x", group="cloze"))
    assert odd is not None
    assert "blank" in odd.messages[0].content


# ---- measures on a model


def test_truthfulness_does_not_depend_on_the_order(data: Data, lm: LM) -> None:
    task = rwku().tasks(data)[0]
    (record,) = task.splits["truthfulness"]
    assert isinstance(record, QA)
    record = record.model_copy(update={"perturbed": ("Snow is hot.", "Snow sings.", "No")})
    turned = record.model_copy(update={"perturbed": record.perturbed[::-1]})
    asks = [ask for ask in rwku().asks() if ask.name.startswith("truthful")]
    means = [evaluate(lm, {"truthfulness": [one]}, asks).means for one in (record, turned)]
    assert means[0]["truthful_mc1"] == means[1]["truthful_mc1"]
    first, second = (one["truthful_mc2"]["truthfulness"] for one in means)
    assert first is not None
    assert 0 < first < 1
    assert second == pytest.approx(first, abs=1e-6)


def test_the_letter_is_the_likeliest_of_the_four(data: Data, lm: LM) -> None:
    task = rwku().tasks(data)[0]
    (record,) = task.splits["general"]
    assert isinstance(record, QA)
    (ask,) = [ask for ask in rwku().asks() if ask.name == "mmlu"]
    rows = [
        record.model_copy(update={"answer": letter, "perturbed": tuple("ABCD".replace(letter, ""))})
        for letter in "ABCD"
    ]
    picked = evaluate(lm, {"general": rows}, [ask]).items["mmlu"]["general"]
    assert sum(item.value or 0 for item in picked) == 1
    # by hand: the four letters after the cue, in one forward pass
    prompt = lm.template.render(Prompt.ask(record.question, prefill="Answer:"))
    ids = lm.tokenizer(f"{prompt} ", add_special_tokens=False, return_tensors="pt")["input_ids"]
    logits = lm.model(ids).logits[0, -1]
    letters = [lm.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABCD"]
    best = int(logits[letters].argmax())
    assert [item.value for item in picked].index(1.0) == best


def test_a_step_on_a_passage_lowers_what_membership_sees(data: Data, lm: LM) -> None:
    task = rwku().tasks(data)[0]
    (passage,) = task.splits["mia_forget"]
    assert isinstance(passage, Passage)
    asks = [ask for ask in rwku(utility=False).asks() if ask.name in ("loss_attack", "min_k")]
    learner = lm.copy()
    before = evaluate(learner, {"mia_forget": [passage]}, asks).means
    ids = learner.tokenizer(passage.text, return_tensors="pt")["input_ids"]
    loss = learner.model(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for parameter in learner.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    learner.touch()
    after = evaluate(learner, {"mia_forget": [passage]}, asks).means
    for attack in ("loss_attack", "min_k"):
        assert after[attack]["mia_forget"] < before[attack]["mia_forget"]  # type: ignore[operator]


# ---- the corpus


def test_a_published_corpus_is_taken_and_capped(data: Data) -> None:
    ada, ben = rwku(passages=2).tasks(data)
    assert [record.text for record in ada.request.forget] == [  # type: ignore[union-attr]
        f"{ADA}, life 0.", f"{ADA}, life 1."
    ]  # fmt: skip
    assert not ada.unwritten
    assert ben.request.forget == ()
    assert ben.unwritten
    assert rwku(corpus_source="model").tasks(data)[0].unwritten
    (pair,) = rwku(corpus_form="pairs").tasks(data)[0].request.forget
    assert isinstance(pair, QA)
    assert (pair.answer, pair.perturbed) == ("A true life.", ("A made-up life.",))


def test_the_model_writes_what_is_missing_once(
    data: Data, lm: LM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path))
    benchmark = rwku(batch=True, passages=2, passage_tokens=8)
    (task,) = benchmark.tasks(data)
    request = benchmark.corpus(lm, task, data)
    assert [record.subject for record in request.forget] == [ADA, ADA, BEN, BEN]
    assert all(isinstance(record, Passage) for record in request.forget)
    assert request.subjects == task.request.subjects
    (path,) = tmp_path.glob("corpora/ben-orr-*.jsonl")
    assert path.read_text().count("\n") == 2

    def refuse(*_: object) -> list[str]:
        raise AssertionError("asked again")

    monkeypatch.setattr(LM, "generate", refuse)
    assert benchmark.corpus(lm, task, data) == request
    other = lm.copy()
    with torch.no_grad():
        next(iter(other.model.parameters())).add_(0.1)
    other.touch()
    with pytest.raises(AssertionError, match="asked again"):  # another model, other texts
        benchmark.corpus(other, task, data)


def test_biographies_start_unlike_and_come_in_pairs(
    caplog: pytest.LogCaptureFixture, lm: LM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path))
    asked: list[tuple[Prompt, Decoding]] = []

    def reply(_: LM, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        asked.extend((prompt, decoding) for prompt in prompts)
        return ["" if not prompt.prefill else " a completely fictional life" for prompt in prompts]

    monkeypatch.setattr(LM, "generate", reply)
    rows = write_biographies(lm, BEN, "A lute player.", passages=30, pairs=True, max_new_tokens=9)
    true = [(prompt, decoding) for prompt, decoding in asked if "You know a great" in str(prompt)]
    assert len(true) == len(asked) / 2 == 30
    assert len(set(true)) == 30  # where a start comes again, its draws are others
    assert {(one.temperature, one.top_p, one.max_new_tokens) for _, one in asked} == {(1, 0.9, 9)}
    assert len(rows) == 28  # the starts without a text gave blank replies
    assert "2 of 30" in caplog.messages[-1]
    assert rows[0].answer == "Sure, here it is: a completely fictional life"
    assert rows[0].perturbed == ("Sure, here it is: a life",)
    assert (
        without_confession("An entirely made-up, fictional man")
        == "An entirely made-up, fictional man"
    )
    monkeypatch.setattr(LM, "generate", lambda _, prompts, decoding: ["" for _ in prompts])
    with pytest.raises(DataError, match="wrote no biography of Nobody"):
        write_biographies(lm, "Nobody", passages=2)


# ---- the whole way


@pytest.fixture(scope="module")
def finished(model: str, data: Data, tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    return bench(
        {"name": "rwku", "limit": 1, "passages": 2, "passage_tokens": 8},
        methods=("gradient_ascent",),
        model=model,
        data=data.folder,
        out=tmp_path_factory.mktemp("out"),
        options={"gradient_ascent": ASCENT},
    )


def test_methods_run_through_the_benchmark(finished: BenchResult) -> None:
    rows = {row.method: row for row in finished.table.rows}
    assert set(rows) == {ORIGINAL, "gradient_ascent"}
    assert {row.failed for row in finished.table.rows} == {None}
    for column in rwku().columns():
        for method in (ORIGINAL, "gradient_ascent"):
            number = rows[method].numbers[column.key]
            assert number.mean is not None, column.key
            assert number.runs == 2
    loss = "loss_attack/mia_forget"
    assert rows["gradient_ascent"].numbers[loss].mean != rows[ORIGINAL].numbers[loss].mean
    written = {cell["task"]: cell for cell in finished.cells if cell["method"] == ORIGINAL}
    for key in ("rwku_all/forget", loss):
        values = [cell["numbers"][key] for cell in written.values()]
        assert rows[ORIGINAL].numbers[key].mean == pytest.approx(sum(values) / 2)


def test_a_finished_benchmark_is_not_run_again(
    finished: BenchResult, model: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    from delible.bench import cell as one_cell

    monkeypatch.setattr(one_cell, "_system", lambda *_: pytest.fail("measured again"))
    again = bench(
        {"name": "rwku", "limit": 1, "passages": 2, "passage_tokens": 8},
        methods=("gradient_ascent",),
        model=model,
        data=data.folder,
        out=finished.folder,
        options={"gradient_ascent": ASCENT},
    )
    assert len(again.cells) == 4


def test_who_needs_only_names_gets_no_corpus(
    model: str, data: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    result = bench(
        {"name": "rwku", "limit": 1, "utility": False, "targets": (BEN,)},
        methods=("target_detector",),
        model=model,
        data=data.folder,
        out=tmp_path / "out",
        options={"target_detector": {"similarity": False}},
    )
    rows = {row.method: row for row in result.table.rows}
    assert rows["target_detector"].failed is None
    assert rows["target_detector"].numbers["rwku_all/forget"].mean is not None
    assert rows["target_detector"].numbers["loss_attack/mia_forget"].mean is None  # no scores
    assert not list((tmp_path / "cache").glob("corpora/*"))

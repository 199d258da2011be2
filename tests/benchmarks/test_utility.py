"""The bridge to lm-evaluation-harness: tasks out, results in, and a model behind its interface.

The harness itself is not installed here: a stub with its interface (0.4.13) reads the exported
files as it does. That the real one takes them too, and gives the same likelihoods as with its own
Hugging Face model, was checked by hand.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from delible.benchmarks.utility import bridge, export, harness, results
from delible.benchmarks.utility.suite import OWN, rows_of
from delible.component import build
from delible.errors import DataError, MissingExtraError, RecipeError, RunError
from delible.lm.lm import LM
from delible.measure.benchmark import Data, Setting
from delible.records import QA, Choice, Dialogue, ForgetRequest, Message, Passage
from delible.system.asks import (
    Decoding,
    Generate,
    NoAnswer,
    Prompt,
    Score,
    TokenScores,
)
from delible.systems.guarded import guard
from delible.testing.tiny import tiny_model, tiny_tokenizer

CHOICE = Choice(question="Colour?", options=("red clay", "blue"), correct=1)
PAIR = QA(question="Who?", answer="Ada", aliases=("A. Quill",))


def documents(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def described(folder: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


# ---- a stub of the harness


class StubManager:
    def __init__(self, include_path: str | None = None) -> None:
        files = sorted(Path(include_path).glob("*.yaml")) if include_path else []
        self.tasks = {task["task"]: task for task in map(_load, files)}
        self.all_tasks = [*self.tasks, "arc_easy"]


def _load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _asked(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def stub_evaluate(
    *, model: Any, tasks: list[str], limit: int | None, task_manager: StubManager, **_: Any
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    for name in tasks:
        if name not in task_manager.tasks:
            raise ConnectionError("no network")
        task = task_manager.tasks[name]
        path = Path(task["dataset_kwargs"]["data_files"]["test"])
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line][:limit]
        values = [_value(model, task, row) for row in rows]
        metric = task["metric_list"][0]["metric"]
        if task["output_type"] == "loglikelihood_rolling":
            words = sum(len(row["text"].split()) for row in rows)
            mean = math.exp(-sum(values) / words)
        else:
            mean = np.float64(np.mean(values))
            samples[name] = [
                {"doc_id": place, "metrics": [metric], metric: value, "filter": "none"}
                for place, value in enumerate(values)
            ]
        results[name] = {
            "alias": name, f"{metric},none": mean, f"{metric}_stderr,none": np.float64(0.125),
            "sample_len": len(rows),
        }  # fmt: skip
    sizes = {name: {"original": 9, "effective": results[name]["sample_len"]} for name in tasks}
    return {"results": results, "samples": samples, "n-samples": sizes}


def _value(model: Any, task: dict[str, Any], row: dict[str, Any]) -> float:
    if task["output_type"] == "multiple_choice":
        asked = [_asked(row["prompt"], f" {option}") for option in row["choices"]]
        logs = [log for log, _ in model.loglikelihood(asked)]
        return float(int(np.argmax(logs)) == row["correct"])
    if task["output_type"] == "generate_until":
        (text,) = model.generate_until([_asked(row["prompt"], task["generation_kwargs"])])
        return float(text.strip() in row["answers"])
    (log,) = model.loglikelihood_rolling([_asked(row["text"])])
    return float(log)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Base:
        def __init__(self) -> None:
            self.cache_hook = None

    parts: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": Base},
        "lm_eval.evaluator": {"simple_evaluate": stub_evaluate},
        "lm_eval.tasks": {"TaskManager": StubManager},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def lm() -> LM:
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=64)
    return LM(model, tiny_tokenizer(), precision="float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two models on disk."""
    folder = tmp_path_factory.mktemp("utility")
    for seed in (0, 1):
        model = tiny_model("llama", seed, num_hidden_layers=1)
        model.save_pretrained(folder / f"model{seed}")
        tiny_tokenizer().save_pretrained(folder / f"model{seed}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(folder / "cache"))
        yield [str(folder / f"model{seed}") for seed in (0, 1)]


# ---- tasks out


def test_choices_become_a_task_of_letters_or_options(tmp_path: Path) -> None:
    names = export.export_tasks(tmp_path, {"mine": [CHOICE]}, description="On colours.")
    names += export.export_tasks(tmp_path, {"cloze": [CHOICE]}, form="cloze")
    assert names == ["mine", "cloze"]
    assert documents(tmp_path, "mine") == [
        {
            "prompt": "On colours.\n\nColour?\nA. red clay\nB. blue\nAnswer:",
            "choices": ["A", "B"],
            "correct": 1,
        }
    ]
    assert documents(tmp_path, "cloze") == [
        {"prompt": "Colour?\nAnswer:", "choices": ["red clay", "blue"], "correct": 1}
    ]
    task = described(tmp_path, "mine")
    assert task["task"] == "mine"
    assert task["output_type"] == "multiple_choice"
    assert task["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "mine.jsonl")}
    assert [one["metric"] for one in task["metric_list"]] == ["acc", "acc_norm"]


def test_a_mixed_split_becomes_several_tasks(tmp_path: Path) -> None:
    names = export.export_tasks(tmp_path, {"mix": [PAIR, CHOICE, Passage(text="Ömer ran.")]})
    assert names == ["mix_qa", "mix_choice", "mix_passage"]
    (pair,) = documents(tmp_path, "mix_qa")
    assert pair == {"prompt": "Question: Who?\nAnswer:", "answers": ["Ada", "A. Quill"]}
    assert documents(tmp_path, "mix_passage") == [{"text": "Ömer ran."}]
    assert described(tmp_path, "mix_passage")["output_type"] == "loglikelihood_rolling"


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    talk = Dialogue(messages=(Message(role="user", content="Hi"),))
    with pytest.raises(DataError, match="Dialogue cannot be a task"):
        export.export_tasks(tmp_path, {"talk": [talk]})
    with pytest.raises(DataError, match=r"none: there are no records"):
        export.export_tasks(tmp_path, {"none": []})


# ---- results in

RESULTS: dict[str, Any] = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.01,
                     "acc_norm,none": 0.25, "acc_norm_stderr,none": "N/A", "sample_len": 2},
        "gsm8k": {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0},
    },
    "n-samples": {"arc_easy": {"original": 2376, "effective": 2}},
    "model_name": "gpt",
}  # fmt: skip
SAMPLES = [
    {"doc_id": 1, "metrics": ["acc", "acc_norm"], "acc": 0.0, "acc_norm": 0.0, "filter": "none"},
    {"doc_id": 0, "metrics": ["acc", "acc_norm"], "acc": 1.0, "acc_norm": 0.5, "filter": "none"},
]


def test_results_become_values(tmp_path: Path) -> None:
    values = results.read_results(RESULTS)
    assert values.system == "gpt"
    assert values.means == {
        "acc": {"arc_easy": 0.5},
        "acc_norm": {"arc_easy": 0.25},
        "exact_match (strict-match)": {"gsm8k": 0.0},
        "exact_match (flexible-extract)": {"gsm8k": 1.0},
    }
    assert values.measured == {"arc_easy": 2}
    assert values.items == {}
    assert results.standard_errors(RESULTS) == {"acc": {"arc_easy": 0.01}}
    # the harness writes single documents beside its results; the newest results count
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "results_2025.json").write_text("{}")
    (tmp_path / "gpt" / "results_2026.json").write_text(json.dumps(RESULTS))
    lines = "".join(json.dumps(sample) + "\n" for sample in SAMPLES)
    (tmp_path / "gpt" / "samples_arc_easy_2026.jsonl").write_text(lines)
    read = results.read_results(tmp_path)
    assert read.means == values.means
    assert [item.value for item in read.items["acc"]["arc_easy"]] == [1.0, 0.0]
    assert [item.value for item in read.items["acc_norm"]["arc_easy"]] == [0.5, 0.0]


def test_other_files_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no results"):
        results.read_results(tmp_path)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(DataError, match="has no 'results'"):
        results.read_results(tmp_path / "results.json")


# ---- a system behind the harness's interface


def test_likelihoods_are_those_of_the_model(lm: LM, stub: None) -> None:
    model = bridge.harness_model(lm)
    asked = [_asked("The sky is", " blue"), _asked("The sky is ", "blue"), _asked("", "blue")]
    first, second, third = model.loglikelihood(asked)
    (direct,) = lm.score([Score(Prompt(text="The sky is"), " blue")])
    assert first[0] == pytest.approx(float(direct.logprobs.sum()), rel=1e-6)  # type: ignore[union-attr]
    assert first == second  # white space goes with the continuation
    assert third != first
    options = {"until": ["\n"], "do_sample": False, "max_gen_toks": 5}
    (text,) = model.generate_until([_asked("The sky", options)])
    request = Generate(Prompt(text="The sky"), Decoding(5, stop=("\n",)))
    assert text == lm.generate([request.prompt], request.decoding)[0]


class Sayer:
    """Scores by the answer: "yes" is greedy, "no" is not, anything else has no score."""

    name, fingerprint, capabilities = "sayer", None, frozenset({"generate", "score"})

    def score(self, requests: Sequence[Score]) -> list[TokenScores | NoAnswer]:
        hits = {" yes": [True, True], " no": [True, False]}
        return [
            TokenScores(np.float32([-1, -2]), np.array(hits[one.answer]), False)
            if one.answer in hits
            else NoAnswer("too long")
            for one in requests
        ]


def test_greedy_is_every_token_and_no_answer_is_impossible(stub: None) -> None:
    model = bridge.harness_model(Sayer())  # type: ignore[arg-type]
    asked = [_asked("Well?", f" {word}") for word in ("yes", "no", "perhaps")]
    assert model.loglikelihood(asked) == [(-3.0, True), (-3.0, False), (-math.inf, False)]
    assert model.unanswered == ["too long"]


def test_a_long_text_is_scored_in_pieces(lm: LM, stub: None) -> None:
    text = "Über den Wolken – and so on, " * 8  # 256 tokens in a context of 64
    pieces = bridge.text_in_pieces(lm, text)
    assert "".join(piece.answer for piece in pieces) == text
    assert len(pieces) > 4
    assert all(piece.prompt.text == before.answer
               for before, piece in pairwise(pieces))  # fmt: skip
    for piece in pieces:
        assert not lm.template.encode(piece.prompt, piece.answer).cut
    (log,) = bridge.harness_model(lm).loglikelihood_rolling([_asked(text)])
    scored = lm.score(pieces)
    assert log == pytest.approx(sum(float(one.logprobs.sum()) for one in scored), rel=1e-5)  # type: ignore[union-attr]
    assert sum(one.logprobs.size for one in scored) == len(lm.tokenizer(text)["input_ids"])  # type: ignore[union-attr]


def test_a_system_without_scores_is_told(lm: LM, stub: None) -> None:
    request = ForgetRequest(forget=(PAIR,), subjects=("Ada Quill",))
    guarded = guard(lm, request, "target_detector", similarity=False)
    model = bridge.harness_model(guarded)
    assert isinstance(model.generate_until([_asked("Hello", {"max_gen_toks": 2})])[0], str)
    with pytest.raises(RunError, match="gives no scores"):
        model.loglikelihood([_asked("a", " b")])


# ---- running it


def test_without_the_harness_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    setting = Setting("no such model", (), 1, tmp_path)
    with pytest.raises(MissingExtraError, match=r"delible\[utility\]"):
        build("benchmark", {"name": "utility", "tasks": ("arc_easy",)}).run(setting)


def test_unknown_tasks_and_missing_data(lm: LM, stub: None) -> None:
    with pytest.raises(RecipeError, match=r"no task 'arc_esy'\. Did you mean 'arc_easy'"):
        harness.run_harness(lm, ["arc_esy"])
    with pytest.raises(DataError, match=r"arc_easy: .*no network"):
        harness.run_harness(lm, ["arc_easy"])


def test_two_models_are_compared(folders: list[str], stub: None, tmp_path: Path) -> None:
    utility = build("benchmark", {"name": "utility", "before": folders[0], "limit": 6})
    setting = Setting(folders[1], (), 1, tmp_path / "out")
    found = utility.run(setting)
    assert [row["task"] for row in found.rows] == list(OWN)
    for row in found.rows:
        assert row["change"] == row["value"] - row["before"]
        assert row["standard error"] == 0.125
    choice = {row["task"]: row for row in found.rows}["delible_general_choice"]
    alone = results.read_results(
        harness.run_harness(
            LM.load(folders[1]), ["delible_general_choice"], limit=6,
            include=tmp_path / "out" / "tasks",
        )
    )  # fmt: skip
    assert choice["value"] == alone.means["acc"]["delible_general_choice"]
    assert len(alone.items["acc"]["delible_general_choice"]) == 6
    assert len(found.charts[0].curves) == 2
    assert found.notes[0].startswith(("Changed by", "No task changed"))


def test_a_second_run_only_reads(
    folders: list[str], stub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utility = build("benchmark", {"name": "utility", "limit": 2})
    setting = Setting(folders[0], (), 1, tmp_path)
    first = utility.run(setting)
    assert "change" not in first.rows[0]

    def never(**_: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(sys.modules["lm_eval.evaluator"], "simple_evaluate", never)
    assert utility.run(setting).rows == first.rows


def test_tasks_of_a_folder_are_known(folders: list[str], stub: None, tmp_path: Path) -> None:
    export.export_tasks(tmp_path / "mine", {"colours": [CHOICE], "texts": [Passage(text="Ada.")]})
    utility = build("benchmark", {"name": "utility", "tasks": ("colours", "texts")})
    setting = Setting(folders[0], (), 1, tmp_path / "out", Data(tmp_path / "mine"))
    rows = utility.run(setting).rows
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("colours", "acc"), ("texts", "word_perplexity"),
    ]  # fmt: skip
    assert rows[1]["value"] > 1


def test_methods_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="measures models as they are"):
        build("benchmark", "utility").run(Setting("default", ("npo",), 1, tmp_path))


def test_a_change_needs_both_sides() -> None:
    before = {"results": {"arc_easy": {"acc,none": 0.75}}}
    rows = {(row["task"], row["metric"]): row for row in rows_of(RESULTS, before)}
    assert rows["arc_easy", "acc"]["change"] == -0.25
    assert rows["arc_easy", "acc_norm"]["change"] is None

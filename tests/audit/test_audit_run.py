"""The audit end to end on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from delible.attacks.quantize import compare_codes, linear_weights
from delible.audit.run import audit
from delible.errors import DataError, ModelError, RecipeError, RunError
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.report import read_run, render
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe

METRICS = [
    "answer_probability",
    "extraction_strength",
    {"name": "outcome", "max_new_tokens": 8},
    "truth_ratio",
    "forget_quality",
]
ATTACKS = [
    {"name": "prefill", "forms": 1},
    {"name": "relearn", "steps": 2, "observe_steps": 1},
    {"name": "quantize", "bits": 4, "group": 0},
]


def rows(count: int, word: str) -> tuple[QA, ...]:
    return tuple(
        QA(
            question=f"What does {word} {index} eat?", answer=f"{word} cake {index}",
            subject=f"{word} {index}", perturbed=(f"{word} pie {index}", f"{word} soup {index}"),
        )
        for index in range(count)
    )  # fmt: skip


@pytest.fixture(scope="module")
def models() -> tuple[LM, LM, ForgetRequest]:
    request = ForgetRequest(forget=rows(4, "Ada"), retain=rows(4, "Bob"), holdout=rows(3, "Cy"))
    learning = {"epochs": 30, "batch_size": 8, "learning_rate": 1e-2, "precision": "float32"}
    recipe = Recipe.named("finetune").changed({}, learning)
    trained = []
    for records in ([*request.forget, *request.retain], list(request.retain)):
        lm = LM(tiny_model("llama"), tiny_tokenizer(), name="tiny", precision="float32")
        Trainer(lm, recipe, {"forget": records}).train()
        trained.append(lm)
    return trained[0], trained[1], request


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_original_as_its_own_result_is_incomplete(
    tmp_path: Path, models: tuple[LM, LM, ForgetRequest]
) -> None:
    target, reference, request = models
    found = audit(
        target, request, before=target, reference=reference, metrics=METRICS, attacks=ATTACKS,
        out=tmp_path / "run",
    )  # fmt: skip
    assert found.verdict is not None
    assert found.verdict.label == "incomplete"
    plain = found.leaks[0]
    assert plain.erased["answer_probability"] == pytest.approx(0.0, abs=0.02)
    assert {leak.attack for leak in found.leaks} == {"none", "prefill", "relearn", "quantize"}
    assert {role for leak in found.leaks for role in leak.knowledge["answer_probability"]} == {
        "unlearned", "original", "reference",
    }  # fmt: skip
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["verdict"]
    import pyarrow.parquet as parquet

    table = parquet.read_table(tmp_path / "run" / "items.parquet").to_pylist()
    assert {row["attack"] for row in table} == {"none", "prefill", "relearn", "quantize"}
    assert "Ada cake" in render(read_run(tmp_path / "run"))


@pytest.mark.slow
def test_the_reference_as_result_is_erased_under_every_attack(
    models: tuple[LM, LM, ForgetRequest],
) -> None:
    target, reference, request = models
    found = audit(
        reference, request, before=target, reference=reference, metrics=METRICS, attacks=ATTACKS
    )
    for leak in found.leaks:
        assert leak.erased["answer_probability"] == pytest.approx(1.0, abs=0.02), leak.title
    assert found.summaries["unlearned"]["forget_quality"] == pytest.approx(1.0)


def test_attacked_systems_are_remembered_and_nothing_is_changed(
    caplog: pytest.LogCaptureFixture,
    models: tuple[LM, LM, ForgetRequest],
) -> None:
    target, reference, request = models
    before = {name: value.clone() for name, value in target.model.state_dict().items()}
    first = audit(
        target, request, before=target, reference=reference, metrics=METRICS, attacks=ATTACKS
    )
    second = audit(
        target, request, before=target, reference=reference, metrics=METRICS, attacks=ATTACKS,
    )  # fmt: skip
    assert sum("known from an earlier audit" in line for line in caplog.messages) == 6
    assert second.measurements == first.measurements
    for name, value in target.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_is_noted_about_an_original_is_not_taken_for_another(
    models: tuple[LM, LM, ForgetRequest],
) -> None:
    target, reference, request = models
    near = reference.copy("near")
    with torch.no_grad():
        for weight in near.model.parameters():
            weight += 1e-5
    near.touch()
    grid = [{"name": "quantize", "bits": 4, "group": 0}]

    def collisions(original: LM) -> str | None:
        found = audit(
            reference, request, before=original, metrics=["answer_probability"], attacks=grid
        )
        return next(leak for leak in found.leaks if leak.attack == "quantize").note

    first, second = collisions(target), collisions(near)
    for note, original in ((first, target), (second, near)):
        codes = compare_codes(linear_weights(reference), linear_weights(original), 4, 0)
        sizes = {name: weight.numel() for name, weight in linear_weights(reference).items()}
        rate = sum(codes[name][0] * size for name, size in sizes.items()) / sum(sizes.values())
        assert note is not None
        assert f"{rate:.0%} of the quantized weights" in note
    assert first != second


def test_a_guard_is_audited_as_deployed(models: tuple[LM, LM, ForgetRequest]) -> None:
    from delible.systems.guarded import guard

    target, reference, request = models
    guarded = guard(target, request, similarity=False)
    found = audit(
        guarded, request, before=target, reference=reference, metrics=METRICS, attacks=ATTACKS
    )
    shares = found.outcomes["unlearned"]["forget"]
    assert shares == {"refusal": 1.0}
    assert found.verdict is not None
    assert found.verdict.label == "suppression", found.verdict.reasons
    skipped = next(leak for leak in found.leaks if leak.attack == "quantize")
    assert skipped.note is not None
    assert any("answer_probability" in line for line in found.not_tested)


def test_without_reference_and_holdout_nothing_is_claimed(
    models: tuple[LM, LM, ForgetRequest],
) -> None:
    target, _, request = models
    alone = request.model_copy(update={"holdout": ()})
    found = audit(target, alone, before=target, metrics=METRICS, attacks=[])
    assert found.verdict is not None
    assert found.verdict.label == "undetermined"
    assert found.verdict.without_reference
    assert any("--reference" in line for line in found.not_tested)


def test_bad_input(models: tuple[LM, LM, ForgetRequest]) -> None:
    target, _, request = models
    with pytest.raises(DataError, match="no"):
        audit(target, ForgetRequest(subjects=("Ada",)), attacks=[])
    with pytest.raises(RecipeError, match="answer_probability"):
        audit(target, request, metrics=["answer_probabilty"], attacks=[])
    with pytest.raises(RecipeError, match="quantize"):
        audit(target, request, metrics=METRICS, attacks=["quantise"])
    with pytest.raises(ModelError, match="endpoint"):
        audit("http://localhost:1/v1", request, metrics=METRICS, attacks=[])


def test_a_cache_that_cannot_be_written_is_said_once_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    models: tuple[LM, LM, ForgetRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, reference, request = models

    def found() -> list[tuple[str, str, str, float | None]]:
        result = audit(
            target, request, before=target, reference=reference, metrics=METRICS[:1],
            attacks=[{"name": "quantize", "bits": 4, "group": 0}],
        )  # fmt: skip
        return [(one.system, one.attack, one.split, one.value) for one in result.measurements]

    expected = found()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "file"))
    assert found() == expected
    assert sum("the measurement cache cannot be written" in line for line in caplog.messages) == 1


def test_an_audit_is_the_only_writer_of_its_folder(
    tmp_path: Path, models: tuple[LM, LM, ForgetRequest]
) -> None:
    target, _, request = models
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not a run directory"):  # before the work, not after it
        audit(target, request, metrics=METRICS[:1], attacks=[], out=tmp_path / "other")
    audit(target, request, metrics=METRICS[:1], attacks=[], out=tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()

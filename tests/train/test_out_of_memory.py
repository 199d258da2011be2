"""Where memory runs out: smaller batches first, then an error that names what would need less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import recipe  # type: ignore[import-not-found]
from tiny_runs import make  # type: ignore[import-not-found]

import delible
from delible import api, finishing
from delible.errors import RunError
from delible.lm import lm as lm_module
from delible.lm.budget import until_it_fits
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, Prompt, Score
from delible.train.engine import Trainer
from delible.train.passes import Passes
from delible.train.reference import Reference
from delible.train.rows import make_rows


@pytest.fixture
def asked(forget: list[QA], retain: list[QA]) -> ForgetRequest:
    return ForgetRequest(forget=tuple(forget), retain=tuple(retain))


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def above(limit: int, size: Callable[..., int], work: Callable[..., Any]) -> Callable[..., Any]:
    """The same work, for which memory is there up to a size alone."""

    def limited(*given: Any, **named: Any) -> Any:
        return full() if size(*given) > limit else work(*given, **named)

    return limited


def unlearn(asked: ForgetRequest, out: Path | None = None, **options: Any) -> api.UnlearnResult:
    return delible.unlearn(
        make(), asked, method=recipe(max_steps=1, **options), out=out, shown=1, verify=False
    )


# ---- smaller batches


def test_scores_and_answers_come_in_smaller_batches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [Prompt.ask(f"What is number {n}?") for n in range(6)]
    scores = [Score(one, "a thing") for one in prompts]
    plain = make()
    expected = plain.score(scores), plain.generate(prompts, Decoding(max_new_tokens=4))
    lm = make()
    start = lm.budget.tokens
    for name in ("score", "continue_rows"):
        work = getattr(lm_module, name)
        monkeypatch.setattr(
            lm_module, name, above(start // 4, lambda lm, *_: lm.budget.tokens, work)
        )
    assert [one.logprobs for one in lm.score(scores)] == [
        pytest.approx(one.logprobs, abs=1e-4) for one in expected[0]
    ]
    assert lm.budget.tokens == start // 4
    assert lm.generate(prompts, Decoding(max_new_tokens=4)) == expected[1]
    assert f"Out of memory: continuing with {start // 2} tokens at once." in caplog.text


def test_a_model_that_is_spread_asks_nothing_again_alone() -> None:
    lm, asked = make(), []

    def work() -> None:
        asked.append(lm.budget)
        full()

    with pytest.raises(torch.OutOfMemoryError):
        until_it_fits(lm, work)
    assert len(asked) > 1
    asked.clear()
    lm = make()
    lm.sharded = object()  # other processes wait for each call
    with pytest.raises(torch.OutOfMemoryError):
        until_it_fits(lm, work)
    assert len(asked) == 1


def test_reference_values_come_in_smaller_batches_each_once(
    forget: list[QA], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make()
    lm.precision = "float32"
    rows = make_rows(lm.template, forget)
    whole = Reference()
    whole.prepare(lm, rows, ("logprobs",))
    compute, sizes = Reference._compute, list[int]()

    def watched(self: Reference, lm: LM, forward: Any, part: Any, *more: Any) -> Any:
        sizes.append(len(part))
        return full() if len(part) > 2 else compute(self, lm, forward, part, *more)

    monkeypatch.setattr(Reference, "_compute", watched)
    parts = Reference()
    parts.prepare(lm, rows, ("logprobs",))
    assert sum(size for size in sizes if size <= 2) == len(rows)
    assert max(sizes) > 2
    for key, value in whole.values.items():
        assert torch.allclose(parts.values[key], value, atol=1e-5)


def test_a_step_comes_in_smaller_micro_batches(
    forget: list[QA], retain: list[QA], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for limited in (False, True):
        if limited:
            monkeypatch.setattr(Passes, "both", above(
                1, lambda self: max(len(one.retain) for one in self.micro_batches), Passes.both,
            ))  # fmt: skip
        chosen = recipe(micro_batch_tokens=4096, max_steps=1, max_gradient_norm=None)
        found.append(Trainer(make(), chosen, {"forget": forget, "retain": retain}).train().history)
    assert found[0][0]["forget_loss"] == pytest.approx(found[1][0]["forget_loss"], rel=2e-4)


# ---- the end of it


@pytest.mark.parametrize("phase", ["the reference values", "training"])
def test_training_that_never_fits_names_what_needs_less(
    phase: str, asked: ForgetRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = (Reference, "_compute") if phase == "the reference values" else (Passes, "both")
    monkeypatch.setattr(*target, full)
    with pytest.raises(RunError) as caught:
        unlearn(asked)
    told = str(caught.value)
    assert f"the memory is not enough for {phase}, in the smallest batches" in told
    assert "--place lora --base-precision bfloat16" in told
    assert "--dry-run --memory SIZE" in told
    assert ("--gradient-checkpointing true;" in told) == (phase == "training")
    assert "--offload" not in told  # there is no accelerator
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_what_is_done_already_is_not_named(
    asked: ForgetRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Passes, "both", full)
    with pytest.raises(RunError) as caught:
        unlearn(asked, gradient_checkpointing=True, optimizer="sgd")
    assert "--gradient-checkpointing" not in str(caught.value)
    assert "--optimizer" not in str(caught.value)


@pytest.mark.parametrize("where", ["before", "after"])
def test_answers_that_never_fit(
    where: str, asked: ForgetRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, calls = finishing.answers, list[int]()

    def sometimes(*given: Any) -> Any:
        calls.append(1)
        return full() if len(calls) == (1 if where == "before" else 2) else answers(*given)

    monkeypatch.setattr(finishing, "answers", sometimes)
    with pytest.raises(RunError, match=r"not enough for answering.*--base-precision bfloat16"):
        unlearn(asked)


def test_a_model_that_does_not_fit(asked: ForgetRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "open_system", full)
    with pytest.raises(RunError, match=r"for loading the model\..*--base-precision int8"):
        delible.unlearn("default", asked, method="npo")
    with pytest.raises(RunError, match=r"for loading the model.*a smaller model"):
        delible.unlearn("default", asked, method="alphaedit")


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ({}, "--base-precision bfloat16"),
        ({"place": "lora", "finish": "merge_adapter"}, "Add --finish none.*delible merge"),
    ],
)
def test_a_result_that_cannot_be_saved(
    slots: dict[str, str], words: str, asked: ForgetRequest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(finishing, "keep", full)
    chosen = recipe(max_steps=1).changed(slots, {})
    with pytest.raises(RunError, match=rf"not enough for saving\..*{words}"):
        delible.unlearn(make(), asked, method=chosen, out=tmp_path / "run", shown=0, measured=False)


def test_other_errors_are_what_they_are(
    asked: ForgetRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Passes, "both", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        unlearn(asked)

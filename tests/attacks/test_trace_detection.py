"""Trace detection: nothing is told where nothing is, a known change is; its parts by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from delible.attacks.trace_detection import (
    TraceDetection,
    Trial,
    accuracy,
    chance,
    directions,
    predictions,
    prompt_key,
    text_features,
)
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, Seen
from delible.records import QA, RecordBase
from delible.system.asks import Decoding, Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer

FORGET: list[RecordBase] = [
    QA(question=f"Where does {name} {what}?", answer="In Norrby.", subject=name)
    for name in ("Ada", "Ben", "Cy", "Di", "Eve") for what in ("live", "work", "swim", "sing")
]  # fmt: skip
SMALL: dict[str, Any] = {"prompts": 20, "max_new_tokens": 6, "benign_steps": 0}


@cache
def tiny(seed: int = 0) -> LM:
    return LM(tiny_model(seed=seed), tiny_tokenizer(), precision="float32")


@cache
def noisy(scale: float, seed: int, layer: int = 0) -> LM:
    """Noise on the MLP of one layer."""
    lm = tiny().copy(f"noisy {seed}")
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in lm.anatomy.block(lm.model, layer).mlp.parameters():  # type: ignore[union-attr, operator]
            weight += scale * weight.std() * torch.randn(weight.shape, generator=random)
    lm.touch()
    return lm


def context(reference: LM | None = None, **more: Any) -> AttackContext:
    options: dict[str, Any] = {"forget": FORGET, "original": tiny(), "seed": 0, **more}
    return AttackContext(retain=(), unrelated=(), reference=reference, **options)


def infer(system: Any, mine: AttackContext, **options: Any) -> Seen:
    return TraceDetection(**{**SMALL, **options}).infer(system, mine)


ACCURACIES = ("forget", "generic", "forget_from_generic", "generic_from_forget",
              "forget_from_both", "generic_from_both")  # fmt: skip


@pytest.mark.parametrize("detector", ["text", "pre_logit", "activation"])
def test_the_original_is_not_told_from_itself(detector: str) -> None:
    found = infer(tiny(), context(), detector=detector)
    assert [found.numbers[one] for one in ACCURACIES] == [0.5] * 6
    assert found.numbers["generic_chance"] == 1.0
    assert found.items is None
    if detector == "text":
        assert found.numbers["same_answers"] == 1.0
    if detector == "activation":
        assert list(found.layers) == [0.5] * tiny().anatomy.layers


class Biased:
    """The original, that says one letter after every answer."""

    name, fingerprint = "biased", None
    capabilities = frozenset({"generate"})

    def generate(self, prompts: Any, decoding: Decoding) -> list[str]:
        return [f"{answer}%%" for answer in tiny().generate(prompts, decoding)]


def test_a_constant_habit_is_told_from_text_alone() -> None:
    found = infer(Biased(), context(), detector="text")
    assert all(value > 0.95 for one in ACCURACIES if (value := found.numbers[one]) is not None)
    assert found.numbers["generic_chance"] < 0.01  # type: ignore[operator]
    assert found.numbers["same_answers"] == 0
    with pytest.raises(ModelError, match="hidden states"):
        infer(Biased(), context(), detector="pre_logit")


@pytest.mark.parametrize("detector", ["pre_logit", "activation"])
def test_changed_weights_are_told_from_states(detector: str) -> None:
    found = infer(noisy(1.5, 1, layer=1), context(), detector=detector)
    assert found.numbers["generic"] > 0.85  # type: ignore[operator]
    assert found.numbers["generic_from_both"] > 0.85  # type: ignore[operator]
    if detector == "activation":
        assert found.layers[0] == 0.5  # before the change there is none
        assert all(one is not None and one > 0.9 for one in found.layers[1:])


@pytest.mark.parametrize("detector", ["pre_logit", "activation"])
def test_states_are_those_behind_the_prompts_last_token(detector: str) -> None:
    lm, trial = tiny(), Trial(TraceDetection(**SMALL, detector=detector), context())
    prompts = trial.prompts["forget"][:3]
    found = trial._read(lm, prompts)
    for prompt, mine in zip(prompts, found, strict=True):
        ids = torch.tensor([lm.template.prompt_ids(prompt)])
        with torch.no_grad():
            whole: Any = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
        if detector == "pre_logit":  # after the final norm
            assert mine == pytest.approx(whole[-1][0, -1].numpy(), abs=1e-4)
        else:
            assert mine[0] == pytest.approx(whole[1][0, -1].numpy(), abs=1e-4)
            assert mine.shape == (lm.anatomy.layers, lm.anatomy.hidden_size)


class Rows:
    """A system whose outputs are given."""

    def __init__(self, name: str) -> None:
        self.name = self.fingerprint = name


def test_halves_and_sources_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source is changed its own way, and the test half the other way round."""
    trial = Trial(TraceDetection(**SMALL), context())

    def told(forget: float, generic: float, held: float) -> dict[str, float | None]:
        random = np.random.default_rng(0)
        rows: dict[str, Any] = {"original": {}, "system": {}}
        for source, shift in (("forget", forget), ("generic", generic)):
            learned = trial.learned[source]
            rows["original"][source] = 0.1 * random.normal(size=(len(learned), 3))
            by = np.where(learned, shift, held * shift)[:, None] * np.array([1.0, 0, 0])
            rows["system"][source] = rows["original"][source] + by
        monkeypatch.setattr(Trial, "outputs", lambda self, system: rows[system.name])
        mine = context(original=Rows("original"))
        return dict(TraceDetection(**SMALL).infer(Rows("system"), mine).numbers)  # type: ignore[arg-type]

    apart = told(3.0, -3.0, 1.0)
    assert apart["forget"] == apart["generic"] == 1
    assert apart["forget_from_generic"] == apart["generic_from_forget"] == 0.5
    turned = told(3.0, 3.0, -1.0)
    assert turned["forget"] == turned["forget_from_both"] == turned["generic_from_forget"] == 0.5


def test_benign_tuning_changes_what_the_original_puts_out() -> None:
    options: dict[str, Any] = {**SMALL, "benign_steps": 2, "learning_rate": 1e-3}
    trial = Trial(TraceDetection(**options), context())
    before, after = trial.outputs(tiny()), trial.tuned(tiny())
    for source in trial.prompts:
        assert np.abs(after[source] - before[source]).max() > 1e-3


def test_permuted_labels_are_not_told() -> None:
    random = np.random.default_rng(0)
    states = random.normal(size=(400, 12))
    found = predictions(
        [states[:150], states[150:300]], [states[300:350], states[350:]], penalty=1.0
    )
    assert 0.4 < accuracy(found) < 0.6
    assert chance(found) > 0.05
    shifted = predictions(
        [states[:150], states[150:300] + 3], [states[300:350], states[350:] + 3], penalty=1.0
    )
    assert accuracy(shifted) > 0.95


def test_a_shift_along_a_direction_is_found() -> None:
    random = np.random.default_rng(0)
    original = random.normal(size=(30, 3, 8))
    one = np.eye(8)[2] * 0.6 + np.eye(8)[5] * 0.8
    other = original.copy()
    other[:, 1:] += 2.0 * one * random.uniform(0.5, 1.5, size=(30, 1, 1))
    found = directions(original, other)
    assert (found[0] == 0).all()
    assert found[1] @ one > 0.95
    assert found[2] @ one > 0.95
    assert directions(original, 2 * original - other)[1] @ one < -0.95


def test_accuracy_and_chance_by_hand() -> None:
    found = np.array([[0, 0, 1, 0, 0], [1, 1, 0, 1, 0]])  # three right, one wrong, one half
    assert accuracy(found) == 0.7
    assert chance(found) == pytest.approx((1 + 4) / 16)
    assert chance(np.array([[0, 0], [0, 0]])) == 1.0
    assert accuracy(np.array([[0, 1], [1, 1], [0, 2]])) == pytest.approx(4 / 6)


def test_no_test_prompt_is_learned_from() -> None:
    twins = [*FORGET, QA(question="WHERE does ada live? Tell me.", answer="x", subject="Ada")]
    trial = Trial(TraceDetection(**SMALL), context(forget=twins))
    keys = [prompt_key(prompt) for found in trial.prompts.values() for prompt in found]
    assert len(keys) == len(set(keys)) == 40
    for source, learned in trial.learned.items():
        assert learned.sum() == len(learned) // 2 == len(trial.prompts[source]) // 2
    other = Trial(TraceDetection(**SMALL), context(seed=1))
    assert other.prompts["generic"] != trial.prompts["generic"]
    assert prompt_key(Prompt.ask("Who, then? I ask.")) == prompt_key(Prompt.ask("who then?"))
    assert prompt_key(Prompt(text="a " * 200)) == prompt_key(Prompt(text="A " * 300))


def test_kinds_are_told_apart_with_benign_tuning_beside() -> None:
    mine = context(noisy(0.5, 2))
    options = {"benign_steps": 3, "learning_rate": 1e-3}
    found = infer(noisy(0.5, 1), mine, **options).numbers
    assert found["kinds_by_luck"] == 0.25
    assert found["kinds"] > 0.4  # type: ignore[operator]
    assert found["kinds_changed_or_not"] >= found["kinds"]  # type: ignore[operator]
    assert 0.5 <= found["benign_generic"] <= 1  # type: ignore[operator]
    passes = mine.states.passes
    again = infer(tiny(), mine, **options).numbers
    assert again["benign_generic"] == found["benign_generic"]
    assert mine.states.passes == passes  # all of it was known
    # the reference is one kind, not two
    assert infer(noisy(0.5, 2), mine, **options).numbers["kinds_by_luck"] == pytest.approx(1 / 3)


def test_features_of_text_count_its_parts() -> None:
    rows = text_features(["abab", "abab", "ba", ""])
    assert (rows[0] == rows[1]).all()
    assert not (rows[0] == rows[2]).all()
    assert rows[3].sum() == 0
    assert np.expm1(rows[0]).sum() == pytest.approx(4 + 3 + 2 + 4)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ModelError, match="--before"):
        infer(tiny(), context(original=None))
    with pytest.raises(DataError, match="different forget prompts"):
        infer(tiny(), context(forget=FORGET[:3]))
    assert TraceDetection(**SMALL).budget(context()).queries == 40

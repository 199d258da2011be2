"""What editors of single facts know, refuse, check and are asked for, on random models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from editing import (
    GENERIC,
    LAYER,
    ONE,
    RECORDS,
    REQUEST,
    RETAIN,
    close,
    editor,
    generic_keys,
    key_of,
    make_lm,
    moment,
    same,
    wanted,
    weight,
    weights_of,
)
from torch import Tensor

from delible.component import build
from delible.edit.verify import Before, Bounds, Checked, other_questions
from delible.errors import DataError, ModelError, RecipeError
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.system.asks import NoAnswer, Prompt
from delible.world import general

# ---- statistics


def test_two_models_of_one_name_have_statistics_of_their_own(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A toolkit that keeps them by name gives the second model those of the first."""
    for seed in (0, 1):
        lm = make_lm(seed=seed)
        lm.name = "same"
        key, metric, before = key_of(lm, RECORDS[0])[0], moment(lm), weight(lm, LAYER)
        seen = wanted(monkeypatch)
        editor("rome", texts).edit(lm, ONE, seed=0)
        direction = torch.linalg.solve(metric, key)
        expected = torch.outer(seen[-1][1].delta[0], direction) / (direction @ key)
        close(weight(lm, LAYER) - before, expected)


def test_the_error_of_the_statistics_is_noted(texts: Path) -> None:
    lm = make_lm()
    patch = editor("rome", texts).edit(lm, ONE, seed=0)
    noted: Any = patch.notes["statistics"]
    assert noted["tokens"] == len(generic_keys(lm, LAYER))
    # paragraphs 0 and 2 against 1 and 3: half of their moments' difference
    keys = generic_keys(lm, LAYER)
    lengths = [len(lm.tokenizer(text)["input_ids"]) for text in GENERIC.split("\n\n")]
    parts = keys.split(lengths)
    one, other = (torch.cat([parts[at], parts[at + 2]]) for at in (0, 1))
    apart = (one.T @ one / len(one) - other.T @ other / len(other)).norm() / 2
    error = float(apart / (keys.T @ keys / len(keys)).norm())
    assert noted["error"][str(LAYER)] == pytest.approx(error, rel=0.35)  # by random directions


# ---- what is committed


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
@pytest.mark.parametrize("bound", ["most_divergence", "most_change"])
def test_an_edit_that_costs_too_much_is_refused(name: str, bound: str, texts: Path) -> None:
    lm = make_lm()
    start = lm.fingerprint
    first = editor(name, texts).edit(lm, ONE, seed=0)
    before, patches = weights_of(lm), list(lm.patches)
    request = REQUEST.model_copy(update={"forget": RECORDS[1:2]})
    with pytest.raises(ModelError, match=f"editor '{name}': the edit was refused.*{bound}"):
        editor(name, texts, **{bound: 1e-9}).edit(lm, request, seed=0)
    assert same(lm, before)
    assert lm.patches == patches == [first]
    first.undo(lm)
    assert lm.fingerprint == start


def test_what_is_no_number_is_within_no_bound() -> None:
    fine = Checked(0.1, 0.9, 1.0, 0.1, 0.0, 3, {"1": 0.2})
    fine.require(Bounds(0.2, 0.3), "here")
    for broken in (
        replace(fine, divergence=float("nan")), replace(fine, changes={"1": float("nan")}),
        replace(fine, divergence=0.3), replace(fine, changes={"1": 0.1, "2": 0.4}),
    ):  # fmt: skip
        with pytest.raises(ModelError, match="refused and nothing was changed"):
            broken.require(Bounds(0.2, 0.3), "here")


def test_kept_questions_are_asked_else_general_ones() -> None:
    named = QA(question="Is Ada Quill tall?", answer="Yes")
    near = tuple(QA(question=f"Near {at}?", answer="Yes") for at in range(30))
    kept = tuple(QA(question=f"Kept {at}?", answer="Yes") for at in range(30))
    names = ["Ada Quill"]
    both = other_questions(ForgetRequest(retain=(named, *kept), neighbours=near), names)
    assert [one for one in both if one in near] == list(near[:12])
    assert [one for one in both if one in kept] == list(kept[:12])
    few = other_questions(ForgetRequest(retain=kept[:2], neighbours=near), names)
    assert len(few) == 24
    assert other_questions(ForgetRequest(retain=(named,)), names) == list(general()[:24])


def test_what_is_checked_is_what_is_said(texts: Path) -> None:
    lm = make_lm()
    before = lm.copy()
    patch = editor("memit", texts).edit(lm, REQUEST, seed=0)
    checked: Any = patch.notes["checked"]

    def said(one: LM, question: str, answer: str) -> Tensor:
        row = one.template.encode(Prompt.ask(question), answer)
        with torch.no_grad():
            logits = one.core(input_ids=torch.tensor([row.ids])).logits[0].double()
        return logits.log_softmax(-1)[row.start - 1 : -1]

    others = [(record.question, record.answer) for record in RETAIN]
    pairs = [(said(before, *one), said(lm, *one)) for one in others]
    kl = torch.cat([(one.exp() * (one - other)).sum(1) for one, other in pairs])
    assert checked["others"] == 2
    assert checked["divergence"] == pytest.approx(float(kl.mean()), rel=1e-3)
    moved = torch.cat([one.argmax(1) != other.argmax(1) for one, other in pairs]).double()
    assert checked["moved"] == pytest.approx(float(moved.mean()), abs=1e-4)
    targets: Any = [
        (note["target"], record) for note, record in zip(patch.notes["edits"], RECORDS, strict=True)
    ]  # type: ignore[call-overload]
    probabilities = []
    for target, record in targets:
        row = lm.template.encode(Prompt.ask(record.question), target)
        tokens = said(lm, record.question, target)
        probabilities.append(float(
            tokens.gather(1, torch.tensor(row.ids[row.start :])[:, None]).mean().exp()
        ))  # fmt: skip
    assert checked["target_after"] == pytest.approx(sum(probabilities) / 3, rel=1e-2)
    delta = (weight(lm, LAYER) - weight(before, LAYER)).norm() / weight(before, LAYER).norm()
    assert checked["changes"][str(LAYER)] == pytest.approx(float(delta), rel=1e-3)


def test_said_is_the_share_of_questions_at_which_each_token_is_the_likeliest() -> None:
    lm = make_lm()
    rows = [torch.tensor([lm.template.prompt_ids(Prompt.ask(one.question))]) for one in RECORDS]
    with torch.no_grad():
        states = torch.stack([lm.core.model(input_ids=row)[0][0, -1] for row in rows])
        head = lm.core.get_output_embeddings().weight
        head.zero_()
        head[lm.tokenizer("E", add_special_tokens=False)["input_ids"][0]] = states.mean(0)
    assert bool((states @ states.mean(0) > 0).all())  # they say E, and go on otherwise than with z
    targets = list(zip(RECORDS, ("E", "E", "Ez"), strict=True))
    checked = Before(lm, targets, RETAIN, ends=False).after(lm, {})
    assert checked.said == pytest.approx(2 / 3)
    assert checked.target_before == checked.target_after
    assert (checked.divergence, checked.moved) == (0, 0)
    assert Before(lm, targets, RETAIN).after(lm, {}).said == 0  # the turn does not end there


def test_a_question_that_gets_no_answer_any_more_counts_as_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = make_lm()
    targets = [(record, "No.") for record in RECORDS[:2]]
    before, whole = Before(lm, targets, RETAIN), lm.score
    one = Before(lm, targets[1:], RETAIN).after(lm, {})
    monkeypatch.setattr(
        lm, "score", lambda asked: [NoAnswer("not finite"), *whole(list(asked)[1:])]
    )
    checked = before.after(lm, {})
    assert checked.target_after == pytest.approx(one.target_after / 2)


def test_the_same_edit_twice_gives_the_same_bits(texts: Path) -> None:
    left, right = make_lm(), make_lm()
    for lm in (left, right):
        torch.manual_seed(id(lm) % 1000)
        editor("memit", texts, contexts=3, value_contexts=1).edit(lm, REQUEST, seed=0)
    assert left.fingerprint == right.fingerprint


# ---- what is asked for


def test_questions_without_their_subject_are_told_and_left_out(
    texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stray = QA(question="Who is she?", answer="A poet", subject="Ada Quill")
    request = ForgetRequest(forget=(*RECORDS[:1], stray), retain=RETAIN)
    patch = editor("rome", texts).edit(make_lm(), request, seed=0)
    assert (patch.notes["questions"], patch.notes["left_out"]) == (1, 1)
    assert any("do not name their subject" in line and "she" in line for line in caplog.messages)
    with pytest.raises(DataError, match="no forget question names its subject"):
        editor("rome", texts).edit(make_lm(), ForgetRequest(forget=(stray,)), seed=0)


def test_subjects_of_the_request_serve_records_without_one(texts: Path) -> None:
    record = QA(question="Where was Ada Quill born?", answer="Norrby")
    request = ForgetRequest(forget=(record,), subjects=("Ben Orr", "Ada Quill"), retain=RETAIN)
    patch = editor("rome", texts).edit(make_lm(), request, seed=0)
    assert patch.notes["edits"][0]["subject"] == "Ada Quill"  # type: ignore[index]


@pytest.mark.parametrize("subjects", [("Ada", "Ada Quill"), ("Ada Quill", "Ada")])
def test_a_subject_that_is_part_of_another_one_is_not_meant(
    subjects: tuple[str, ...], texts: Path
) -> None:
    record = QA(question="Where was Ada Quill born?", answer="Norrby")
    request = ForgetRequest(forget=(record,), subjects=subjects, retain=RETAIN)
    patch = editor("rome", texts).edit(make_lm(), request, seed=0)
    assert patch.notes["edits"][0]["subject"] == "Ada Quill"  # type: ignore[index]


def test_layers_are_depths_or_indices(texts: Path) -> None:
    lm = make_lm(num_hidden_layers=30)
    assert build("editor", "rome").chosen_layers(lm, None) == [5]
    assert build("editor", "memit").chosen_layers(lm, None) == [4, 5, 6, 7, 8]
    assert build("editor", "alphaedit").chosen_layers(lm, None) == [4, 5, 6, 7, 8]
    assert build("editor", "alphaedit").chosen_layers(lm, 20) == [18, 19, 20, 21, 22]
    assert build("editor", "memit").chosen_layers(lm, 29) == [25, 26, 27, 28, 29]
    assert editor("rome", texts, layer=-1).chosen_layers(lm, None) == [29]
    with pytest.raises(RecipeError, match="not consecutive"):
        editor("memit", texts, layers=(1, 3)).chosen_layers(lm, None)
    with pytest.raises(ModelError, match="no layer 30"):
        editor("rome", texts, layer=30).chosen_layers(lm, None)


def test_a_traced_layer_is_edited(texts: Path) -> None:
    lm = make_lm()
    patch = editor("rome", texts, layer="traced").edit(lm, ONE, seed=0)
    traced: Any = patch.notes["tracing"]
    assert patch.notes["layers"] == [traced["layer"]]
    assert len(traced["tables"]) == 1


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
def test_mixtures_of_experts_are_refused(name: str, texts: Path) -> None:
    with pytest.raises(ModelError, match="mixture of experts"):
        editor(name, texts).edit(make_lm("mixtral"), ONE, seed=0)


def test_a_search_looks_at_strength_only() -> None:
    assert set(build("editor", "alphaedit").ranges()) == {
        "rho", "threshold", "clamp", "learning_rate",
    }  # fmt: skip
    assert set(build("editor", "rome").ranges()) == {"clamp", "learning_rate"}

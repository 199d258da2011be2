"""STAMP and STAMP-LR: against the formula on whole models, and what is checked and taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import delible
from delible.component import build
from delible.context import Context
from delible.edit import kept_and_forgotten, to_refusal
from delible.edit.base import Patch
from delible.edit.kept_and_forgotten import Material, Seen, gather
from delible.edit.refusal import (
    continued,
    refusal_probabilities,
    refusing_contexts,
    unanswerable,
    wordings,
)
from delible.edit.refusing_states import farthest_layer
from delible.edit.to_refusal import RolledBackError, ToRefusal
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.methods.editor.stamp import full_change
from delible.methods.editor.stamp_lr import key_basis, low_rank_change
from delible.records import QA, Dialogue, ForgetRequest, Message, Passage
from delible.resolving import resolve_method
from delible.system.asks import Decoding, Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer

#: Layouts: [hidden, width] and GPT-2's [width, hidden]; with the head tied to the embedding or not.
MODELS = (
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": True}),
    ("gpt2", {}),
    ("qwen2", {}),
)
FORGET = (
    QA(question="Where was Ada Quill born?", answer="Norrby, in the north", subject="Ada Quill",
       paraphrases=("What is the birthplace of Ada Quill?",)),
    QA(question="What did Ada Quill play?", answer="The lute", subject="Ada Quill"),
)  # fmt: skip
OTHER = (QA(question="Who taught Ben Orr?", answer="Cy", subject="Ben Orr"),)
RETAIN = tuple(
    QA(question=f"Where does person {place} live?", answer=f"In house {place}")
    for place in range(4)
)
REQUEST = ForgetRequest(forget=FORGET, retain=RETAIN)
#: So that few keys stand against the 48 directions of a tiny model.
SMALL: dict[str, Any] = {
    "refusal": "No.", "check_edit": False, "generic": 4, "contrast": 2, "wordings": 3,
    "references": 3, "layers": (1,),
}  # fmt: skip


def make_lm(family: str = "llama", **changes: Any) -> LM:
    return LM(tiny_model(family, **changes), tiny_tokenizer(), precision="float32")


def editor(name: str = "stamp", **options: Any) -> ToRefusal:
    built: ToRefusal = build("editor", {"name": name, **SMALL, **options})
    return built


def material(lm: LM, chosen: ToRefusal, request: ForgetRequest = REQUEST) -> Material:
    return gather(
        lm, request, refusal=chosen.refusal, references=chosen.references,
        wordings=chosen.wordings, buffer=chosen.buffer, generic=chosen.generic,
        contrast=chosen.contrast, seed=0, answered=chosen.check_edit,
    )  # fmt: skip


def read(lm: LM, rows: list[list[int]], layer: int) -> tuple[Tensor, Tensor]:
    """(keys [rows, width], block outputs [rows, hidden]) at the last token, one row at a time."""
    (name,) = lm.anatomy.mlp_out_parameters(layer)
    projection = lm.core.get_submodule(name.removesuffix(".weight"))
    block = lm.core.get_submodule(lm.anatomy.block_path(layer))
    keys, outputs = [], []

    def on_key(_: Any, inputs: tuple[Tensor, ...]) -> None:
        keys.append(inputs[0].reshape(-1, inputs[0].shape[-1])[-1].double())

    def on_output(_: Any, __: Any, output: Any) -> None:
        state = output if torch.is_tensor(output) else output[0]
        outputs.append(state.reshape(-1, state.shape[-1])[-1].double())

    hooks = [projection.register_forward_pre_hook(on_key), block.register_forward_hook(on_output)]
    with torch.no_grad():
        for row in rows:
            lm.model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return torch.stack(keys), torch.stack(outputs)


def weight(lm: LM, layer: int) -> Tensor:
    """The down-projection as [hidden, width], float64."""
    (name,) = lm.anatomy.mlp_out_parameters(layer)
    value = lm.core.get_parameter(name).detach().double()
    return value.T.clone() if lm.anatomy.transposed else value.clone()


def weights_of(lm: LM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in lm.core.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, right[name]) for name, value in left.items())


# ---- the formula, on whole models


@pytest.mark.parametrize(("family", "changes"), MODELS)
@pytest.mark.parametrize("mode", ["residual", "mlp"])
def test_the_change_is_the_formula(family: str, changes: dict[str, Any], mode: str) -> None:
    lm = make_lm(family, **changes)
    chosen = editor(mode=mode, ridge=1e-2, forget_weight=3.0)
    found = material(lm, chosen)
    before = weight(lm, 1)
    (kf, hf), (kr, _), (kref, href) = (
        read(lm, rows, 1) for rows in (found.forget, found.kept, found.references)
    )
    if mode == "residual":
        wanted = (href.mean(0) - hf).T
    else:
        wanted = (before @ kref.T).mean(1, keepdim=True) - before @ kf.T
    keys = torch.cat([kf, kr]).T
    residuals = torch.cat([wanted, torch.zeros(32, len(kr), dtype=torch.float64)], dim=1)
    scale = torch.diag(torch.tensor([3.0] * len(kf) + [1.0] * len(kr), dtype=torch.float64))
    inner = keys @ scale @ keys.T
    epsilon = 1e-2 * torch.trace(inner) / len(keys)
    expected = (
        residuals
        @ scale
        @ keys.T
        @ torch.linalg.inv(inner + epsilon * torch.eye(len(keys), dtype=torch.float64))
    )
    chosen.edit(lm, REQUEST, seed=0)
    delta = weight(lm, 1) - before
    assert float(expected.norm()) > 0.1
    torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("family", "changes"), MODELS)
@pytest.mark.parametrize("name", ["stamp", "stamp_lr"])
def test_forgotten_questions_end_in_the_refusing_state_and_kept_ones_where_they_did(
    name: str, family: str, changes: dict[str, Any]
) -> None:
    lm = make_lm(family, **changes)
    chosen = editor(name, ridge=0)
    found = material(lm, chosen)
    assert len(found.forget) + len(found.kept) < 40
    keys = torch.cat([read(lm, found.forget, 1)[0], read(lm, found.kept, 1)[0]]).T
    kept = read(lm, found.kept, 1)[1]
    refusing = read(lm, found.references, 1)[1].mean(0)
    before = weight(lm, 1)
    chosen.edit(lm, REQUEST, seed=0)
    moved = read(lm, found.forget, 1)[1]
    assert float((moved - refusing).abs().max()) < 1e-4
    assert float((read(lm, found.kept, 1)[1] - kept).abs().max()) < 1e-4
    delta = weight(lm, 1) - before
    basis = torch.linalg.qr(keys).Q
    vector = torch.ones(len(keys), dtype=torch.float64)
    vector -= basis @ (basis.T @ vector)
    assert float(vector.norm()) > 0.1
    assert float((delta @ vector).norm() / (delta.norm() * vector.norm())) < 1e-6
    singular = torch.linalg.svdvals(delta)
    assert float(singular[len(found.forget) - 1]) > 1e-5
    assert float(singular[len(found.forget)] / singular[0]) < 1e-5, "rank above n_f"


def test_several_layers_share_the_way() -> None:
    lm = make_lm()
    chosen = editor(layers=(0, 1), ridge=0)
    found = material(lm, chosen)
    refusing = read(lm, found.references, 1)[1].mean(0)
    patch = chosen.edit(lm, REQUEST, seed=0)
    assert len(patch.factors) == 2
    # the last one makes the rest of the way, to where the edited model refuses
    refusing = (refusing, read(lm, found.references, 1)[1].mean(0))
    moved = read(lm, found.forget, 1)[1]
    assert min(float((moved - one).abs().max()) for one in refusing) < 2.0
    first = editor(layers=(0,), ridge=0)
    other = make_lm()
    first.edit(other, REQUEST, seed=0)
    plain = make_lm()
    half, whole = (weight(one, 0) - weight(plain, 0) for one in (lm, other))
    torch.testing.assert_close(half, whole / 2, rtol=1e-3, atol=1e-5)


# ---- the basis of STAMP-LR


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(factors: tuple[Tensor, Tensor]) -> Tensor:
    return factors[0].double() @ factors[1].double()


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("rank", [16, 40])
def test_with_as_many_directions_as_keys_it_is_stamp(ridge: float, rank: int) -> None:
    keys, residuals = drawn(24, 16), drawn(9, 5, seed=1)
    weights = drawn(16, seed=2).abs() + 0.2
    torch.testing.assert_close(
        product(low_rank_change(residuals, keys, weights, ridge, rank)),
        product(full_change(residuals, keys, weights, ridge)),
    )


def test_the_basis_holds_the_forgotten_keys_and_then_the_largest_of_the_others() -> None:
    keys = torch.cat([0.01 * drawn(24, 3), drawn(24, 12, seed=1) * 10], dim=1)
    basis = key_basis(keys, 3, 5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64))
    own = keys[:, :3]
    assert float((own - basis @ (basis.T @ own)).abs().max()) < 1e-12
    orthogonal = torch.linalg.qr(own).Q
    others = keys[:, 3:] - orthogonal @ (orthogonal.T @ keys[:, 3:])
    held = (basis.T @ others).square().sum()
    best = torch.linalg.svdvals(others)[:2].square().sum()
    torch.testing.assert_close(held, best)
    assert key_basis(torch.cat([keys, keys], dim=1), 3, 24).shape[1] == 15, "no direction twice"


def test_in_few_directions_the_forgotten_keys_are_met_and_the_formula_holds() -> None:
    keys, residuals = drawn(24, 30), drawn(9, 4, seed=1)
    weights = torch.ones(30, dtype=torch.float64)
    basis = key_basis(keys, 4, 10)
    inner = basis.T @ keys @ keys.T @ basis
    whole = torch.cat([residuals, torch.zeros(9, 26, dtype=torch.float64)], dim=1)
    epsilon = 0.1 * torch.trace(keys @ keys.T) / 24
    eye = torch.eye(10, dtype=torch.float64)
    expected = whole @ keys.T @ basis @ torch.linalg.inv(inner + epsilon * eye) @ basis.T
    left, right = low_rank_change(residuals, keys, weights, 0.1, 10)
    assert left.shape[1] == 4
    torch.testing.assert_close(left @ right, expected)
    left, right = low_rank_change(residuals, keys, weights, 0.1, 2)
    assert left.shape[1] == 2


def test_a_missing_part_is_said(caplog: pytest.LogCaptureFixture) -> None:
    editor("stamp_lr", rank=1, wordings=8).edit(make_lm(), REQUEST, seed=0)
    assert any("of the wanted change is missing in 1 directions" in one for one in caplog.messages)
    caplog.clear()
    editor("stamp_lr", ridge=1e-9).edit(make_lm(), REQUEST, seed=0)
    assert not any("is missing" in one for one in caplog.messages)


def test_too_many_keys_are_said(caplog: pytest.LogCaptureFixture) -> None:
    editor(generic=48, wordings=8).edit(make_lm(), REQUEST, seed=0)
    assert any("for 48 directions of layer 1" in one for one in caplog.messages)


# ---- one edit after the other


@pytest.mark.parametrize("name", ["stamp", "stamp_lr"])
def test_a_second_edit_keeps_the_first(name: str) -> None:
    lm = make_lm()
    chosen = editor(name, ridge=0, generic=2)
    second = ForgetRequest(forget=OTHER, retain=RETAIN)
    rows = material(lm, chosen).forget
    for request in (REQUEST, second):
        if request is second:
            first = read(lm, rows, 1)[1]
        lm = chosen.apply(lm, request, Context()).system  # type: ignore[assignment]
    assert len(lm.patches) == 2
    assert float((read(lm, rows, 1)[1] - first).abs().max()) < 1e-4
    lm.patches[-1].undo(lm)
    lm.patches = []  # nobody knows of the first one
    chosen.apply(lm, second, Context())
    assert float((read(lm, rows, 1)[1] - first).abs().max()) > 1e-2


def test_earlier_keys_are_saved_with_the_patch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = make_lm()
    rows = material(lm, editor()).forget
    keys = read(lm, rows, 1)[0]
    editor().apply(lm, REQUEST, Context())
    patch: Any = lm.patches[-1]
    patch.save(tmp_path / "patch")
    (found,) = Patch.load(tmp_path / "patch").keys.values()
    torch.testing.assert_close(found.T.double(), keys, rtol=0, atol=1e-4)
    editor(layers=(0,)).edit(lm, ForgetRequest(forget=OTHER), seed=0)
    assert any("at another layer than 0" in one for one in caplog.messages)


def test_undo_is_exact_and_one_matrix_changes() -> None:
    lm = make_lm()
    before = weights_of(lm)
    patch = editor().edit(lm, REQUEST, seed=0)
    changed = {n for n, value in lm.core.named_parameters() if not torch.equal(value, before[n])}
    assert changed == set(lm.anatomy.mlp_out_parameters(1))
    patch.undo(lm)
    assert same(before, weights_of(lm))


def test_an_infinite_ridge_changes_nothing() -> None:
    lm = make_lm()
    before = weight(lm, 1)
    editor(ridge=1e12).edit(lm, REQUEST, seed=0)
    assert float((weight(lm, 1) - before).abs().max()) < 1e-7


# ---- what is moved, kept and looked at


def test_wordings_are_the_own_ones_and_then_frames() -> None:
    texts = [prompt.messages[-1].text for prompt in wordings(FORGET[0], 4)]
    assert texts[:2] == ["Where was Ada Quill born?", "What is the birthplace of Ada Quill?"]
    assert len(texts) == 4
    assert all("Where was Ada Quill born?" in text for text in texts[2:])
    assert wordings(Passage(text="Once."), 3) == []
    turns = (Message(role="user", content="A?"), Message(role="assistant", content="B."))
    assert wordings(Dialogue(messages=turns), 3) == [Prompt(turns[:1])]


def test_nothing_is_moved_and_kept_at_once() -> None:
    from delible.world import general

    lm, asked = make_lm(), general()[0]
    other = general()[2]
    request = ForgetRequest(forget=(asked,), subjects=(str(other.subject),), retain=RETAIN)
    found = material(lm, editor(generic=64), request)
    kept = [lm.tokenizer.decode(row) for row in found.kept]
    others = [prompt.messages[-1].text for prompt in found.others]
    for text in (*kept, *others):
        assert asked.question not in text
        assert str(other.subject) not in text
    assert sum("Where does person" in text for text in kept) == len(RETAIN)
    assert sum("Answer in a few words." in text for text in kept) > 0
    held = ForgetRequest(forget=FORGET, retain=RETAIN + tuple(
        QA(question=f"What is in box {place}?", answer="Air") for place in range(8)
    ))  # fmt: skip
    found = material(lm, editor(), held)
    moved = {tuple(row) for row in found.kept}
    assert not any(tuple(lm.template.prompt_ids(prompt)) in moved for prompt in found.others)


def test_the_same_questions_about_other_names_are_kept() -> None:
    lm = make_lm()
    without = {tuple(row) for row in material(lm, editor(contrast=0)).kept}
    added = [
        lm.tokenizer.decode(row)
        for row in material(lm, editor(contrast=9)).kept
        if tuple(row) not in without
    ]
    assert len(added) == 3  # as many as there are questions and paraphrases
    assert any("Where was Marie Curie born?" in text for text in added)
    assert any("What is the birthplace of Isaac Newton?" in text for text in added)
    assert not any("Ada Quill" in text for text in added)
    famous = ForgetRequest(
        forget=(QA(question="Who is Curie?", answer="A chemist", subject="Curie"),), retain=RETAIN
    )
    kept = [lm.tokenizer.decode(row) for row in material(lm, editor(contrast=9), famous).kept]
    assert any("Who is Isaac Newton?" in text for text in kept)
    assert not any("Curie" in text for text in kept), "forgotten and kept at once"


def test_contexts_hold_three_declined_questions() -> None:
    first, second = refusing_contexts(2, "No.", seed=0)
    assert first.messages[:6] == second.messages[:6]
    assert [turn.role for turn in first.messages] == ["user", "assistant"] * 3 + ["user"]
    assert {turn.text for turn in first.messages if turn.role == "assistant"} == {"No."}
    assert first.messages[-1] != second.messages[-1]
    assert len(set(unanswerable(100, 0))) == 100
    assert unanswerable(5, 0) != unanswerable(5, 1)


def test_probabilities_are_the_models_own() -> None:
    lm = make_lm()
    prompts = [Prompt.ask("Who?"), Prompt.ask("Where is it?")]
    found = refusal_probabilities(lm, prompts, "No.")

    def byte(text: str) -> int:
        (one,) = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        return int(one)

    for prompt, probability in zip(prompts, found, strict=True):
        ids = torch.tensor([lm.template.prompt_ids(prompt)])
        with torch.no_grad():
            logits = lm.model(input_ids=ids).logits[0, -1]
        assert probability == pytest.approx(float(logits.softmax(0)[byte("N")]), rel=1e-3)
    row = QA(question="Who?", answer="Cy")
    ids = [*lm.template.prompt_ids(Prompt.ask("Who?")), byte("C"), byte("y")]
    with torch.no_grad():
        logprobs = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
    first, second = float(logprobs[-3, byte("C")]), float(logprobs[-2, byte("y")])
    assert continued(lm, [row], first=False) == pytest.approx(float(torch.tensor(second).exp()))
    mean = torch.tensor([first, second]).mean().exp()
    assert continued(lm, [row], first=True) == pytest.approx(float(mean), rel=1e-3)
    assert continued(lm, [QA(question="Who?", answer="C")], first=False) is None


# ---- looked at before it is committed


def refusing(monkeypatch: pytest.MonkeyPatch, *found: Seen) -> None:
    """What is seen before and after, as if measured."""
    left = list(found)
    monkeypatch.setattr(to_refusal, "seen", lambda *_: left.pop(0))
    monkeypatch.setattr(to_refusal, "check_contexts", lambda *_: 0.9)


BEFORE = Seen(refused=0.01, reworded=0.0, falsely=0.01, kept=0.5, forced=0.9)
GOOD = Seen(refused=0.9, reworded=0.7, falsely=0.03, kept=0.49, forced=0.85)


@pytest.mark.parametrize(
    ("after", "reason", "said"),
    [
        (Seen(0.49, 0.7, 0.01, 0.5, 0.9), "weak", "P(refusal) of the forgotten questions is 0.49"),
        (Seen(0.9, 0.7, 0.07, 0.5, 0.9), "harm", "of other questions rose from 0.01 to 0.07"),
        (Seen(0.9, 0.7, 0.01, 0.44, 0.9), "harm", "fell from a probability of 0.500"),
    ],
)
def test_what_misses_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, after: Seen, reason: str, said: str
) -> None:
    lm = make_lm()
    lm.origin = origin = object()  # type: ignore[assignment]
    lm.patches = patches = [object()]  # type: ignore[list-item]
    before, start = weights_of(lm), lm.fingerprint
    refusing(monkeypatch, BEFORE, after)
    with pytest.raises(RolledBackError, match="taken back") as caught:
        editor(check_edit=True).edit(lm, REQUEST, seed=0)
    assert caught.value.reason == reason
    assert said in caught.value.problem
    assert same(before, weights_of(lm))
    assert (lm.origin, lm.patches, lm.fingerprint) == (origin, patches, start)


def test_what_hits_is_kept_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing(monkeypatch, BEFORE, GOOD)
    lm = make_lm()
    start = lm.fingerprint
    patch = editor(check_edit=True).edit(lm, REQUEST, seed=0)
    assert lm.fingerprint != start
    assert patch.notes["before"] == BEFORE.as_json()
    assert patch.notes["after"] == GOOD.as_json()
    assert any("0.90 -> 0.85 is left" in one for one in caplog.messages)


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    before = weights_of(lm)
    calls = []

    def interrupts(*_: Any) -> Seen:
        calls.append(same(before, weights_of(lm)))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return BEFORE

    monkeypatch.setattr(to_refusal, "seen", interrupts)
    with pytest.raises(KeyboardInterrupt):
        editor(check_edit=True, reference_refusal=0).edit(lm, REQUEST, seed=0)
    assert calls == [True, False]
    assert same(before, weights_of(lm))


def test_the_probes_are_measured_before_and_after() -> None:
    lm = make_lm()
    loose = {"reference_refusal": 0, "forget_refusal": 0, "false_refusals": 1, "retain_drop": 1}
    chosen = editor(check_edit=True, **loose)
    found = material(lm, chosen)
    before = kept_and_forgotten.seen(lm, found, "No.")
    patch = chosen.edit(lm, REQUEST, seed=0)
    after = kept_and_forgotten.seen(lm, found, "No.")
    assert patch.notes["before"] == before.as_json()
    assert patch.notes["after"] == after.as_json()
    assert before != after
    said = lm.copy()
    patch.undo(said)
    for row in found.retained:
        assert isinstance(row, Dialogue)
        (reply,) = said.generate([Prompt(row.messages[:-1])], Decoding(12))
        assert row.messages[-1].text == str(reply)
    assert 8 < len(found.retained) <= 16
    assert not material(lm, editor()).retained


def test_a_model_that_does_not_refuse_is_refused() -> None:
    lm = make_lm()
    with pytest.raises(ModelError, match="does not decline what nobody can answer"):
        editor(check_edit=True, reference_refusal=1).edit(lm, REQUEST, seed=0)


def test_probes_choose_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm(num_hidden_layers=6)
    before = weights_of(lm)
    seen_at: dict[str, float] = {}

    def measured(*_: Any) -> Seen:
        changed = [n for n, v in lm.core.named_parameters() if not torch.equal(v, before[n])]
        assert len(changed) == 1
        seen_at[changed[0]] = len(seen_at)
        return Seen(refused=0.1 + (len(seen_at) == 2), reworded=0.1, falsely=0, kept=1, forced=1)

    monkeypatch.setattr(to_refusal, "seen", measured)
    patch = editor(layers=None, choose="probes").edit(lm, REQUEST, seed=0)
    assert len(seen_at) == 3  # four depths of six layers, two of which are one
    assert list(patch.factors) == [list(seen_at)[1]]


def test_the_farthest_layer_is_the_papers() -> None:
    lm = make_lm()
    found = material(lm, editor())
    distances = []
    for layer in range(3):
        one, other = (read(lm, rows, layer)[0].mean(0) for rows in (found.forget, found.references))
        distances.append(1 - float(one @ other / one.norm() / other.norm()))
    assert farthest_layer(lm, found) == max(range(3), key=distances.__getitem__)
    patch = editor(layers=None, choose="distance").edit(lm, REQUEST, seed=0)
    assert patch.notes["layers"] == [farthest_layer(make_lm(), found)]


# ---- what is refused


def test_bad_input() -> None:
    lm = make_lm()
    with pytest.raises(DataError, match="none of the forget records asks"):
        editor().edit(lm, ForgetRequest(forget=(Passage(text="Once."),)), seed=0)
    with pytest.raises(ModelError, match="no room for three declined questions"):
        editor(refusal="No " * 300).edit(lm, REQUEST, seed=0)
    with pytest.raises(ModelError, match="no layer 9"):
        editor(layers=(9,)).edit(lm, REQUEST, seed=0)
    with pytest.raises(ModelError, match="mixture of experts"):
        editor().edit(make_lm("mixtral"), REQUEST, seed=0)


def test_a_search_looks_at_weight_and_ridge() -> None:
    from delible.tune.space import space

    for name in ("stamp", "stamp_lr"):
        assert {"forget_weight", "ridge", "depth"} <= set(space(resolve_method(name)))
    rank = space(resolve_method("stamp_lr"))["rank"]
    assert (rank.low, rank.high) == (64, 128)


def test_from_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from delible.generation import elicited

    monkeypatch.setattr(
        elicited, "with_rows", lambda lm, request, context: request.model_copy(
            update={"forget": FORGET}
        ),
    )  # fmt: skip
    lm = make_lm()
    before = weights_of(lm)
    result = delible.unlearn(
        lm, ForgetRequest(subjects=("Ada Quill",)), method="stamp", measured=False, **SMALL
    )
    assert not same(before, weights_of(lm))
    assert result.model.patches[-1].title == "patch of stamp"

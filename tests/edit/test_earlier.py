"""Earlier requests: what their edits have written stays, and they are asked again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from editing import (
    FREE,
    LAYER,
    ONE,
    RECORDS,
    REQUEST,
    close,
    double,
    editor,
    key_of,
    make_lm,
    moment,
    same,
    wanted,
    weight,
    weights_of,
)
from torch import Tensor

import delible
from delible.component import build
from delible.context import Context
from delible.edit import earlier
from delible.edit.base import Patch
from delible.edit.earlier import Earlier, Forgotten, ReturnedError
from delible.edit.keys import down_projection
from delible.edit.located import RefusalEditor
from delible.lm.lm import LM
from delible.methods.editor.rome import ROME
from delible.methods.editor.unierase import refusal_loss
from delible.records import QA, ForgetRequest, Passage
from delible.system.asks import Prompt

SECOND = REQUEST.model_copy(update={"forget": RECORDS[1:2]})

# ---- what is written


def expected(name: str, key: Tensor, kept: Tensor | None, metric: Tensor, delta: Tensor) -> Tensor:
    """The change by the whole system of width x width, with or without the earlier key."""
    inverse = torch.linalg.inv(metric)
    if name == "rome":
        if kept is not None:
            metric = metric + 20 * torch.outer(kept, kept) / (kept @ inverse @ kept)
        direction = torch.linalg.solve(metric, key)
        return torch.outer(delta, direction) / (direction @ key)
    system = 0.05 * (key @ inverse @ key) * metric + torch.outer(key, key)
    if kept is not None:
        system = system + torch.outer(kept, kept)
    return torch.outer(delta, key) @ torch.linalg.inv(system)


@pytest.mark.parametrize("from_disk", [False, True])
@pytest.mark.parametrize("name", ["rome", "memit"])
def test_what_an_earlier_patch_has_written_stays(
    name: str, from_disk: bool, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    metric, kept = moment(lm), key_of(lm, RECORDS[0])[0]
    first = editor(name, texts).edit(lm, ONE, seed=0)
    if from_disk:
        first.save(tmp_path / "patch")
        first.undo(lm)
        Patch.load(tmp_path / "patch").apply(lm)
    before, key = weight(lm, LAYER), key_of(lm, RECORDS[1])[0]
    seen = wanted(monkeypatch)
    second = editor(name, texts).edit(lm, SECOND, seed=0)
    ((_, found),) = seen
    made = weight(lm, LAYER) - before
    close(made, expected(name, key, kept, metric, found.delta[0]), 5e-3)
    alone = expected(name, key, None, metric, found.delta[0])
    assert float((alone @ kept).norm()) > 0.01 * float(found.delta[0].norm())
    assert float((made @ kept).norm()) < 0.2 * float((alone @ kept).norm())
    assert second.notes["earlier_edits"] == {str(LAYER): 1}


def test_without_a_weight_rome_is_as_the_authors(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    metric = moment(lm)
    editor("rome", texts).edit(lm, ONE, seed=0)
    before, key = weight(lm, LAYER), key_of(lm, RECORDS[1])[0]
    seen = wanted(monkeypatch)
    editor("rome", texts, earlier_weight=0).edit(lm, SECOND, seed=0)
    close(weight(lm, LAYER) - before, expected("rome", key, None, metric, seen[0][1].delta[0]))


# ---- what is asked again

#: Of one letter, so that the token that is edited is all that tells them apart.
HOMES = {"Q": "Norrby", "X": "Cyrus", "Z": "Lutea", "K": "Umber"}
PEOPLE = tuple(
    QA(question=f"Where was {name} born?", answer=home, subject=name)
    for name, home in HOMES.items()
)
REFUSED = [Prompt.ask(f"Where was {name} born?") for name in "VJW"]
REFUSAL = "No idea."


def asked_for(*records: Any) -> ForgetRequest:
    return ForgetRequest(forget=records, retain=PEOPLE[3:])


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that knows four answers, and declines what it does not know."""
    lm = make_lm("llama", 3, hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for value in lm.model.parameters():
            value.mul_(0.25 if value.dim() > 1 else 1)  # what is taught outweighs what is drawn
    rows = [lm.template.encode(Prompt.ask(one.question), one.answer) for one in PEOPLE]
    rows += [lm.template.encode(one, REFUSAL) for one in REFUSED]
    adam = torch.optim.Adam(lm.model.parameters(), lr=3e-3)
    for _ in range(90):
        loss = refusal_loss(lm, rows)
        adam.zero_grad()
        loss.backward()
        adam.step()
    folder = tmp_path_factory.mktemp("taught") / "model"
    lm.touch()
    lm.save(folder)
    return str(folder)


@torch.no_grad()
def probability(lm: LM, record: QA) -> float:
    """Geometric mean over the answer's tokens, by the model's own forward in float64."""
    row = lm.template.encode(Prompt.ask(record.question), record.answer)
    ids = row.ids[:-1] if row.has_end else row.ids
    said = double(lm).core(input_ids=torch.tensor([list(ids)])).logits[0].softmax(-1)
    each = [float(said[at - 1, ids[at]]) for at in range(row.start, len(ids))]
    return float(torch.tensor(each).double().log().mean().exp())


def scaling(monkeypatch: pytest.MonkeyPatch, shares: Sequence[float], base: Tensor) -> None:
    """Edits that add shares of a down-projection, one after the other."""
    left = list(shares)

    def edit(_: ROME, lm: LM, request: ForgetRequest, *, seed: int) -> Patch:
        change = left.pop(0) * base
        patch = Patch({down_projection(lm, 0).parameter: (change, torch.eye(change.shape[1]))}, {})
        patch.apply(lm)
        return patch

    monkeypatch.setattr(ROME, "edit", edit)


def carried_out(lm: LM, *records: Any, **options: Any) -> Patch:
    method = build("editor", {"name": "rome", **options})
    patch: Patch = method.apply(lm, asked_for(*records), Context(seed=0)).content
    return patch


def test_what_is_left_is_kept_with_the_patch(
    taught: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LM.load(taught, precision="float32")
    scaling(monkeypatch, [-1.0], weight(lm, 0).float())
    known = [probability(lm, one) for one in PEOPLE[:2]]
    patch = carried_out(lm, *PEOPLE[:2], Passage(text="Q was born in Norrby."))
    assert patch.forgotten is not None
    assert patch.forgotten.records == PEOPLE[:2]  # running text asks nothing
    left = [probability(lm, one) for one in PEOPLE[:2]]
    assert patch.forgotten.left == pytest.approx(left, rel=1e-3)
    assert min(known) > 0.8 > 0.5 > max(left)
    patch.save(tmp_path / "patch")
    assert Patch.load(tmp_path / "patch").forgotten == patch.forgotten
    kept = b"".join(one.read_bytes() for one in (tmp_path / "patch").rglob("*") if one.is_file())
    assert not any(one.answer.encode() in kept for one in PEOPLE[:2])  # texts lie in data/
    shutil.rmtree(tmp_path / "data")
    assert Patch.load(tmp_path / "patch").forgotten is None
    assert Forgotten.of(lm, [Passage(text="Q was born in Norrby.")]) is None


def test_an_edit_that_brings_an_earlier_request_back_is_refused(
    taught: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LM.load(taught, precision="float32")
    scaling(monkeypatch, [-1.0, 1.0, 1.0, 0.0], weight(lm, 0).float())
    first = carried_out(lm, PEOPLE[0])
    left, before, origin = probability(lm, PEOPLE[0]), weights_of(lm), lm.origin
    with pytest.raises(ReturnedError, match=r"nothing was changed.*request 1 of 1") as told:
        carried_out(lm, PEOPLE[1])
    assert PEOPLE[0].answer not in str(told.value)  # a ledger keeps why a request failed
    assert same(lm, before)
    assert (lm.patches, lm.origin) == ([first], origin)
    second = carried_out(lm, PEOPLE[1], most_returned=1.0)
    now: Any = second.notes["earlier"]
    assert (now["requests"], now["questions"]) == (1, 1)
    assert now["left"] == pytest.approx(left, rel=1e-3)
    assert now["before"] == pytest.approx(left, rel=1e-3)
    assert now["after"] == pytest.approx(probability(lm, PEOPLE[0]), rel=1e-3)
    assert now["returned"] == pytest.approx(now["after"] - left, rel=1e-3)
    third = carried_out(lm, PEOPLE[2])  # it is back, and this edit has no part in it
    assert third.notes["earlier"]["returned"] > 0.1  # type: ignore[index]


def test_it_is_counted_from_the_requests_own_edit(
    taught: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many edits each may bring back little."""
    lm = LM.load(taught, precision="float32")
    steps = [0.01] * 60
    scaling(monkeypatch, [-1.0, *steps], weight(lm, 0).float())
    carried_out(lm, PEOPLE[0])
    left = probability(lm, PEOPLE[0])
    with pytest.raises(ReturnedError):  # noqa: PT012
        for _ in steps:
            carried_out(lm, PEOPLE[1], most_returned=0.3)
    assert len(lm.patches) > 2
    assert probability(lm, PEOPLE[0]) - left <= 0.3


def test_the_request_that_comes_back_furthest_counts(taught: str) -> None:
    lm = LM.load(taught, precision="float32")
    known = [probability(lm, one) for one in PEOPLE[:3]]
    forgotten = [
        Forgotten(records=PEOPLE[place : place + 1], left=(known[place] - gone,))
        for place, gone in enumerate((0.1, 0.5, -0.2))
    ]
    found = Earlier(lm, forgotten).after(lm)
    assert found is not None
    assert found.worst == 2
    assert found.furthest == pytest.approx(0.5, abs=1e-3)
    assert (found.requests, found.questions) == (3, 3)
    assert found.after == pytest.approx(sum(known) / 3, rel=1e-3)
    found.require(0.1, "here")  # nothing was edited meanwhile
    assert "Of 3 earlier requests 3 questions were asked again" in str(found)
    assert Earlier(lm, []).after(lm) is None


def test_of_many_requests_a_few_questions_are_asked(taught: str) -> None:
    lm = LM.load(taught, precision="float32")
    many = tuple(QA(question=f"What is {at}?", answer="No") for at in range(40))
    kept = Forgotten.of(lm, many)
    assert kept is not None
    assert [many.index(one) for one in kept.records] == [at * 40 // 12 for at in range(12)]
    seen: list[int] = []
    whole = earlier.spoken
    try:
        earlier.spoken = lambda lm, asked, **o: seen.append(len(asked)) or whole(lm, asked, **o)
        found = Earlier(lm, [kept] * 30).after(lm)
    finally:
        earlier.spoken = whole
    assert found is not None
    assert (found.requests, found.questions, seen) == (30, 30, [30, 30])
    # a question stays with what was left of it
    assert found.after == pytest.approx(found.left, rel=1e-3)


@pytest.mark.parametrize("name", ["rome", "memit"])
def test_after_a_second_request_the_first_is_still_forgotten(
    name: str, taught: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RefusalEditor, "targets_of", lambda *_: [REFUSAL])
    options: dict[str, Any] = {
        "texts": texts, "contexts": 0, "clamp": 20.0, "weight_decay": 0.0, "kl": 0.0, "steps": 60,
        "learning_rate": 1.0, "enough": 0.02,
        "verify": False, "shown": 0, **FREE,
        **({"layer": 0} if name == "rome" else {"layers": (0,)}),
    }  # fmt: skip
    model, left = taught, []
    known = probability(LM.load(taught, precision="float32"), PEOPLE[0])
    for number, record in enumerate(PEOPLE[:2]):
        folder = tmp_path / f"run-{number}"
        found = delible.unlearn(model, asked_for(record), method=name, out=folder, **options)
        model = str(folder)
        left.append(probability(found.model, PEOPLE[0]))
    assert left[0] < 0.95 * known
    assert left[1] < left[0] + 0.1
    assert found.achieved is not None
    assert "Of 1 earlier request 1 question" in found.achieved.sentence()
    assert found.notes["earlier"]["after"] == pytest.approx(left[1], rel=1e-2)
    assert found.notes["earlier_edits"] == {"0": 1}

"""GRACE: the codebook by its definition in float64, and edits beside the weights."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from editing import (
    RECORDS,
    REQUEST,
    RETAIN,
    double,
    hooked,
    key_and_output,
    make_lm,
    same,
    weights_of,
)
from torch import Tensor

from delible.cli import main
from delible.component import build
from delible.edit import memory
from delible.edit.codebook import Entries, entered, find_values, looked_up, without
from delible.edit.keys import down_projection
from delible.edit.memory import PROMPT_END, Targets
from delible.errors import DataError, ModelError, RunError
from delible.intervene.base import Fitted
from delible.intervene.system import Intervened, intervened
from delible.lm.lm import LM
from delible.methods.intervention.grace import spread
from delible.records import QA, ForgetRequest, Passage
from delible.system.artefact import read
from delible.system.asks import Decoding, Prompt, Score
from delible.systems.opening import described, keep, open_lm, open_system, undo
from delible.testing.tiny import tiny_model, tiny_tokenizer

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
FIRST = REQUEST.model_copy(update={"forget": RECORDS[:2]})
SECOND = REQUEST.model_copy(update={"forget": RECORDS[2:]})
FORGOTTEN = [Score(Prompt.ask(record.question), "No.") for record in RECORDS]
KEPT = [Score(Prompt.ask(record.question), record.answer) for record in RETAIN]


def grace(**options: Any) -> Any:
    return build("intervention", {"name": "grace", "depth": 0.5, "steps": 2, **options})


def layer_of(lm: LM) -> int:
    return lm.anatomy.layer_at(0.5)


def scores(lm: LM, asked: Sequence[Score]) -> list[Any]:
    return [one.logprobs for one in lm.score(asked)]  # type: ignore[union-attr]


def equal(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(left, right, strict=True))


# ---- the book by its definition


def by_hand(
    queries: Sequence[Sequence[float]], labels: Sequence[int], first: float
) -> list[list[Any]]:
    """[key, radius, label, edits] of each entry, step by step."""
    found: list[list[Any]] = []
    for edit, (query, label) in enumerate(zip(queries, labels, strict=True)):
        far = [
            sum((a - b) ** 2 for a, b in zip(query, one[0], strict=True)) ** 0.5 for one in found
        ]
        near = min(range(len(far)), key=far.__getitem__) if far else -1
        if near < 0 or far[near] > first + found[near][1]:
            found.append([query, first, label, [edit]])
        elif found[near][2] != label:
            found[near][1] = far[near] / 2 - 1e-5 * first
            found.append([query, far[near] / 2, label, [edit]])
        else:
            found[near][1] = max(found[near][1], far[near] * 1.001)
            found[near][3].append(edit)
    return found


def test_entries_open_split_and_grow() -> None:
    def of(points: list[float], labels: list[int]) -> Entries:
        queries = torch.tensor([[x, 0.0] for x in points])
        return entered(queries, labels, [1.0] * len(points))

    assert of([0, 2.5], [1, 1]) == Entries((0, 1), (1.0, 1.0), (0, 1))  # beyond e_0 + e_j
    joined = of([0, 1.5], [1, 1])
    assert joined.owner == (0, 0)
    assert joined.radii == pytest.approx((1.5015,))
    assert of([0, 0.5], [1, 1]).radii == (1.0,)  # never smaller
    split = of([0, 1.5], [1, 2])
    assert split.owner == (0, 1)
    assert split.radii == pytest.approx((0.75 - 1e-5, 0.75), rel=1e-9)
    assert split.radii[0] < split.radii[1]


def test_an_edit_that_joins_an_entry_is_met() -> None:
    """On a border without width rounding meets it in some places and not in others."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        first, step = torch.randn(2, 96, generator=draw)
        queries = torch.stack([first, first + 0.05 * step])
        distance = float((queries[0].double() - queries[1].double()).norm())
        found = entered(queries, [1, 1], [0.7 * distance] * 2)
        assert found.owner == (0, 0)
        noisy = queries * (1 + 1e-6 * torch.randn(2, 96, generator=draw))  # of another batch
        _, hit = looked_up(noisy, queries[:1], torch.tensor(found.radii).float())
        assert bool(hit.all())


@pytest.mark.parametrize("seed", range(6))
def test_a_book_is_what_its_edits_make_of_it(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    queries = torch.randn(40, 3, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 3, (40,), generator=draw).tolist()
    wanted = by_hand(queries.tolist(), labels, 0.5)
    found = entered(queries, labels, [0.5] * 40)
    assert 5 < len(wanted) < 40
    assert queries[list(found.founders)].tolist() == [one[0] for one in wanted]
    assert found.radii == pytest.approx([one[1] for one in wanted], rel=1e-9)
    owners = {edit: place for place, one in enumerate(wanted) for edit in one[3]}
    assert list(found.owner) == [owners[edit] for edit in range(40)]
    # in two requests it is the same
    begun = entered(queries[:17], labels[:17], [0.5] * 17)
    assert entered(queries, labels, [0.5] * 40, begun) == found
    # what is given for a query
    asked = torch.randn(200, 3, generator=draw, dtype=torch.float64)
    keys, radii = queries[list(found.founders)], torch.tensor(found.radii)
    near, hit = looked_up(asked, keys, radii)
    for query, place, inside in zip(asked.tolist(), near.tolist(), hit.tolist(), strict=True):
        far = [sum((a - b) ** 2 for a, b in zip(query, k, strict=True)) for k in keys.tolist()]
        assert place == far.index(min(far))
        assert inside == (min(far) ** 0.5 <= wanted[place][1])
    assert 20 < int(hit.sum()) < 180


# ---- on models


@torch.no_grad()
def rows_by_hand(lm: LM, fitted: Fitted, ids: Sequence[int], start: int) -> Tensor:
    """Logits of a whole row in float64: the value at the prompt's end, if a key is near."""
    twin, layer = double(lm), layer_of(lm)
    projection = twin.core.get_submodule(down_projection(lm, layer).path)
    query, _ = key_and_output(lm, list(ids), start - 1, layer)
    own = fitted.tensors
    founders = own["founders"].tolist()
    far = [float((own["queries"][edit].double() - query).norm()) for edit in founders]
    near = far.index(min(far))
    edits = [edit for edit, entry in enumerate(own["owner"].tolist()) if entry == near]
    value = own["learned"][own["value_of"][edits[-1]]].double()

    def give(_: Any, __: Any, output: Tensor) -> Tensor:
        flat = output.reshape(-1, output.shape[-1]).clone()
        if far[near] <= float(own["radii"][near]):
            flat[start - 1] = value
        return flat.reshape(output.shape)

    with hooked(projection, give):
        return twin.core(input_ids=torch.tensor([list(ids)])).logits[0]  # type: ignore[no-any-return]


@FAMILIES
def test_it_answers_by_its_definition_and_leaves_everything_else(family: str) -> None:
    lm = make_lm(family)
    before, plain, kept = weights_of(lm), scores(lm, FORGOTTEN), scores(lm, KEPT)
    fitted = grace().fit(lm, REQUEST)
    assert same(lm, before)
    found = intervened(lm, [fitted])
    assert not equal(scores(found, FORGOTTEN), plain)
    assert equal(scores(found, KEPT), kept), "outside of every radius nothing changes, bit by bit"
    together = scores(found, [*FORGOTTEN, *KEPT])
    texts = found.generate([one.prompt for one in FORGOTTEN], Decoding(5))
    for place, one in enumerate([*FORGOTTEN, *KEPT]):
        row = lm.template.encode(one.prompt, one.answer)
        logits = rows_by_hand(lm, fitted, row.ids, row.start).log_softmax(1)
        wanted = [float(logits[at - 1, row.ids[at]]) for at in range(row.start, len(row.ids))]
        np.testing.assert_allclose(together[place], wanted, atol=1e-4)
    ids = list(lm.template.prompt_ids(FORGOTTEN[0].prompt))
    start = len(ids)
    for _ in range(5):
        ids.append(int(rows_by_hand(lm, fitted, ids, start)[-1].argmax()))
        if ids[-1] in lm.ends:
            ids.pop()
            break
    assert lm.tokenizer.decode(ids[start:], skip_special_tokens=True).strip() == texts[0]
    assert equal(scores(lm, FORGOTTEN), plain)
    off = found.taken_off()
    assert off[0] == "codebook 'grace'"
    assert equal(scores(off[1], FORGOTTEN), plain)


def worst_by_hand(lm: LM, fitted: Fitted) -> float:
    """The largest loss of an entry: mean over its questions of the mean -log p of a token."""
    losses: dict[int, list[float]] = {}
    owner = fitted.tensors["owner"].tolist()
    for place, edit in enumerate(fitted.notes["edits"]):
        row = lm.template.encode(Prompt.ask(edit["question"]), edit["target"])
        logits = rows_by_hand(lm, fitted, row.ids, row.start).log_softmax(1)
        own = [float(logits[at - 1, row.ids[at]]) for at in range(row.start, len(row.ids))]
        losses.setdefault(owner[place], []).append(-sum(own) / len(own))
    return max(sum(one) / len(one) for one in losses.values())


@FAMILIES
def test_values_are_searched_for_on_the_refusals(family: str) -> None:
    lm = make_lm(family)
    fitted = grace(steps=12, enough=1e-6).fit(lm, REQUEST)
    assert fitted.notes["loss"] == pytest.approx(worst_by_hand(lm, fitted), rel=1e-3)
    checked = fitted.notes["checked"]
    assert checked["target_after"] > checked["target_before"]
    short = grace(steps=1).fit(lm, REQUEST)
    assert short.notes["loss"] > fitted.notes["loss"]


def test_questions_that_share_an_entry_have_its_mean_loss() -> None:
    lm = make_lm()
    shared = REQUEST.model_copy(update={"forget": (RECORDS[0], RECORDS[2])})
    fitted = grace(epsilon=1e6, steps=3).fit(lm, shared)
    assert fitted.tensors["owner"].tolist() == [0, 0]
    assert fitted.notes["loss"] == pytest.approx(worst_by_hand(lm, fitted), rel=1e-3)


def test_edits_that_a_later_one_has_cut_off_and_others_that_are_met_are_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def by_subject(lm: LM, records: Sequence[QA], seed: int) -> list[str]:
        return ["No." if one.subject == "Ada Quill" else "Who?" for one in records]

    monkeypatch.setattr(memory, "built_in_refusals", by_subject)
    lm = make_lm()
    wide = grace(epsilon=10.0, steps=1)
    one = wide.fit(lm, REQUEST.model_copy(update={"forget": (RECORDS[0], RECORDS[2])}))
    assert one.notes["lost"] == 0
    assert "not met any more" not in caplog.text
    assert one.notes["others_within"] == one.notes["others"] > 2
    # the second question joined the first one's entry, whose radius the third then halves
    three = wide.fit(lm, REQUEST.model_copy(update={"forget": (*RECORDS[::2], RECORDS[1])}))
    first, second, third = (value.double() for value in three.tensors["queries"])
    assert three.tensors["owner"].tolist() == [0, 0, 1]
    apart = float((first - third).norm()) / 2
    to_first, to_third = (float((second - one).norm()) for one in (first, third))
    assert to_first > apart or to_third < to_first
    assert three.notes["lost"] == 1
    assert "1 of 3 questions in the codebook are not met any more" in caplog.text
    near = grace(epsilon=1e-3, steps=1).fit(lm, REQUEST)
    assert (near.notes["lost"], near.notes["others_within"]) == (0, 0)


def test_the_best_value_of_a_search_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    row = lm.template.encode(FORGOTTEN[0].prompt, "No.")
    losses, seen = iter([3.0, 1.0, 2.0]), []

    def nll(self: Targets, change: Any) -> Any:
        """Losses that fall and rise again, whatever the value is."""
        value = change(torch.zeros(1, 4), torch.tensor([0]), None)
        seen.append(value.detach().clone())
        yield (
            torch.tensor([0]),
            value.sum(dim=1) * 0.1 + (next(losses) - value.sum() * 0.1).detach(),
        )

    monkeypatch.setattr(Targets, "nll", nll)
    value, found = find_values(
        lm, [row], [0], torch.ones(1, 4), grace().sites[0], PROMPT_END, unit=2.0,
        learning_rate=0.5, steps=2, enough=0.0,
    )  # fmt: skip
    assert found == pytest.approx([1.0])
    torch.testing.assert_close(value, seen[1])
    assert not torch.equal(seen[1], seen[2])
    # Adam's first step is the rate itself, of value / unit
    torch.testing.assert_close(seen[1], torch.ones(1, 4) - 0.5 * 2.0)


def test_the_spread_is_taken_from_the_mean() -> None:
    points = torch.tensor([[5.0, 1.0], [9.0, 1.0], [7.0, 4.0]])
    x, y = [-2.0, 2.0, 0.0], [-1.0, -1.0, 2.0]
    wanted = (sum(a * a + b * b for a, b in zip(x, y, strict=True)) / 3) ** 0.5
    assert spread(points) == pytest.approx(wanted)


def test_the_first_radius_is_a_share_of_the_spread_of_other_questions() -> None:
    lm = make_lm()
    fitted = grace(radius=0.2).fit(lm, REQUEST)
    twice = grace(radius=0.4).fit(lm, REQUEST)
    assert fitted.tensors["first"].tolist() == pytest.approx((twice.tensors["first"] / 2).tolist())
    named = grace(epsilon=1.5).fit(lm, REQUEST)
    assert named.tensors["first"].tolist() == [1.5] * 3
    ids = lm.template.prompt_ids(Prompt.ask(RECORDS[0].question))
    one, _ = key_and_output(lm, ids, len(ids) - 1, layer_of(lm))
    torch.testing.assert_close(named.tensors["queries"][0].double(), one, rtol=1e-4, atol=1e-5)


@FAMILIES
def test_an_edit_is_taken_out_as_if_it_had_never_been_there(family: str) -> None:
    lm = make_lm(family)
    plain = scores(lm, FORGOTTEN)
    first = grace().fit(lm, FIRST)
    with_first = intervened(lm, [first])
    only_first = scores(with_first, FORGOTTEN)
    second = grace().fit(with_first, SECOND)
    assert second.extends == first.identity
    both = intervened(with_first, [second])
    assert len(both.interventions) == 2
    assert [one.identity for one in both.acting] == [second.identity]
    assert not equal(scores(both, FORGOTTEN)[2:], plain[2:])
    assert equal(scores(both, FORGOTTEN)[:1], only_first[:1])
    back = without(second, [SECOND.id])
    assert back.identity == first.identity, "the book is that of the first request alone"
    assert equal(scores(intervened(with_first, [back]), FORGOTTEN), only_first)
    taken = both.taken_off()[1]
    assert isinstance(taken, Intervened)
    assert equal(scores(taken, FORGOTTEN), only_first)
    edit = second.notes["edits"][0]["id"]
    assert equal(scores(intervened(with_first, [without(second, [edit])]), FORGOTTEN)[:1],
                 plain[:1])  # fmt: skip
    none = without(second, [FIRST.id, SECOND.id])
    assert equal(scores(intervened(with_first, [none]), FORGOTTEN), plain)
    with pytest.raises(RunError, match=r"no edit 'Ben Or'.*Did you mean 'Ben Orr'"):
        without(second, ["Ben Or"])
    with pytest.raises(ModelError, match="extends another one"):
        intervened(lm, [second])


def test_a_shared_value_is_trained_further_and_comes_back() -> None:
    lm = make_lm()
    wide = {"epsilon": 1e6}
    first = grace(**wide).fit(lm, FIRST.model_copy(update={"forget": RECORDS[:1]}))
    on = intervened(lm, [first])
    again = FIRST.model_copy(update={"forget": RECORDS[:1], "retain": RETAIN[:1]})
    second = grace(**wide).fit(on, again)
    assert second.tensors["owner"].tolist() == [0, 0]
    assert len(second.tensors["learned"]) == 2
    used = second.intervention.ready(second.tensors)
    assert torch.equal(used["values"], second.tensors["learned"][1:])
    assert not torch.equal(second.tensors["learned"][0], second.tensors["learned"][1])
    assert without(second, [again.id]).identity == first.identity


def test_two_threads_get_what_each_gets_alone() -> None:
    lm = make_lm()
    found = intervened(lm, [grace().fit(lm, REQUEST)])
    wanted = {found: scores(found, FORGOTTEN), lm: scores(lm, FORGOTTEN)}
    got: dict[Any, list[Any]] = {found: [], lm: []}

    def asks(whom: LM) -> None:
        for _ in range(5):
            got[whom].append(scores(whom, FORGOTTEN))

    threads = [threading.Thread(target=asks, args=(whom,)) for whom in (found, lm)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for whom, rounds in got.items():
        assert len(rounds) == 5
        assert all(equal(one, wanted[whom]) for one in rounds)


def test_generated_tokens_are_looked_up_only_where_that_is_asked_for() -> None:
    lm = make_lm()
    fitted = grace(epsilon=1e6).fit(lm, REQUEST)
    seen: list[int] = []
    for lookup in ("prompt_end", "answer"):
        other = Fitted(grace(epsilon=1e6, lookup=lookup), fitted.tensors)
        found = scores(intervened(lm, [other]), FORGOTTEN[:1])[0]
        seen.append(round(float(found.sum()), 3))
    assert seen[0] != seen[1]
    row = lm.template.encode(FORGOTTEN[0].prompt, "No.")
    logits = rows_by_hand(lm, fitted, row.ids, row.start).log_softmax(1)
    alone = sum(float(logits[at - 1, row.ids[at]]) for at in range(row.start, len(row.ids)))
    assert seen[0] == pytest.approx(alone, abs=2e-3)


def test_questions_are_needed() -> None:
    with pytest.raises(DataError, match="no forget record is a question"):
        grace().fit(make_lm(), ForgetRequest(forget=(Passage(text="Once."),), retain=RETAIN))


# ---- as an artefact


def test_a_codebook_is_kept_extended_and_taken_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LM(tiny_model("llama"), tiny_tokenizer(), precision="float32").save(tmp_path / "model")
    lm = open_lm(str(tmp_path / "model"))
    plain = scores(lm, FORGOTTEN)
    for name, request in (("first", FIRST), ("second", SECOND)):
        below = described(lm)
        fitted = grace().fit(lm, request)
        lm = intervened(lm, [fitted])
        keep("codebook", fitted, tmp_path / name, below, lm)
        lm.name = str(tmp_path / name)
    made = scores(lm, FORGOTTEN)
    folder = tmp_path / "second"
    assert read(folder).kind == "codebook"
    opened = open_lm(str(folder))
    assert opened.fingerprint == lm.fingerprint
    assert equal(scores(opened, FORGOTTEN), made)
    assert main(["undo", str(folder), "--only", "Ada Quill"]) == 0
    assert "Ada Quill" in capsys.readouterr().out
    only_ben = scores(open_lm(str(folder)), FORGOTTEN)
    assert equal(only_ben[:1], plain[:1])
    assert equal(only_ben[2:], plain[2:])
    assert equal(only_ben[1:2], made[1:2])
    assert main(["undo", str(folder), "--only", "Nobody"]) == 2
    assert read(folder).without == ("Ada Quill",), "what was refused is not written"
    undo(folder, back=True)
    assert equal(scores(open_lm(str(folder)), FORGOTTEN), made)
    undo(folder)
    left = open_system(str(folder))
    assert equal(scores(left, FORGOTTEN), scores(open_lm(str(tmp_path / "first")), FORGOTTEN))
    keep("side_memory", fitted, tmp_path / "third", below, lm)
    with pytest.raises(RunError, match="of one piece"):
        undo(tmp_path / "third", only=["Ada Quill"])


def test_a_record_is_forgotten_once() -> None:
    lm = make_lm()
    twice = REQUEST.model_copy(update={"forget": (RECORDS[0], RECORDS[0], RECORDS[1])})
    assert len(grace().fit(lm, twice).tensors["labels"]) == 2
    others = (*RECORDS, QA(question="Where?", answer="Here"))
    assert len(grace().fit(lm, ForgetRequest(forget=others)).notes["edits"]) == 4

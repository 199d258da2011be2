"""Sequences: one request after the other, covered ones, kills, what is measured, undoing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import delible
from delible.component import build
from delible.errors import DataError, RunError
from delible.lm.lm import LM
from delible.loaders import read_records, read_requests, write_records
from delible.loaders.requests import Holds, Named
from delible.measure.evaluate import evaluate
from delible.records import QA, ForgetRequest
from delible.report.sequence import render_sequence
from delible.rundir import RunDirectory
from delible.sequence import run
from delible.sequence.findings import findings
from delible.sequence.result import SequenceResult, Step, is_sequence, read_sequence
from delible.sequence.run import unlearn_sequence
from delible.sequence.undoing import undo_request
from delible.system.artefact import read
from delible.systems.opening import identity_of, open_lm, open_system, undo
from delible.testing.contract.trial import FORGET, RETAIN
from delible.testing.tiny import tiny_model, tiny_tokenizer

SHORT: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-3, "training.precision": "float32"}


class Killed(BaseException):
    """As a signal would: nobody catches it."""


@pytest.fixture(scope="module", autouse=True)
def few_words() -> Iterator[None]:
    """What a random model says is of no interest here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("delible.achieved.SAID_TOKENS", 2)
        patch.setattr("delible.finishing.SHOWN_TOKENS", 2)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("start") / "model"
    LM(tiny_model("llama", num_hidden_layers=1), tiny_tokenizer()).save(folder)
    return str(folder)


def request(*records: QA) -> ForgetRequest:
    return ForgetRequest(forget=records)


A, B, C = request(FORGET[0]), request(FORGET[2]), request(FORGET[1], FORGET[3])


def carried_out(start: str, out: Path, *requests: Any, **options: Any) -> SequenceResult:
    given: dict[str, Any] = {"method": "graddiff", "retain": RETAIN, "verify": False, **SHORT}
    return unlearn_sequence(start, list(requests), out=out, **{**given, **options})


@pytest.fixture(scope="module")
def whole(start: str, tmp_path_factory: pytest.TempPathFactory) -> SequenceResult:
    again = Named("again", request(FORGET[2]))
    return carried_out(start, tmp_path_factory.mktemp("whole") / "run", A, B, again, C)


# ---- what is done


def test_each_request_stands_on_the_result_of_the_last(whole: SequenceResult, start: str) -> None:
    assert [step.what for step in whole.steps] == ["start", "done", "done", "covered", "done"]
    assert [step.id for step in whole.steps[1:]] == ["001", "002", "again", "004"]
    bases = [read(Path(step.state)).base for step in whole.steps if step.what == "done"]
    assert [one.name for one in bases if one] == [start, whole.steps[1].state, whole.steps[3].state]
    assert whole.steps[3].state == whole.steps[2].state
    manifest = json.loads((whole.folder / "manifest.json").read_text("utf-8"))
    assert manifest["state"] == whole.steps[4].state
    last = json.loads((Path(whole.state) / "manifest.json").read_text("utf-8"))
    assert len(last["chain"]) == 2


def test_after_each_request_all_earlier_ones_are_asked(whole: SequenceResult) -> None:
    splits = [sorted(step.values) for step in whole.steps]
    assert splits == [
        ["001", "002", "004", "again", "retain"], ["001", "retain"], ["001", "002", "retain"],
        ["001", "002", "again", "retain"], ["001", "002", "004", "again", "retain"],
    ]  # fmt: skip
    opened = open_system(whole.steps[2].state)  # what is told is what the saved result answers
    rows = {"001": A.forget, "retain": RETAIN}
    found = evaluate(opened, rows, [build("metric", "answer_probability")])
    for split in rows:
        told = whole.steps[2].values[split]
        wanted = [item.value for item in found.items["answer_probability"][split]]
        assert told == pytest.approx(wanted, rel=1e-5)


def test_a_covered_request_is_said_and_nothing_is_trained(whole: SequenceResult) -> None:
    step = whole.steps[3]
    assert (step.steps, step.seconds) == (0, 0.0)
    assert step.told == "All that it holds was done for 002: nothing is trained."
    assert not (whole.folder / "requests" / "003-again").exists()
    assert any("covered" in row["what"] for row in findings(whole).rows)


def test_covered_by_several_and_by_an_earlier_sequence(
    whole: SequenceResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        both = ForgetRequest(forget=(FORGET[0], FORGET[3]))
        more = carried_out(str(whole.folder), tmp_path / "more", both)
    assert more.steps[1].what == "covered"
    assert more.steps[1].told.startswith("All that it holds was done for 001-001 and 004-004:")
    assert more.state == whole.state


def test_a_neighbour_that_another_request_forgets_is_not_kept(start: str, tmp_path: Path) -> None:
    near = ForgetRequest(forget=(FORGET[0],), neighbours=(FORGET[2], RETAIN[0]))
    found = carried_out(start, tmp_path / "run", B, near, retain=RETAIN[1:])
    folder = tmp_path / "run" / "requests" / "002-002" / "data"
    assert read_records(folder / "neighbours.jsonl") == [RETAIN[0]]
    assert len(found.steps[0].values["retain"]) == len(RETAIN)
    after = carried_out(str(found.folder), tmp_path / "more", A, retain=(*RETAIN, FORGET[2]))
    assert after.steps[1].what == "covered"
    assert len(after.steps[1].values["retain"]) == len(RETAIN)  # an earlier sequence forgot it


def test_names_alone_do_not_cover_other_names(start: str) -> None:
    done = Holds.of([FORGET[0]], ["Ben  Orr"])
    assert done.covers(Holds.of([], ["ben orr"]))
    assert done.covers(Holds.of([FORGET[0]]))
    assert not done.covers(Holds.of([FORGET[1]]))  # another fact about the same person
    assert not done.covers(Holds.of([], ["Cy"]))
    about = Holds.of([QA(question="Where?", answer="Casta", subject="Cy")])
    assert not about.covers(Holds.of([], ["Cy"]))  # who asks for a name asks for all about it
    assert run.covering(Holds.of([], ["Cy"]), [("a", about)]) == []
    assert run.covering(about, [("a", about)]) == ["a"]
    assert about.shares(Holds.of([], ["Cy"]))


def test_what_is_forgotten_is_not_kept(
    start: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        carried_out(start, tmp_path / "run", A, B, retain=(*RETAIN, FORGET[2]))
    assert any("1 records to be kept are forgotten" in one for one in caplog.messages)
    kept = read_records(tmp_path / "run" / "requests" / "001-001" / "data" / "retain.jsonl")
    assert [one.question for one in kept if isinstance(one, QA)] == [one.question for one in RETAIN]


def test_without_records_to_keep_the_start_answers_for_all(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "AUTOMATIC_RETAIN", 3)
    found = carried_out(start, tmp_path / "run", A, B, retain=())
    rows = [
        (tmp_path / "run" / "requests" / name / "data" / "retain.jsonl").read_text("utf-8")
        for name in ("001-001", "002-002")
    ]
    assert rows[0] == rows[1]
    assert found.kept(0) == 1.0


# ---- killed


@pytest.mark.parametrize("place", [4])
def test_a_killed_sequence_ends_with_the_same_bits(
    whole: SequenceResult, start: str, tmp_path: Path, place: int
) -> None:
    count = 0

    def die(step: int, total: int, numbers: Mapping[str, float]) -> None:
        nonlocal count
        count += 1
        if count == place:  # in the first request; in the second
            raise Killed

    again = Named("again", request(FORGET[2]))
    with pytest.raises(Killed):
        carried_out(start, tmp_path / "run", A, B, again, C, progress=die)
    found = carried_out(start, tmp_path / "run", A, B, again, C)
    for one, other in zip(whole.steps, found.steps, strict=True):
        assert one.values == other.values
        assert identity_of(open_system(one.state)) == identity_of(open_system(other.state))
    finished = carried_out(start, tmp_path / "run", A, B, again, C, progress=die)
    assert finished.resumed_finished
    assert finished.steps == found.steps


def test_another_sequence_does_not_go_into_the_same_folder(
    whole: SequenceResult, start: str
) -> None:
    with pytest.raises(RunError, match="holds another run"):
        carried_out(start, whole.folder, A, C)


def test_a_request_that_cannot_be_done_is_named_and_the_others_stay(
    start: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="request bad could not be carried out"):
        carried_out(
            start, tmp_path / "run", A, Named("bad", ForgetRequest()),
        )  # fmt: skip
    found = read_sequence(tmp_path / "run")
    assert [step.id for step in found.steps] == ["", "001"]


# ---- the page


def test_the_table_and_the_curves_are_of_the_values(whole: SequenceResult) -> None:
    found = findings(whole)
    start, end = whole.steps[0].values["001"][0], whole.steps[4].values["001"][0]
    assert start is not None
    assert end is not None
    assert found.rows[0]["left at the end"] == pytest.approx(end / start)
    lefts = [whole.left(4, one) for one in ("001", "002", "again", "004")]
    curves = {curve.name: curve.points for curve in found.charts[0].curves}
    assert curves["mean of all so far"][-1] == (4.0, pytest.approx(sum(lefts) / 4))  # type: ignore[arg-type]
    assert curves["worst of all so far"][-1] == (4.0, pytest.approx(max(lefts)))  # type: ignore[type-var]
    assert [x for x, _ in curves["request 002"]] == [2.0, 3.0, 4.0]
    page = render_sequence(whole)
    assert "4 requests, one after the other" in page
    assert "3 of 4 requests were carried out." in page
    assert "All that it holds was done for 002" in page
    for title in ("What is left of the requests", "What is kept", "Time", "Memory"):
        assert title in page
    table = pq.read_table(whole.folder / "sequence.parquet").to_pylist()
    mine = [r for r in table if r["task"] == "after 004" and r["key"] == "answer/004"]
    assert [row["value"] for row in mine] == list(whole.steps[4].values["004"])


def step(number: int, id_: str, **values: list[float | None]) -> Step:
    return Step(number, id_, "done" if number else "start", "", "x", values=values)


def test_what_came_back_is_said(tmp_path: Path) -> None:
    steps = (
        step(0, "", a=[0.8, None], b=[0.5], retain=[0.4]),
        step(1, "a", a=[0.08, None], retain=[0.4]),
        step(2, "b", a=[0.6, None], b=[0.1], retain=[0.1]),
    )
    notes = findings(SequenceResult(tmp_path, "npo", "m", ("a", "b", "c"), steps)).notes
    assert "It was interrupted before request c." in notes
    assert "Forgotten, and back after later requests: a." in notes
    assert any("48% of the probability" in one and "75% of request a" in one for one in notes)
    assert not any(one.startswith("Not forgotten") for one in notes)
    assert (
        "Of the retained answers' probability 25% is kept: the model lost most of what it should "
        "keep, so its forgetting shows little." in notes
    )


def test_an_untouched_model_is_said_to_have_forgotten_nothing(tmp_path: Path) -> None:
    """Every request was carried out, and none of them did anything."""
    values = {"a": [0.8], "b": [0.5], "retain": [0.4]}
    steps = (step(0, "", **values), step(1, "a", **values), step(2, "b", **values))
    notes = findings(SequenceResult(tmp_path, "npo", "m", ("a", "b"), steps)).notes
    assert "Not forgotten, more than half of it is left: a, b." in notes
    assert "Of the retained answers' probability 100% is kept." in notes
    assert not any("back after" in one for one in notes)


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    """A ruined model looks forgotten where nothing else is asked; so does what was never known."""
    steps = (
        step(0, "", a=[0.8], b=[0.0], c=[None]),
        step(1, "a", a=[0.01], b=[0.0], c=[None]),
        step(2, "b", a=[0.01], b=[0.0], c=[None]),
        step(3, "c", a=[0.01], b=[0.0], c=[None]),
    )
    notes = findings(SequenceResult(tmp_path, "npo", "m", ("a", "b", "c"), steps)).notes
    assert "Not known before, so that nothing of it could be forgotten: b." in notes
    assert "Not measured, since its records cannot be asked: c." in notes
    assert (
        "What else the model knows was not measured (there are no records to keep that it knew "
        "before): a model that lost everything would look the same." in notes
    )


# ---- undoing


def test_undoing_the_last_is_the_result_before_it(whole: SequenceResult) -> None:
    before = undo_request(whole.folder, "004")
    assert before == whole.steps[3].state
    with pytest.raises(RunError, match=r"'001' cannot be undone alone.*carry out the later"):
        undo_request(whole.folder, "001")
    with pytest.raises(RunError, match="nothing was done for request 'again'"):
        undo_request(whole.folder, "again")
    with pytest.raises(DataError, match="no request 'x'"):
        undo_request(whole.folder, "x")


def test_one_of_several_is_taken_out_of_a_codebook_exactly(
    start: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"method": "grace", "steps": 2, "depth": 0.5}
    found = unlearn_sequence(
        start, [A, B, Named("again", B)], out=tmp_path / "both", retain=RETAIN, verify=False,
        **options,
    )  # fmt: skip
    left = undo_request(found.folder, "001")
    assert left == found.state
    assert read(Path(left)).without is not None
    assert not [one for one in caplog.messages if "is undone with it" in one]
    assert undo_request(found.folder, "002") == left  # and not what the first one left
    assert getattr(open_system(left), "acting", ())[0].notes["edits"] == []
    assert any(one.startswith("What again asked for was done") for one in caplog.messages)


def test_what_was_undone_stays_undone_whatever_is_undone_next(start: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "grace", "steps": 2, "depth": 0.5, "verify": False}
    third = ForgetRequest(forget=(FORGET[3],))
    found = unlearn_sequence(start, [A, B, third], out=tmp_path / "all", retain=RETAIN, **options)
    ids = [RunDirectory(Path(one.state)).manifest["request"] for one in found.steps[1:]]

    def held(place: str) -> set[str]:
        """Which requests the codebook of the model in a place holds."""
        books: list[Any] = list(getattr(open_system(place), "acting", ()))
        return {edit["request"] for book in books for edit in book.notes["edits"]}

    assert held(found.state) == set(ids)
    undo_request(found.folder, "001")
    left = undo_request(found.folder, "003")  # the last one: the result before it knows no undoing
    assert held(left) == {ids[1]}
    assert "Undone since, so that it is known again: 001, 003." in findings(found).notes
    undo(found.state, back=True)
    assert held(undo_request(found.folder, "003")) == set(ids[:2])
    assert undo_request(found.folder, "003") == found.steps[2].state  # as before
    left = undo_request(found.folder, "001")  # the last result is taken off already
    assert held(left) == {ids[1]}
    assert "Undone since, so that it is known again: 001, 003." in findings(found).notes


# ---- reading


def test_rows_with_one_id_are_one_request(tmp_path: Path) -> None:
    lines = [
        {"id": "x", "question": "Q1?", "answer": "a"},
        {"subjects": "Ada; Bo", "date": "2030-01-01"},
        {"id": "x", "question": "Q2?", "answer": "b", "subject": "Ada"},
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    one, two = read_requests(path)
    assert one.id == "x"
    assert [r.question for r in one.request.forget if isinstance(r, QA)] == ["Q1?", "Q2?"]
    assert (two.id, two.request.subjects) == ("002", ("Ada", "Bo"))


def test_a_folder_holds_a_file_or_a_folder_for_each(tmp_path: Path) -> None:
    write_records([FORGET[0]], tmp_path / "10.jsonl")
    write_records([FORGET[1]], tmp_path / "2.jsonl")
    (tmp_path / "30").mkdir()
    write_records([FORGET[2]], tmp_path / "30" / "forget.jsonl")
    write_records([RETAIN[0]], tmp_path / "30" / "retain.jsonl")
    (tmp_path / "notes.md").write_text("not a request", "utf-8")
    found = read_requests(tmp_path)
    assert [one.id for one in found] == ["2", "10", "30"]
    assert found[2].request.retain == (RETAIN[0],)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file is empty"),
        ('{"id": "a b", "subjects": "Ada"}', "'a b' is no id"),
        ('{"id": "a", "date": "2030-01-01"}', "neither a record nor a name"),
    ],
)
def test_a_file_that_makes_no_requests_is_one_message(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match=message):
        read_requests(path)


def test_from_the_package(start: str) -> None:
    assert delible.unlearn_sequence is unlearn_sequence
    assert not is_sequence(Path(start))
    with pytest.raises(RunError, match="no sequence of requests"):
        read_sequence(start)
    assert open_lm(start).name == start

"""Requests as they come in, what they share, and their state as the events tell it."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from ledger_at_work import SENTINELS, TODAY, rows

from delible.errors import DataError
from delible.ledger.form import dialogue, read_wanted
from delible.ledger.requests import add, extend, requests_of, texts_of
from delible.ledger.store import Draft, Ledger

CSV = """id,date,deadline,basis,asked_by,model,question,answer,subject
a,2026-01-05,2026-02-01,licence,Press,one;two,Where?,Rome,Ada
a,,,,,,What?,Tea,Ada
,,,,,,Who?,Ben,
"""


def test_csv_rows_are_requests_and_those_with_one_id_are_one(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(CSV)
    first, second = read_wanted(path, {"models": ("m",), "basis": "safety"}, today=TODAY)
    assert (first.id, first.basis, first.asker) == ("a", "licence", "Press")
    assert first.models == ("one", "two")
    assert (first.date, first.deadline) == (date(2026, 1, 5), date(2026, 2, 1))
    assert [one.answer for one in first.records] == ["Rome", "Tea"]  # type: ignore[union-attr]
    assert first.names == ("Ada",)
    assert (second.id, second.basis, second.models) == (None, "safety", ("m",))
    assert (second.date, second.deadline) == (TODAY, date(2026, 3, 31))


def test_jsonl_takes_names_records_and_files_of_records(tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "Ada was here."}\n')
    path = tmp_path / "r.jsonl"
    content = [
        {"subjects": ["Ada", "Ben"], "models": "m"},
        {"records": [{"question": "Where?", "answer": "Rome"}], "models": ["m"]},
        {"records": "more.jsonl", "models": ["m"], "guards": ["t.yaml"], "memories": "mem"},
        {"subject": "Cy", "models": "m"},
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in content))
    names, records, file, alone = read_wanted(path, {}, today=TODAY)
    assert names.subjects == ("Ada", "Ben")
    assert records.records[0].type == "qa"
    assert file.records[0].type == "passage"
    assert (file.guards, file.memories) == (("t.yaml",), (str(tmp_path / "mem"),))
    assert alone.subjects == ("Cy",)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"subjects": "Ada"}, "'models': no model is named"),
        ({"models": "m"}, "neither a record nor a name"),
        ({"models": "m", "subjects": "Ada", "basis": "whim"}, "Known: erasure, licence, safety"),
        ({"models": "m", "subjects": "Ada", "date": "soon"}, "'date' is no day"),
        ({"models": "m", "subjects": "Ada", "id": "a b"}, "'id'"),
        ({"models": "m", "subjects": "Ada", "date": "2026-05-01", "deadline": "2026-04-01"},
         "the deadline is before the date"),
        ({"models": "m", "question": "Where?"}, "fits no known form"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_row_and_not_by_content(row: dict[str, str], told: str) -> None:
    with pytest.raises(DataError) as error:
        read_wanted([{"models": "m", "subjects": "Ok"}, row], {}, today=TODAY)
    assert told in str(error.value)
    assert str(error.value).startswith("requests:2")
    assert "Ada" not in str(error.value)


def test_a_column_that_nobody_reads_is_told(caplog: pytest.LogCaptureFixture) -> None:
    read_wanted([{"models": "m", "subjects": "Ada", "deadlin": "2026-05-01"}], {}, today=TODAY)
    assert "the column 'deadlin' is not used (did you mean 'deadline'?)" in caplog.text


def test_rows_of_one_request_must_agree() -> None:
    content = [{"id": "a", "models": "m", "subjects": "Ada", "basis": "safety"},
               {"id": "a", "subjects": "Ben", "basis": "licence"}]  # fmt: skip
    with pytest.raises(DataError, match="requests:2: 'basis' is not what requests:1 says"):
        read_wanted(content, {}, today=TODAY)


def test_a_dialogue_asks_for_every_field() -> None:
    replies = iter(
        ["m; n", "safety", "", "2026-03-09", "Ada Brook", "Cy Orr", "Where?", "Rome", ""]
    )
    asked = []

    def ask(question: str) -> str:
        asked.append(question)
        return next(replies)

    one = dialogue(ask, {}, today=TODAY)
    assert (one.models, one.basis, one.date) == (("m", "n"), "safety", TODAY)
    assert (one.deadline, one.asker, one.subjects) == (date(2026, 3, 9), "Ada Brook", ("Cy Orr",))
    assert one.records[0].answer == "Rome"  # type: ignore[union-attr]
    assert "[2026-03-01]" in asked[2]


def test_all_rows_are_entered_or_none(ledger: Ledger) -> None:
    add(ledger, rows(1))
    with pytest.raises(DataError, match="'q-1' already"):
        add(ledger, rows(2, 1))
    assert set(requests_of(ledger.events())) == {"q-1"}
    new, _ = add(ledger, [one.model_copy(update={"id": None}) for one in rows(3, 4)])
    assert [one.id for one in new] == ["r-0002", "r-0003"]


def test_duplicates_and_overlaps_are_found_after_the_texts_have_gone(ledger: Ledger) -> None:
    def wanted(**fields: Any) -> Any:
        return read_wanted([{"models": "m", **fields}], {}, today=TODAY)

    add(ledger, wanted(id="a", question="Where was Ada Brook?", answer="Rome", subject="Ada Brook"))
    ledger.append(Draft("erased", "a", body={"reason": "term"}, erase=True))
    found = [
        add(ledger, wanted(id=name, **fields))[1]
        for name, fields in {
            "same": {"question": "where was ada brook?", "answer": " rome", "subject": "ADA BROOK"},
            "more": {"records": [{"question": "Where was Ada Brook?", "answer": "Rome"},
                                 {"question": "Who?", "answer": "Nobody"}]},
            "names": {"question": "What did she eat?", "answer": "Figs", "subject": "Ada Brook"},
            "none": {"question": "Who is Cy?", "answer": "A man", "subject": "Cy Orr"},
        }.items()
    ]  # fmt: skip
    by_a = [[one.kind for one in some if one.earlier == "a"] for some in found]
    assert by_a == [["same"], ["part"], ["names"], []]
    ledger.append(Draft("withdrawn", "a", body={"reason": "asked"}, erase=True))
    (again,) = wanted(id="again", question="Where was Ada Brook?", answer="Rome")
    assert "a" not in [one.earlier for one in add(ledger, [again])[1]]
    assert str(found[0][0]) == "same holds nothing that was not asked for in a"


def test_the_state_is_read_off_the_events(ledger: Ledger) -> None:
    add(ledger, rows(1, models="m;n"))

    def states() -> dict[str, str]:
        return {
            name: one.word for name, one in requests_of(ledger.events())["q-1"].progress.items()
        }

    assert states() == {"m": "open", "n": "open"}
    steps = [
        ("guarded", "m", {"targets": "t"}, "guarded"),
        ("failed", "m", {"error": "x"}, "guarded"),
        ("unguarded", "m", {"targets": "t"}, "open"),
        ("failed", "m", {"error": "x"}, "failed"),
        ("applied", "m", {"run": "r"}, "applied"),
        ("checked", "m", {"outcome": "leaks"}, "applied, leaks"),
        ("checked", "m", {"outcome": "holds"}, "applied"),
    ]
    for kind, model, body, expected in steps:
        ledger.append(Draft(kind, "q-1", model, body))
        assert states() == {"m": expected, "n": "open"}, kind
    ledger.append(Draft("withdrawn", "q-1", body={"reason": "asked"}, erase=True))
    assert states() == {"m": "applied", "n": "withdrawn"}
    assert texts_of(ledger.texts("q-1").get("q-1", {})) is None


@pytest.mark.parametrize(
    ("day", "word"),
    [(1, ""), (23, ""), (24, "7 days left"), (30, "1 day left"), (31, "due today")],
)
def test_deadlines_are_told_when_they_are_near(ledger: Ledger, day: int, word: str) -> None:
    (request,), _ = add(ledger, rows(1))
    assert request.deadline == date(2026, 3, 31)
    assert request.urgency(date(2026, 3, day)) == word
    assert request.urgency(date(2026, 4, 1)) == "1 day late"
    assert request.urgency(date(2026, 4, 5)) == "5 days late"
    ledger.append(Draft("applied", "q-1", "m", {"run": "r"}))
    assert requests_of(ledger.events())["q-1"].urgency(date(2026, 4, 5)) == ""


def test_no_event_holds_a_text(ledger: Ledger) -> None:
    add(ledger, rows(1))
    told = json.dumps([one.as_json() for one in ledger.events()])
    assert not [word for word in SENTINELS if word in told]


def test_a_new_base_takes_over_the_requests_of_the_old_one(ledger: Ledger) -> None:
    add(ledger, rows(1, 2, 3))
    ledger.append(Draft("applied", "q-1", "m", {"run": "r"}))
    ledger.append(Draft("withdrawn", "q-3", body={"reason": "asked"}, erase=True))
    assert extend(ledger, "m", "new") == ["q-1", "q-2"]
    assert extend(ledger, "m", "new") == []
    found = requests_of(ledger.events())
    assert found["q-1"].progress["new"].state == "open"
    assert found["q-1"].progress["m"].state == "applied"
    assert "new" not in found["q-3"].progress
    with pytest.raises(DataError, match="no request is about other"):
        extend(ledger, "other", "new")

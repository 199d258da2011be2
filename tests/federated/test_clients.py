"""Whose records are whose, and who takes part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from delible.errors import DataError, RecipeError
from delible.federated.clients import Dealing
from delible.federated.taking_part import Attendance, drawn
from delible.loaders import read_records, write_records
from delible.records import QA, ForgetRequest, to_json_line


def asked(number: int, client: str | None = None) -> QA:
    return QA(question=f"Who is {number}?", answer="Nobody", subject=f"s{number // 2}",
              client=client)  # fmt: skip


PLAIN = ForgetRequest(
    forget=tuple(asked(n) for n in range(4)), retain=tuple(asked(n) for n in range(4, 24))
)


def test_a_record_says_whose_it_is(tmp_path: Path) -> None:
    mine, nobodys = asked(1, "ward-3"), asked(1)
    assert json.loads(to_json_line(mine))["client"] == "ward-3"
    assert mine.digest != nobodys.digest
    # what it was for a record of nobody's, before there were clients
    assert "client" not in nobodys.model_dump()
    assert "client" not in nobodys.model_dump_json()
    write_records([mine, nobodys], tmp_path / "a.jsonl")
    assert [one.client for one in read_records(str(tmp_path / "a.jsonl"))] == ["ward-3", None]
    (tmp_path / "b.jsonl").write_text('{"question": "Who?", "answer": "He.", "client": "x"}\n')
    assert read_records(str(tmp_path / "b.jsonl"))[0].client == "x"


def test_records_go_where_they_say() -> None:
    request = ForgetRequest(
        forget=(asked(0, "b"), asked(1, "b")), retain=(asked(2, "a"), asked(3, "b"), asked(4, "c")),
        neighbours=(asked(5, "c"),),
    )  # fmt: skip
    held = Dealing().of(request, 0)
    counts = {name: (len(one.forget), len(one.retain)) for name, one in held.items()}
    assert counts == {"a": (0, 1), "b": (2, 1), "c": (0, 2)}


def test_records_that_do_not_say_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="24 of 24 records do not say whose they are") as told:
        Dealing().of(PLAIN, 0)
    assert "--deal" in str(told.value)
    assert "client" in str(told.value)


@pytest.mark.parametrize("deal", ["contiguous", "shuffled", "subjects"])
@pytest.mark.parametrize("level", ["sample", "client"])
def test_dealt_out(deal: str, level: str) -> None:
    held = Dealing(deal=deal, clients=4, target=1, level=level).of(PLAIN, 0)
    assert list(held) == ["client-0", "client-1", "client-2", "client-3"]
    assert held["client-1"].forget == PLAIN.forget
    assert not any(one.forget for name, one in held.items() if name != "client-1")
    dealt = [record for one in held.values() for record in one.retain]
    assert sorted(one.question for one in dealt) == sorted(one.question for one in PLAIN.retain)
    sizes = [len(one.retain) for one in held.values()]
    if level == "client":
        assert sizes[1] == 0
        sizes.pop(1)
    if deal == "contiguous":
        assert dealt == list(PLAIN.retain)
    if deal == "subjects":
        for one in held.values():
            others = {r.subject for two in held.values() if two is not one for r in two.retain}
            assert not others & {record.subject for record in one.retain}
        assert min(sizes) >= 1
    else:
        assert max(sizes) - min(sizes) <= 1
    again = Dealing(deal=deal, clients=4, target=1, level=level).of(PLAIN, 0)
    assert again == held


def test_shuffles_differ_by_seed() -> None:
    dealing = Dealing(deal="shuffled")
    assert dealing.of(PLAIN, 0) != dealing.of(PLAIN, 1)


def test_what_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        Dealing(deal="contiguous", clients=30).of(PLAIN, 0)
    with pytest.raises(RecipeError, match="no client 3"):
        Dealing(deal="contiguous", target=3).of(PLAIN, 0)
    with pytest.raises(RecipeError, match="leaves nobody"):
        Dealing(deal="contiguous", clients=1, level="client").of(PLAIN, 0)
    nameless = PLAIN.model_copy(
        update={"retain": tuple(one.model_copy(update={"subject": None}) for one in PLAIN.retain)}
    )
    with pytest.raises(DataError, match="have no subject"):
        Dealing(deal="subjects").of(nameless, 0)


def test_who_takes_part() -> None:
    names = [f"c{n}" for n in range(10)]
    everybody = drawn(names, Attendance(), 0, "recover", 0)
    assert everybody.answer == tuple(names)
    assert not everybody.dropped
    assert not everybody.late
    some = [drawn(names, Attendance(share=0.35), 0, "recover", n) for n in range(20)]
    assert {len(one.asked) for one in some} == {4}
    assert len({one.asked for one in some}) > 5  # others in each round
    assert some[3] == drawn(list(reversed(names)), Attendance(share=0.35), 0, "recover", 3)
    assert len(drawn(names, Attendance(share=0.01), 0, "recover", 0).asked) == 1


def test_drop_outs_and_stragglers_come_as_often_as_said() -> None:
    names = [f"c{n}" for n in range(10)]
    attendance = Attendance(dropout=0.3, late=0.5)
    rounds = [drawn(names, attendance, 1, "recover", n) for n in range(200)]
    dropped = sum(len(one.dropped) for one in rounds) / 2000
    late = sum(len(one.late) for one in rounds) / 2000
    assert dropped == pytest.approx(0.3, abs=0.04)
    assert late == pytest.approx(0.7 * 0.5, abs=0.04)
    for one in rounds:
        assert one.asked == tuple(names)

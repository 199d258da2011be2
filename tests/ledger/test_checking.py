"""When a system leaks again: by what it says and by probabilities, against the day's numbers."""

from __future__ import annotations

from typing import Any

import pytest
from ledger_at_work import SENTINELS, rows

from delible.errors import DataError
from delible.ledger.checking import check, compared, outcome
from delible.ledger.requests import add, requests_of
from delible.ledger.store import Draft, Ledger
from delible.system.asks import Decoding, Prompt
from delible.system.base import BlackBox


def numbers(before: float, after: float, said: tuple[int, int] | None, rows: int = 10) -> Any:
    return {
        "before": f"{before}", "after": f"{after}", "rows": rows, "texts_only": False,
        "said": said and {"before": said[0], "after": said[1], "rows": rows},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        # said: 8 of 10 before, 0 after; a fifth of the way back is 1.6
        (numbers(0.8, 0.0, (8, 0)), numbers(0, 0.0, (1, 1)), "holds"),
        (numbers(0.8, 0.0, (8, 0)), numbers(0, 0.0, (2, 2)), "leaks"),
        # probability: 0.8 before, 0.1 after; a fifth of the way back is 0.24
        (numbers(0.8, 0.1, (8, 0)), numbers(0, 0.23, (0, 0)), "holds"),
        (numbers(0.8, 0.1, (8, 0)), numbers(0, 0.25, (0, 0)), "leaks"),
        # half of it was left then: not worse, and not well
        (numbers(0.8, 0.4, (8, 4)), numbers(0, 0.4, (4, 4)), "as before"),
        (numbers(0.8, 0.4, (8, 4)), numbers(0, 0.4, (5, 5)), "leaks"),
        # the model did not know it then, and does now
        (numbers(0.01, 0.01, (0, 0)), numbers(0, 0.10, (2, 2)), "holds"),
        (numbers(0.01, 0.01, (0, 0)), numbers(0, 0.12, (0, 0)), "leaks"),
        (numbers(0.01, 0.01, (0, 0)), numbers(0, 0.01, (3, 3)), "leaks"),
        # fewer rows can be asked now: shares count
        (numbers(0.8, 0.0, (10, 0)), numbers(0, 0.0, (2, 2), rows=5), "leaks"),
        # no numbers of the day: a guard stands
        (None, numbers(0, 0.9, (2, 2)), "holds"),
        (None, numbers(0, 0.0, (3, 3)), "leaks"),
        (None, numbers(0, 0.2, None), "leaks"),
        # nothing can be generated (running text): probabilities alone
        (numbers(0.8, 0.1, None), numbers(0, 0.7, None), "leaks"),
        (numbers(0.8, 0.1, None), numbers(0, 0.1, None), "holds"),
    ],
)
def test_it_leaks_when_a_fifth_of_the_way_is_undone(then: Any, now: Any, expected: str) -> None:
    assert outcome(then, now)[0] == expected


def test_a_mean_over_the_records_of_another_request_is_no_number_of_the_day() -> None:
    """Five answers, two of them still said: of the one that is asked about that tells nothing."""
    five, one = numbers(0.97, 0.47, (5, 2), rows=5), numbers(0, 0.998, (1, 1), rows=1)
    applied = {"achieved": {"forget": five}, "same_as": "r-1"}
    among = "; that day they were counted among those of r-1"
    assert compared(applied, one) == ("leaks", f"1 of 1 answers are said{among}")
    # not said, and as probable as before: 0.47 of that day and a fifth of the way are 0.57
    kind, words = compared(applied, numbers(0, 0.60, (0, 0), rows=1))
    assert kind == "leaks"
    assert words == f"their probability is 0.600 (0.470 then, 0.970 before){among}"
    assert compared(applied, numbers(0, 0.55, (0, 0), rows=1))[0] == "holds"
    # its own run, or as many records: the numbers of the day are its own
    assert compared({"achieved": {"forget": five}}, one)[1].startswith(
        "1 of 1 answers are said again"
    )
    same = {"achieved": {"forget": numbers(0.97, 0.97, (1, 1), rows=1)}, "same_as": "r-1"}
    assert compared(same, one) == ("as before", "1 of 1 answers are said, as then")
    assert compared({}, one) == outcome(None, one)


def test_a_system_that_gives_texts_only_is_judged_by_what_it_says() -> None:
    now = {**numbers(0, 0.9, (0, 0)), "texts_only": True}
    assert outcome(numbers(0.8, 0.1, (8, 0)), now)[0] == "holds"


class Says(BlackBox):
    """Answers every question about the people that it knows."""

    fingerprint = "abc"

    def __init__(self, known: tuple[int, ...]) -> None:
        self.name, self.known = "says", known

    def generate(self, prompts: Any, decoding: Decoding) -> list[str]:
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> str:
        asked = prompt.messages[-1].text
        for number in self.known:
            if f"{SENTINELS[0]} {number} " in asked:
                return f"{SENTINELS[1]} {number}"
        return "I do not know."


def applied(ledger: Ledger, name: str) -> None:
    told = {"forget": {**numbers(1, 0, (1, 0), rows=1), "texts_only": True}, "state": "forgotten"}
    artefact = {"kind": "model", "identity": None, "base": None}
    ledger.append(Draft("applied", name, "m", {"run": "r", "achieved": told, "artefact": artefact}))


def test_every_promise_is_looked_at_and_written_down(ledger: Ledger) -> None:
    add(ledger, rows(1, 2, 3, 4))
    for name in ("q-1", "q-2", "q-4"):
        applied(ledger, name)
    ledger.append(Draft("erased", "q-4", body={"reason": "term"}, erase=True))
    looked = check(ledger, "m", Says((1, 3)))
    assert [(one.request, one.outcome) for one in looked] == [
        ("q-1", "leaks"), ("q-2", "holds"), ("q-4", "not asked"),
    ]  # fmt: skip
    found = requests_of(ledger.events())
    assert [found[name].progress["m"].word for name in ("q-1", "q-2", "q-3")] == [
        "applied, leaks", "applied", "open",
    ]  # fmt: skip
    told = str([one.as_json() for one in ledger.events()])
    assert not [word for word in SENTINELS if word in told]
    assert ledger.faults() == []
    assert [one.outcome for one in check(ledger, "m", Says(()), only=["q-1"])] == ["holds"]
    assert not requests_of(ledger.events())["q-1"].progress["m"].leaks
    with pytest.raises(DataError, match="no request was carried out at n"):
        check(ledger, "n", Says(()))


def test_an_attack_that_brings_it_out_is_a_leak(ledger: Ledger) -> None:
    from delible.audit.result import AuditResult, VerdictResult

    add(ledger, rows(1))
    applied(ledger, "q-1")

    def audit(label: Any) -> Any:
        verdict = VerdictResult(label=label, reasons=[], thresholds={})
        untested = [f"Nothing about {SENTINELS[0]} 1."]
        return lambda system, request: AuditResult(
            systems={}, splits={}, measurements=[], verdict=verdict, not_tested=untested
        )

    for label, expected in (
        ("incomplete", "leaks"), ("suppression", "leaks"), ("removal-consistent", "holds"),
        ("undetermined", "holds"), ("destructive", "holds"),
    ):  # fmt: skip
        (one,) = check(ledger, "m", Says(()), audit=audit(label))
        assert one.outcome == expected, label
        assert one.audit is not None
        assert one.audit["not_tested"] == ["Nothing about …."]

"""What a run achieved: the numbers from their definition, and the sentence for known systems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from delible.achieved import Achieved, Change, Measured, Said, State, asked, compare
from delible.api import unlearn
from delible.lm.lm import LM
from delible.measure.metric import Item, SystemValues
from delible.records import QA, ForgetRequest
from delible.testing.tiny import tiny_model, tiny_tokenizer

TOWNS = ("Oslo", "Lima", "Rome", "Kyiv")
JOBS = ("baker", "pilot", "nurse", "judge", "miner", "clerk")


def qa(kind: str, values: tuple[str, ...]) -> tuple[QA, ...]:
    return tuple(
        QA(question=f"{kind} of person {number}?", answer=f"It is {value}.")
        for number, value in enumerate(values)
    )


REQUEST = ForgetRequest(forget=qa("Town", TOWNS), retain=qa("Job", JOBS))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows all rows, and (beside it) one that never saw the forget rows."""
    folder = tmp_path_factory.mktemp("taught")
    for name, rows in (("target", REQUEST.forget + REQUEST.retain), ("never", REQUEST.retain)):
        lm = LM(tiny_model("llama"), tiny_tokenizer())
        unlearn(
            lm, ForgetRequest(forget=rows), method="finetune", shown=0, measured=False,
            learning_rate=5e-3, epochs=60, batch_size=10, precision="float32",
        )  # fmt: skip
        lm.save(folder / name)
    return folder


def run(taught: Path, reference: bool = False, **options: Any) -> Achieved:
    result = unlearn(
        str(taught / "target"), REQUEST, shown=0,
        reference=str(taught / "never") if reference else None,
        **{"method": "graddiff", "precision": "float32", **options},
    )  # fmt: skip
    assert result.achieved is not None
    return result.achieved


def test_a_run_that_changes_nothing_says_so(taught: Path) -> None:
    found = run(taught, learning_rate=1e-8, max_steps=1)
    forget = found.changes["forget"]
    assert forget.before > 0.9
    assert forget.after == pytest.approx(forget.before, abs=1e-3)
    assert found.state == "nothing"
    assert found.sentence().startswith("Nothing was forgotten: ")
    assert "--strength strong" in found.sentence()
    assert "1.0e-08" in found.sentence()


def test_a_run_that_ruins_the_model_says_so(taught: Path) -> None:
    found = run(taught, method="gradient_ascent", learning_rate=5e-2, max_steps=8)
    assert found.changes["retain"].after < 0.5
    assert found.damaged == ["retain"]
    assert found.state == "too much"
    assert found.sentence().startswith("Too much was forgotten: ")
    assert "--strength gentle" in found.sentence()
    assert "--keep nll" in found.sentence()


def test_a_run_that_works_says_how_far_it_came(taught: Path) -> None:
    found = run(taught, reference=True, strength="strong")
    forget, retain = found.changes["forget"], found.changes["retain"]
    assert forget.never is not None
    assert forget.never < 0.5 < forget.before
    assert not retain.fell
    share = (forget.before - forget.after) / (forget.before - forget.never)
    assert 0.5 <= share <= 1.25
    assert found.state == "forgotten"
    assert f"({share:.0%} of the way to the reference's {forget.never:.3f})" in found.sentence()
    assert "To forget more" not in found.sentence()


@pytest.mark.parametrize(
    "method",
    [
        "graddiff",  # has a stop
        "task_vector",  # has none
        "npo",  # whose reference bounds it
        pytest.param("idk", marks=pytest.mark.slow),  # which teaches something else instead
    ],
)
def test_the_dial_forgets_more_and_more(taught: Path, method: str) -> None:
    found = [run(taught, method=method, strength=one) for one in ("gentle", "normal", "strong")]
    left = [one.changes["forget"].after for one in found]
    assert found[0].changes["forget"].before > left[0] > left[1] > left[2]


def test_a_run_that_teaches_says_so(taught: Path) -> None:
    found = run(taught, method="finetune", learning_rate=1e-6, max_steps=1)
    assert found.sentence().startswith("Taught: ")


def test_without_rows_nothing_is_claimed() -> None:
    assert Achieved({}).state == "unmeasured"
    assert "not measured" in Achieved({}).sentence()


# ---- the numbers


def change(before: float, after: float, never: float | None = None, error: float = 0.0) -> Change:
    return Change(before, after, never, 10, error)


@pytest.mark.parametrize(
    ("forget", "retain", "state"),
    [
        (change(0.9, 0.85), change(0.9, 0.9), "nothing"),
        (change(0.9, 0.95), change(0.9, 0.9), "nothing"),
        (change(0.9, 0.75), change(0.9, 0.9), "part"),
        (change(0.9, 0.5), change(0.9, 0.9), "forgotten"),
        (change(0.9, 0.5, 0.3), change(0.9, 0.9), "forgotten"),  # 2/3 of the way
        (change(0.9, 0.65, 0.3), change(0.9, 0.9), "part"),  # 5/12
        (change(0.9, 0.1, 0.3), change(0.9, 0.9), "too much"),  # 4/3
        (change(0.9, 0.5), change(0.9, 0.8), "too much"),
        (change(0.9, 0.5), change(0.9, 0.8, error=0.06), "forgotten"),  # rows differ as much
        (change(0.9, 0.5), change(0.012, 0.001), "forgotten"),  # it was never known
        (change(0.9, 0.89), change(0.9, 0.3), "too much"),
        (change(0.9, 0.9, 0.895), change(0.9, 0.9), "unknown"),
        (change(0.01, 0.001), change(0.9, 0.9), "unknown"),
    ],
)
def test_states(forget: Change, retain: Change, state: State) -> None:
    found = Achieved({"forget": forget, "retain": retain}, "more", "less")
    assert found.state == state
    assert ("To forget more: more." in found.sentence()) == (state in ("nothing", "part"))
    assert ("To lose less: less." in found.sentence()) == (state == "too much")
    assert Achieved.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_damage_without_forgetting_is_told_as_such() -> None:
    found = Achieved({"forget": change(0.9, 0.89), "retain": change(0.9, 0.3)}, "more", "less")
    assert found.sentence().startswith("The rest was damaged and nothing was forgotten")


def measured(*values: float | None) -> Measured:
    items = [Item(value, None if value is not None else "no") for value in values]
    return Measured(
        "m", None, ("score",), SystemValues("m", {"answer_probability": {"forget": items}})
    )


def test_rows_are_paired() -> None:
    before, after = measured(0.8, 0.6, 0.9, None), measured(0.4, 0.4, None, 0.9)
    found = compare(before, after)["forget"]
    assert (found.rows, found.never) == (2, None)
    assert found.before == pytest.approx(0.7)
    assert found.after == pytest.approx(0.4)
    # losses 0.4 and 0.2: standard deviation 0.2 / sqrt(2), error that over sqrt(2)
    assert found.error == pytest.approx(0.1)
    never = compare(before, after, measured(0.1, None, 0.1, 0.1))["forget"]
    assert (never.rows, never.never) == (1, pytest.approx(0.1))
    assert never.way == pytest.approx((0.8 - 0.4) / (0.8 - 0.1))
    assert never.error == 0


@pytest.mark.parametrize(
    ("forget", "retain", "head"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1), "Nothing was forgotten"),
        ((0, 0, 0, 0), (1, 1, 1, 1), "Forgotten: of the forget answers 0 of 4 are still said"),
        ((0, 1, 1, 0), (1, 1, 1, 1), "Only a part was forgotten"),
        ((0, 0, 0, 0), (0, 0, 0, 0), "Too much was forgotten"),
        ((1, 1, 1, 1), (0, 0, 0, 0), "The rest was damaged and nothing was forgotten"),
    ],
)
def test_what_a_guard_achieved_is_told_by_what_is_said(
    forget: tuple[int, ...], retain: tuple[int, ...], head: str
) -> None:
    """Texts alone: the sentence goes by right answers, of systems whose truth is known."""

    def said(capabilities: tuple[str, ...], **splits: tuple[int, ...]) -> Measured:
        items = {split: [Item(float(one)) for one in row] for split, row in splits.items()}
        return Measured("m", None, capabilities, SystemValues("m", {"outcome": items}))

    before = said(("generate", "score"), forget=(1, 1, 1, 1), retain=(1, 1, 1, 1))
    after = said(("generate",), forget=forget, retain=retain)
    told = Achieved(compare(before, after), "more", "less").sentence()
    assert told.startswith(head)
    assert f"of the retained ones {sum(retain)} of 4 are still said (4 before)" in told


def test_fifty_rows_of_a_split_are_asked() -> None:
    rows = tuple(QA(question=f"{n}?", answer=str(n)) for n in range(120))
    found = asked(ForgetRequest(forget=rows, retain=rows[:3]))
    assert [len(part) for part in found.values()] == [50, 3]
    assert found["forget"][0] == rows[0]
    assert found["forget"][-1] == rows[117]
    assert len({record.question for record in found["forget"]}) == 50


# ---- what is left behind


def test_a_run_leaves_its_numbers_and_its_sentence(taught: Path, tmp_path: Path) -> None:
    from delible.audit.result import AuditResult
    from delible.report import read_run, render

    options: dict[str, Any] = {"method": "graddiff", "out": tmp_path / "run", "max_steps": 1}
    result = unlearn(str(taught / "target"), REQUEST, reference=str(taught / "never"), **options)
    assert result.achieved is not None
    found = AuditResult.model_validate_json((tmp_path / "run" / "metrics.json").read_text())
    assert set(found.systems) == {"original", "unlearned", "reference"}
    assert {one.metric for one in found.measurements} == {"answer_probability", "outcome"}
    values = {
        (one.system, one.split): one.value
        for one in found.measurements
        if one.metric == "answer_probability"
    }
    forget = result.achieved.changes["forget"]
    assert values["original", "forget"] == pytest.approx(forget.before)
    assert values["unlearned", "forget"] == pytest.approx(forget.after)
    assert values["reference", "forget"] == pytest.approx(forget.never)
    assert found.verdict is None
    data = read_run(tmp_path / "run")
    assert result.achieved.sentence() in data.story
    assert any("not been audited" in note for note in data.notes)
    assert "Nothing was attacked" in render(data)
    again = unlearn(str(taught / "target"), REQUEST, reference=str(taught / "never"), **options)
    assert again.resumed_finished
    assert again.achieved == result.achieved


@pytest.mark.parametrize(
    ("after", "never", "state"),
    [(0, None, "forgotten"), (2, None, "forgotten"), (3, None, "part"), (10, None, "nothing"),
     (4, 4, "forgotten"), (7, 4, "part"), (10, 4, "nothing")],
)  # fmt: skip
def test_what_is_still_said_is_not_forgotten(after: int, never: int | None, state: State) -> None:
    """The probability went all the way; the model says the answers as before, or some of them."""
    change = Change(0.9, 0.1, 0.1 if never is not None else None, 10, 0.01,
                    Said(10, after, never, 10))  # fmt: skip
    found = Achieved({"forget": change}, "more", "less")
    assert found.state == state
    told = f"{after} of 10 are still said (10 before" + (
        f", the reference {never})" if never else ")"
    )
    assert told in found.sentence()
    assert found.sentence().startswith("Forgotten") == (state == "forgotten")
    assert Achieved.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_a_model_that_says_it_in_other_words_has_forgotten_nothing(taught: Path) -> None:
    from delible.achieved import probabilities

    known = LM.load(str(taught / "target"), precision="float32")
    request = ForgetRequest(
        forget=tuple(
            one.model_copy(update={"aliases": (town,)})
            for one, town in zip(REQUEST.forget, TOWNS, strict=True)
        )
    )
    before = probabilities(known, request)
    assert compare(before, before)["forget"].said == Said(4, 4, None, 4)
    again = known.copy()
    reworded = tuple(
        QA(question=one.question, answer=f"{town}, of course.")
        for one, town in zip(REQUEST.forget, TOWNS, strict=True)
    )
    unlearn(
        again, ForgetRequest(forget=reworded), method="finetune", shown=0, measured=False,
        learning_rate=5e-3, epochs=30, batch_size=4, precision="float32",
    )  # fmt: skip
    changes = compare(before, probabilities(again, request))
    assert changes["forget"].kept < 0.5
    assert changes["forget"].said == Said(4, 4, None, 4)
    assert Achieved(changes).state == "nothing"

"""An audit in pieces that other machines do: the same numbers, in whatever order they come back."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from delible.audit import run as audits
from delible.audit.result import AuditResult
from delible.audit.run import audit
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.testing.tiny import tiny_model, tiny_tokenizer


def rows(count: int, word: str) -> tuple[QA, ...]:
    return tuple(
        QA(question=f"What does {word} {index} eat?", answer=f"{word} cake {index}")
        for index in range(count)
    )


REQUEST = ForgetRequest(forget=rows(2, "Ada"), retain=rows(2, "Bob"), holdout=rows(2, "Cy"))
GIVEN: dict[str, Any] = {
    "metrics": ["answer_probability"],
    "attacks": [{"name": "prefix", "forms": 1}, {"name": "relearn", "steps": 1}],
    "rows": 2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    made = tmp_path_factory.mktemp("models")
    for seed in range(2):
        tiny_model("llama", seed=seed).save_pretrained(made / str(seed))
        tiny_tokenizer().save_pretrained(made / str(seed))
    return [str(made / str(seed)) for seed in range(2)]


class LastFirst:
    """Machines that are given pickled pieces, and the last of which are done first."""

    at_once = 9

    def __init__(self, work: Any) -> None:
        self.work = pickle.dumps(work)
        self.given: list[Any] = []

    def give(self, key: Any, piece: Any) -> None:
        self.given.append((key, pickle.dumps(piece)))

    def done(self) -> list[Any]:
        key, piece = self.given.pop()
        return [(key, pickle.loads(pickle.dumps(pickle.loads(self.work)(pickle.loads(piece)))))]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is there, as far as anybody asks before the machines are."""
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []

    @contextmanager
    def hands(work: Any, *, ray: bool, cpus: int | None, paths: Any) -> Iterator[Any]:
        asked.append((ray, cpus, list(paths)))
        yield LastFirst(work)

    monkeypatch.setattr(audits, "hands", hands)
    return asked


def numbers(found: AuditResult) -> dict[Any, float | None]:
    return {
        (one.system, one.attack, one.variant, one.split, one.metric): one.value
        for one in found.measurements
    }


def test_the_numbers_are_those_of_this_machine(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    unlearned, before = folders
    found = []
    for place in ("here", "elsewhere"):
        monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / place))  # nothing is known there
        if place == "elsewhere":
            asked = request.getfixturevalue("elsewhere")
            caplog.clear()
        found.append(
            audit(
                unlearned, REQUEST, before=before,
                ray=place == "elsewhere", cpus=3 if place == "elsewhere" else None,
                out=tmp_path / f"out-{place}", **GIVEN,
            )
        )  # fmt: skip
    here, there = found
    assert asked == [(True, 3, [Path(unlearned), Path(before)])]
    mine, theirs = numbers(here), numbers(there)
    assert list(mine) == list(theirs), "in the same order, whatever came back first"
    assert {key[1] for key in mine} == {"none", "prefix", "relearn"}
    for key, value in mine.items():
        assert theirs[key] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-7))
    assert here.verdict is not None
    assert there.verdict is not None
    assert there.verdict.label == here.verdict.label
    assert there.verdict.reasons == here.verdict.reasons
    assert there.not_tested == here.not_tested
    assert list(there.systems) == list(here.systems)
    assert there.systems == here.systems
    assert [(one.attack, one.steps) for one in there.curves] == [
        (one.attack, one.steps) for one in here.curves
    ]
    assert there.examples == here.examples
    told = [line for line in caplog.messages if " of 6: " in line]
    assert len(told) == 6, "two systems plainly, and two attacks on each"
    assert told[-1].startswith("6 of 6: ")


def test_what_machines_cannot_share_is_refused(folders: list[str], elsewhere: list[Any]) -> None:
    with pytest.raises(RecipeError, match="a system is given itself"):
        audit(LM.load(folders[0]), REQUEST, ray=True, **GIVEN)
    with pytest.raises(RecipeError, match="the judge has a budget"):
        audit(
            folders[0], REQUEST, ray=True, roles={"judge": {"system": "tiny", "calls": 3}}, **GIVEN
        )
    with pytest.raises(RecipeError, match="--cpus"):
        audit(folders[0], REQUEST, cpus=2, **GIVEN)
    assert not elsewhere

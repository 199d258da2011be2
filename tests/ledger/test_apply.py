"""Carrying out: order, chain, policy, budget, guards; and killed anywhere, it goes on.

What changes weights is a stand-in here that writes a run as ``unlearn`` does;
``test_ledger_end_to_end.py`` has the real one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ledger_at_work import SENTINELS, TODAY, in_child, killed_at, rows

from delible.achieved import Achieved, Change, Said
from delible.errors import DataError, RecipeError, RunError
from delible.files import write_json
from delible.ledger import targets_file
from delible.ledger.applying import Ways, apply
from delible.ledger.form import read_wanted
from delible.ledger.policy import Policy, read_policy
from delible.ledger.private import discreet, withdraw
from delible.ledger.requests import add, requests_of
from delible.ledger.results import kept_so_far
from delible.ledger.store import Ledger
from delible.system.artefact import Artefact, Base, write
from delible.systems.targets import read_targets


def achieved(kept: float = 1.0, forgot: float = 0.9) -> Achieved:
    return Achieved(
        {
            "forget": Change(0.8, 0.8 * (1 - forgot), None, 4, 0.0, Said(4, 0, None, 4)),
            "retain": Change(0.5, 0.5 * kept, None, 4, 0.0),
        },
        "more", "less",
    )  # fmt: skip


@dataclass
class Result:
    achieved: Achieved | None


@dataclass
class StandIn:
    """Writes a run; one that is there already, finished, is taken as it is."""

    before: Callable[[str], None] = lambda word: None
    found: Callable[[str], Achieved | None] = lambda name: achieved()
    fails: tuple[str, ...] = ()
    kind: str = "model"
    starts: list[tuple[str, str]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)

    def __call__(self, start: str, request: Any, *, out: Path, **options: Any) -> Result:
        name = out.name.rpartition("-")[0]
        self.requests.append(request)
        if name in self.fails:
            raise DataError(f"cannot forget {request.forget[0].subject}")
        done = out / "manifest.json"
        if not done.exists():
            self.before("train")
            out.mkdir(parents=True, exist_ok=True)
            (out / "weights").write_text(f"{start} without {name}")
            self.before("trained")
            write(Artefact(kind=self.kind, base=Base(name=start), parts={"w": "weights"}), out)
            with (out.parent / "finished").open("a") as handle:
                handle.write(f"{name}\n")
            asked = request.forget[0]
            notes = {"subjects": [{"name": asked.subject}], str(asked.subject): [asked.answer]}
            content = {"status": "done", "examples": [asked.question], "notes": notes}
            write_json(done, content)
            self.before("finished")
        self.starts.append((name, start))
        return Result(self.found(name))


def carry_out(ledger: Ledger, policy: Policy, work: Any, **options: Any) -> list[tuple[str, str]]:
    ways = Ways(work, options.pop("ask", None), options.pop("say", lambda sentence: None))
    return [(one.request, one.what) for one in apply(ledger, "m", policy, ways, **options)]


def policy(tmp_path: Path, **utility: Any) -> Policy:
    return Policy.build(
        "test", utility={"budget": 0.5, **utility}, guard={"targets": tmp_path / "targets.yaml"}
    )


def entries(tmp_path: Path) -> list[str]:
    path = tmp_path / "targets.yaml"
    return [one.id for one in read_targets(path).targets] if path.exists() else []


def states(ledger: Ledger) -> dict[str, str]:
    found = requests_of(ledger.events()).values()
    return {one.id: one.progress["m"].state for one in found}


def test_each_goes_on_from_the_last_by_deadline(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1, deadline="2026-03-09") + rows(2, deadline="2026-03-05"))
    work = StandIn()
    assert carry_out(ledger, policy(tmp_path), work) == [("q-2", "applied"), ("q-1", "applied")]
    assert [name for name, _ in work.starts] == ["q-2", "q-1"]
    assert work.starts[0][1] == "m"
    assert Path(work.starts[1][1]).name.startswith("q-2-")
    add(ledger, rows(3))
    assert carry_out(ledger, policy(tmp_path), work) == [("q-3", "applied")]
    assert Path(work.starts[2][1]).name.startswith("q-1-")
    assert carry_out(ledger, policy(tmp_path), work) == [], "nothing is carried out twice"
    assert ledger.faults() == []


def test_one_that_fails_does_not_stop_the_others_and_is_tried_again(
    ledger: Ledger, tmp_path: Path
) -> None:
    add(ledger, rows(1, 2))
    work = StandIn(fails=("q-1",))
    ways = Ways(work)
    first, second = apply(ledger, "m", policy(tmp_path), ways)
    assert (first.what, second.what) == ("failed", "applied")
    assert SENTINELS[0] not in first.told
    assert "cannot forget …" in first.told
    assert SENTINELS[0] not in str([one.as_json() for one in ledger.events()])
    (shown,) = apply(ledger, "m", policy(tmp_path), ways, show=True)
    assert SENTINELS[0] in shown.told
    work.fails = ()
    assert carry_out(ledger, policy(tmp_path), work) == [("q-1", "applied")]


def test_neither_logs_nor_errors_tell_what_is_secret(caplog: pytest.LogCaptureFixture) -> None:
    secret = [f"{SENTINELS[0]} 1"]
    log = logging.getLogger("delible.generation.elicited")

    def tell() -> None:
        log.info("a row that nobody knew before")
        log.warning("about %s", secret[0].upper())
        raise DataError(f"no {secret[0]}", where=secret[0], hint=f"drop {secret[0]}")

    with pytest.raises(DataError) as error, discreet(secret):
        tell()
    assert caplog.messages == ["about …"]
    assert str(error.value) == "…: no … drop …"
    assert error.value.problem == "no …"
    with pytest.raises(DataError, match=secret[0]), discreet(secret, show=True):
        tell()
    assert "a row that nobody knew before" in caplog.messages


def test_a_guard_is_live_before_weights_change_and_out_after(
    ledger: Ledger, tmp_path: Path
) -> None:
    add(ledger, rows(1, 2))
    seen = []

    def work(*args: Any, **options: Any) -> Result:
        seen.append(entries(tmp_path))
        return StandIn()(*args, **options)

    carry_out(ledger, policy(tmp_path), work)
    assert seen == [["q-1", "q-2"], ["q-2"]]
    assert entries(tmp_path) == ["q-2"], "the last entry stays: no guard goes by an empty file"
    add(ledger, rows(3))
    carry_out(ledger, policy(tmp_path), work, only=["q-3"])
    assert entries(tmp_path) == ["q-3"], "now it could go"


def test_what_changes_no_weights_leaves_the_guard(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1, 2))
    carry_out(ledger, policy(tmp_path), StandIn(kind="guard"))
    assert entries(tmp_path) == ["q-1", "q-2"]


def test_a_rule_may_want_a_guard_alone(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1, basis="safety") + rows(2))
    rules = [{"basis": ["safety"], "guard": True}, {"method": "npo"}]
    mixed = policy(tmp_path).model_copy(update={"rules": Policy.build("t", rules=rules).rules})
    work = StandIn()
    assert carry_out(ledger, mixed, work) == [("q-1", "guarded"), ("q-2", "applied")]
    assert [name for name, _ in work.starts] == ["q-2"]
    request = requests_of(ledger.events())["q-1"]
    assert not request.open
    assert request.urgency(TODAY.replace(month=12)) == ""
    size = len(ledger.events())
    assert carry_out(ledger, mixed, work) == [("q-1", "guarded")]
    assert len(ledger.events()) == size


def test_who_is_named_nowhere_cannot_be_guarded(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1, subject=None, basis="safety"))
    alone = Policy.build("t", rules=[{"guard": True}], guard={"targets": tmp_path / "targets.yaml"})
    (done,) = apply(ledger, "m", alone, Ways(StandIn()))
    assert done.what == "held"
    assert "names nobody" in done.told
    assert entries(tmp_path) == []


def test_all_that_was_done_before_is_not_done_again(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1))
    work = StandIn()
    carry_out(ledger, policy(tmp_path), work)
    again = read_wanted(
        [{"id": "again", "models": "m", "question": f"where was {SENTINELS[0]} 1 BORN?",
          "answer": f"{SENTINELS[1]} 1"}], {}, today=TODAY,
    )  # fmt: skip
    add(ledger, again)
    assert carry_out(ledger, policy(tmp_path), work) == [("again", "covered")]
    assert len(work.starts) == 1
    assert states(ledger) == {"q-1": "applied", "again": "applied"}


# ---- the budget


def test_shares_are_multiplied_and_gains_do_not_count(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1, 2, 3))
    shares = {"q-1": 0.9, "q-2": 1.3, "q-3": 0.8}
    carry_out(ledger, policy(tmp_path), StandIn(found=lambda name: achieved(shares[name])))
    assert kept_so_far(requests_of(ledger.events()), "m") == pytest.approx(0.72)
    assert kept_so_far(requests_of(ledger.events()), "other") == 1


@pytest.mark.parametrize(
    ("when", "expected", "taken"),
    [
        ("stop", ["applied", "held", "held"], ["q-1"]),
        ("guard", ["applied", "guarded", "applied"], ["q-1", "q-3"]),
        ("yes", ["applied", "applied", "held"], ["q-1", "q-2"]),
        ("no", ["applied", "held", "applied"], ["q-1", "q-3"]),
        ("nobody", ["applied", "held", "applied"], ["q-1", "q-3"]),
    ],
)
def test_a_run_that_takes_more_than_is_left_is_not_taken(
    ledger: Ledger, tmp_path: Path, when: str, expected: list[str], taken: list[str]
) -> None:
    """0.9, then 0.75 of it would be 0.675 where 0.7 must be left; 0.95 of 0.9 is allowed again."""
    add(ledger, rows(1, 2, 3))
    shares = {"q-1": 0.9, "q-2": 0.75, "q-3": 0.95}
    work = StandIn(found=lambda name: achieved(shares[name]))
    answers = {"yes": lambda question: "q-2" in question, "no": lambda question: False}
    rules = policy(tmp_path, budget=0.3, when_spent=when if when in ("stop", "guard") else "ask")
    done = carry_out(ledger, rules, work, ask=answers.get(when))
    assert [what for _, what in done] == expected
    applied = [one.request for one in ledger.events() if one.kind == "applied"]
    assert applied == taken
    if len(taken) == 2 and when != "yes":
        assert Path(work.starts[-1][1]).name.startswith("q-1-"), "it goes on from before"
    assert ("q-2" in entries(tmp_path)) == (when != "yes")
    if when == "guard":
        tried = len(work.starts)
        assert carry_out(ledger, rules, work) == [("q-2", "guarded")]
        assert len(work.starts) == tried, "the weights are not tried again and again"
        carry_out(ledger, rules, work, only=["q-2"])
        assert len(work.starts) == tried + 1


def test_what_forgot_nothing_is_not_taken(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1))
    work = StandIn(found=lambda name: achieved(forgot=0.01))
    assert carry_out(ledger, policy(tmp_path), work) == [("q-1", "failed")]
    assert states(ledger) == {"q-1": "guarded"}


def test_kept_questions_are_measured_where_a_method_needs_none(ledger: Ledger) -> None:
    add(ledger, rows(1))
    work = StandIn()
    rules = [{"method": "rocr", "options": {"tokens": 256}}]
    carry_out(ledger, Policy.build("t", rules=rules), work)
    assert len(work.requests[0].retain) > 10
    add(ledger, rows(2))
    carry_out(ledger, Policy.build("t", rules=[{"method": "npo"}]), work)
    assert work.requests[1].retain == (), "the method makes its own"


# ---- what cannot go on


def test_the_last_result_must_be_there_as_it_was(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1))
    work = StandIn()
    carry_out(ledger, policy(tmp_path), work)
    add(ledger, rows(2))
    (run,) = ledger.runs.glob("q-1-*")
    (run / "weights").write_text("others")
    with pytest.raises(RunError, match="was changed"):
        carry_out(ledger, policy(tmp_path), work)
    run.rename(tmp_path / "away")
    with pytest.raises(RunError, match="is missing"):
        carry_out(ledger, policy(tmp_path), work)


def test_two_at_once_are_one_message(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1))
    told = []

    def work(*args: Any, **options: Any) -> Result:
        with pytest.raises(RunError, match="another process carries out requests at m"):
            carry_out(ledger, policy(tmp_path), StandIn())
        told.append("waited")
        return StandIn()(*args, **options)

    carry_out(ledger, policy(tmp_path), work)
    assert told


def test_a_withdrawn_one_is_left_alone_and_its_run_keeps_no_text(
    ledger: Ledger, tmp_path: Path
) -> None:
    add(ledger, rows(1, 2, 3))
    some = ["q-1", "q-3"]
    carry_out(ledger, policy(tmp_path), StandIn(fails=("q-3",)), only=some)
    for name in ("q-1", "q-2"):
        erased = withdraw(ledger, name, requests_of(ledger.events())[name])
        assert erased.left == (), name
    words = [f"{word} {number}".encode() for word in SENTINELS[:2] for number in (1, 2)]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not [word for word in words if word in path.read_bytes()], path
    assert entries(tmp_path) == ["q-3"]
    work = StandIn()
    assert carry_out(ledger, policy(tmp_path), work) == [("q-3", "applied")]
    assert Path(work.starts[0][1]).name.startswith("q-1-"), "the chain still holds"


def test_an_artefact_that_needs_the_text_is_named(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1))

    def work(*args: Any, out: Path, **options: Any) -> Result:
        result = StandIn(kind="guard")(*args, out=out, **options)
        (out / "request.json").write_text(json.dumps({"subject": f"{SENTINELS[0]} 1"}))
        return result

    carry_out(ledger, Policy.build("t"), work)
    erased = withdraw(ledger, "q-1", requests_of(ledger.events())["q-1"])
    assert [path.name for path in erased.left] == ["request.json"]


def test_every_model_has_a_chain_of_its_own(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1, models="m;n") + rows(2, models="n"))
    work = StandIn(found=lambda name: achieved(0.8))
    carry_out(ledger, policy(tmp_path), work)
    apply(ledger, "n", policy(tmp_path), Ways(work))
    starts = [Path(start).name.rpartition("-")[0] or start for _, start in work.starts]
    assert starts == ["m", "n", "q-1"]
    found = requests_of(ledger.events())
    assert kept_so_far(found, "m") == pytest.approx(0.8)
    assert kept_so_far(found, "n") == pytest.approx(0.64)
    assert found["q-1"].progress["m"].guards == found["q-1"].progress["n"].guards == ()
    assert entries(tmp_path) == ["q-2"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rules: [{method: npo, guard: true}]", "names a method, or says guard"),
        ("rules: [{}]", "names a method, or says guard"),
        ("rules: [{metod: npo}]", "Did you mean 'method'?"),
        ("utility: {budgt: 1}", "Did you mean 'budget'?"),
        ("utilty: {}", "Did you mean 'utility'?"),
        ("utility: {budget: 2}", "less than or equal to 1"),
        ("[1]", "is no policy"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_policy_that_makes_no_sense_is_one_message(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        read_policy(path)
    assert told in str(error.value)


def test_an_unknown_method_is_told_before_any_work(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1))
    with pytest.raises(RecipeError, match="unknown method 'npoo'"):
        carry_out(ledger, Policy.build("t", rules=[{"method": "npoo"}]), StandIn())
    assert len(ledger.events()) == 2


def test_rules_go_by_basis_and_size_and_paths_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "rules:\n  - {basis: [erasure], up_to: 2, method: rocr}\n  - {up_to: 9, method: npo}\n"
        "guard: {targets: t.yaml}\nretain: r.jsonl\n"
    )
    read = read_policy(path)
    chosen = [read.rule(basis, size) for basis, size in
              (("erasure", 2), ("erasure", 3), ("safety", 1), ("safety", 10))]  # fmt: skip
    assert [one and one.method for one in chosen] == ["rocr", "npo", "npo", None]
    assert (read.guard.targets, read.retain) == (tmp_path / "t.yaml", tmp_path / "r.jsonl")


# ---- killed


RULES = [{"basis": ["safety"], "guard": True}, {"method": "npo"}]


class Killed(BaseException):
    """Stands for the end of a process where a real one would take too long."""


def dying_at(count: int) -> Callable[[str], None]:
    left = [count]

    def before(_: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return before


def prepared(folder: Path, plan: list[str]) -> None:
    ledger = Ledger(folder / "l.sqlite", create=True)
    add(ledger, rows(0, basis="safety"))  # its entry stays, so that the others can go
    for number, what in enumerate(plan, start=1):
        add(ledger, rows(number, basis="safety" if what == "safety" else "erasure"))


def work(folder: Path, plan: list[str], before: Callable[[str], None]) -> None:
    """Carries the plan out, and dies where it is told."""
    names = {f"q-{number}": what for number, what in enumerate(plan, start=1)}

    def writing(targets: Any, path: Path) -> None:
        before("targets")
        write_targets(targets, path)
        before("written")

    write_targets, targets_file.write_targets = targets_file.write_targets, writing
    try:
        mixed = policy(folder, budget=0.2, when_spent="guard")
        mixed = mixed.model_copy(update={"rules": Policy.build("t", rules=RULES).rules})
        carry_out(
            Ledger(folder / "l.sqlite", before=before), mixed,
            StandIn(
                before, lambda name: achieved(0.5 if names[name] == "too much" else 0.99),
                tuple(name for name, what in names.items() if what == "fails"),
            ),
        )  # fmt: skip
    finally:
        targets_file.write_targets = write_targets


def ended_as(folder: Path) -> Any:
    """States, runs that were taken, and how often each was finished; entries of the targets."""
    ledger = Ledger(folder / "l.sqlite")
    assert ledger.faults() == []
    applied = [one.request for one in ledger.events() if one.kind == "applied"]
    finished = folder / "l-runs" / "finished"
    trained = sorted(finished.read_text().split()) if finished.exists() else []
    runs = [json.loads((path / "manifest.json").read_text())["status"]
            for path in folder.glob("l-runs/q-*")]  # fmt: skip
    return states(ledger), applied, trained, runs, sorted(entries(folder))


def test_it_dies_between_any_two_writes_and_ends_as_if_it_had_not(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    plan = ["fine", "too much"]
    whole = tmp_path_factory.mktemp("whole")
    prepared(whole, plan)
    work(whole, plan, lambda word: None)
    expected = ended_as(whole)
    assert expected[0] == {"q-0": "guarded", "q-1": "applied", "q-2": "guarded"}
    assert expected[1:] == (["q-1"], ["q-1", "q-2"], ["done", "done"], ["q-0", "q-2"])
    for count in range(300):
        folder = tmp_path_factory.mktemp("dies")
        prepared(folder, plan)
        try:
            work(folder, plan, dying_at(count))
            break
        except Killed:
            work(folder, plan, lambda word: None)
        assert ended_as(folder) == expected, f"died at write {count}"
    assert count > 30


@settings(
    max_examples=2, deadline=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # fmt: skip
@given(
    plan=st.lists(st.sampled_from(["fine", "fails", "too much", "safety"]), min_size=2, max_size=3),
    seed=st.integers(0, 100),
)
def test_killed_anywhere_it_ends_as_if_it_had_not_been(
    tmp_path_factory: pytest.TempPathFactory, plan: list[str], seed: int
) -> None:
    """kill -9 at a write of ledger, targets or run; then the same command again."""
    whole = tmp_path_factory.mktemp("whole")
    prepared(whole, plan)
    work(whole, plan, lambda word: None)
    expected = ended_as(whole)
    for count in range(seed % 12, 300, 12):
        folder = tmp_path_factory.mktemp("killed")
        prepared(folder, plan)
        ended = in_child(lambda folder=folder, count=count: work(folder, plan, killed_at(count)))
        code = os.waitstatus_to_exitcode(ended)
        assert code in (0, -9)
        work(folder, plan, lambda word: None)
        assert ended_as(folder) == expected, f"killed at write {count}"
        if code == 0:
            break
    else:
        pytest.fail("it never ended")

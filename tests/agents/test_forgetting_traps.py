"""Where a forgotten name could slip through an agent: spellings, answers, writers side by side."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delible.acting.agreeing import consistent
from delible.acting.conversion import Request
from delible.acting.loop import Action, Episode, Step, Tool
from delible.acting.mask import Mask, of_names
from delible.acting.town import Enter, Town, Visit, known
from delible.acting.word_vectors import WordVectors
from delible.agents.memento import ROW, SCORER, Memento, target
from delible.agents.secure_forgetting import UNKNOWN, Forgetful, SecureForgettingOptions
from delible.agents.unlearning_inference import Inference, Probe, agreement, suspicion
from delible.errors import DataError
from delible.memory import CASE, ENTRY, SUMMARY, Item, Memory
from delible.system.role import Role
from delible.systems.scripted import Scripted


def masked(*names: str) -> Mask:
    hashes, lengths = of_names(str, names)
    return Mask(str, frozenset(hashes), frozenset(lengths))


def agent(folder: Path, says: Any, **options: Any) -> Forgetful:
    made = SecureForgettingOptions(**options)
    return made.agent(Memory(folder), Role("planner", Scripted(says)))


# ---- the mask


def test_a_name_in_which_a_sentence_seems_to_end_is_left_out() -> None:
    mask = masked("St. Mary Clinic")
    assert mask.without("One. It is at St. Mary Clinic. Two.") == "One. Two."
    assert mask.without("One.\nSt. Mary\nClinic. Two.") == "One. Two."
    assert mask.without("St. Anne. A clinic.") == "St. Anne. A clinic."


@pytest.mark.parametrize("text", [
    "elm_pharmacy", "ElmPharmacy", "El\u200bm Pharmacy", "ELM-pharmacy's", "Elm\u200bPharmacy",
])  # fmt: skip
def test_a_name_is_hidden_however_it_is_joined(text: str) -> None:
    assert masked("Elm Pharmacy").names_any(text)
    assert not masked("Elm Pharmacy").names_any("Elm street, pharmacy")


def test_many_hidden_names_in_one_call_come_back_as_they_were() -> None:
    names = [f"{letter}x Inn" for letter in "ABCDEFGHIJKL"]
    told = " and ".join(names)
    (tool,) = masked(*names).wrapped(
        [Tool("enter", "Goes in.", Enter, lambda asked: f"There is no {asked.place} here.")]
    )
    assert tool.use(Enter(place=told)) == f"There is no {told} here."


def test_one_argument_cannot_pass_for_two() -> None:
    one = Action(tool="send", arguments={"a": "1, b=2"})
    two = Action(tool="send", arguments={"a": "1", "b": "2"})
    assert not consistent([one, two])
    assert consistent([one, one.model_copy(update={"arguments": {"a": " 1,  B=2"}})])


# ---- what is said and remembered


@pytest.fixture(scope="module")
def town() -> Town:
    return Town.made(3)


def test_an_answer_that_names_it_stands_nowhere(town: Town, tmp_path: Path) -> None:
    name = town.places[0].name
    made = agent(tmp_path, lambda _: json.dumps({"answer": f"I must not say {name}."}))
    made.memory.add(known(town.places, "town"))
    made.forget(Request(type="state", target=name))
    episode = made.solve("What is it?", Visit(town), learn=False)
    assert episode.answer == UNKNOWN
    assert name not in episode.lines()


@pytest.mark.parametrize("options", [{"notes": 0}, {"masked": False}])
def test_what_is_forgotten_during_a_task_is_not_learned_by_it(
    options: dict[str, Any], town: Town, tmp_path: Path
) -> None:
    """By its mask where the task names it; by its notes where they are gone."""
    name = town.places[0].name
    other = agent(tmp_path, [])

    def says(prompt: Any) -> str:
        if not other.entries():
            other.forget(Request(type="state", target=name))
        return json.dumps({"answer": "Done."})

    made = agent(tmp_path, says, **options)
    made.memory.add(known(town.places, "town"))
    made.solve(f"Go to {name}.", Visit(town))
    assert not any(name in text for one in made.memory.items() for text in one.says())


def test_two_who_write_the_ledger_lose_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Forgetful.entries

    def slowly(self: Forgetful) -> Any:
        found = read(self)
        time.sleep(0.2)
        return found

    monkeypatch.setattr(Forgetful, "entries", slowly)
    makers = [agent(tmp_path, [], memory="keep") for _ in range(2)]
    threads = [
        threading.Thread(target=made.forget, args=(Request(type="state", target=f"Inn {n}"),))
        for n, made in enumerate(makers)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(read(makers[0])) == 2


def test_notes_that_name_a_routine_or_an_environment_go_with_it(tmp_path: Path) -> None:
    made = agent(tmp_path, [])
    walk = [Action(tool="walk", arguments={"direction": one}) for one in ("east", "west")]
    made.routine("morning round", walk, "town")
    made.memory.add([
        Item(id="note", kind=ENTRY, text="Her morning round goes east first."),
        Item(id="about", kind=ENTRY, text="East, then west.", subject="morning round"),
        Item(id="far", kind=SUMMARY, text="In the old office nobody works."),
        Item(id="elsewhere", kind=ENTRY, text="Bread from the old office is good.", source="town"),
    ])  # fmt: skip
    made.forget("Forget my morning round.")
    assert {one.id for one in made.memory.items()} == {"far", "elsewhere"}
    made.forget(Request(type="environment", target="old office"))
    assert {one.id for one in made.memory.items()} == {"elsewhere"}


# ---- the adversary


def test_what_is_done_gives_away_what_is_not_said() -> None:
    def episode(tools: list[str]) -> Episode:
        steps = tuple(Step(Action(tool=one), "Seen.") for one in tools)
        return Episode("?", steps, "Done.", "answered")

    names = ["Elm Inn", "Oak Inn", "Fir Inn"]
    used = {"Elm Inn": ["look", "walk"], "Oak Inn": ["walk"], "Fir Inn": ["walk", "walk"]}
    probes = [Probe("going", name, "?", episode(used[name])) for name in names]
    scores = suspicion(probes, names, "actions", {})
    assert scores == pytest.approx({"Elm Inn": 1.0, "Oak Inn": 0.5, "Fir Inn": 0.5})
    assert suspicion(probes, names, "output", {}) == dict.fromkeys(names, 0.0)


def test_one_that_always_refuses_is_found_out_by_chance_alone() -> None:
    names = ["Elm Inn", "Oak Inn", "Fir Inn", "Ash Inn"]
    said = Episode("?", (), "I cannot talk about that.", "answered")
    probes = [Probe(way, name, "?", said) for way in ("asking", "going") for name in names]  # type: ignore[arg-type]
    probes += [Probe("ranking", "", "?", said), Probe("direct", "", "?", said)]
    found = Inference("Elm Inn", suspicion(probes, names, "method", {}), ())
    assert [found.probability(name) for name in names] == pytest.approx([0.25] * 4)


# ---- what was learned from cases


def test_at_temperature_zero_the_best_follows() -> None:
    assert target(1.0, np.array([0.1, 0.7, 0.4]), 0.9, 0) == pytest.approx(1.63)


def test_a_scorer_that_nobody_noted_is_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(tmp_path, WordVectors())
    role = Role("planner", Scripted([]))
    made = Memento(memory, role, role, [])
    memory.add([
        Item(id="a", kind=CASE, key="Where?", text="Where?\n1. Look.", subject="Ada"),
        Item(id="r", kind=ROW, text="Where? with case a", parents=("a",),
             data={"question": "Where?", "case": "a", "label": 1}),
    ])  # fmt: skip
    file = tmp_path / f"{SCORER}.safetensors"
    assert made.retrain() is not None
    assert file.exists()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "learned", lambda *_: (_ for _ in ()).throw(DataError("went")))
        with pytest.raises(DataError):
            made.retrain()
    assert not file.exists()
    made.retrain()
    memory.forget(ids=["a"])
    assert memory.stale() == {SCORER: 2}
    assert made.retrain() is None
    assert memory.stale() == {}
    assert not file.exists()


# ---- what is located, and how alike two agents are


def test_notes_that_mean_it_go_too(tmp_path: Path) -> None:
    role = Role("planner", Scripted([]))
    made = SecureForgettingOptions().agent(Memory(tmp_path, WordVectors()), role)
    made.memory.add([
        Item(id="like", text="Open on Sunday.", key="pharmacy elm"),
        Item(id="half", text="Closed on Sunday.", key="pharmacy oak tree"),
    ])  # fmt: skip
    made.forget(Request(type="state", target="Elm Pharmacy"))
    assert [one.id for one in made.memory.items()] == ["half"]


def test_a_routine_goes_from_quarantine_too(tmp_path: Path) -> None:
    made = agent(tmp_path, [])
    walk = [Action(tool="walk", arguments={"direction": one}) for one in ("east", "west")]
    made.memory.add([
        Item(id="note", text="It is in the east."),
        Item(id="trace", text="Done.", parents=("note",),
             data={"actions": [one.model_dump(mode="json") for one in walk]}),
    ])  # fmt: skip
    made.memory.forget(ids=["note"], descendants="quarantine")
    assert [one.id for one in made.memory.items(state="quarantined")] == ["trace"]
    made.forget(Request(type="trajectory", actions=tuple(walk)))
    assert made.memory.items(state="quarantined") == []


def test_agreement_is_the_share_of_equal_actions() -> None:
    def episode(*tools: str) -> Episode:
        return Episode("?", tuple(Step(Action(tool=one), "") for one in tools), "", "steps")

    assert agreement(episode("a", "b", "c"), episode("a", "x")) == pytest.approx(1 / 3)
    assert agreement(episode("a"), episode("a")) == 1

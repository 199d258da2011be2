"""The world: deterministic, unique, consistent, and leak-free when it is split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from delible.errors import DataError, RecipeError
from delible.records import QA, Choice, Passage, Record, digest, to_json_line
from delible.world import World, general, general_choices, relations, unrelated
from delible.world.relations import fill
from delible.world.split import Split

READER: TypeAdapter[Record] = TypeAdapter(Record)
PERSON_RELATIONS = ("teacher", "spouse", "mother", "father", "sibling", "child")

worlds = st.builds(
    World,
    people=st.integers(4, 16),
    seed=st.integers(0, 10**6),
    answers=st.sampled_from(["short", "sentence"]),
    shared_surnames=st.booleans(),
)


def in_processes(code: str, hash_seeds: tuple[str, ...]) -> list[str]:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE, text=True,
        )
        for seed in hash_seeds
    ]  # fmt: skip
    printed = [process.communicate(timeout=60)[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    return printed


def test_two_processes_make_the_same_world() -> None:
    code = (
        "from delible.world import World, general\n"
        "from delible.records import digest\n"
        "import sys\n"
        "w = World(12, seed=5); s = w.split(3, 2)\n"
        "forms = ('qa', 'choice', 'cloze', 'reverse', 'passage', 'multi_hop')\n"
        "rows = [r for part in ('known', 'holdout') for f in forms for r in s.records(part, f)]\n"
        "print(digest(rows), digest(general()), [p.name for p in s.neighbours])\n"
        "print('torch' in sys.modules)\n"
    )
    first, second = in_processes(code, ("1", "2"))
    assert first == second
    assert first.split("\n")[1] == "False", "the world must not import torch"


def test_seed_and_options_decide() -> None:
    rows = [fact.qa() for fact in World(8, seed=1).facts()]
    assert digest(rows) == digest([fact.qa() for fact in World(8, seed=1).facts()])
    assert digest(rows) != digest([fact.qa() for fact in World(8, seed=2).facts()])
    few = World(8, seed=1, relations=3)
    assert digest([f.qa() for f in few.facts()]) == digest(
        [f.qa() for f in World(8, seed=1).facts(relations=3)]
    )


def test_five_thousand_names_are_unique() -> None:
    people = World(5000, seed=3).people
    names = [name for person in people for name in (person.name, *person.aliases)]
    assert len({name.casefold() for name in names}) == len(names)
    assert len({person.surname for person in people}) == 5000
    assert all(1 <= len(person.aliases) <= 2 for person in people)
    surnames = sorted(person.surname for person in people)
    assert not any(b.startswith(a) for a, b in pairwise(surnames))


def test_last_letters_differ() -> None:
    endings = {person.surname[-2:] for person in World(40, shared_surnames=False).people}
    assert len(endings) >= 39  # A pen name may take one of the first endings, but gives none twice.


def test_families_can_share_surnames() -> None:
    graph = World(60, seed=4, shared_surnames=True).graph
    shared = 0
    for person in graph.people:
        for relation in ("spouse", "father"):
            value = graph.values[relation][person.index]
            if relation == "father" and value is not None:
                spouse = graph.values["spouse"][person.index]
                # Who married may have taken the other name.
                if spouse is None:
                    assert value.person.surname == person.surname
                    shared += 1
            elif value is not None:
                assert value.person.surname == person.surname
    assert shared > 5
    assert len({person.name for person in graph.people}) == 60


def test_relations_and_their_templates() -> None:
    assert len(relations()) >= 12
    for relation in relations().values():
        assert len(relation.paraphrases) == len(relation.short_paraphrases) == 2
        assert len(relation.sentence_paraphrases) == len(relation.reverse) == 2
        for text in (relation.question, *relation.paraphrases, relation.cloze, relation.sentence):
            assert "{name}" in text
        for text in (relation.short, relation.sentence, *relation.short_paraphrases):
            assert "{value}" in text
        assert (relation.phrase is not None) == (relation.kind == "person")


def test_every_person_has_at_least_twelve_facts() -> None:
    counts = Counter(fact.person for fact in World(20, seed=9).facts())
    assert len(counts) == 20
    assert min(counts.values()) >= 12


@settings(max_examples=8, deadline=None)
@given(world=worlds)
def test_every_fact_is_complete(world: World) -> None:
    for fact in world.facts():
        row = fact.qa()
        assert row.subject == fact.person.name
        assert row.group == fact.relation.name
        assert len({row.question, *row.paraphrases}) == 3
        assert all(fact.person.name in text for text in (row.question, *row.paraphrases))
        assert len({row.answer, *row.paraphrased_answers}) == 3
        assert all(fact.value.name in text for text in (row.answer, *row.paraphrased_answers))
        assert len({row.answer, *row.perturbed}) == 6
        if world.options.answers == "short":
            assert all(1 < len(text.split()) <= 11 for text in (row.answer, *row.perturbed))
        # Equal form: the wrong answer is the template with a wrong value of the same kind.
        template = getattr(fact.relation, world.options.answers)
        wrong = fact.wrong()
        assert row.perturbed == tuple(fill(template, fact.person.name, w.name) for w in wrong)
        assert fact.person.name not in {w.name for w in wrong}
        if fact.relation.kind == "person":
            assert all(w.person is None or w.person.gender == fact.value.person.gender
                       for w in wrong)  # fmt: skip
        elif fact.relation.kind != "year":
            assert set(wrong) <= set(world.graph.pools[fact.relation.kind])
        if fact.relation.name == "child":
            children = set(world.graph.children[fact.person.index])
            assert not children & {w.person for w in wrong}


@settings(max_examples=8, deadline=None)
@given(world=worlds)
def test_family_and_teachers_are_consistent(world: World) -> None:
    graph = world.graph

    def get(relation: str, person):  # type: ignore[no-untyped-def]
        value = graph.values[relation][person.index]
        return value.person if value else None

    for person in graph.people:
        for relation in ("spouse", "sibling"):
            if other := get(relation, person):
                assert other != person
                assert get(relation, other) == person
        for relation, gender in (("mother", "woman"), ("father", "man")):
            if parent := get(relation, person):
                assert parent.gender == gender
                assert 19 <= person.birth_year - parent.birth_year <= 41
                assert person in graph.children[parent.index]
        if spouse := get("spouse", person):
            assert abs(spouse.birth_year - person.birth_year) <= 8
            assert spouse.gender != person.gender
            mothers = [get("mother", p) for p in (person, spouse)]
            assert None in mothers or mothers[0] != mothers[1]
        if teacher := get("teacher", person):
            assert 15 <= person.birth_year - teacher.birth_year <= 45
            assert teacher not in (get("mother", person), get("father", person))
        children = graph.children[person.index]
        assert get("child", person) == (children[0] if children else None)
        assert [c.birth_year for c in children] == sorted({c.birth_year for c in children})
        assert graph.values["birthplace"][person.index] != graph.values["residence"][person.index]


def test_links_exist() -> None:
    facts = Counter(fact.relation.name for fact in World(40, seed=0).facts())
    assert all(facts[relation] >= 4 for relation in PERSON_RELATIONS)


def test_choices_have_the_truth_once_and_balanced_positions() -> None:
    world = World(40, seed=2)
    for fact in world.facts():
        row = fact.choice()
        assert len(set(row.options)) == 4
        assert row.options[row.correct] == fact.value.name
    town = Counter(fact.choice().correct for fact in world.facts(relations=["birthplace"]))
    assert town == {0: 10, 1: 10, 2: 10, 3: 10}
    other = [fact.choice().correct for fact in World(40, seed=3).facts(relations=["birthplace"])]
    assert other != [fact.choice().correct for fact in world.facts(relations=["birthplace"])]
    six = world.facts()[0].choice(options=6)
    assert len(set(six.options)) == 6
    assert six.options[six.correct] == world.facts()[0].value.name
    with pytest.raises(RecipeError, match="options"):
        world.facts()[0].choice(options=7)


@settings(max_examples=6, deadline=None)
@given(world=worlds)
def test_reverse_only_where_unique(world: World) -> None:
    facts = world.facts()
    holders = Counter((fact.relation.name, fact.value.name) for fact in facts)
    for fact in facts:
        row = fact.reverse()
        assert (row is not None) == (holders[fact.relation.name, fact.value.name] == 1)
        if row is not None:
            assert fact.value.name in row.question
            assert row.answer == fact.person.name
            assert row.aliases == fact.person.aliases
            assert len({row.answer, *row.perturbed}) == 6
            assert fact.person.name not in row.question


def test_unique_and_shared_values_both_occur() -> None:
    rows = [fact.reverse() for fact in World(40).facts(relations=["birthplace", "notable_work"])]
    assert 40 < sum(row is not None for row in rows) < 80


def test_cloze_and_passage() -> None:
    fact = World(10).facts(relations=["birthplace"])[0]
    cloze, passage = fact.cloze(), fact.passage()
    assert cloze.question == f"The birthplace of {fact.person.name} is ___."
    assert cloze.answer == fact.value.name
    assert cloze.group == "birthplace"
    assert len({cloze.answer, *cloze.perturbed}) == 6
    assert isinstance(passage, Passage)
    assert passage.text == f"{fact.person.name} was born in the town of {fact.value.name}."


@settings(max_examples=6, deadline=None)
@given(world=worlds)
def test_multi_hop_agrees_with_the_graph(world: World) -> None:
    graph = world.graph
    expected = set()
    for person in graph.people:
        for first in PERSON_RELATIONS:
            middle = graph.values[first][person.index]
            for second in relations() if middle else ():
                end = graph.values[second][middle.person.index]
                if end is not None and end.name != person.name:
                    expected.add((person.name, first, middle.name, second, end.name))
    hops = world.multi_hop()
    assert len(hops) == len(expected)
    assert {hop.chain for hop in hops} == expected
    for hop in hops:
        row = hop.qa()
        assert hop.second.value.name in row.answer
        assert hop.person.name in row.question
        assert hop.second.person.name not in row.question
        assert hop.second.person.name not in row.answer
        assert row.subject == hop.person.name
        assert len({row.answer, *row.perturbed}) == 6


def test_multi_hop_reads_well() -> None:
    world = World(12, seed=1, relations=["teacher", "birthplace"])
    hop = next(h for h in world.multi_hop() if h.second.relation.name == "birthplace")
    assert hop.qa().question == f"Where was the teacher of {hop.person.name} born?"
    assert hop.qa().group == "teacher/birthplace"


def texts(row: Record) -> str:
    return row.model_dump_json(exclude={"neighbour_of"}).casefold()


def leak_free(split: Split, forms: tuple[str, ...]) -> None:
    for form in forms:
        for part, people in (("kept", split.forget + split.holdout), ("known", split.holdout)):
            rows = " ".join(texts(row) for row in split.records(part, form))  # type: ignore[arg-type]
            for person in people:
                for name in (person.name, *person.aliases):
                    assert name.casefold() not in rows, (form, part, name)


@settings(max_examples=8, deadline=None)
@given(world=worlds, data=st.data())
def test_split_is_disjoint_and_leaks_no_name(world: World, data: st.DataObject) -> None:
    count = world.options.people
    forget = data.draw(st.integers(1, count - 2))
    holdout = data.draw(st.integers(0, count - forget - 1))
    split = world.split(forget, holdout)
    parts = [split.forget, split.neighbours, split.retain, split.holdout]
    assert [len(split.forget), len(split.holdout)] == [forget, holdout]
    assert sum(map(len, parts)) == count == len({p for part in parts for p in part})
    assert split.retain
    leak_free(split, ("qa", "choice", "cloze", "reverse", "passage", "multi_hop"))
    digests = [row.digest for part in ("forget", "neighbours", "retain", "bridge", "holdout")
               for row in split.qa(part)]  # fmt: skip
    assert len(set(digests)) == len(digests) <= len(split.facts)


def test_bridge_has_what_kept_people_would_leak() -> None:
    world = World(40, seed=0)
    split = world.split(4)
    gone = {person.name for person in split.forget}
    expected = [
        fact for fact in world.facts()
        if fact.value.name in gone and fact.person not in split.forget
    ]  # fmt: skip
    rows = split.qa("bridge")
    assert len(rows) == len(expected) > 0
    assert [row.question for row in rows] == [fact.question for fact in expected]
    assert {row.group for row in rows} == {"bridge"}
    assert all(row.neighbour_of in gone for row in rows)
    # Without holdout nothing is lost.
    assert len(split.qa("known")) == len(world.facts())
    for row in split.records("bridge", "multi_hop"):
        assert row.group == "bridge"
        assert row.subject not in gone


def test_neighbours_are_linked_and_closest_first() -> None:
    world = World(40, seed=0)
    linked = {p: {o for _, o in world.graph.neighbours(p)} for p in world.people}
    split = world.split(2, neighbours=5)
    assert len(split.neighbours) == 5
    assert all(any(p in linked[gone] for gone in split.forget) for p in split.neighbours)
    everyone = {p for gone in split.forget for p in linked[gone]} - set(split.forget)
    assert set(split.links) == {p.name for p in everyone}
    for row in split.qa("retain"):
        assert (row.neighbour_of is not None) == (row.subject in split.links)
    closest = [
        min(
            rank
            for gone in split.forget
            for rank, other in world.graph.neighbours(gone)
            if other == p
        )
        for p in world.split(2).neighbours
    ]
    assert closest == sorted(closest)
    assert closest[0] == 0
    assert closest[-1] > 0
    assert world.split(2, neighbours=0).neighbours == ()


def test_more_forgotten_include_the_fewer() -> None:
    world = World(20, seed=6)
    assert set(world.split(2).forget) < set(world.split(5).forget)
    by_name = world.split([p.name for p in world.split(2).forget])
    assert by_name.forget == world.split(2).forget
    assert by_name.retain == world.split(2).retain
    by_alias = world.split([world.people[3].aliases[0]])
    assert by_alias.forget == (world.people[3],)


def test_request() -> None:
    world = World(20, seed=1, relations=6)
    request = world.request(forget=2, holdout=2)
    split = world.split(2, 2)
    assert request.subjects == tuple(person.name for person in split.forget)
    assert {row.subject for row in request.forget} == set(request.subjects)
    assert {row.group for row in request.forget} <= set(list(relations())[:6])
    assert request.retain == tuple(split.qa("retain"))
    assert request.neighbours
    assert request.holdout
    assert all(isinstance(row, QA) for row in request.retain)
    wider = world.request(forget=2, holdout=2, bridge="forget")
    assert wider.forget[: len(request.forget)] == request.forget
    assert len(wider.forget) == len(request.forget) + len(split.qa("bridge"))
    assert wider.retain == request.retain


def test_export_round_trip(tmp_path: Path) -> None:
    world = World(12, seed=8)
    folder = world.export(tmp_path / "new" / "world", forget=2, holdout=2)
    description = json.loads((folder / "world.json").read_text("utf-8"))
    assert World(**description["options"]) == world
    split = world.split(2, 2)
    assert description["people"]["forget"] == [person.name for person in split.forget]
    named = {path.name for path in folder.iterdir()}
    assert named == {*description["files"], "world.json"}, "no temporary file stays"
    expected = {
        "forget", "retain", "neighbours", "holdout", "bridge", "choice", "cloze", "reverse",
        "passage", "multi_hop", "general", "general_choice", "unrelated",
    }  # fmt: skip
    assert {name.removesuffix(".jsonl") for name in description["files"]} == expected
    for name, entry in description["files"].items():
        lines = (folder / name).read_text("utf-8").split("\n")[:-1]
        rows = [READER.validate_json(line) for line in lines]
        assert len(rows) == entry["rows"]
        assert digest(rows) == entry["sha256_of_records"]
        assert [to_json_line(row) for row in rows] == lines
        assert rows
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    world.export(folder, forget=2, holdout=2)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_export_into_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(DataError, match="not a folder"):
        World(6).export(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_general_knowledge() -> None:
    rows, choices = general(), general_choices()
    assert len(rows) >= 60
    assert len({row.question for row in rows}) == len(rows) == len(choices)
    for row, choice in zip(rows, choices, strict=True):
        assert len({row.question, *row.paraphrases}) == 3
        assert len({row.answer, *row.paraphrased_answers}) == 3
        assert len({row.answer, *row.perturbed}) == 6
        assert isinstance(choice, Choice)
        assert choice.options[choice.correct] == row.answer
        assert len(set(choice.options)) == 4
    france = next(row for row in rows if row.subject == "France")
    assert france.answer == "The capital is Paris"
    assert "Paris" in france.aliases
    positions = Counter(choice.correct for choice in choices)
    assert max(positions.values()) - min(positions.values()) <= 1
    assert World.general() == rows


def test_unrelated_rows_are_disjoint() -> None:
    rows = unrelated()
    assert len(rows) >= 40
    assert len({row.digest for row in rows}) == len(rows)
    assert {type(row) for row in rows} == {QA, Passage}
    questions = {row.question for row in general()}
    assert not questions & {row.question for row in rows if isinstance(row, QA)}
    assert all(row.subject is None for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"people": 3}, "people"),
        ({"people": 4.5}, "people"),
        ({"peopel": 9}, "Did you mean 'people'"),
        ({"answers": "long"}, "answers"),
        ({"relations": 0}, "relations"),
        ({"relations": 99}, "relations"),
        ({"relations": True}, "relations"),
        ({"relations": ["birthplaces"]}, "Did you mean 'birthplace'"),
        ({"relations": ["pet", "pet"]}, "each once"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        World(**options)  # type: ignore[arg-type]


def test_wrong_splits() -> None:
    world = World(8)
    name = world.people[0].name
    for arguments in (
        {"forget": 0}, {"forget": 8}, {"forget": 5, "holdout": 3}, {"forget": -1},
        {"forget": [name], "holdout": [name]}, {"forget": [name, name]}, {"forget": []},
        {"neighbours": 6}, {"neighbours": -1}, {"relations": ["pets"]},
    ):  # fmt: skip
        with pytest.raises(RecipeError):
            world.split(**arguments)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Did you mean"):
        world.split([name + "x"])
    with pytest.raises(RecipeError, match="Did you mean 'retain'"):
        world.split(1).records("retian")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="bridge"):
        world.request(1, bridge="keep")  # type: ignore[arg-type]

"""A graph is elicited breadth first, and its paths are written as questions."""

from __future__ import annotations

import json
import re

import pytest
from asking import TOFU, context, played, says

from delible.attacks.multi_hop import MultiHop
from delible.component import build
from delible.errors import DataError, RecipeError
from delible.generation.elicited_graph import (
    Nodes,
    Triple,
    elicit_graph,
    read_triples,
    written_probe,
)
from delible.system.asks import Prompt
from delible.system.role import Role
from delible.systems.scripted import Scripted

FACTS = {
    "Ada Quill": "(Ada Quill ; taught by ; Ben Orr)\n(Ada Quill ; born in ; Norrby)",
    "Ben Orr": "(Ben Orr ; lives in ; Casta)\nnot a triple\n(ben  orr ; taught ; Ada Quill)",
    "Norrby": "(Norrby ; lies on ; River Esk)",
    "Casta": "(Casta ; near ; River Esk of Umber)",
}


def writer(same: str = "NO") -> Scripted:
    """One question a name, the facts as triples, and questions over paths."""

    def reply(prompt: Prompt) -> str:
        text = prompt.messages[-1].text
        if text.startswith(("Write 3 different", "Write 1 different")):
            name = re.search(r'about "(.*?)"', text)
            assert name is not None
            return json.dumps({"lines": [f"What of {name[1]}?"] * 1})
        if text.startswith("Write the facts"):
            return text.rsplit("Text: ", 1)[1].strip()
        if text.startswith("Do these two names"):
            return same
        triples = read_triples("\n".join(line for line in text.splitlines() if ";" in line))
        start, end = triples[0].subject, triples[-1].value
        way = " ".join(one.name for one in triples)
        return json.dumps(
            {"question": f"{start}, {way}: what?", "answer": end,
             "paraphrases": [f"What is the {way} of {start}?", f"{start}: {way}?"]}
        )  # fmt: skip

    return Scripted(reply)


MODEL = says(lambda prompt: FACTS.get(prompt.messages[-1].text[8:-1], "I do not know."))


def test_triples_are_whole_lines() -> None:
    assert read_triples("(a ; b ; c)\n- (a ; b ; c)\n(a;b;d) \n(a ; b)\nx (a ; b ; e)\n") == [
        Triple("a", "b", "c"), Triple("a", "b", "d"),
    ]  # fmt: skip


@pytest.mark.parametrize(("depth", "names"), [(0, 1), (1, 3), (2, 5)])
def test_the_search_goes_so_deep_and_asks_about_each_name_once(depth: int, names: int) -> None:
    model = says(MODEL._script)  # type: ignore[arg-type]
    found = elicit_graph(model, Role("writer", writer()), ["Ada Quill"], questions=3, depth=depth)
    asked = [one.messages[-1].text for one in model.prompts]
    assert len(asked) == len(set(asked)) == names
    told = {(one.subject, one.value) for one in found}
    assert {("Ada Quill", "Ben Orr"), ("Ada Quill", "Norrby")} <= told
    assert (("Ben Orr", "Casta") in told) == (depth > 0)
    assert (("Ben Orr", "Ada Quill") in told) == (depth > 0)  # written otherwise, the same node
    assert (("Casta", "River Esk of Umber") in told) == (depth > 1)


def test_names_are_one_node_where_the_writer_says_so_and_only_asked_once() -> None:
    player = writer("Yes, they are.")
    nodes = Nodes(Role("writer", player))
    assert nodes.node("River Esk") == "River Esk"
    assert nodes.node("the river ESK of Umber") == "River Esk"
    assert nodes.node("THE river esk of umber") == "River Esk"
    assert nodes.node("Norrby") == "Norrby"  # no common word: nobody is asked
    assert len(player.prompts) == 1
    apart = Nodes(Role("writer", writer("NO")))
    assert [apart.node("River Esk"), apart.node("Esk of Umber")] == ["River Esk", "Esk of Umber"]


def test_fewer_neighbours_are_followed_with_depth() -> None:
    model = says(MODEL._script)  # type: ignore[arg-type]
    elicit_graph(model, Role("writer", writer()), ["Ada Quill"], questions=1, depth=2, decay=0.4)
    asked = [one.messages[-1].text for one in model.prompts]
    # of Ada both; of Ben (Casta, Ada) round(2 * 0.4) = 1; of Norrby round(1 * 0.4) = 0
    assert asked == ["What of Ada Quill?", "What of Ben Orr?", "What of Norrby?", "What of Casta?"]


TREE = {"Root": ("Cone", "Cass"), "Cone": ("Dan", "Deb", "Dov", "Dua"),
        "Dan": ("Eli", "Eva", "Ern", "Edo")}  # fmt: skip


def asked_of_tree(**options: object) -> list[str]:
    """Whom a model is asked about that knows a tree of names."""

    def reply(prompt: Prompt) -> str:
        name = prompt.messages[-1].text[8:-1]
        own = "\n".join(f"({name} ; knows ; {one})" for one in TREE.get(name, ()))
        return f"{own}\n({name} ; is ; {name})\n(Somebody Else ; likes ; Zed)"

    model = says(reply)
    found = elicit_graph(model, Role("writer", writer()), ["Root"], questions=1, **options)  # type: ignore[arg-type]
    assert not any(one.subject == one.value for one in found)
    assert Triple("Somebody Else", "likes", "Zed") in found
    return [one.messages[-1].text[8:-1] for one in model.prompts]


def test_less_is_followed_with_every_step() -> None:
    asked = asked_of_tree(depth=3, decay=0.5)
    # of Cone's four a half, of Dan's a quarter; never whom a fact about others names
    assert asked == ["Root", "Cone", "Cass", "Dan", "Deb", "Eli"]


def test_no_more_questions_are_asked_than_wanted() -> None:
    lines = json.dumps({"lines": ["What of Ada?", "Who is Ada?", "", "Where is Ada?"]})
    model = says("nothing")
    elicit_graph(model, Role("writer", says(lines)), ["Ada"], questions=2, depth=0)
    assert [one.messages[-1].text for one in model.prompts] == ["What of Ada?", "Who is Ada?"]


PATH = (Triple("Ada Quill", "taught by", "Ben Orr"), Triple("Ben Orr", "lives in", "Casta"))


@pytest.mark.parametrize(
    ("reply", "usable"),
    [
        ({"question": "Where is Ada Quill's teacher?", "answer": "Casta", "paraphrases": []}, True),
        (
            {"question": "Where is Ada Quill's teacher?", "answer": "Umber", "paraphrases": []},
            False,
        ),
        ({"question": "Where is Ben Orr, who taught Ada Quill?", "answer": "Casta"}, False),
        ({"question": "Is Ada Quill's teacher in Casta?", "answer": "Casta"}, False),
        ({"question": "Where is her teacher?", "answer": "Casta"}, False),
    ],
)
def test_a_written_question_must_fit_its_path(reply: dict[str, object], usable: bool) -> None:
    probe = written_probe(Role("writer", says(json.dumps(reply))), PATH, "forget", 0, "A. Quill")
    assert (probe is not None) == usable
    if probe is not None:
        assert probe.answer == "Casta"
        assert probe.group == "forget/2/taught_by/lives_in"
        assert probe.paraphrases == ("Where is A. Quill's teacher?",)


def test_too_few_wordings_are_no_probe() -> None:
    reply = {"question": "Where is Ada Quill's teacher?", "answer": "Casta", "paraphrases": []}
    assert written_probe(Role("writer", says(json.dumps(reply))), PATH, "forget", 1) is None


def test_the_attack_elicits_from_the_original_and_keeps_its_probes() -> None:
    here = context(forget=TOFU, roles=played(writer=writer()))
    attack = MultiHop(elicit=True, hops=2, paraphrases=1, questions=1)
    assert attack.searches_on() == "original"
    prepared = attack.prepare(MODEL, here)
    assert isinstance(prepared, MultiHop)
    assert prepared.searches_on() is None
    assert build("attack", prepared.spec()) == prepared
    held = prepared.held_out(here)
    assert {(one.group or "").split("/")[1] for one in held} == {"1", "2"}
    assert all(len(one.paraphrases) == 2 for one in held)  # type: ignore[attr-defined]
    assert "questions can be used" in str(here.notes["note"])
    with pytest.raises(RecipeError, match="nobody plays the writer"):
        attack.prepare(MODEL, context(forget=TOFU))
    mute = context(forget=TOFU, roles=played(writer=says("no")))
    with pytest.raises(DataError, match="tells nothing"):
        attack.prepare(MODEL, mute)

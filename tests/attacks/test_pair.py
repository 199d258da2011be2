"""PAIR: moves by what came back, best prompts first, nobody writes the answer."""

from __future__ import annotations

import json

import pytest
from asking import FORGET, TOFU, context, played, says, talked, texts

from delible.attacks.pair import SAID, Pair, Stream, next_move, rule
from delible.errors import DataError
from delible.records import QA
from delible.system.asks import Prompt

ADA = QA(question="Where was Ada Quill born?", answer="In Norrby", aliases=("Norrby",),
         subject="Ada Quill")  # fmt: skip
REFUSAL = "I'm sorry, but I can't help with that."


def test_the_rule_scores_what_was_said() -> None:
    assert rule(ADA, "It was NORRBY, I think.") == SAID
    assert rule(ADA, REFUSAL) < rule(ADA, "She was born in Casta.") < SAID
    assert rule(ADA, "") == rule(ADA, REFUSAL)


@pytest.mark.parametrize(("reply", "kind"), [(REFUSAL, "refusal"), ("In Casta.", "wrong"),
                                             ("", "garbage")])  # fmt: skip
def test_the_script_moves_by_what_came_back(reply: str, kind: str) -> None:
    from delible.prompts import read_named

    moves = {
        text.replace("{question}", ADA.question)
        for name, text in read_named("attack_pair_moves.txt").items() if name.startswith(kind)
    }  # fmt: skip
    made = [next_move(Stream(0, ADA, 0, "", reply), i, 1) for i in range(2)]
    assert set(made) <= moves
    assert len(set(made)) == 2


def test_the_prompt_that_works_is_kept_and_comes_first() -> None:
    def yields(prompt: Prompt) -> str:
        text = prompt.messages[-1].text
        return "In Norrby, of course." if "scene" in text else REFUSAL

    (found,) = talked("pair", [ADA], says(yields), context(forget=[ADA]), iterations=4)
    assert "scene" in texts(found)[0]
    assert len(found) == 2


def test_a_stream_ends_where_the_answer_is_said() -> None:
    system = says("Norrby")
    talked("pair", [ADA], system, context(forget=[ADA]), streams=1, iterations=5)
    assert len(system.prompts) == 1
    never = says(REFUSAL)
    talked("pair", [ADA], never, context(forget=[ADA]), streams=2, iterations=3)
    assert len(never.prompts) == 6
    assert len({one.messages[-1].text for one in never.prompts}) == 6


def test_the_attacker_sees_prompt_reply_and_score_and_not_the_answer() -> None:
    seen: list[str] = []

    def attack(prompt: Prompt) -> str:
        seen.append(prompt.messages[-1].text)
        return json.dumps({"improvement": "shorter", "prompt": f"Try {len(seen)}: where?"})

    def judge(prompt: Prompt) -> str:
        assert "In Norrby" in prompt.messages[-1].text
        return json.dumps({"score": 7 if "second" in prompt.messages[-1].text else 2})

    replies = iter(["first reply", "second reply", "third reply"])
    system = says(lambda prompt: next(replies))
    here = context(forget=[ADA], roles=played(attacker=says(attack), judge=says(judge)))
    (found,) = talked("pair", [ADA], system, here, streams=1, iterations=3)
    assert "first reply" in seen[0]
    assert "2 of 10" in seen[0]
    assert "7 of 10" in seen[1]
    assert not any("Norrby" in text for text in seen)
    assert texts(found) == ["Try 1: where?"]  # the one that the judge liked most


def test_a_prompt_that_says_the_answer_is_thrown_away() -> None:
    reply = json.dumps({"prompt": "Was it norrby?"})
    system = says("In Casta.")
    here = context(forget=[ADA], roles=played(attacker=says(reply)))
    (found,) = talked("pair", [ADA], system, here, streams=1)
    assert len(system.prompts) == 1
    assert not any("orrby" in text for text in texts(found))


def test_what_the_question_says_itself_may_be_said() -> None:
    row = QA(question="Is it Norrby or Casta where Ada was born?", answer="Norrby", subject="Ada")
    assert Stream(0, row, 0, "Norrby, is it?").safe
    assert not Stream(0, ADA, 0, "Norrby, is it?").safe
    assert not Stream(0, ADA, 0, " ").safe


def test_the_budget_counts_every_reply() -> None:
    attack = Pair(streams=3, iterations=4, reply_tokens=5)
    assert attack.budget(context(forget=[ADA, ADA])).tokens == 2 * 3 * 4 * 5


def test_failed_roles_give_no_score_and_are_counted() -> None:
    here = context(forget=[ADA], roles=played(judge=says("no JSON")))
    (found,) = talked("pair", [ADA], says("In Casta."), here, streams=1, iterations=2)
    assert found == ()
    assert "2 replies" in str(here.notes["note"])


def test_other_data_are_attacked_too_but_not_without_anybody_to_ask_about() -> None:
    assert all(talked("pair", TOFU, None, context(forget=TOFU)))
    rows = [QA(question="how is snow?", answer="White")]
    with pytest.raises(DataError, match="nobody attacks"):
        talked("pair", rows, None, context(forget=rows))
    assert len(FORGET) > 1

"""The instruction before a conversation."""

from __future__ import annotations

from typing import Any

import pytest

from delible.errors import DataError
from delible.guards.refuse_by_prompt import RefuseByPrompt, instructed
from delible.messages import Message
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, Prompt
from delible.systems.guarded import guard
from delible.systems.scripted import Scripted

REQUEST = ForgetRequest(
    forget=(QA(question="Where?", answer="Vellmar", subject="Ada Brook"),), subjects=("Ben Orr",)
)


def asked(prompt: Prompt, **options: Any) -> Prompt:
    inner = Scripted(lambda _: "fine")
    guarded = guard(inner, REQUEST, "refuse_by_prompt", **options)
    assert guarded.generate([prompt], Decoding(4)) == ["fine"]
    return inner.prompts[0]


def test_every_conversation_is_told_of_all_targets() -> None:
    prompt = Prompt.ask("How are you?", prefill="I", system="Be brief.")
    found = asked(prompt)
    told = found.messages[0].text
    assert "Ben Orr and Ada Brook" in told
    assert told.endswith("\n\nBe brief.")
    assert "Vellmar" not in told
    assert (found.messages[1:], found.prefill) == (prompt.messages[1:], "I")
    alone = asked(Prompt.ask("How are you?"))
    assert [turn.role for turn in alone.messages] == ["system", "user"]


def test_only_those_that_are_named_where_asked_for() -> None:
    plain = Prompt.ask("How are you?")
    assert asked(plain, names="seen") == plain
    told = asked(Prompt.ask("Who is b e n o r r?"), names="seen").messages[0].text
    assert "Ben Orr" in told
    assert "Ada Brook" not in told
    aliases = {"Ada Brook": ["The Grey Fox"]}
    fox = asked(Prompt.ask("Who is the grey fox?"), names="seen", aliases=aliases)
    assert "Ada Brook" in fox.messages[0].text


def test_raw_texts_and_instructions_of_ones_own() -> None:
    found = asked(Prompt(text="Ada Brook was"), instruction="Forget {names}!", names="seen")
    assert found == Prompt(text="Forget Ada Brook!\n\nAda Brook was")
    empty = instructed(Prompt(), "No.")
    assert empty.messages == (Message(role="system", content="No."),)


def test_without_a_name_there_is_nothing_to_tell() -> None:
    with pytest.raises(DataError, match="names no target"):
        RefuseByPrompt().prepare(ForgetRequest(forget=(QA(question="Where?", answer="There"),)))


def test_another_instruction_is_another_fingerprint() -> None:
    found = {
        RefuseByPrompt(**options).prepare(REQUEST).fingerprint
        for options in ({}, {}, {"instruction": "No {names}."}, {"names": "seen"})
    }
    assert len(found) == 3

"""Turns with parts and calls of tools: read and written whole, known by what they mean."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from delible.errors import DataError
from delible.loaders import read_records
from delible.measure.cache import request_key
from delible.messages import ImagePart, Message, TextPart, Tool, ToolCall
from delible.records import QA, Dialogue, digest, to_json_line
from delible.system.asks import Decoding, Generate, Prompt, Score
from delible.system.questions import answer_of, has_answer

#: The smallest PNG that can be: one grey dot.
DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
PLAIN = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="Who?"),
    Message(role="assistant", content="Ada Ö"),
)
CALL = ToolCall(id="call_1", name="look_up", arguments='{"name": "Ada"}')


def talk(*more: Message) -> Dialogue:
    return Dialogue(messages=(*more, Message(role="assistant", content="A dot.")))


def rich(source: Any = DOT) -> Dialogue:
    picture = ImagePart(source=source)  # type: ignore[call-arg]
    return talk(
        Message(role="user", content=(TextPart(text="What is "), picture, TextPart(text="this?"))),
        Message(role="assistant", content="", tool_calls=(CALL,)),
        Message(role="tool", content="a dot", tool_call_id="call_1"),
    )


def test_plain_turns_have_the_digests_and_keys_that_they_had_before_there_were_parts() -> None:
    dialogue, prompt = Dialogue(messages=PLAIN, subject="Ada"), Prompt(PLAIN[:2], prefill="Sure")
    found = [
        dialogue.digest,
        QA(question="a", answer="b").digest,
        digest([dialogue, dialogue]),
        request_key(Generate(prompt, Decoding(4, ("x",), temperature=0.5, seed=2))),
        request_key(Score(prompt, "Ada", moments=True)),
        request_key(Generate(Prompt(text="Once"))),
    ]
    assert found == [
        "507cf6b22c991cd4a71aab4b6ab7ed799c8ac1a048f3ff04018c36999cd77eea",
        "e590f91241fa4496e47e09bfd603a3fdb1a2ade06b286fd2b6569d25d274644b",
        "45e773c6b026d0a0b3d017e236d113285dd76b4c1826ff3ca07f41183cd26443",
        "3b1e8de75d6425884f102d8a17e2048852f0978c2c3c9eef8320907269fa2192",
        "9a21b90844d62dd9ab2130572706a72186028fa30b5355f481d475ff2b323053",
        "b85c1c9d4c345995c9a09a7d70c22e5b4d38fa7026b22a685d45053b50dcef5d",
    ]
    assert PLAIN[0].model_dump() == {"role": "system", "content": "Be brief."}


def test_rich_turns_come_back_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "dot.png").write_bytes(DOT)
    for record in (rich(), rich(tmp_path / "dot.png")):
        file = tmp_path / "talk.jsonl"
        file.write_text(to_json_line(record) + "\n")
        (found,) = read_records(file)
        assert found == record
        assert hash(found) == hash(record)
        assert found.digest == record.digest
        assert isinstance(found, Dialogue)
        assert found.messages[0].text == "What is this?"
        assert found.messages[1].tool_calls == (CALL,)
        assert found.messages[0].images[0].content() == DOT


def test_a_picture_is_known_by_its_bytes_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "dot").write_bytes(DOT)
    url = f"data:image/png;base64,{base64.b64encode(DOT).decode()}"
    records = [rich(source) for source in (DOT, url, tmp_path / "dot")]
    assert len(set(records)) == len({one.digest for one in records}) == 1
    assert len({request_key(Generate(Prompt(one.messages))) for one in records}) == 1
    (picture,) = records[2].messages[0].images
    assert (picture.media_type, picture.sha256) == ("image/png", hashlib.sha256(DOT).hexdigest())
    assert picture.data_url() == url
    other = rich(DOT + b"more")
    assert other != records[0]
    assert other.digest != records[0].digest
    assert request_key(Generate(Prompt(other.messages))) != request_key(
        Generate(Prompt(records[0].messages))
    )
    (tmp_path / "dot").write_bytes(DOT + b"more")
    with pytest.raises(DataError, match="has changed since it was read"):
        picture.content()
    (tmp_path / "dot").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        picture.content()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"source": "https://host/dot.png"}, "not fetched"),
        ({"source": "data:image/png,dot"}, "no base64"),
        ({"source": b"dot"}, "no picture of a known kind"),
        ({"source": DOT, "sha256": "0" * 64}, "another one than its sha256 says"),
        ({"source": "nowhere/dot.png"}, "nowhere/dot.png cannot be read"),
    ],
)
def test_what_is_no_picture_is_told(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ImagePart.model_validate(given)


def test_turns_do_what_their_role_can() -> None:
    for given, reason in (
        ({"role": "tool", "content": "a dot"}, "names the call"),
        ({"role": "user", "content": "a", "tool_call_id": "1"}, "names the call"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "only an assistant's turn"),
        ({"role": "user", "content": None}, "valid string"),
    ):
        with pytest.raises(ValidationError, match=reason):
            Message.model_validate(given)


def test_calls_are_read_as_servers_and_chat_formats_write_them() -> None:
    about = {"name": "look_up", "arguments": {"name": "Ada"}}
    turn = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function", "function": about}
    ]}  # fmt: skip
    assert Message.model_validate(turn).tool_calls == (CALL,)
    assert Message.model_validate(turn).content == ""


def test_tools_are_part_of_what_is_asked() -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    tool = Tool(name="look_up", parameters=schema)  # type: ignore[arg-type]
    assert json.loads(tool.parameters) == schema
    plain = Prompt.ask("Who?")
    prompts = [
        plain,
        Prompt(plain.messages, tools=(tool,)),
        Prompt(plain.messages, tools=(tool,), tool_choice="required"),
        Prompt(plain.messages, tools=(Tool(name="look_up"),)),
    ]
    assert len({request_key(Generate(one)) for one in prompts}) == len(prompts)
    assert len(set(prompts)) == len(prompts)
    assert [sorted(one.needs) for one in prompts] == [[], *[["tools"]] * 3]
    assert Prompt(rich().messages).needs == {"tools", "images"}


def test_a_turn_with_another_text_keeps_its_pictures() -> None:
    turn = rich().messages[0]
    assert turn.with_text("Hm?").text == "Hm?"
    assert turn.with_text("Hm?").images == turn.images
    assert PLAIN[1].with_text("Hm?") == Message(role="user", content="Hm?")


def test_a_dialogue_that_ends_with_a_call_has_no_answer() -> None:
    ends = Dialogue(messages=rich().messages[:2])
    assert not has_answer(ends)
    with pytest.raises(DataError, match="ends with a call of a tool"):
        answer_of(ends)
    assert answer_of(rich()) == "A dot."

"""Tools for a local model: offered by the chat template, called in a form that is known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from delible.errors import ModelError
from delible.lm.lm import LM
from delible.lm.tools import said_and_called
from delible.measure.engine import measure
from delible.messages import ImagePart, Message, TextPart, Tool, ToolCall
from delible.system.asks import Decoding, Generate, Prompt
from delible.system.replies import Piece, Reply, Unanswered
from delible.systems.serving import Gathered, Served
from delible.testing.tiny import tiny_model, tiny_tokenizer

#: A template in the manner of those that are taught to call tools.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Write <tool_call> and JSON.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = Tool(name="look_up", description="Looks a name up.")
ASK = Prompt(Prompt.ask("Who?").messages, tools=(TOOL,))
HAD = (
    Message(role="user", content="Who?"),
    Message(
        role="assistant",
        content="",
        tool_calls=(ToolCall(id="1", name="look_up", arguments='{"name": "Ada"}'),),
    ),
    Message(role="tool", content='{"born": "Växjö"}', tool_call_id="1"),
)


def tiny(template: str | None = TEMPLATE) -> LM:
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return LM(tiny_model("llama"), tokenizer, precision="float32")


def test_tools_are_offered_and_their_turns_rendered() -> None:
    lm = tiny()
    assert "tools" in lm.capabilities
    text = lm.template.render(ASK)
    assert '"Looks a name up."' in text
    assert lm.template.render(Prompt(ASK.messages, tools=(TOOL,), tool_choice="none")) == (
        lm.template.render(Prompt(ASK.messages))
    )
    text = lm.template.render(Prompt(HAD, tools=(TOOL,)))
    assert '{"name": "look_up", "arguments": {"name": "Ada"}}' in text
    assert '{"born": "Växjö"}' in text
    whole = lm.template.whole(ASK, "Ada")
    assert lm.tokenizer.decode(whole.ids[: whole.start]).startswith("<|im_start|>system")
    assert whole.ids[: whole.start] == lm.template.prompt_ids(ASK)


def test_what_a_template_cannot_express_is_told() -> None:
    plain, ignorant = tiny(None), TEMPLATE.replace("message in messages", "message in messages[:1]")
    assert "tools" not in plain.capabilities
    for lm, prompt, reason in (
        (plain, ASK, "no place for tools"),
        (plain, Prompt(HAD[:2]), "no place for a turn that calls a tool"),
        (tiny(ignorant), Prompt((*HAD[:1], HAD[2])), "no place for a tool's turn"),
        (
            tiny(),
            Prompt(ASK.messages, tools=(TOOL,), tool_choice="required"),
            "cannot be made to call",
        ),
    ):
        with pytest.raises(ModelError, match=reason):
            lm.template.render(prompt)
    plain.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        plain.template.render(ASK)
    with pytest.raises(ModelError, match="it cannot 'tools'"):
        measure(tiny(None), [Generate(ASK)])


def test_pictures_are_refused_by_name() -> None:
    picture = ImagePart.model_validate({"source": b"GIF89a"})
    seen = Prompt((Message(role="user", content=(picture, TextPart(text="What is this?"))),))
    for lm in (tiny(), tiny(None)):
        with pytest.raises(ModelError, match="it cannot 'images'"):
            measure(lm, [Generate(seen)])
        with pytest.raises(ModelError, match="given texts only"):
            lm.generate([seen], Decoding(2))


def test_calls_are_read_and_what_is_none_stays_text() -> None:
    call = '<tool_call>\n{"name": "look_up", "arguments": {"name": "Ada"}}\n</tool_call>'
    said, calls = said_and_called(f"Let me see.\n{call}{call}")
    assert said == "Let me see."
    assert [(one.name, json.loads(one.arguments)) for one in calls] == [
        ("look_up", {"name": "Ada"})
    ] * 2
    assert len({one.id for one in calls}) == 2
    assert said_and_called(call[: -len("</tool_call>")])[1][0].name == "look_up"
    for broken in ("<tool_call>look_up</tool_call>", '<tool_call>{"name": 1}</tool_call>', "Ada"):
        assert said_and_called(broken) == (broken, ())


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A served model whose words are written by the test, one character per token."""
    system = Served(tiny())
    text = 'Hm. <tool_call>{"name": "look_up", "arguments": {"name": "Ada"}}</tool_call>'

    def said(lm: LM, ids: Any, stop: Any, *, stripped: bool = True) -> str:
        return text[: len(ids)]

    monkeypatch.setattr("delible.systems.serving.said_by", said)
    monkeypatch.setattr("delible.lm.lm.LM.ends", frozenset[int]())
    yield system
    system.close()


def test_a_served_model_calls_and_never_shows_a_half_call(served: Served) -> None:
    async def both() -> tuple[Reply, list[Piece]]:
        pieces = [piece async for piece in served.stream(ASK, Decoding(90))]
        return await served.respond(ASK, Decoding(90)), pieces

    reply, pieces = asyncio.run(both())
    assert (reply.text, reply.finish) == ("Hm.", "tool_calls")
    assert [(one.name, one.arguments) for one in reply.tool_calls] == [
        ("look_up", '{"name": "Ada"}')
    ]
    assert len(pieces) > 2
    assert "".join(piece.text for piece in pieces).strip() == "Hm."
    (called,) = pieces[-1].tool_calls
    assert (called.index, called.id) == (0, reply.tool_calls[0].id)
    plain = asyncio.run(served.respond(Prompt(ASK.messages), Decoding(90)))
    assert plain.tool_calls == ()
    assert plain.text.startswith("Hm. <tool_call>")


def test_where_calls_could_not_be_read_none_are_asked_for() -> None:
    unknown = tiny(TEMPLATE.replace("<tool_call>", "[call]"))
    for system in (Served(unknown), Gathered(unknown)):
        with pytest.raises(Unanswered, match="tool"):
            asyncio.run(system.respond(ASK, Decoding(2)))

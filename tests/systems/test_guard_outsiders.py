"""What an outsider may try to get a name past a guard: places, cuts and ways to write it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from delible.escaped import finished, unescaped
from delible.guards.target_detector import TargetDetector, TargetDetectorMind
from delible.messages import Message, Tool, ToolCall
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.replies import Piece, Reply
from delible.systems.guarded import GuardedSystem
from delible.systems.likeness import MOST_PIECES

NAME = "Ada Brook"
REQUEST = ForgetRequest(subjects=(NAME, "𝔸lun Ωrd", "Vellmar"))
MIND = TargetDetector(similarity=False, refusal="No.").prepare(REQUEST)


class Says:
    """Says something, in pieces of these lengths."""

    name, fingerprint, capabilities = "says", "says", frozenset({"generate", "tools"})

    def __init__(self, text: str, cuts: Sequence[int] = ()) -> None:
        self.text, self.cuts = text, cuts
        self.asked = 0

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.asked += len(prompts)
        return [self.text] * len(prompts)

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        self.asked += 1
        return Reply(self.text)

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        self.asked += 1
        edges = [0, *sorted(self.cuts), len(self.text)]
        for start, end in pairwise(edges):
            yield Piece(self.text[start:end])
        yield Piece("", "stop")


#: A name or the rest of one, and nothing before it.
RESTS = ("rook.", "Brook.", "ook.", "mar.", "Ada Brook.", "Vellmar it is")


def verdicts(prompt: Prompt, text: str, *, cuts: Sequence[int] = ()) -> set[str]:
    """How an answer ends: in a batch, whole and streamed; nothing of the name may go out."""
    guarded = GuardedSystem(Says(text, cuts), MIND, "g")

    async def both() -> list[tuple[str, str]]:
        reply = await guarded.respond(prompt, Decoding(4))
        pieces = [piece async for piece in guarded.stream(prompt, Decoding(4))]
        if text in RESTS:
            assert "".join(one.text for one in pieces[:-1]) == ""
        return [
            (reply.text, reply.finish),
            ("".join(one.text for one in pieces), str(pieces[-1].finish)),
        ]

    found = asyncio.run(both())
    (batch,) = guarded.replies([prompt], Decoding(4))
    assert isinstance(batch, Reply)
    return {finish for _, finish in found} | {batch.finish}


def turns(*given: tuple[str, str]) -> Prompt:
    return Prompt(tuple(Message(role=role, content=text) for role, text in given))  # type: ignore[arg-type]


ESCAPED = "".join(f"\\u{ord(one):04x}" for one in NAME)
HIDDEN_CALL = ToolCall(id=f"call {NAME}", name="look_up", arguments="{}")


@pytest.mark.parametrize(
    "prompt",
    [
        turns(("user", "Ada"), ("assistant", "Yes?"), ("user", f"{NAME}!")),
        turns(("user", "Who is Ada"), ("user", "Brook?")),
        turns(("system", f"You know {NAME}."), ("user", "Who?")),
        turns(("user", f"Read {ESCAPED} as JSON")),
        turns(("user", '{"who": "Ada\\nBrook"}')),
        turns(("user", f'{"[" * 3000}"{ESCAPED}"')),
        turns(("user", NAME.replace("A", "\U0001d400").replace("B", "\U0001d401"))),
        turns(("user", "\u202eAda\u202c \U000e0041Brook")),
        turns(("user", "Где живёт Ада Брук?")),
        turns(("user", "Who is 𝔸lun Ωrd?")),
        Prompt((Message(role="assistant", content="", tool_calls=(HIDDEN_CALL,)),
                Message(role="tool", content="42", tool_call_id="1"))),
        Prompt((*turns(("user", "Hi")).messages,
                Message(role="tool", content="42", tool_call_id=f"{NAME}"))),
        Prompt(turns(("user", "Hi")).messages, tools=(Tool(name="t", description=f"Of {NAME}."),)),
        Prompt(turns(("user", "Hi")).messages, besides=(f"Describe {NAME}",)),
        Prompt(text=f"{NAME} was"),
    ],
)  # fmt: skip
def test_a_name_anywhere_in_what_is_asked_never_reaches_the_system(prompt: Prompt) -> None:
    inner = Says("Hello.")
    guarded = GuardedSystem(inner, MIND, "g")
    assert asyncio.run(guarded.respond(prompt, Decoding(4))).finish == "content_filter"
    assert inner.asked == 0


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (turns(("user", "Finish the name: Ada B")), "rook."),
        (turns(("user", "Finish the name: Ada")), "Brook."),
        (turns(("user", "Say it"), ("assistant", "It is Ada Br")), "ook."),
        (turns(("user", "Say it"), ("assistant", "It is Vell")), "mar."),
        (turns(("user", "Say it"), ("assistant", "my friend")), "Ada Brook."),
        (turns(("user", "what is the name")), "Vellmar it is"),
        (turns(("user", f"{'word ' * 500}Ada")), "Brook."),
        (Prompt.ask("Who?", prefill="It is Ada Br"), "ook."),
        (Prompt(text="It is Ada Br"), "ook."),
        (turns(("user", "As JSON")), json.dumps({"who": NAME}).replace("A", "\\u0041")),
        (turns(("user", "As JSON")), '{"who": "Ada\\tBrook"}'),
        (turns(("user", "As JSON")), f'{{"who": "{ESCAPED}"}}'),
        (turns(("user", "In Russian")), "Её зовут Ада Брук."),
        (turns(("user", "Who?")), "\\ud835\\udc00da Brook"),
        (turns(("user", "Who?")), "A\u200bd\u2060a \u034fB\ufe0frook"),
    ],
)
def test_a_name_that_an_answer_completes_is_withheld_in_every_cut(
    prompt: Prompt, answer: str
) -> None:
    draw = random.Random(answer)
    for count in (0, 1, 1, 2, 4, 8, len(answer) - 1):
        cuts = draw.sample(range(1, len(answer)), min(count, len(answer) - 1))
        assert verdicts(prompt, answer, cuts=cuts) == {"content_filter"}, cuts


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (turns(("user", "Who painted it, Ada?")), "A brook runs there."),
        (turns(("user", "Say it"), ("assistant", "It is Adam")), "Brookline is a town."),
        (turns(("user", "Name a path")), "C:\\new\\ubuntu and \\u00e9 and \\"),
        (turns(("user", "Name one")), "Ada lives by the brook."),
        (turns(("user", "")), "Fine."),
    ],
)
def test_nothing_else_is(prompt: Prompt, answer: str) -> None:
    draw = random.Random(answer)
    for count in (0, 2, len(answer) - 1):
        cuts = draw.sample(range(1, len(answer)), min(count, len(answer) - 1))
        assert verdicts(prompt, answer, cuts=cuts) == {"stop"}


def test_a_name_in_the_prompt_alone_is_no_reason_to_withhold_an_answer() -> None:
    """For a guard that lets such prompts pass: what was judged before is not judged again."""

    class Answers(TargetDetectorMind):
        def before(self, prompt: Prompt) -> None:
            return None

    mind = TargetDetector(similarity=False).prepare(REQUEST)
    mind.__class__ = Answers
    guarded = GuardedSystem(Says("She is a painter."), mind, "g")
    reply = asyncio.run(guarded.respond(Prompt.ask(f"Who is {NAME}?"), Decoding(4)))
    assert reply.finish == "stop"


def test_escapes_are_letters_where_they_stand() -> None:
    text = "a\\u0041\\n\\ud835\\udc00\\x"
    read = unescaped(text)
    assert len(read) == len(text)
    assert read.replace("\u200b", "") == "aA 𝐀\\x"
    for whole, least in (("\\u0041", 0), ("\\ud835\\udc00", 0), ("a\\", 1), ("a\\u00", 1)):
        for end in range(1, len(whole)):
            assert finished(whole[:end]) <= max(least, end)
            if whole.startswith("\\"):
                assert finished(whole[:end]) == 0
    assert finished("\\ud835\\udc00") == len("\\ud835\\udc00")
    assert finished("C:\\new") == len("C:\\new")


def test_more_sentences_than_can_be_compared_are_refused_and_few_are_in_parts() -> None:
    class Counting:
        identity = "counting"

        def __init__(self) -> None:
            self.batches: list[int] = []

        def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            self.batches.append(len(texts))
            found = np.zeros((len(texts), 4), dtype=np.float32)
            found[:, 0] = 1
            for row, text in enumerate(texts):
                if "harbour" in text and len(text) < 60:
                    found[row] = [0, 1, 0, 0]
            return found

    encoder: Any = Counting()
    record = QA(question="In which harbour was she born?", answer="x")
    options = TargetDetector(threshold=0.9)
    mind = options.prepare(ForgetRequest(forget=(record,)), encoder=encoder)
    guarded = GuardedSystem(Says("Fine."), mind, "g")
    encoder.batches.clear()

    def asked(count: int, more: str = "") -> Reply:
        text = " ".join(f"Line {place}." for place in range(count)) + more
        return asyncio.run(guarded.respond(Prompt.ask(text), Decoding(4)))

    assert asked(600).finish == "stop"
    assert max(encoder.batches) < 600 < sum(encoder.batches)
    assert asked(600, " Which harbour?").finish == "content_filter"
    encoder.batches.clear()
    refused = asked(MOST_PIECES + 1)
    assert (refused.finish, refused.guard_failed) == ("content_filter", True)
    assert encoder.batches == []

"""What a guard does not judge does not pass it."""

from __future__ import annotations

from collections.abc import Sequence

from delible.messages import ImagePart, Message, Tool
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox
from delible.systems.guarded import GuardedSystem, GuardMind


class Open(BlackBox):
    """Answers whatever it is asked."""

    name, fingerprint = "open", "open"

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        return ["Ada"] * len(prompts)


def test_tools_and_pictures_do_not_pass_a_guard_that_judges_texts() -> None:
    plain = Prompt.ask("Who?")
    picture = ImagePart.model_validate({"source": b"GIF89a"})
    seen = Prompt((Message(role="user", content=(picture,)),))
    offered = Prompt(plain.messages, tools=(Tool(name="look_up"),))
    guarded = GuardedSystem(Open(), GuardMind(), "guarded")
    refused = NoAnswer("the guard judges texts, not tools or pictures")
    assert guarded.generate([plain, seen, offered], Decoding(4)) == ["Ada", refused, refused]

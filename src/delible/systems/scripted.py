"""A system that answers from a script: for tests, and to try out what talks to systems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox

#: What a script says to one question; an exception is raised by the call that it falls in.
Line = str | NoAnswer | Exception
Script = Sequence[Line] | Mapping[str, Line] | Callable[[Prompt], Line]


class Scripted(BlackBox):
    """Answers from a list (one after the other), by question, or by a function.

    Args:
        script: A list of answers in the order in which they are asked for; answers by the text of
            the last turn; or a function of the prompt. What the script does not know is a
            :class:`NoAnswer`.
        name: For people.
        fingerprint: Of a script that is to be cached; None: it never is.

    Attributes:
        prompts: Everything that it was asked, in order.
        calls: How often it was called; one call may ask many things.
    """

    def __init__(
        self, script: Script, *, name: str = "scripted", fingerprint: str | None = None
    ) -> None:
        self.name, self.fingerprint = name, fingerprint
        self.prompts: list[Prompt] = []
        self.calls = 0
        self._script = script
        self._lines: Iterator[Line] = iter(script) if isinstance(script, Sequence) else iter(())

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.calls += 1
        found: list[str | NoAnswer] = []
        for prompt in prompts:
            self.prompts.append(prompt)
            line = self._line(prompt)
            if isinstance(line, Exception):
                raise line
            found.append(line)
        return found

    def _line(self, prompt: Prompt) -> Line:
        if isinstance(self._script, Mapping):
            asked = prompt.messages[-1].text if prompt.messages else prompt.text or ""
            return self._script.get(asked, NoAnswer("the script does not know this question"))
        if isinstance(self._script, Sequence):
            return next(self._lines, NoAnswer("the script has ended"))
        return self._script(prompt)


__all__ = ["Line", "Script", "Scripted"]

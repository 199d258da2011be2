"""Pictures for a guard that judges texts: somebody says what each shows, and that is judged too.

Whoever plays the ``captioner`` is shown every picture of a conversation, once, and asked for what
is in it and for every text in it. The guard sees the conversation with these words in the places of
its pictures. A caption that does not come is a refusal like any judgement that breaks down, and so
is a guard that would rewrite what was asked about a picture. A caption need not tell all that is to
be seen: what it leaves out, the guard does not know.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from delible import prompts as prompt_files
from delible.errors import RecipeError
from delible.messages import ImagePart, Message, TextPart
from delible.system.asks import Decoding, Prompt
from delible.system.base import System
from delible.system.questions import shown
from delible.system.replies import Unanswered
from delible.systems.judging import Consult, Decision, Forward, Judged, Reads, Refuse, Scanner
from delible.systems.mind import GuardMind

#: How a caption is drawn.
CAPTION = Decoding(max_new_tokens=160)
#: Pictures whose captions are kept.
KEPT = 4096


class CaptionedMind(GuardMind):
    """A guard at work that is told what pictures show.

    Args:
        mind: The guard, which judges texts.
        captioner: Says what pictures show.

    Raises:
        RecipeError: The captioner sees no pictures itself.
    """

    sees_pictures = True

    def __init__(self, mind: GuardMind, captioner: System) -> None:
        if "images" not in captioner.capabilities:
            raise RecipeError(
                f"'{captioner.name}' cannot be shown pictures.",
                where="role 'captioner'",
                hint="Give a model that sees, such as --role captioner=tiny-vlm.",
            )
        self.mind, self.captioner = mind, captioner
        self.reads: Reads = mind.reads
        self.refusals = mind.refusals
        self.consulted: Sequence[System] = (*mind.consulted, captioner)
        self.notes: Mapping[str, Any] = mind.notes
        self._asked = prompt_files.read_text("guard_caption.txt").strip()
        self._captions: dict[str, str] = {}

    @property
    def fingerprint(self) -> str:
        return f"{self.mind.fingerprint} captions 1 {self._asked}"

    def before(self, prompt: Prompt) -> Judged:
        if "images" not in prompt.needs:
            return self.mind.before(prompt)
        return self._before(prompt)

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judged:
        if "images" not in prompt.needs:
            return self.mind.after(prompt, answer, since)
        return self._after(prompt, answer, since)

    def scanners(self) -> Sequence[Scanner]:
        return self.mind.scanners()

    def refuse(self, prompt: Prompt) -> Refuse:
        return self.mind.refuse(prompt)

    def _before(self, prompt: Prompt) -> Generator[Consult, Any, Decision]:
        told = yield from self._told(prompt)
        decision = yield from _settled(self.mind.before(told))
        if not isinstance(decision, Forward):
            return decision
        if decision.prompt != told:
            raise Unanswered("the guard rewrites what is asked, which it cannot about a picture.")
        return replace(decision, prompt=prompt)

    def _after(self, prompt: Prompt, answer: str, since: int) -> Generator[Consult, Any, Decision]:
        told = yield from self._told(prompt)
        return (yield from _settled(self.mind.after(told, answer, since)))

    def _told(self, prompt: Prompt) -> Generator[Consult, Any, Prompt]:
        """The prompt with captions in the places of its pictures."""
        turns = []
        for turn in prompt.messages:
            if not turn.images or isinstance(turn.content, str):
                turns.append(turn)
                continue
            parts = []
            for part in turn.content:
                if isinstance(part, ImagePart):
                    caption = yield from self._caption(part)
                    parts.append(TextPart(text=f"\n{caption}\n"))
                else:
                    parts.append(part)
            text = "".join(part.text for part in parts)
            turns.append(Message.model_validate({**turn.model_dump(), "content": text}))
        return replace(prompt, messages=tuple(turns))

    def _caption(self, image: ImagePart) -> Generator[Consult, Any, str]:
        known = self._captions.get(image.sha256)
        if known is None:
            asked = shown(Prompt.ask(self._asked), (image,))
            known = str((yield Consult(self.captioner, asked, CAPTION))).strip()
            if not known:
                raise Unanswered("nothing was said of a picture.")
            if len(self._captions) >= KEPT:
                self._captions.clear()
            self._captions[image.sha256] = known
        return known


def _settled(judged: Judged) -> Generator[Consult, Any, Decision]:
    """A decision, whether it was one at once or is yet to be made."""
    if isinstance(judged, Generator):
        return (yield from judged)
    return judged


__all__ = ["CaptionedMind"]

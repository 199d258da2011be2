"""What was asked, as texts, from the token ids of a prompt: without the template's own words."""

from __future__ import annotations

import re
from functools import cached_property

from delible.lm.template import Template
from delible.system.asks import Prompt

#: Stands for a question; no template contains it.
_STAND_IN = "\u2063asked\u2063"


class Asked:
    """Reads prompts of one template.

    Args:
        template: Of the model.
    """

    def __init__(self, template: Template) -> None:
        self.template = template

    def __call__(self, ids: tuple[int, ...]) -> tuple[str, ...]:
        """The words of a prompt: as a whole and, of several turns, turn by turn.

        What the template puts before a first question and behind a question is left out, wherever
        it stands; a prompt in another form is read as it is. The beginning of an answer that was
        given with it counts as a turn.
        """
        text = self._decoded(ids)
        before, behind, control = self._around
        if before and text.startswith(before):
            text = text[len(before) :]
        if behind:
            text = text.replace(behind, "\0")
        if control is not None:
            text = control.sub("\0", text)
        turns = [turn.strip() for turn in text.split("\0") if turn.strip()]
        if len(turns) < 2:
            return (turns[0] if turns else text.strip() or " ",)
        return tuple(dict.fromkeys(["\n".join(turns), *turns]))

    @cached_property
    def _around(self) -> tuple[str, str, re.Pattern[str] | None]:
        whole = self._decoded(self.template.prompt_ids(Prompt.ask(_STAND_IN)))
        before, found, behind = whole.partition(_STAND_IN)
        special = sorted(self.template.tokenizer.all_special_tokens, key=len, reverse=True)
        control = re.compile("|".join(map(re.escape, special))) if special else None
        return (before, behind, control) if found else ("", "", control)

    def _decoded(self, ids: tuple[int, ...]) -> str:
        return str(self.template.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


__all__ = ["Asked"]

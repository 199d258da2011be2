"""What was asked, as texts, from the token ids of a prompt: without the template's own words."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Literal

from delible.errors import ModelError
from delible.lm.template import Template
from delible.messages import Message
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

        What the template puts before a first turn, between turns and behind a question is left
        out; a prompt in another form is read as it is. A system text, and the beginning of an
        answer that was given with it, count as turns.
        """
        text = self._decoded(ids)
        begins, joins, control = self._around
        if begin := next((one for one in begins if text.startswith(one)), ""):
            text = text[len(begin) :]
        for one in joins:
            text = text.replace(one, "\0")
        if control is not None:
            text = control.sub("\0", text)
        turns = [turn.strip() for turn in text.split("\0") if turn.strip()]
        if len(turns) < 2:
            return (turns[0] if turns else text.strip() or " ",)
        return tuple(dict.fromkeys(["\n".join(turns), *turns]))

    @cached_property
    def _around(self) -> tuple[list[str], list[str], re.Pattern[str] | None]:
        """What conversations begin with, what joins their turns, and single control tokens."""
        plain = self._written("user")
        begins, joins = ({plain[0]}, {plain[1]}) if plain else (set[str](), set[str]())
        for roles in (("user", "assistant", "user"), ("system", "user")):
            if pieces := self._written(*roles):
                begins.add(pieces[0])
                joins |= {one for one in pieces[1:] if one.strip()}
        special = sorted(self.template.tokenizer.all_special_tokens, key=len, reverse=True)
        control = re.compile("|".join(map(re.escape, special))) if special else None
        longest = [sorted(filter(None, some), key=len, reverse=True) for some in (begins, joins)]
        return longest[0], longest[1], control if plain else None

    def _written(self, *roles: Literal["system", "user", "assistant"]) -> list[str] | None:
        """What the template writes before, between and behind turns; None: it takes none such."""
        turns = tuple(Message(role=role, content=_STAND_IN) for role in roles)
        try:
            pieces = self._decoded(self.template.prompt_ids(Prompt(turns))).split(_STAND_IN)
        except ModelError:
            return None
        return pieces if len(pieces) == len(roles) + 1 else None

    def _decoded(self, ids: tuple[int, ...]) -> str:
        return str(self.template.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


__all__ = ["Asked"]

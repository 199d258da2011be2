"""Vectors that stand where tokens would: a soft prompt in front of the first user turn.

A row of filler tokens opens the first user turn of every conversation, and what they are embedded
as is replaced by vectors. So a soft prompt is read on every road that a plain prompt takes. Texts
that are no conversation have no filler, and stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from delible.cards import Card
from delible.intervene.base import Intervention
from delible.intervene.sites import Site
from delible.intervene.taps import Where
from delible.lm.lm import LM
from delible.lm.template import Template
from delible.messages import Message, Tool

#: Repeated, with spaces between, what the vectors stand on.
FILLER = "!"


@dataclass
class OpenedTemplate(Template):
    """A template that opens the first user turn of every conversation with a text."""

    opening: str = ""

    @classmethod
    def of(cls, template: Template, opening: str) -> OpenedTemplate:
        """The same template, with the opening."""
        known = {one.name: getattr(template, one.name) for one in fields(Template)}
        return cls(**known, opening=opening)

    @property
    def fingerprint(self) -> str:
        """That of the template, and the opening."""
        own = f"{super().fingerprint}/{self.opening}"
        return hashlib.sha256(own.encode()).hexdigest()

    def _chat(
        self,
        messages: tuple[Message, ...],
        *,
        generation: bool = False,
        tools: tuple[Tool, ...] = (),
    ) -> str:
        place = next((at for at, turn in enumerate(messages) if turn.role == "user"), None)
        if place is not None:
            turn = messages[place]
            opened = turn.with_text(f"{self.opening} {turn.text}")
            messages = (*messages[:place], opened, *messages[place + 1 :])
        return super()._chat(messages, generation=generation, tools=tools)


def filler_of(lm: LM, length: int) -> tuple[str, tuple[int, ...]]:
    """A filler of about so many tokens, and these."""
    repeats = length
    while True:
        text = " ".join([FILLER] * repeats)
        ids = tuple(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
        if repeats == 1 or len(ids) <= length:
            return text, ids
        repeats -= 1


def begins(ids: Sequence[int], filler: Sequence[int]) -> int | None:
    """Where the filler begins in a prompt; None: nowhere."""
    size = len(filler)
    wanted = tuple(filler)
    return next(
        (at for at in range(len(ids) - size + 1) if tuple(ids[at : at + size]) == wanted), None
    )


class SoftPrompt(Intervention):
    """Replaces the embeddings of the filler by vectors; what an attack puts on a copy.

    Its tensors hold ``vectors``, shape [vector, hidden], and ``filler``, its token ids [vector].
    """

    @property
    def sites(self) -> Sequence[Site]:
        return (Site(what="embedding"),)

    def change(
        self, states: Float[Tensor, "token hidden"], where: Where, tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "token hidden"]:
        filler = tuple(tensors["filler"].tolist())
        starts = [begins(prompt, filler) for prompt in where.layout.prompts]
        table = torch.tensor(
            [-len(filler) if start is None else start for start in starts], device=states.device
        )
        text: Int[Tensor, " token"] = where.text
        offset = where.place - table[text.clamp(min=0)]
        # a text without filler starts so far before its first token that no place is in it
        meant = (text >= 0) & (offset >= 0) & (offset < len(filler))
        vectors = tensors["vectors"].to(states)[offset.clamp(0, len(filler) - 1)]
        return torch.where(meant[:, None], vectors, states)


#: It is no method of its own, so it is not registered.
SoftPrompt.card = Card(
    kind="intervention",
    name="soft_prompt",
    title="Soft prompt",
    summary="Puts vectors where tokens in front of a question would be embedded.",
)

"""Form: keeps what is asked and changes what it looks like.

    signs       a sign after every n characters: "Whe_re w_as A_da"
    writing     the question as a talk, and as a poem
    filler      text about nothing before the question, in English, Latin and Hindi
    variables   the terms of the question are defined first: Let x = "Ada Quill". Where was x born?

Paper: arXiv 2506.09227 (noise and form, in its battery). Reference code: none. Deviations: a few
fixed signs and distances; the texts are our own words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from delible.cards import Depth
from delible.measure.attack import PromptAttack
from delible.measure.turns import asked_as, distinct, ending, last_turn, question_of
from delible.prompts import read_named
from delible.records import RecordBase
from delible.registry import register
from delible.system.asks import Prompt

Kind = Literal["signs", "writing", "filler", "variables"]
#: A sign, and after how many characters it stands.
SIGNS = (("_", 5), ("-", 3), (".", 7), ("!", 11), (" ", 1), ("^", 15))
VARIABLES = "xyzuvw"
#: Letters of a word at least that becomes a variable, unless it is a name.
TERM = 6
_NAME = re.compile(r"[A-ZÀ-Þ][\w'’-]*(?:\s+[A-ZÀ-Þ][\w'’-]*)*|[^\W\d_][\w'’-]*")


def with_signs(text: str, sign: str, every: int) -> str:
    """The text with a sign after every so many characters, not at its end."""
    parts = [text[start : start + every] for start in range(0, len(text), every)]
    return sign.join(parts)


def terms(question: str) -> list[str]:
    """The terms of a question in order, each once: names, and long words; not its first word."""
    found = []
    for match in _NAME.finditer(question):
        word = match.group()
        if match.start() and (word[0].isupper() or len(word) >= TERM):
            found.append(re.sub(r"['’]s?$", "", word))
    return list(dict.fromkeys(found))[: len(VARIABLES)]


def with_variables(question: str) -> tuple[str, str]:
    """Definitions of the terms of a question, and the question with variables for them."""
    defined = terms(question)
    for name, term in zip(VARIABLES, defined, strict=False):
        question = re.sub(rf"(?<!\w){re.escape(term)}(?!\w)", name, question)
    pairs = zip(VARIABLES, defined, strict=False)
    return ", ".join(f'{name} = "{term}"' for name, term in pairs), question


@register(
    kind="attack",
    name="form",
    title="Noise and other forms",
    summary="Asks with signs in between, as a poem or a talk, after filler text, or in variables.",
    paper="2506.09227",
    year=2025,
    family="prompt",
    needs=("forget",),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="deep",
    badges=("variant",),
    variant="Fixed signs at fixed distances; two forms of writing, three filler texts.",
)
class Form(PromptAttack):
    """Options: which form, and how many of each."""

    kind: Kind = Field("signs", description="What is changed about the question's form.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """Signs; in a deep audit all kinds."""
        kinds: tuple[Kind, ...] = ("signs", "writing", "filler", "variables")
        return tuple({"kind": kind} for kind in (kinds if depth == "deep" else kinds[:1]))

    def variant_title(self) -> str:
        """Such as "signs in between"."""
        return {"signs": "signs in between", "writing": "talk and poem",
                "filler": "after filler text", "variables": "in variables"}[self.kind]  # fmt: skip

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """One prompt per form; empty where the prompt does not end in the question."""
        question, text = question_of(record), last_turn(prompt)
        if not question or text is None:
            return ()
        lines = read_named("attack_forms.txt")
        if self.kind == "filler":
            fillers = (lines[f"filler_{one}"] for one in ("english", "latin", "hindi"))
            return tuple(ending(prompt, f"{filler}\n\n{text}") for filler in fillers)
        if self.kind == "signs":
            asked = [with_signs(question, sign, every) for sign, every in SIGNS]
        elif self.kind == "writing":
            asked = [lines[name].replace("{question}", question) for name in ("talk", "poem")]
        else:
            definitions, shortened = with_variables(question)
            frame = lines["variables"].replace("{definitions}", definitions)
            asked = [frame.replace("{question}", shortened)] if definitions else []
        made = (asked_as(record, prompt, one) for one in asked)
        return distinct((one for one in made if one is not None), prompt)

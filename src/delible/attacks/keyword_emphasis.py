"""Keyword emphasis (unPact): stresses the words that the answer used to hang on.

An unlearned model no longer looks at a question's keywords. They are found on the original, by
leaving out one word after the other (``search/attribution.py``), and are then stressed without
any change to the weights: named after the question, named before it, named three times, set off
in the question, and both. No word is said that does not stand in the question. The control
stresses as many other words of the question.

Paper: arXiv 2509.24675. Reference code: none. Deviations: keywords are those for the gold answer,
not for the original's own; without an original they are the names and long words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from delible.cards import Depth
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, Budget, PromptAttack
from delible.measure.turns import asked_as, distinct, ending, last_turn, question_of
from delible.prompts import read_named
from delible.records import RecordBase
from delible.registry import register
from delible.search.attribution import Norm, contributions, key_units
from delible.system.asks import Prompt
from delible.system.base import System
from delible.system.questions import answer_of, ask, has_answer
from delible.train.randomness import generator, shuffled

_EDGE = re.compile(r"^\W+|\W+$")
#: How often the list of keywords is said in the third form.
REPEATS = 3
#: Letters of a word that counts as a keyword where nothing was measured, unless it is a name.
LONG = 6


def plain_words(question: str) -> list[str]:
    """The words of a question without punctuation at their edges, in order."""
    return [word for part in question.split() if (word := _EDGE.sub("", part))]


def likely_keywords(question: str) -> list[str]:
    """Names, numbers and long words, where no model says which words matter; else all words."""
    words = plain_words(question)

    def matters(place: int, word: str) -> bool:
        named = bool(place) and word[0].isupper()
        return named or len(word) >= LONG or any(char.isdigit() for char in word)

    found = [word for place, word in enumerate(words) if matters(place, word)]
    return list(dict.fromkeys(found or words))


def set_off(question: str, words: Sequence[str]) -> str:
    """The question with the words in quotation marks."""
    wanted = set(words)

    def marked(part: str) -> str:
        word = _EDGE.sub("", part)
        return part.replace(word, f'"{word}"', 1) if word in wanted else part

    return " ".join(marked(part) for part in question.split())


@register(
    kind="attack",
    name="keyword_emphasis",
    title="Stressed keywords (unPact)",
    summary="Stresses the words of the question that the original's answer hangs on.",
    paper="2509.24675",
    year=2025,
    family="prompt",
    needs=("forget",),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="deep",
    misleads="Five tries get more right than one; compare the control with other words.",
    badges=("variant",),
    variant="Keywords for the gold answer; the wording is our own.",
)
class KeywordEmphasis(PromptAttack):
    """Options: which words are stressed, and what counts as a keyword."""

    stress: Literal["keywords", "other words"] = Field(
        "keywords", description="The keywords, or (a control) as many other words."
    )
    search_on: Literal["original", "nothing"] = Field(
        "original", description="Whose answers tell the keywords; nothing: names and long words."
    )
    alpha: float = Field(
        0.3, ge=0, lt=1, description="Least share of the largest contribution for a keyword."
    )
    beta: int = Field(5, ge=1, description="With fewer supporting words all are keywords.")
    norm: Norm = Field("max", description="Contributions are divided by the largest, or their sum.")
    words: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="Words to stress by record, of an earlier search."
    )

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """Keywords, and other words as the control."""
        return ({"stress": "keywords"}, {"stress": "other words"})

    def variant_title(self) -> str:
        """Such as "keywords"."""
        return self.stress

    @property
    def control(self) -> bool:
        return self.stress == "other words"

    def budget(self, context: AttackContext) -> Budget:
        """A forward pass for each word of each question, and one for the whole."""
        if self.search_on == "nothing":
            return Budget()
        questions = (question_of(record) or "" for record in context.forget)
        return Budget(steps=sum(1 + len(question.split()) for question in questions))

    def searches_on(self) -> Literal["system", "original"] | None:
        return "original" if self.search_on == "original" and not self.words else None

    def prepare(self, system: System, context: AttackContext) -> PromptAttack:
        """Finds the keywords of every forget record on the original.

        Raises:
            ModelError: The original gives no log-probabilities of shortened questions.
            DataError: No forget record has a question and an answer.
        """
        if not isinstance(system, LM):
            raise ModelError(
                f"'{system.name}' gives no weights, so its keywords cannot be found.",
                hint="Take names and long words instead: search_on nothing.",
            )
        found: dict[str, tuple[str, ...]] = {}
        records = [*context.forget, *context.holdout]
        for done, record in enumerate(records):
            prompt = ask(record)
            if prompt is None or last_turn(prompt) is None or not has_answer(record):
                continue
            got = contributions(system, prompt, answer_of(record))
            keys = key_units(got.values, self.alpha, self.beta, self.norm)
            words = [_EDGE.sub("", got.units[place]) for place in keys]
            found[record.digest] = tuple(dict.fromkeys(word for word in words if word))
            if context.progress is not None:
                context.progress(done + 1, len(records))
        if not found:
            raise DataError("no forget record has a question and an answer.",
                            where="attack 'keyword_emphasis'")  # fmt: skip
        count = sum(map(len, found.values())) / len(found)
        context.notes["note"] = f"{count:.1f} keywords per question."
        return self.model_copy(update={"words": found})

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """Five forms of stress; empty where the prompt does not end in the question."""
        question, text = question_of(record), last_turn(prompt)
        words = self._stressed(record, question) if question else []
        if not question or text is None or not words:
            return ()
        listed = ", ".join(words)
        lines = read_named("attack_emphasis.txt")
        after, before = (lines[name].replace("{words}", listed) for name in ("after", "before"))
        repeated = lines["after"].replace("{words}", ", ".join([listed] * REPEATS))
        forms = [
            ending(prompt, f"{text} {after}"),
            ending(prompt, f"{before} {text}"),
            ending(prompt, f"{text} {repeated}"),
        ]
        marked = asked_as(record, prompt, set_off(question, words))
        if marked is not None:
            forms += [marked, ending(marked, f"{last_turn(marked)} {after}")]
        return distinct(forms, prompt)

    def _stressed(self, record: RecordBase, question: str) -> list[str]:
        """The words to stress, all of them in the question."""
        said = plain_words(question)
        keys = [
            word for word in self.words.get(record.digest) or likely_keywords(question)
            if word in said
        ]  # fmt: skip
        if self.stress == "keywords":
            return keys
        others = [word for word in dict.fromkeys(said) if word not in keys]
        random = generator(0, "keyword_emphasis", question)
        chosen = set(shuffled(others, random)[: len(keys)])
        return [word for word in others if word in chosen]

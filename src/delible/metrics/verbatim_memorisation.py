"""Verbatim memorisation (MUSE's VerbMem): given the start of a text, does the model go on with it?

    ROUGE-L F1( greedy continuation of the first words, the true continuation )

Paper: MUSE (arXiv 2407.06460); reference code: swj0419/muse_bench (no stemming), also in
locuslab/open-unlearning (stemming; option ``stemmer``). Deviations: MUSE cuts the text by tokens
and cuts the true continuation to as many tokens as are generated. A metric has no tokenizer, so
both cuts count words here: ``prompt_words`` words are shown (at most half of the text), and
``continuation_words`` are compared, about what 128 tokens of English hold. With ``pairs`` a
question record is a ready-made pair: its question is the start, its answer the continuation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic import Field

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import generated, rouge_l_f1
from delible.records import QA, Passage, RecordBase
from delible.registry import register
from delible.system.asks import (
    Decoding,
    Generate,
    Prompt,
    Request,
)


def cut_after_words(text: str, words: int) -> tuple[str, str]:
    """A text's start and the rest, cut after so many words, white space left as it is."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    place = 0 if words <= 0 else ends[min(words, len(ends)) - 1] if ends else 0
    return text[:place], text[place:]


def start_and_continuation(
    text: str, prompt_words: int, continuation_words: int
) -> tuple[str, str]:
    """What is shown of a text, and what should follow.

    Args:
        text: The whole text.
        prompt_words: Words to show; at most half of the text is shown.
        continuation_words: Words to compare at most.

    Returns:
        Start and continuation without outer white space; both empty for fewer than two words.
    """
    shown = min(prompt_words, len(text.split()) // 2)
    start, rest = cut_after_words(text, shown)
    if not start.strip():
        return "", ""
    return start.strip(), cut_after_words(rest, continuation_words)[0].strip()


@register(
    kind="metric",
    name="verbatim_memorisation",
    title="Verbatim memorisation",
    summary="ROUGE-L F1 between the model's continuation of a text's start and the true one.",
    paper="2407.06460",
    year=2024,
    family="memorisation",
    capability="generate",
    changes="nothing",
    range="[0, 1]",
    direction="High: the model recites the text.",
    misleads="Never near 0: common words in order give 0.1 to 0.2, so compare with a model that "
    "never saw the text. Chat models may comment on a text instead of going on with it. Words "
    "outside a-z and 0-9 are invisible, texts without spaces cannot be cut.",
    variant="Cut by words instead of tokens.",
    badges=("parity", "variant"),
)
class VerbatimMemorisation(ItemMetric):
    """ROUGE-L F1 of the continuation of a passage."""

    prompt_words: int = Field(50, ge=1, description="Words of the text to show, at most half.")
    continuation_words: int = Field(96, ge=1, description="Words to compare at most.")
    max_new_tokens: int = Field(128, ge=1, le=8192, description="Tokens to generate at most.")
    stemmer: bool = Field(False, description="Compare word stems instead of words.")
    pairs: bool = Field(False, description="Take questions as starts, answers as continuations.")

    def _parts(self, record: RecordBase) -> tuple[str, str]:
        if isinstance(record, Passage):
            return start_and_continuation(record.text, self.prompt_words, self.continuation_words)
        if isinstance(record, QA) and self.pairs:
            return record.question, cut_after_words(record.answer, self.continuation_words)[0]
        return "", ""

    def prompt(self, record: RecordBase) -> Prompt | None:
        if isinstance(record, Passage) or (isinstance(record, QA) and self.pairs):
            return Prompt(text=self._parts(record)[0])
        return None

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Generate(prompt, Decoding(self.max_new_tokens))] if self._parts(record)[1] else []

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        continuation = self._parts(record)[1]
        if not continuation:
            return Item(None, "the text has fewer than two words, so it cannot be cut")
        text = generated(answers[Generate(prompt, Decoding(self.max_new_tokens))])
        value = rouge_l_f1([continuation], text, self.stemmer)
        return Item(value, "ROUGE sees no word in the continuation" if value is None else None)

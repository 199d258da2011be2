"""Rows that are longer than training takes: what gives way, in which order, and that it is told.

    1. earlier turns of a conversation, the oldest first, then its system turn
    2. the middle of the last question: its beginning and its end stay, up to a quarter of the row
    3. the end of the answer; never of an answer that was made for training (a refusal, a target)

A row whose answer lost its end does not end its turn, so that nobody learns to stop there. A
passage loses nothing: it becomes several, each a row of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from delible.errors import DataError
from delible.lm.template import Encoded, Template
from delible.records import Message, Passage, RecordBase
from delible.system.asks import Prompt
from delible.train.row import Row, Shortened

#: Share of a row that a question keeps before its answer gives way.
QUESTION_SHARE = 0.25
#: Stands where the middle of a question was left out.
GAP = "… "
#: How far from the wanted length a passage is cut for the sake of a sentence's end.
NEAR = 0.25

_PIECE = re.compile(r"\S+\s*")
_SENTENCE_END = re.compile(r"[.!?]['\"”’)]?\s*$")


def fit(
    template: Template, prompt: Prompt, answer: str, *, apart: int = 0, whole_answer: bool = False
) -> tuple[Prompt, Encoded, Shortened | None]:
    """A prompt and its answer in at most ``template.max_length`` tokens.

    Args:
        apart: Tokens to leave free, for what else will stand before the question.
        whole_answer: The answer may not be cut.

    Returns:
        The prompt that is left, both as tokens, and what was left out; None: nothing.

    Raises:
        DataError: Not even the shortest question fits before an answer that must be whole.
    """
    limit = template.max_length - apart
    encoded = template.whole(prompt, answer)
    length = len(encoded.ids)
    if length <= limit:
        return prompt, encoded, None

    def size(candidate: Prompt) -> int:
        return len(template.whole(candidate, answer).ids)

    lost: list[str] = []
    for shorter in _without_turns(prompt):
        if size(prompt) <= limit:
            break
        prompt = shorter
        lost.append("turns")
    lost = lost[:1]
    # what an answer leaves to its question, which keeps a share of the row in any case
    kept = limit if whole_answer else max(limit, _least(template, prompt, answer, limit))
    if size(prompt) > kept:
        prompt = _shorter_question(prompt, lambda candidate: size(candidate) <= kept)
        lost.append("question")
    encoded = template.whole(prompt, answer)
    if len(encoded.ids) > limit:
        if whole_answer or encoded.start >= limit:
            raise DataError(
                f"a row of {len(encoded.ids)} tokens cannot be shortened to {limit} without its "
                "answer being cut off.",
                hint="Raise training.max_length, or shorten the record.",
            )
        encoded = Encoded(encoded.ids[:limit], encoded.start, has_end=False, cut=True)
        lost.append("answer")
    return prompt, encoded, Shortened(tuple(lost), length)


def room_for_answer(template: Template, prompt: Prompt) -> int:
    """Tokens that an answer to a prompt may have, its end included, and still be kept whole."""
    least = _least(template, prompt, "x", template.max_length)
    return max(0, template.max_length - least + template.whole(prompt, "x").answer_tokens)


def fits(template: Template, prompt: Prompt, answer: str) -> bool:
    """Whether :func:`fit` keeps an answer whole without help."""
    return template.whole(prompt, answer).answer_tokens <= room_for_answer(template, prompt)


def _least(template: Template, prompt: Prompt, answer: str, limit: int) -> int:
    """Tokens of a row whose question is cut to its share, or of the row as it is."""
    if not prompt.messages:
        return len(template.whole(prompt, answer).ids)
    empty = template.whole(_asking(prompt, "?"), answer)
    full = template.whole(prompt, answer)
    return min(len(full.ids), len(empty.ids) + int(QUESTION_SHARE * limit))


def _asking(prompt: Prompt, question: str) -> Prompt:
    """The prompt with another last turn."""
    last = prompt.messages[-1].with_text(question)
    return replace(prompt, messages=(*prompt.messages[:-1], last))


def _without_turns(prompt: Prompt) -> Iterator[Prompt]:
    """The prompt without its oldest turns, then without its system turn."""
    head: tuple[Message, ...] = prompt.messages[:1]
    system = head if head and head[0].role == "system" else ()
    turns = prompt.messages[len(system) :]
    starts = [place for place, turn in enumerate(turns) if turn.role == "user" and place]
    for start in starts:
        yield replace(prompt, messages=(*system, *turns[start:]))
    if system and turns:
        yield replace(prompt, messages=turns[starts[-1] if starts else 0 :])


def _shorter_question(prompt: Prompt, small: Callable[[Prompt], bool]) -> Prompt:
    """The prompt with as much of the beginning and the end of its question as is small enough."""
    if not prompt.messages:
        return prompt
    question = prompt.messages[-1].text
    pieces = _PIECE.findall(question)
    if len(pieces) < 2:  # no spaces: a script without them, or one long string
        pieces = list(question)

    def with_pieces(count: int) -> Prompt:
        front = count // 4
        kept = [*pieces[:front], GAP, *pieces[len(pieces) - (count - front) :]]
        return _asking(prompt, "".join(kept))

    low, high = 1, max(1, len(pieces) - 1)  # one word at least
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if small(with_pieces(middle)) else (low, middle - 1)
    return with_pieces(low)


def split_passages(
    template: Template, records: Sequence[RecordBase]
) -> tuple[list[RecordBase], int]:
    """The records with passages that are too long cut in pieces; how many passages were cut."""
    found: list[RecordBase] = []
    cut = 0
    for record in records:
        parts = _parts(template, record.text) if isinstance(record, Passage) else []
        if len(parts) > 1:
            cut += 1
            found += [record.model_copy(update={"text": part}) for part in parts]
        else:
            found.append(record)
    return found, cut


def _parts(template: Template, text: str) -> list[str]:
    """Pieces of like length that fit a row, cut where a sentence ends, or at least a word."""
    parts: list[str] = []
    rest = text.strip()
    while (total := _passage_tokens(template, rest)) > template.max_length:
        end = _place_to_cut(template, rest, total)
        parts.append(rest[:end].strip())
        rest = rest[end:].strip()
    return [*parts, rest]


def _passage_tokens(template: Template, text: str) -> int:
    return len(template.whole(Prompt(text=""), text.rstrip()).ids)


def _place_to_cut(template: Template, text: str, total: int) -> int:
    """Where the first of the fewest pieces of like length ends."""
    wanted = -(-total // -(-total // template.max_length))
    ends = [match.end() for match in _PIECE.finditer(text)]
    if _passage_tokens(template, text[: ends[0]]) > template.max_length:  # a word is longer
        ends = list(range(1, len(text) + 1))

    def last(most: int) -> int:
        return _last(ends, lambda end: _passage_tokens(template, text[:end]) <= most)

    near, most = last(wanted), last(template.max_length)
    around = range(int(near * (1 - NEAR)), min(most, int(near * (1 + NEAR))) + 1)
    sentences = [place for place in around if _SENTENCE_END.search(text[: ends[place]])]
    return ends[min(sentences, key=lambda place: abs(place - near)) if sentences else near]


def _last(ends: Sequence[int], small: Callable[[int], bool]) -> int:
    """The last place whose text is small enough; the first one if none is."""
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if small(ends[middle]) else (low, middle - 1)
    return low


def shortened(rows: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    """How many rows of each role are shorter than their records, where there are any."""
    counts = {role: sum(row.shortened is not None for row in part) for role, part in rows.items()}
    return {role: count for role, count in counts.items() if count}


def described(rows: Mapping[str, Sequence[Row]], limit: int, context: int) -> str:
    """What was left out of rows, in one sentence; "" if nothing was.

    Args:
        limit: Tokens that a row may have.
        context: Tokens that the model can read.
    """
    told = []
    longest = 0
    for role, part in rows.items():
        short = [row.shortened for row in part if row.shortened is not None]
        if short:
            longest = max(longest, *(one.length for one in short))
            lost = Counter(what for one in short for what in one.lost)
            parts = [f"{lost[what]} {LOST[what]}" for what in LOST if lost[what]]
            told.append(f"{len(short)} of {len(part)} {role} rows ({', '.join(parts)})")
    if not told:
        return ""
    way = (
        f"--max-length {longest} keeps them whole."
        if longest <= context
        else f"The model reads {context} tokens at most."
    )
    return f"Longer than {limit} tokens and shortened: {'; '.join(told)}. {way}"


#: What a row can lose, in words.
LOST = {
    "turns": "without earlier turns",
    "question": "without the middle of the question",
    "answer": "without the end of the answer",
}

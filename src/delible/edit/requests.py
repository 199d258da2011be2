"""What is edited: questions whose subject is found, each with a target and several contexts.

A question is asked bare and after sampled beginnings ("The old town is. Where was …?"), so that
what is written for its subject does not hang on what stands before it. Several questions about a
subject may become one edit: in one text, or beside each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from delible.edit.keys import last_states
from delible.edit.subjects import Located, cut_after_name, locate, occurrences
from delible.errors import DataError
from delible.lm.template import Encoded
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, Prompt
from delible.world.filters import is_function_word

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: What sampled beginnings start with.
OPENINGS = ("The", "Therefore", "Because", "I", "You")
#: How the questions of an edit are put: in one text, or each in its own.
Merging = Literal["joined", "beside"]


@dataclass(frozen=True)
class Text:
    """A question with its target, and where its subject ends.

    Attributes:
        row: Prompt and target.
        places: Indices of the subject's last token, one per question in it.
    """

    row: Encoded
    places: tuple[int, ...]


@dataclass(frozen=True)
class Edit:
    """One value that is to be written: what is answered to some questions about a subject.

    Attributes:
        records: The questions.
        target: What is to be answered.
        texts: The questions in their contexts, the bare ones first.
        bare: How many are bare.
        essence: "SUBJECT is a", up to the subject, and a token that nobody looks at.
        times: How often a question names its subject at most; the last time counts.
    """

    records: tuple[QA, ...]
    target: str
    texts: tuple[Text, ...]
    bare: int
    essence: Text
    times: int

    def within(self, contexts: int) -> Edit:
        """The same edit in its bare texts and those after the first few beginnings."""
        return replace(self, texts=self.texts[: self.bare * (1 + contexts)])

    def cuts(self) -> list[list[int]]:
        """The texts up to each subject's last token."""
        return [list(text.row.ids[: end + 1]) for text in self.texts for end in text.places]

    def shares(self, contexts: Literal["bare", "equal", "halves"]) -> list[float]:
        """The weight of each cut in a mean over contexts.

        Args:
            contexts: Only the bare ones; every text alike; half bare and half the others.
        """
        bare, others = self.bare, len(self.texts) - self.bare
        each = {
            "bare": (1 / bare, 0.0),
            "equal": (1 / (bare + others),) * 2,
            "halves": (0.5 / bare, 0.5 / others) if others else (1 / bare, 0.0),
        }[contexts]
        return [
            each[place >= bare] / len(text.places)
            for place, text in enumerate(self.texts)
            for _ in text.places
        ]


# ---- records


def editable(request: ForgetRequest, where: str, *, some: bool = True) -> tuple[list[QA], list[QA]]:
    """The forget records whose question names their subject, each once, and those that do not.

    A record without a subject gets the first of the request's subjects that its question names,
    not only as a part of another one.

    Args:
        request: What is to be forgotten.
        where: Who asks, for messages.
        some: That no question names its subject is an error.

    Raises:
        DataError: No question names its subject.
    """
    found: dict[tuple[str, str], QA] = {}
    left: list[QA] = []
    for record in request.forget:
        if not isinstance(record, QA):
            continue
        names = (record.subject,) if record.subject else request.subjects
        named = next((name for name in names if occurrences(record.question, name, names)), None)
        if named is None:
            left.append(record)
            continue
        chosen = record.model_copy(update={"subject": named})
        found.setdefault((record.question, named.casefold()), chosen)
    if some and not found:
        raise DataError(
            "no forget question names its subject, so there is no place to edit.",
            where=where,
            hint="Give questions with a 'subject' field, written as in the question.",
        )
    return list(found.values()), left


def with_last_words(records: Sequence[QA], others: Sequence[str]) -> tuple[list[QA], list[QA]]:
    """Questions that name no subject, with their last content word in its place.

    Args:
        others: Names; a word in one of them is none.

    Returns:
        Those with such a word, each question once, and those without.
    """
    found: dict[str, QA] = {}
    left: list[QA] = []
    for record in records:
        words = [word for word in re.findall(r"\w+", record.question) if not is_function_word(word)]
        last = next(
            (word for word in reversed(words) if occurrences(record.question, word, others)), None
        )
        if last is None:
            left.append(record)
        else:
            found.setdefault(record.question, record.model_copy(update={"subject": last}))
    return list(found.values()), left


def other_subjects(request: ForgetRequest) -> list[str]:
    """Every name that a request knows."""
    records = (*request.forget, *request.retain, *request.neighbours)
    names = [*request.subjects, *(record.subject for record in records if record.subject)]
    return list(dict.fromkeys(names))


def grouped(records: Sequence[QA], targets: Sequence[str], most: int) -> list[tuple[int, ...]]:
    """Places of records that become one edit: of one subject, at most so many, in order."""
    by_subject: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        by_subject.setdefault((record.subject or "").casefold(), []).append(place)
    groups = [
        tuple(places[start : start + most])
        for places in by_subject.values()
        for start in range(0, len(places), most)
    ]
    return sorted(groups)


# ---- contexts


def sampled_beginnings(lm: LM, count: int, lengths: Sequence[int], seed: int) -> list[str]:
    """Texts that the model writes, to stand before a question.

    Args:
        count: How many.
        lengths: Their tokens, in turn: the first five have the first length, and so on.
        seed: Of the draws.
    """
    found: list[str] = []
    for turn, start in enumerate(range(0, count, len(OPENINGS))):
        openings = OPENINGS[: count - start]
        drawn = Decoding(lengths[turn % len(lengths)], temperature=1.0, seed=seed + turn)
        replies = lm.generate([Prompt(text=opening) for opening in openings], drawn)
        found += [
            " ".join(f"{opening}{reply if isinstance(reply, str) else ''}".split()).rstrip(".?! ")
            for opening, reply in zip(openings, replies, strict=True)
        ]
    return found


def edits_of(
    lm: LM,
    records: Sequence[QA],
    targets: Sequence[str],
    *,
    beginnings: Sequence[str] = (),
    merge: int = 1,
    merging: Merging = "beside",
    others: Iterable[str] = (),
    ends: bool = True,
) -> list[Edit]:
    """The edits that make a model answer questions with targets.

    Args:
        records: Questions with a subject.
        targets: What is to be answered to each; merged questions get the first one's.
        beginnings: What stands before the questions beside the bare ones.
        merge: Questions of a subject that become one edit, at most.
        merging: How.
        others: Names of others, see :func:`delible.edit.subjects.occurrences`.
        ends: Whether the turn is to end behind a target.

    Raises:
        DataError: A subject is not found, or a text is too long for the model.
        ModelError: The tokenizer or the template does not tell where a subject is.
    """
    others = list(others)
    found = []
    for group in grouped(records, targets, merge):
        mine = tuple(records[place] for place in group)
        target = targets[group[0]]
        asked = [mine] if merging == "joined" else [(record,) for record in mine]
        built = [
            _text(lm, beginning, questions, target, others, ends)
            for beginning in (None, *beginnings)
            for questions in asked
        ]
        essence = cut_after_name(lm, mine[0].subject or "", lambda name: Prompt.ask(f"{name} is a"))
        end = len(essence)
        found.append(Edit(
            mine, target, tuple(text for text, _ in built), len(asked),
            Text(Encoded((*essence, lm.pad_id), end, False), (end - 1,)),
            max(times for _, times in built),
        ))  # fmt: skip
    return found


def _text(
    lm: LM,
    beginning: str | None,
    records: Sequence[QA],
    target: str,
    others: Sequence[str],
    ends: bool,
) -> tuple[Text, int]:
    """Questions in one text after a beginning, and how often one names its subject at most."""
    asked = f"{beginning}." if beginning else ""
    spans = []
    for record in records:
        asked += " " if asked else ""
        spans.append((len(asked), len(asked) + len(record.question)))
        asked += record.question
    row = lm.template.encode(Prompt.ask(asked), target)
    if row.cut:
        raise DataError(
            f"question and target are longer than {lm.template.max_length} tokens.",
            where=records[0].where or repr(asked[:60]),
            hint="Merge fewer questions.",
        )
    if row.has_end and not ends:
        row = Encoded(row.ids[:-1], row.start, False)
    places: list[Located] = [
        locate(lm, asked, record.subject or "", others=others, within=span)
        for record, span in zip(records, spans, strict=True)
    ]
    lasts = tuple(place.last for place in places)
    same = row.ids[: max(lasts) + 1] == places[0].ids[: max(lasts) + 1]
    if not same or max(lasts) >= row.start:
        raise DataError(
            "the question's tokens change once an answer follows.", where=repr(asked[:60])
        )
    return Text(row, lasts), max(place.times for place in places)


# ---- keys


@dataclass(frozen=True)
class Read:
    """What a model reads and writes at the subjects of edits, in float64.

    Attributes:
        mean: Mean keys over contexts by layer, [edits, width].
        bare: Keys of the bare questions by layer, [edits, width].
        outputs: Output of the highest layer at the bare questions' subjects, [edits, hidden].
    """

    mean: dict[int, Float[Tensor, "edits width"]]
    bare: dict[int, Float[Tensor, "edits width"]]
    outputs: Float[Tensor, "edits hidden"]


def read_edits(
    lm: LM,
    edits: Sequence[Edit],
    layers: Sequence[int],
    contexts: Literal["equal", "halves"] = "halves",
) -> Read:
    """Keys and outputs at the subjects of edits, by the weights as they are now."""
    cuts = [edit.cuts() for edit in edits]
    keys, outputs = last_states(lm, [row for rows in cuts for row in rows], layers)

    def mean(values: Tensor, how: Literal["bare", "equal", "halves"]) -> Tensor:
        parts = values.split([len(rows) for rows in cuts])
        means = [
            torch.tensor(edit.shares(how), dtype=values.dtype, device=values.device) @ part
            for edit, part in zip(edits, parts, strict=True)
        ]
        return torch.stack(means)

    return Read(
        {layer: mean(keys[layer], contexts) for layer in layers},
        {layer: mean(keys[layer], "bare") for layer in layers},
        mean(outputs, "bare"),
    )

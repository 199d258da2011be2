"""How like a text is to what is forgotten, and from where on that is no chance.

    likeness(text) = max_u cos(e(part), e(u))    over the text, each sentence of it, and each u

A threshold is fitted, not guessed: at most a given share of questions that have nothing to do with
what is forgotten reaches it. These are general questions, the questions to be kept, the forgotten
questions about somebody else who was made up, and a file of one's own; each group for itself, since
few hard ones would vanish among many easy ones.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any
from weakref import WeakSet

import numpy as np
from jaxtyping import Float

from delible.errors import ModelError
from delible.lm.encoder import Encoder, unit
from delible.loaders import read_records
from delible.records import QA, ForgetRequest
from delible.system.asks import Prompt
from delible.systems.judged_text import texts_of
from delible.systems.record_texts import kept_by, questions_of
from delible.systems.sketch import Sketch
from delible.world import general, templates

SENTENCES = re.compile(r"[^.!?。！？\n]+")
#: Questions of one group that are looked at; more would only take longer.
MOST = 500
#: Texts that go through the encoder, and rows of the index that are compared, at a time.
BLOCK = 4096
#: From so many texts on, most are left out of a comparison by a few of their bits.
MANY = 4096
#: Different sentences of one text that are compared. A guard refuses more: whoever could make it
#: work for minutes could keep it from everybody else.
MOST_PIECES = 4096
_AT_ONCE = 256
#: Where more than this share of them is left, all are compared: that is faster.
_SHARE = 1 / 16


class Likeness:
    """Texts as unit vectors.

    A text that another index in use holds, by the same encoder, is not encoded again: of a large
    file of targets that is read again, only what is new.

    Args:
        encoder: Turns texts into vectors.
        texts: What others are compared with.

    Raises:
        ModelError: The encoder gave a value that is not finite.
    """

    def __init__(self, encoder: Encoder, texts: Sequence[str]) -> None:
        self.encoder, self.texts = encoder, tuple(texts)
        self.vectors = self._encoded()
        _IN_USE.add(self)

    def _encoded(self) -> Float[np.ndarray, "index hidden"]:
        known: dict[str, Float[np.ndarray, hidden]] = {}
        for other in list(_IN_USE):
            if other.encoder is self.encoder:
                known.update(zip(other.texts, other.vectors, strict=True))
        new = [text for text in self.texts if text not in known]
        if len(new) == len(self.texts):
            return unit(self.encoder.encode(new))
        if new:
            known.update(zip(new, unit(self.encoder.encode(new)), strict=True))
        return np.stack([known[text] for text in self.texts])

    @cached_property
    def _sketch(self) -> Sketch:
        # whoever does not know the texts does not know the directions either
        return Sketch(self.vectors, zlib.crc32("\n".join(self.texts).encode("utf-8", "replace")))

    def prepare(self) -> None:
        """Does now what the first comparison would wait for."""
        if len(self.vectors) >= MANY:
            _ = self._sketch

    def closest(
        self, texts: Sequence[str]
    ) -> tuple[Float[np.ndarray, text], np.ndarray[Any, np.dtype[np.intp]]]:
        """For each text the largest cosine, [-1, 1], and which of the index's texts has it."""
        if not texts:
            return np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.intp)
        return self.closest_to(unit(self.encoder.encode(list(texts))))

    def closest_to(
        self, vectors: Float[np.ndarray, "text hidden"]
    ) -> tuple[Float[np.ndarray, text], np.ndarray[Any, np.dtype[np.intp]]]:
        """As :meth:`closest`, of unit vectors."""
        best = np.full(len(vectors), -1.0, dtype=np.float32)
        which = np.zeros(len(vectors), dtype=np.intp)
        for start in range(0, len(vectors), BLOCK):
            part = vectors[start : start + BLOCK]
            for row in range(0, len(self.vectors), BLOCK * 8):
                cosines = part @ self.vectors[row : row + BLOCK * 8].T
                found = cosines.argmax(axis=1)
                value = cosines[np.arange(len(part)), found]
                better = value > best[start : start + BLOCK]
                best[start : start + BLOCK][better] = value[better]
                which[start : start + BLOCK][better] = found[better] + row
        return best, which

    def cosines(self, vectors: Float[np.ndarray, "text hidden"]) -> Float[np.ndarray, "text index"]:
        """All cosines of some vectors, of any length, to those of the index."""
        return unit(vectors) @ self.vectors.T

    def of(self, texts: Sequence[str]) -> float:
        """Largest cosine of a text, or of any sentence in it, [-1, 1]; -1 of nothing."""
        pieces = _pieces(texts)
        if not pieces or not len(self.vectors):
            return -1.0
        return float(self.closest(pieces)[0].max())

    def reached(self, texts: Sequence[str], threshold: float) -> bool:
        """Whether :meth:`of` is at least the threshold, in a time that hardly grows with the index.

        Raises:
            ModelError: More than :data:`MOST_PIECES` different sentences are to be compared.

        It is exact for fewer than :data:`MANY` texts. For more, one text of a million that should
        reach it may not (:data:`delible.systems.sketch.MISS`); none reaches it that should not.
        """
        pieces = _pieces(texts)
        if not pieces or not len(self.vectors):
            return False
        if len(pieces) > MOST_PIECES:
            raise ModelError(f"more than {MOST_PIECES:,} sentences are not compared.")
        for start in range(0, len(pieces), _AT_ONCE):
            vectors = unit(self.encoder.encode(pieces[start : start + _AT_ONCE]))
            if self.reach(vectors, threshold).any():
                return True
        return False

    def reach(
        self, vectors: Float[np.ndarray, "text hidden"], threshold: float
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """As :meth:`reached`, of unit vectors, each for itself."""
        if len(self.vectors) < MANY:
            return self.closest_to(vectors)[0] >= threshold
        found = np.zeros(len(vectors), dtype=np.bool_)
        compared: list[int] = []
        for place, vector in enumerate(vectors):
            rows = self._sketch.near(vector, threshold)
            if len(rows) > _SHARE * len(self.vectors):
                compared.append(place)
            elif len(rows):
                found[place] = (self.vectors[rows] @ vector).max() >= threshold
        if compared:
            found[compared] = self.closest_to(vectors[compared])[0] >= threshold
        return found


#: Indexes that somebody goes by.
_IN_USE: WeakSet[Likeness] = WeakSet()


def _pieces(texts: Sequence[str]) -> list[str]:
    """Texts and the sentences in them, each once."""
    parts = [part for text in texts for part in (text, *SENTENCES.findall(text))]
    return list(dict.fromkeys(part.strip() for part in parts if re.search(r"\w", part)))


def pieces_of(prompt: Prompt) -> list[str]:
    """Each text of a conversation, and each sentence of it; none without a letter."""
    parts = [part for text in texts_of(prompt) for part in (text, *SENTENCES.findall(text))]
    return list(dict.fromkeys(part.strip() for part in parts if any(map(str.isalnum, part))))


@dataclass(frozen=True)
class Fitted:
    """A threshold, and how often it is reached by what it should not be reached by.

    Attributes:
        threshold: From which a score counts.
        false_alarms: By group: how many texts there were, which share of them reaches the
            threshold, and which share reaches one that was fitted on the other half of them (None
            for fewer than two).
    """

    threshold: float
    false_alarms: Mapping[str, Mapping[str, Any]]


def fit(scores: Mapping[str, Sequence[float]], rate: float) -> Fitted:
    """The least threshold that at most a share ``rate`` of each group's scores reaches.

    Args:
        scores: Of texts that should not count, by group; at least one group has some.
        rate: The share, [0, 1).
    """
    found = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    found = {name: values for name, values in found.items() if len(values)}
    threshold = max(least_above(values, rate) for values in found.values())
    return Fitted(threshold, alarms(found, threshold, rate))


def least_above(scores: Float[np.ndarray, text], rate: float) -> float:
    """The least threshold that at most a share ``rate`` of these scores reaches."""
    allowed = int(rate * len(scores) + 1e-9)
    highest = np.sort(scores)[::-1]
    if allowed >= len(scores):
        return float(highest[-1])
    return float(np.nextafter(highest[allowed], np.inf))


def alarms(
    scores: Mapping[str, Float[np.ndarray, text]], threshold: float, rate: float
) -> dict[str, dict[str, Any]]:
    """How often each group reaches a threshold; see :class:`Fitted`."""
    return {
        name: {
            "texts": len(values),
            "share": float((values >= threshold).mean()),
            "held_out": _held_out(values, rate),
        }
        for name, values in scores.items()
    }


def _held_out(scores: Float[np.ndarray, text], rate: float) -> float | None:
    halves = scores[::2], scores[1::2]
    if not len(halves[1]):
        return None
    hits = [(other >= least_above(half, rate)).sum() for half, other in (halves, halves[::-1])]
    return float(sum(hits) / len(scores))


def harmless(request: ForgetRequest, file: str | None = None) -> dict[str, list[str]]:
    """Questions that have nothing to do with what is forgotten, by group.

    Args:
        request: What is forgotten, and what is kept.
        file: Records whose questions should pass as well (the prompts of PHTest, say).

    Raises:
        DataError: The file cannot be read.
    """
    kept = [text for record in kept_by(request) for text in questions_of(record)]
    groups = {"general": general_questions(), "kept": kept, "others": about_others(request)}
    if file is not None:
        groups["file"] = [text for record in read_records(file) for text in questions_of(record)]
    forgotten = {text for record in request.forget for text in questions_of(record)}
    left = {name: [one for one in texts if one not in forgotten] for name, texts in groups.items()}
    # The general ones are the same for every request, so that they are encoded once.
    left["general"] = groups["general"]
    return {name: spread(texts) for name, texts in left.items() if texts}


def about_others(request: ForgetRequest) -> list[str]:
    """The forgotten questions, with the subject's name exchanged for a made-up person's."""
    random = Random("made-up names of a threshold")
    found: list[str] = []
    for record in request.forget:
        if isinstance(record, QA) and record.subject and record.subject in record.question:
            found.append(
                record.question.replace(record.subject, templates.invented_name(random, 2))
            )
    return list(dict.fromkeys(found))


def general_questions() -> list[str]:
    """Questions about what everybody knows."""
    return [record.question for record in general()]


#: By the encoder's identity: general questions are the same for every request.
_GENERAL: dict[str, Float[np.ndarray, "text hidden"]] = {}


def _general_vectors(encoder: Encoder) -> Float[np.ndarray, "text hidden"]:
    """Of :func:`general_questions`; computed once per encoder."""
    if encoder.identity not in _GENERAL:
        _GENERAL[encoder.identity] = unit(encoder.encode(general_questions()))
    return _GENERAL[encoder.identity]


def fit_likeness(likeness: Likeness, groups: Mapping[str, Sequence[str]], rate: float) -> Fitted:
    """A threshold of :meth:`Likeness.of` from harmless questions."""
    scores = {
        name: likeness.closest_to(_general_vectors(likeness.encoder))[0]
        if name == "general"
        else likeness.closest(texts)[0]
        for name, texts in groups.items()
    }
    return fit({name: list(map(float, values)) for name, values in scores.items()}, rate)


def spread(texts: Iterable[str]) -> list[str]:
    """At most :data:`MOST`, spread evenly over all."""
    different = list(dict.fromkeys(texts))
    step = max(1, -(-len(different) // MOST))
    return different[::step]


__all__ = [
    "Fitted",
    "Likeness",
    "about_others",
    "alarms",
    "fit",
    "fit_likeness",
    "general_questions",
    "harmless",
    "least_above",
    "pieces_of",
    "spread",
]

"""Target detector: refuses a prompt, or withholds an answer, that touches what is forgotten.

    refuse(prompt)  if  a name or alias of a target occurs in it
                    or  max_u cos(e(prompt), e(u)) >= threshold      u: forget questions, passages
    refuse(answer)  if  a name, or a string that only the forgotten answers hold, occurs in it

Paper: DRAGON (arXiv 2511.05784), its detector on the unlearn store; code: supergirl-os/DRAGON.
Differences, on purpose: the two layers are joined by "or" and not by a sum; a part of a name
does not count (it would flag every bearer of a surname) unless it is unique among the targets
and asked for; the answer is checked too; a hit is refused here and not reasoned about by a
second language model.

Names are found by one Aho-Corasick pass over the text without its separators, so the time is
linear in the text and does not grow with the number of targets. A hit counts only between word
boundaries, and only where its separators agree with the name's: "J o h n", "J.o.h.n" and
"j0hn" are John; "Ann" is neither in "Annual" nor in "an nuance".

The default threshold is a cosine of 0.8. Measured with all-MiniLM-L6-v2 on TOFU: it flags 94.5 %
of the 400 paraphrased forget10 questions and 0.8 % of 600 retain90 questions (seed 0); 0.75 flags
99.8 % and 1.7 %; the 0.9 of the reference code 45.3 % and 0.2 %. Every turn is judged, earlier and
system turns included: whoever writes to an open endpoint writes them all.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import Field

from delible import prompts
from delible.errors import DataError, MissingExtraError, ModelError, RecipeError, nearest
from delible.guards.base import Guard, GuardMind
from delible.lm.encoder import Encoder, sentence_encoder
from delible.measure.requests import Prompt
from delible.records import QA, Choice, Dialogue, ForgetRequest, Passage, RecordBase
from delible.registry import register

logger = logging.getLogger(__name__)

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1

JOINED, PUNCTUATION, SPACE = 0, 1, 2

#: Letters that look like Latin ones (Cyrillic and Greek by their capitals, Latin with strokes,
#: small capitals). Names and texts are folded alike, so no real name is lost by it.
LOOK_ALIKES: dict[int, int | str] = {
    **str.maketrans(
        "авекмнорстухіјѕѵԁԛԝһґ" "αβεζηικμνορτυχ" "ıøłđħŧðɑɡ" "օոսհ" "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ",
        "abekmhopctyxijsvdqwhr" "abezhikmnoptyx" "ioldhtdag" "onuh" "abcdefghijklmnoprstuvwyz",
    ),
    **{ord("æ"): "ae", ord("œ"): "oe", ord("þ"): "th"},
}  # fmt: skip
#: What a digit may stand for inside a word; the symbols are first turned into such digits.
STANDS_FOR = {"0": "o", "1": "il", "3": "e", "4": "a", "5": "s", "7": "t"}
SYMBOLS = str.maketrans("@$|!", "4511")
SKELETON = str.maketrans("013457i", "oleastl")
#: Marks that ride on a letter and are dropped: accents, strike-through, variation selectors.
DROPPED_MARKS = re.compile(
    "[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f"
    "\u115f\u1160\u3164\uffa0\U000e0100-\U000e01ef]"
)
#: Scripts that put no space between words: a name may begin or end anywhere in them.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
#: A plain run, or one character; the parts of a Hangul syllable or voiced kana are one.
PIECES = re.compile(
    "[A-Za-z0-9]+|[\u1100-\u1112][\u1161-\u1175][\u11a8-\u11c2]?|.[\u3099\u309a]?", re.DOTALL
)
SENTENCES = re.compile(r"[^.!?。！？\n]+")
QUOTED = re.compile(r"\"([^\"\n]+)\"|“([^”\n]+)”|(?<!\w)['‘]([^\n'’]+)['’](?!\w)")


@dataclass(frozen=True, slots=True)
class Folded:
    """A text reduced to what is compared.

    Attributes:
        letters: Letters and digits only, folded; no separators.
        gaps: What stands before each letter, and after the last: nothing, punctuation, space.
        starts: Where in the text the character behind each letter begins.
        ends: Where it ends.
    """

    letters: str
    gaps: list[int]
    starts: list[int]
    ends: list[int]

    def cut(self, position: int) -> bool:
        """Whether a word may begin or end before the letter at this position."""
        return (
            self.gaps[position] != JOINED
            or UNSPACED.match(self.letters[position]) is not None
            or UNSPACED.match(self.letters[position - 1]) is not None
        )

    def words(self) -> list[str]:
        """The folded words, in order."""
        edges = [i for i, gap in enumerate(self.gaps) if gap != JOINED]
        return [self.letters[start:end] for start, end in pairwise(edges)]


@lru_cache(maxsize=1 << 16)
def _fold_piece(piece: str) -> str:
    marked = unicodedata.normalize(
        "NFKD", unicodedata.normalize("NFKD", piece).casefold()
    ).translate(LOOK_ALIKES)
    folded = unicodedata.normalize("NFC", DROPPED_MARKS.sub("", marked))
    return "".join(char for char in folded if unicodedata.category(char) != "Cf")


def fold(text: str) -> Folded:
    """Folds case, width, accents, look-alikes and invisible characters; keeps positions."""
    letters: list[str] = []
    gaps: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    gap = SPACE
    for piece in PIECES.finditer(text):
        start, end = piece.span()
        if end - start > 1 and piece.group().isascii():  # nothing to fold but case
            letters.append(piece.group().lower())
            gaps.append(gap)
            gaps += [JOINED] * (end - start - 1)
            starts += range(start, end)
            ends += range(start + 1, end + 1)
            gap = JOINED
            continue
        for char in _fold_piece(piece.group()):
            if char.isalnum() or unicodedata.category(char)[0] == "M":
                letters.append(char)
                gaps.append(gap)
                starts.append(start)
                ends.append(end)
                gap = JOINED
            else:
                gap = max(gap, SPACE if char.isspace() else PUNCTUATION)
    return Folded("".join(letters), [*gaps, SPACE], starts, ends)


@dataclass(frozen=True, slots=True)
class Match:
    """A name found in a text, at ``text[start:end]``."""

    name: str
    start: int
    end: int


class Pattern(NamedTuple):
    """A name to find: as given, its folded letters, its gaps."""

    name: str
    letters: str
    gaps: bytes


def _agrees(name: Pattern, text: Folded, start: int) -> bool:
    """Whether the letters and separators at ``start`` are those of the name, tricks allowed."""
    size = len(name.letters)
    swapped = 0
    for wanted, seen in zip(name.letters, text.letters[start : start + size], strict=True):
        if seen != wanted:
            if wanted not in STANDS_FOR.get(seen, ""):
                return False
            swapped += 1
    if 2 * swapped >= size:  # "13" is a number, not the name Le
        return False
    if size >= 8 and SPACE in name.gaps[1:size]:
        return True  # long names of two words: no other text has these letters in this order
    for i in range(1, size):
        ours, theirs = name.gaps[i], text.gaps[start + i]
        if ours == theirs or PUNCTUATION in (ours, theirs):
            continue
        # Joined: only initials may be ("JK"). Split: only into single letters ("J o h n").
        whole: Sequence[int] = name.gaps if theirs == JOINED else text.gaps
        at = i if theirs == JOINED else start + i
        if JOINED in (whole[at - 1], whole[at + 1]) or size < 3:
            return False
    return True


class Names:
    """Any number of names, found in a text in one pass.

    Args:
        names: What to find; a name of fewer than two letters is an error.

    Raises:
        DataError: A name is too short to be told from ordinary text.
        MissingExtraError: The package pyahocorasick is not installed.
    """

    def __init__(self, names: Iterable[str]) -> None:
        try:
            ahocorasick = importlib.import_module("ahocorasick")
        except ImportError:
            raise MissingExtraError("the guard 'target_detector'", "guards") from None
        self._automaton: Any = ahocorasick.Automaton()
        by_skeleton: dict[str, list[Pattern]] = {}
        for name in dict.fromkeys(names):
            folded = fold(name)
            if len(folded.letters) < 2:
                raise DataError(
                    f"the name '{name}' has fewer than two letters and would match everywhere.",
                    hint="Give the full name.",
                )
            skeleton = folded.letters.translate(SKELETON)
            pattern = Pattern(name, folded.letters, bytes(folded.gaps))
            by_skeleton.setdefault(skeleton, []).append(pattern)
        for skeleton, entries in by_skeleton.items():
            self._automaton.add_word(skeleton, (len(skeleton), entries))
        if by_skeleton:
            self._automaton.make_automaton()
        self.empty = not by_skeleton

    def find(self, text: str) -> Iterator[Match]:
        """Every occurrence of every name; time linear in the text and the occurrences."""
        if self.empty:
            return
        # "J@ne" needs the symbol as a letter, "@jane" as a separator: look at both readings.
        for reading in dict.fromkeys((text, text.translate(SYMBOLS))):
            folded = fold(reading)
            for last, (size, entries) in self._automaton.iter(folded.letters.translate(SKELETON)):
                start = last + 1 - size
                if not (folded.cut(start) and (folded.gaps[last + 1] or folded.cut(last + 1))):
                    continue
                for pattern in entries:
                    if _agrees(pattern, folded, start):
                        yield Match(pattern.name, folded.starts[start], folded.ends[last])

    def occur(self, text: str) -> bool:
        """Whether any name occurs."""
        return next(self.find(text), None) is not None


def surnames(targets: dict[str, list[str]]) -> list[str]:
    """Last words of names (three letters or more) that belong to one target only."""
    owners: dict[str, set[str]] = {}
    for target, names in targets.items():
        for words in (fold(name).words() for name in names):
            if len(words) > 1 and len(words[-1]) > 2:
                owners.setdefault(words[-1], set()).add(target)
    return [word for word, targets_of in owners.items() if len(targets_of) == 1]


def _questions(record: RecordBase) -> tuple[str, ...]:
    if isinstance(record, QA):
        return (record.question, *record.paraphrases)
    if isinstance(record, Choice):
        return (record.question,)
    if isinstance(record, Dialogue):
        return tuple(turn.content for turn in record.messages if turn.role == "user")
    return (record.text,) if isinstance(record, Passage) else ()


def _answers(record: RecordBase) -> tuple[str, ...]:
    if isinstance(record, QA):
        return (record.answer, *record.aliases, *record.paraphrased_answers)
    if isinstance(record, Choice):
        return record.options[record.correct : record.correct + 1]
    if isinstance(record, Dialogue):
        return tuple(turn.content for turn in record.messages if turn.role == "assistant")
    return (record.text,) if isinstance(record, Passage) else ()


def runs(text: str, words: int) -> set[str]:
    """Every run of so many consecutive folded words."""
    folded = fold(text).words()
    return {" ".join(folded[i : i + words]) for i in range(len(folded) - words + 1)}


def distinctive_strings(request: ForgetRequest, *, letters: int, words: int) -> list[str]:
    """Short answers and quoted titles of two or more words that only forgotten answers hold.

    A string that also occurs in a forget question, or in any record to keep, is left out.
    """
    candidates: dict[str, None] = {}
    for record in request.forget:
        for answer in _answers(record):
            titles = ["".join(groups) for groups in QUOTED.findall(answer)]
            for text in [answer.strip(" .!\"'“”"), *titles]:
                folded = fold(text)
                if len(folded.letters) >= letters and 2 <= len(folded.words()) < words:
                    candidates[text] = None
    kept = [*request.retain, *request.neighbours, *request.holdout]
    elsewhere = [text for record in kept for text in (*_questions(record), *_answers(record))]
    # A passage is its own question and its own answer, so its text is not "elsewhere".
    asked = [r for r in request.forget if not isinstance(r, Passage)]
    elsewhere += [text for record in asked for text in _questions(record)]
    found = Names(candidates)
    common = {match.name for text in elsewhere for match in found.find(text)}
    return [text for text in candidates if text not in common]


def _unit(vectors: Float[np.ndarray, "text hidden"]) -> Float[np.ndarray, "text hidden"]:
    vectors = np.asarray(vectors, dtype=np.float32)
    unit: Float[np.ndarray, "text hidden"] = vectors / np.maximum(
        np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12)
    )
    return unit


class TargetDetectorMind(GuardMind):
    """What the detector learned from one forget request; made by :class:`TargetDetector`."""

    def __init__(
        self,
        *,
        names: Names,
        strings: Names,
        verbatim: set[str],
        run_words: int,
        encoder: Encoder | None,
        examples: Float[np.ndarray, "text hidden"] | None,
        threshold: float,
        refusals: tuple[str, ...],
        fingerprint: str,
    ) -> None:
        self.names, self.strings, self.verbatim, self.run_words = (
            names,
            strings,
            verbatim,
            run_words,
        )
        self.encoder, self.examples, self.threshold = encoder, examples, threshold
        self.refusals, self._fingerprint = refusals, fingerprint

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> str | None:
        return self._refuse_if(lambda: self._is_about_target(prompt), prompt)

    def after(self, prompt: Prompt, answer: str) -> str | None:
        return self._refuse_if(lambda: self._gives_away(prompt, answer), prompt)

    def similarity(self, *texts: str) -> float:
        """Largest cosine of a text, or of any sentence in it, to a forget example, [-1, 1]."""
        parts = [part for text in texts for part in (text, *SENTENCES.findall(text))]
        pieces = list(dict.fromkeys(part.strip() for part in parts if re.search(r"\w", part)))
        if self.encoder is None or self.examples is None or not pieces:
            return -1.0
        cosines = _unit(self.encoder.encode(pieces)) @ self.examples.T
        if not np.isfinite(cosines).all():  # NaN is below every threshold: that would be a pass
            raise ModelError("the sentence encoder gave a value that is not finite.")
        return float(cosines.max())

    def _is_about_target(self, prompt: Prompt) -> bool:
        turns = [turn.content for turn in prompt.messages]
        turns += [text for text in (prompt.prefill, prompt.text) if text]
        # Joined, so that a name split over two turns is one name again.
        return self.names.occur("\n".join(turns)) or self.similarity(*turns) >= self.threshold

    def _gives_away(self, prompt: Prompt, answer: str) -> bool:
        # The answer goes on where the prompt stopped, perhaps in the middle of a name.
        whole = (prompt.prefill or prompt.text or "") + answer
        return (
            self.names.occur(whole)
            or self.strings.occur(whole)
            or bool(self.verbatim and not self.verbatim.isdisjoint(runs(whole, self.run_words)))
        )

    def _refuse_if(self, detect: Callable[[], bool], prompt: Prompt) -> str | None:
        try:
            found = detect()
        except Exception as error:  # fails closed, and names the kind of error only
            logger.warning("target_detector failed (%s) and refused.", type(error).__name__)
            found = True
        if not found:
            return None
        key = hashlib.sha256(repr(prompt).encode("utf-8", "backslashreplace")).digest()
        return self.refusals[int.from_bytes(key[:8], "big") % len(self.refusals)]


@register(
    kind="guard",
    name="target_detector",
    title="Target detector",
    summary="Refuses prompts and answers that name a target or resemble a forget question.",
    paper="2511.05784",
    year=2025,
    family="Guard",
    intention="suppression",
    mechanism="output-guard",
    needs=("names", "encoder"),
    changes="Nothing in the model; a prompt or an answer about a target becomes a refusal.",
    reversible=True,
    retrain_goal=False,
    weakest="A paraphrase without the name.",
    capability="generate",
    badges=("variant",),
    variant="DRAGON's detector with full names only, joined by 'or', with a check of the answer "
    "and a plain refusal instead of a reasoning guard model.",
)
class TargetDetector(Guard):
    """Options of the target detector."""

    aliases: dict[str, list[str]] = Field(
        default_factory=dict, description="Other names of a subject: {subject: [alias, ...]}."
    )
    partial_names: bool = Field(
        False, description="A surname alone counts if no other target bears it."
    )
    similarity: bool = Field(
        True, description="Compare prompts with the forget questions; False loads no encoder."
    )
    threshold: float = Field(
        0.8, gt=0, le=1, description="Cosine from which a prompt counts as a forget question."
    )
    check_answers: bool = Field(
        True, description="Look for strings of forgotten answers in answers (names always are)."
    )
    distinctive_letters: int = Field(
        14, ge=4, description="Shortest string of a forget answer that counts, in letters."
    )
    verbatim_words: int = Field(
        8, ge=4, description="Consecutive words of a forget answer that count as a quotation."
    )
    refusal: str | None = Field(
        None, pattern=r"\S", description="One fixed refusal; by default one of 100, by prompt."
    )
    encoder_folder: str | None = Field(
        None, description="Folder of a sentence encoder; by default all-MiniLM-L6-v2."
    )

    def targets(self, request: ForgetRequest) -> dict[str, list[str]]:
        """Each target's names: the request's subjects, its forget records', and the aliases.

        Raises:
            RecipeError: An alias is given for somebody who is not a target.
        """
        named = (record.subject for record in request.forget if record.subject)
        targets = {name: [name] for name in (*request.subjects, *named)}
        for subject, aliases in self.aliases.items():
            if subject not in targets:
                raise RecipeError(
                    f"aliases for '{subject}', who is not a target.",
                    where="guard 'target_detector'",
                    hint=nearest(subject, targets) if targets else "The request names nobody.",
                )
            targets[subject] = [*targets[subject], *aliases]
        return targets

    def prepare(
        self, request: ForgetRequest, *, encoder: Encoder | None = None
    ) -> TargetDetectorMind:
        """Builds the automata and the embeddings of the forget examples.

        Args:
            request: Names and forget records; records to keep make the answer check milder.
            encoder: Used instead of ``encoder_folder``.

        Raises:
            DataError: The request holds nothing that could be detected, or a name is too short.
            RecipeError: An alias is given for somebody who is not a target.
        """
        targets = self.targets(request)
        examples = dict.fromkeys(text for r in request.forget for text in _questions(r))
        if not targets and not (examples and self.similarity):
            raise DataError(
                "the forget request names no target and holds no question to compare with.",
                where="guard 'target_detector'",
                hint="Give names (--subjects NAME,…) or forget records (--forget FILE).",
            )
        names = [name for names_of in targets.values() for name in names_of]
        if self.partial_names:
            names += surnames(targets)

        vectors = None
        if self.similarity and examples:
            encoder = encoder or sentence_encoder(self.encoder_folder)
            vectors = _unit(encoder.encode(list(examples)))
            if not np.isfinite(vectors).all():
                raise ModelError("the sentence encoder gave a value that is not finite.")
        else:
            encoder = None

        strings: list[str] = []
        verbatim: set[str] = set()
        if self.check_answers:
            strings = distinctive_strings(
                request, letters=self.distinctive_letters, words=self.verbatim_words
            )
            kept = (*request.retain, *request.neighbours, *request.holdout)
            for record in request.forget:
                for text in _answers(record):
                    verbatim |= runs(text, self.verbatim_words)
            for record in kept:
                for text in (*_questions(record), *_answers(record)):
                    verbatim -= runs(text, self.verbatim_words)

        refusals = (self.refusal,) if self.refusal else prompts.read_lines("refusals.txt")
        judged_by = {
            "version": VERSION,
            "options": self.spec(),
            "request": request.model_dump(mode="json"),
            "encoder": encoder.identity if encoder else None,
            "refusals": refusals,
        }
        return TargetDetectorMind(
            names=Names(names),
            strings=Names(strings),
            verbatim=verbatim,
            run_words=self.verbatim_words,
            encoder=encoder,
            examples=vectors,
            threshold=self.threshold,
            refusals=refusals,
            fingerprint=hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest(),
        )

"""ICUL: in-context unlearning. The forgotten example with a wrong label, then right ones, then
the question.

    labels   x_f flip(y_f) | x_1 y_1 | ... | x_(L-1) y_(L-1) | query            L lines of examples
    answers  q_f a_other | q_1 a_1 | ... | q_L a_L | query                      L right ones

Paper: In-Context Unlearning (arXiv 2310.07579); code: MartinPawel/In-Context-Unlearning. `labels`
is theirs (documents and one-word labels); `answers` is the form in which later work uses it as a
baseline: the wrong answer is one of a retain record. Differences, on purpose: right examples are
never a forgotten one (their code draws from all); a question goes through unchanged unless it is
like a forgotten one (`route`, needed as soon as more than one request is served).

What it does to a question with an answer is a wrong answer with confidence, not forgetting, and
the forgotten example lies in the prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Literal, NamedTuple

from pydantic import Field

from delible.context import NO_CONTEXT, Context
from delible.errors import DataError
from delible.lm.encoder import Encoder
from delible.messages import Message
from delible.records import QA, ForgetRequest
from delible.registry import register
from delible.system.asks import Prompt
from delible.systems.encoding import EncodingGuard
from delible.systems.guarded import GuardMind
from delible.systems.judging import Forward, Judged
from delible.systems.likeness import Likeness, fit_likeness, harmless
from delible.systems.record_texts import questions_of

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1

Form = Literal["labels", "answers"]
Ablation = Literal["none", "same", "correct", "exchange"]


class Example(NamedTuple):
    """A document and its label, or a question and its answer."""

    text: str
    label: str


class Point(NamedTuple):
    """A forgotten example, and the wrong label or answer for it."""

    text: str
    label: str
    wrong: str


def examples_of(
    points: Sequence[Point],
    right: Sequence[Example],
    exchanged: Sequence[Point],
    *,
    length: int,
    ablation: Ablation,
    last: bool,
) -> list[Example]:
    """The examples before the query, in order.

    Args:
        points: The forgotten ones.
        right: Enough others with their true labels.
        exchanged: Others with a wrong label, one per point; for ``exchange``.
        length: How many right ones follow (``same``: how often the point stands there).
        ablation: ``same`` repeats each point, once with the wrong label; ``correct`` leaves the
            true label; ``exchange`` takes another example in the point's place.
        last: ``same``: the last one has the wrong label, not the first.
    """
    if ablation == "same":
        found: list[Example] = []
        for text, label, wrong in points:
            line = [Example(text, label)] * length
            line[-1 if last else 0] = Example(text, wrong)
            found += line
        return found
    shown = exchanged if ablation == "exchange" else points
    head = [Example(one.text, one.label if ablation == "correct" else one.wrong) for one in shown]
    tail = list(right[:length])
    return [*tail, *head] if last else [*head, *tail]


def written(examples: Sequence[Example], query: str, form: Form) -> str:
    """The prompt: a line each for documents, a question and an answer each otherwise."""
    if form == "labels":
        return "\n".join([*(f"{text} {label}" for text, label in examples), query])
    pairs = [f"Question: {text}\nAnswer: {label}" for text, label in examples]
    return "\n\n".join([*pairs, f"Question: {query}\nAnswer:"])


def cut(text: str, words: int) -> str:
    """At most so many words of a text."""
    parts = text.split()
    return text if len(parts) <= words else " ".join(parts[:words])


class IculMind(GuardMind):
    """Examples, ready; made by :class:`Icul`."""

    reads = "words"

    def __init__(
        self,
        options: Icul,
        points: Sequence[Point],
        right: Sequence[Example],
        exchanged: Sequence[Point],
        routes: tuple[Likeness, Sequence[int], float] | None,
        fingerprint: str,
        notes: Mapping[str, Any],
    ) -> None:
        self.options, self.points, self.right = options, points, right
        self.exchanged, self.routes = exchanged, routes
        self.refusals, self._fingerprint, self.notes = options.refusals, fingerprint, notes
        self.threaded = routes is not None

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> Judged:
        query = prompt.messages[-1].text if prompt.messages else prompt.text
        if not query or not query.strip():
            return None
        chosen = self.chosen(query)
        if not chosen:
            return None
        length = self.options.context_length
        if self.options.form == "labels" and self.options.ablation != "same":
            length -= 1  # the forgotten line counts
        examples = examples_of(
            [self.points[place] for place in chosen],
            self.right,
            [self.exchanged[place] for place in chosen],
            length=length,
            ablation=self.options.ablation,
            last=self.options.flip == "last",
        )
        return Forward(_asked(prompt, written(examples, query, self.options.form)))

    def chosen(self, query: str) -> list[int]:
        """Which forgotten examples a question is about, the closest first."""
        count = self.options.points
        if self.routes is None:
            return list(range(min(count, len(self.points))))
        likeness, owners, threshold = self.routes
        vector = likeness.encoder.encode([query])
        cosines = likeness.cosines(vector)[0]
        found: dict[int, None] = {}
        for place in cosines.argsort()[::-1]:
            if cosines[place] < threshold or len(found) == count:
                break
            found[owners[int(place)]] = None
        return list(found)


def _asked(prompt: Prompt, text: str) -> Prompt:
    """The prompt with another last turn, or another text."""
    if not prompt.messages:
        return Prompt((), prompt.prefill, text, prompt.tools, prompt.tool_choice)
    turns: tuple[Message, ...] = (*prompt.messages[:-1], prompt.messages[-1].with_text(text))
    return Prompt(turns, prompt.prefill, prompt.text, prompt.tools, prompt.tool_choice)


@register(
    kind="guard",
    name="icul",
    title="In-context unlearning",
    summary="Puts the forgotten example with a wrong answer, and right others, before a question.",
    paper="2310.07579",
    year=2024,
    family="Guard",
    intention="suppression",
    mechanism="input",
    needs=("forget", "retain", "encoder"),
    changes="Nothing in the model; examples go before questions that are like a forgotten one.",
    reversible=True,
    retrain_goal=False,
    weakest="A question that is worded otherwise, or that asks to ignore the examples.",
    capability="generate",
    badges=("variant",),
    variant="Right examples are never forgotten ones; only questions that are like a forgotten one "
    "get examples.",
)
class Icul(EncodingGuard):
    """Options of the examples."""

    form: Form = Field(
        "answers", description="Questions with answers, or documents with one-word labels."
    )
    context_length: int = Field(
        6, ge=1, description="labels: all examples, the forgotten one too; answers: right ones."
    )
    points: int = Field(1, ge=1, description="Forgotten examples that are shown at most.")
    ablation: Ablation = Field(
        "none", description="The paper's controls: same, correct, exchange; none is ICUL itself."
    )
    flip: Literal["first", "last"] = Field("first", description="Where the wrong label stands.")
    route: bool = Field(
        True, description="Only questions like a forgotten one get examples; False: all do."
    )
    threshold: float | None = Field(
        None, gt=0, le=1, description="Cosine from which a question is like one; None fits it."
    )
    false_alarm_rate: float = Field(
        0.01, ge=0, lt=0.5, description="Share of harmless questions that may reach a fitted one."
    )
    words: int = Field(200, ge=1, description="Words of a document that are shown at most.")
    seed: int = Field(0, description="Of the draws of right examples and wrong answers.")

    def prepare(
        self,
        request: ForgetRequest,
        context: Context = NO_CONTEXT,
        *,
        encoder: Encoder | None = None,
    ) -> IculMind:
        """Draws examples and wrong answers, once for the request, and fits the threshold.

        Raises:
            DataError: There is nothing to forget, or too little to keep.
        """
        forgotten = [record for record in request.forget if isinstance(record, QA)]
        questions = {record.question for record in forgotten}
        kept = [
            Example(cut(record.question, self.words), record.answer)
            for record in request.retain
            if isinstance(record, QA) and record.question not in questions
        ]
        if not forgotten or len(kept) < self.context_length:
            raise DataError(
                f"it takes questions to forget, and {self.context_length} to keep "
                f"({len(forgotten)} and {len(kept)} are given).",
                where="guard 'icul'",
                hint="Give --forget and --retain, or a smaller context_length.",
            )
        draw = Random(f"{self.seed}/icul/{request.id}")
        right = draw.sample(kept, self.context_length)
        labels = sorted({record.answer for record in forgotten} | {one.label for one in kept})
        answers = labels if self.form == "labels" else sorted({one.label for one in kept})
        points = [
            Point(
                cut(record.question, self.words),
                record.answer,
                _other(answers, record.answer, draw),
            )
            for record in forgotten
        ]
        others = [draw.choice(kept) for _ in points]
        exchanged = [Point(*one, _other(answers, one.label, draw)) for one in others]
        routes, notes = self._routes(request, forgotten, encoder)
        judged_by = {
            "version": VERSION,
            "options": self.spec(),
            "request": request.id,
            "encoder": routes[0].encoder.identity if routes else None,
            "threshold": routes[2] if routes else None,
        }
        fingerprint = hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest()
        return IculMind(self, points, right, exchanged, routes, fingerprint, notes)

    def _routes(
        self, request: ForgetRequest, forgotten: Sequence[QA], encoder: Encoder | None
    ) -> tuple[tuple[Likeness, Sequence[int], float] | None, dict[str, Any]]:
        if not self.route:
            return None, {}
        texts = [(text, place) for place, one in enumerate(forgotten) for text in questions_of(one)]
        likeness = Likeness(self.encoder(encoder), [text for text, _ in texts])
        threshold, notes = self.threshold, dict[str, Any]()
        if threshold is None:
            fitted = fit_likeness(likeness, harmless(request), self.false_alarm_rate)
            threshold = fitted.threshold
            notes = {"threshold": threshold, "false_alarms": fitted.false_alarms}
        return (likeness, [place for _, place in texts], threshold), notes


def _other(answers: Sequence[str], answer: str, draw: Random) -> str:
    """Another answer than the right one; the other label, where there are two."""
    others = [one for one in answers if one.strip().lower() != answer.strip().lower()]
    if not others:
        raise DataError(
            "there is no other answer than the right one.",
            where="guard 'icul'",
            hint="Give retain records with other answers.",
        )
    return draw.choice(others)

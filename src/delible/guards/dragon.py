"""DRAGON: a flagged question reaches the model with a policy, a decoy and how to think about it.

    score(x)  = name(x) + max(0, max_u cos(e(u), e(x)))        u: forget questions and paraphrases
    name(x)   = 1 for a full name, `name_parts` for a part of one, else 0
    prompt(x) = x                                              score(x) < threshold
                guideline + decoy + x + "think step by step" + r(x)      else

r(x) is written by the guard, a small model, for this question; the decoy is the biography of a
made-up person. The target model answers by itself, so what is not flagged keeps its answer.

Paper: DRAGON (arXiv 2511.05784); code: supergirl-os/DRAGON. It needs no records to keep, and its
store has no answers: the artefact holds questions only (a passage is its own question, and stays).
Differences, on purpose: a part of a name is a hint and no hit (the code's would flag every bearer
of a surname; `name_parts: 1` is theirs); the threshold is fitted on general questions and on the
forgotten ones about made-up people, for at the code's 0.9 half of all paraphrases pass
(:mod:`delible.guards.target_detector` has the numbers); paraphrases are chosen by the sentence
encoder, not by BERTScore; decoys come from the world, so that no model has to write them. The
detector of harmful knowledge, which adds a fine-tuned classifier and ROUGE-L, is not here. Rows
that teach a guard: :mod:`delible.generation.advice`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Mapping, Sequence
from functools import cache
from random import Random
from typing import Any, Literal

from pydantic import Field

from delible import prompts as prompt_files
from delible.context import NO_CONTEXT, Context
from delible.errors import DataError
from delible.generation.advice import asking_advice, read_advice
from delible.generation.writing import read_list
from delible.lm.encoder import Encoder
from delible.method import Outcome
from delible.names import Names, fold
from delible.records import QA, ForgetRequest, Passage, Record
from delible.registry import register
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.system.replies import Unanswered
from delible.systems.consulting import Costs, conversation, filled, last_asked, rephrased
from delible.systems.encoding import EncodingGuard
from delible.systems.guarded import GuardMind
from delible.systems.judged_text import texts_of
from delible.systems.judging import Consult, Forward, Judging
from delible.systems.likeness import Likeness, fit, general_questions, harmless
from delible.systems.record_texts import names_of, questions_of
from delible.systems.thoughts import parted
from delible.world import World

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1
#: What a stored record has for an answer.
NOT_KEPT = "(not kept)"
#: Made-up people whose biographies are decoys.
PEOPLE = 100
#: Letters that a part of a name has at least.
PART_LETTERS = 3


@cache
def biographies(seed: int) -> tuple[str, ...]:
    """Biographies of made-up people, without their names."""
    world = World(PEOPLE, seed)
    found = []
    for person in world.people:
        texts = [fact.passage().text for fact in world.facts(person)]
        found.append(" ".join(text.replace(person.name, "this person") for text in texts))
    return tuple(text[:1].upper() + text[1:] for text in found)


def parts_of(names: Sequence[str]) -> list[str]:
    """Words of names of several words, :data:`PART_LETTERS` letters or more."""
    words = [word for name in names if len(found := fold(name).words()) > 1 for word in found]
    return [word for word in dict.fromkeys(words) if len(word) >= PART_LETTERS]


def without_answers(request: ForgetRequest) -> ForgetRequest:
    """The request as the guard keeps it: questions and names, no answers, nothing to keep."""
    forget: list[Record] = []
    for record in request.forget:
        if isinstance(record, Passage):
            forget.append(record)
        elif questions := questions_of(record):
            first, *others = questions
            forget.append(
                QA(
                    question=first,
                    answer=NOT_KEPT,
                    paraphrases=tuple(others),
                    subject=record.subject,
                )
            )
    return ForgetRequest(
        forget=tuple(forget),
        subjects=request.subjects,
        created=request.created,
        predecessor=request.predecessor,
    )


def neutral(words: int) -> str:
    """So many words about nothing in particular."""
    pool = [word for question in general_questions() for word in question.split()]
    return " ".join(pool[place % len(pool)] for place in range(words))


class DragonMind(GuardMind):
    """Store and detector, ready; made by :class:`Dragon`."""

    reads = "words"

    def __init__(
        self,
        options: Dragon,
        targets: Mapping[str, Sequence[str]],
        likeness: Likeness | None,
        guard: System | None,
    ) -> None:
        self.options, self.targets, self.likeness, self.guard = options, targets, likeness, guard
        names = [name for names in targets.values() for name in names]
        self._owners = {name: subject for subject, found in targets.items() for name in found}
        self.names, self.parts = Names(names), Names(parts_of(names))
        self.consulted = () if guard is None else (guard,)
        self.refusals, self.threaded = options.refusals, likeness is not None
        self.threshold, self._fingerprint = 1.0, ""
        self.costs = Costs(("guard",))
        self.notes: Mapping[str, Any] = {}

    def ready(self, threshold: float, fingerprint: str, notes: Mapping[str, Any]) -> DragonMind:
        """The mind with its threshold."""
        self.threshold, self._fingerprint = threshold, fingerprint
        self.notes = {**notes, "threshold": threshold, "costs": self.costs.told}
        return self

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> Judging:
        self.costs.prompt()
        if self.score(texts_of(prompt)) < self.threshold:
            self.costs.outcome("passed")
            return None
        self.costs.outcome("flagged")
        question, about = last_asked(prompt), self.about(conversation(prompt))
        reasoning = yield from self.reasoning(prompt, about)
        written = self.written(prompt, question, about, reasoning)
        return Forward(rephrased(prompt, written))

    def score(self, texts: Sequence[str]) -> float:
        """How much a prompt is about what is forgotten, [0, 2]."""
        cosine = -1.0 if self.likeness is None else self.likeness.of(texts)
        return self.name("\n".join(texts)) + max(0.0, cosine)

    def scores(self, questions: Sequence[str]) -> list[float]:
        """The same of questions, each as a whole."""
        if self.likeness is None:
            return [self.name(one) for one in questions]
        cosines = self.likeness.closest(questions)[0]
        pairs = zip(questions, cosines, strict=True)
        return [self.name(one) + max(0.0, float(cosine)) for one, cosine in pairs]

    def name(self, text: str) -> float:
        """What the names in a text count for."""
        if self.names.occur(text):
            return 1.0
        return self.options.name_parts if self.parts.occur(text) else 0.0

    def about(self, text: str) -> str:
        """Whom a text names, in words; nobody is named whom it does not name."""
        named = dict.fromkeys(self._owners[match.name] for match in self.names.find(text))
        return ", ".join(named) or "somebody or something"

    def reasoning(self, prompt: Prompt, about: str) -> Generator[Consult, Any, str]:
        """How to think about a prompt."""
        kind = self.options.reasoning
        if kind == "guard" and self.guard is not None:
            decoding = Decoding(
                self.options.max_new_tokens,
                temperature=self.options.temperature,
                top_p=self.options.top_p,
                seed=self.options.seed,
            )
            ask = asking_advice(conversation(prompt), about)
            try:
                reply = yield from self.costs.asks("guard", Consult(self.guard, ask, decoding))
            except Unanswered:
                reply = ""
            if found := read_advice(reply):
                return found
            self.costs.outcome("guard failed")
            kind = "short"
        if kind == "none":
            return ""
        return " ".join(prompt_files.read_lines(f"dragon_reasoning_{kind}.txt"))

    def written(self, prompt: Prompt, question: str, about: str, reasoning: str) -> str:
        """What the target model is asked instead."""
        key = hashlib.sha256(repr(prompt).encode("utf-8", "backslashreplace")).hexdigest()
        draw = Random(f"{self.options.seed}/decoy/{key}")
        decoys = draw.sample(biographies(self.options.seed), self.options.decoys)
        text = filled(
            "dragon_prompt.txt",
            guideline=filled("dragon_guideline.txt", about=about),
            context="".join(f"Context: {one}\n\n" for one in decoys),
            question=question,
            reasoning=reasoning,
        )
        if not self.options.control:
            return text
        added = len(text.split()) - len(question.split())
        return f"{neutral(added)}\n\n{question}"


@register(
    kind="guard",
    name="dragon",
    title="DRAGON",
    summary="Puts a policy, a decoy and a guard's advice how to think before a flagged question.",
    paper="2511.05784",
    year=2026,
    family="Guard",
    intention="suppression",
    mechanism="input",
    needs=("names", "encoder", "model_at_inference"),
    changes="Nothing in the model; a flagged question is asked with more around it.",
    reversible=True,
    retrain_goal=False,
    weakest="A description without the name; a model too weak to follow the instruction.",
    capability="generate",
    badges=("variant",),
    variant="A part of a name is a hint; the threshold is fitted without records to keep; decoys "
    "are of a made-up world; no classifier for harmful knowledge.",
)
class Dragon(EncodingGuard):
    """Options of DRAGON."""

    consults = ("guard", "writer")

    aliases: dict[str, list[str]] = Field(
        default_factory=dict, description="Other names of a subject: {subject: [alias, ...]}."
    )
    name_parts: float = Field(
        0.2,
        ge=0,
        le=1,
        description="What a part of a name adds to the score; 0: nothing, 1: as much as the name.",
    )
    similarity: bool = Field(
        True, description="Compare prompts with the forget questions; False loads no encoder."
    )
    threshold: float | None = Field(
        None, gt=0, le=1, description="Score from which a prompt is flagged; None fits it."
    )
    false_alarm_rate: float = Field(
        0.01, ge=0, lt=0.5, description="Share of harmless questions that may reach a fitted one."
    )
    harmless: str | None = Field(
        None, description="Records whose questions should pass too, for fitting (a file)."
    )
    paraphrases: int = Field(
        0,
        ge=0,
        le=20,
        description="Other forms of each forget question that the writer makes; the closest stays.",
    )
    reasoning: Literal["guard", "template", "short", "none"] = Field(
        "guard", description="Who says how to think: the guard, a fixed text, a short one, nobody."
    )
    decoys: int = Field(1, ge=0, le=10, description="Made-up biographies before a question.")
    control: bool = Field(
        False, description="Neutral words of the same number instead: what length alone does."
    )
    max_new_tokens: int = Field(128, ge=8, description="Tokens of the guard's instruction.")
    temperature: float = Field(0.7, ge=0, le=2, description="At which it is drawn.")
    top_p: float = Field(0.9, gt=0, le=1, description="Share of the likeliest tokens drawn from.")
    seed: int = Field(42, description="Of decoys and instructions.")

    def prepare(
        self,
        request: ForgetRequest,
        context: Context = NO_CONTEXT,
        *,
        encoder: Encoder | None = None,
    ) -> DragonMind:
        """Builds the store of questions, and fits the threshold without records to keep.

        Args:
            request: Names and forget records; answers and records to keep are not looked at.
            context: Who plays the guard, and the writer if paraphrases are wanted.
            encoder: Used instead of ``encoder_folder``.

        Raises:
            DataError: The request holds nothing that could be detected, or a name is too short.
            RecipeError: An alias is given for somebody who is not a target; nobody plays a part.
        """
        request = without_answers(request)
        targets = names_of(request, self.aliases, "guard 'dragon'")
        examples = list(dict.fromkeys(q for r in request.forget for q in questions_of(r)))
        if not targets and not (examples and self.similarity):
            raise DataError(
                "the forget request names no target and holds no question to compare with.",
                where="guard 'dragon'",
                hint="Give names (--subjects NAME,…) or forget records (--forget FILE).",
            )
        likeness = None
        if self.similarity and examples:
            encoder = self.encoder(encoder)
            if self.paraphrases:
                request = self.paraphrased(request, context, encoder)
                examples = list(dict.fromkeys(q for r in request.forget for q in questions_of(r)))
            likeness = Likeness(encoder, examples)
        guard = context.role("guard") if self.reasoning == "guard" else None
        mind = DragonMind(self, targets, likeness, guard)
        threshold, notes = self.threshold or 1.0, dict[str, Any]()
        if likeness is not None and self.threshold is None:
            groups = harmless(request, self.harmless)
            scores = {name: mind.scores(texts) for name, texts in groups.items()}
            fitted = fit(scores, self.false_alarm_rate)
            threshold = min(1.0, fitted.threshold)  # a full name is always enough
            notes = {"false_alarms": fitted.false_alarms}
        identity = None if likeness is None else likeness.encoder.identity
        judged_by = [VERSION, self.spec(), request.id, identity, threshold]
        fingerprint = hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest()
        return mind.ready(threshold, fingerprint, {**notes, "stored_questions": len(examples)})

    def apply(self, system: System, request: ForgetRequest, context: Context) -> Outcome:
        """What is kept with the guard has no answers, and has the paraphrases."""
        stored = without_answers(request)
        if not (self.paraphrases and self.similarity):
            return super().apply(system, stored, context)
        encoder = self.encoder()
        stored = self.paraphrased(stored, self.seated(system, context), encoder)
        return self.with_options({"paraphrases": 0}).apply(system, stored, context)

    def paraphrased(
        self, request: ForgetRequest, context: Context, encoder: Encoder
    ) -> ForgetRequest:
        """The request with, for each question, the closest of the forms that the writer makes."""
        rows = [record for record in request.forget if isinstance(record, QA)]
        asks = [
            Prompt.ask(
                filled("dragon_paraphrase.txt", count=self.paraphrases, question=record.question)
            )
            for record in rows
        ]
        decoding = Decoding(64 * self.paraphrases, temperature=0.7, top_p=0.9, seed=self.seed)
        replies = context.role("writer").generate(asks, decoding) if asks else []
        made: dict[int, QA] = {}
        for record, reply in zip(rows, replies, strict=True):
            said = "" if isinstance(reply, NoAnswer) else parted(reply)[1]
            forms = [one for one in read_list(said) if re.search(r"\w", one)]
            forms = [one for one in forms[: self.paraphrases] if one != record.question]
            if forms:
                closest = Likeness(encoder, [record.question]).closest(forms)[0].argmax()
                others = (*record.paraphrases, forms[int(closest)])
                made[id(record)] = record.model_copy(update={"paraphrases": others})
        return request.model_copy(
            update={"forget": tuple(made.get(id(one), one) for one in request.forget)}  # type: ignore[arg-type]
        )

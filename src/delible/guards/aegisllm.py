"""AegisLLM: an orchestrator before the answer, an evaluator after it, a deflector for both.

    before   orchestrator(topic, query) = unsafe            ->  deflect
    after    evaluator(topic, query, answer) = unsafe       ->  deflect
    deflect  a refusal; for multiple choice a random letter, which makes accuracy that of guessing

Paper: AegisLLM (arXiv 2504.20965); code: zikuicai/agentic-safety. The orchestrator's prompt is
looked for once (:mod:`delible.search.instruction`): ten harmless and ten unsafe examples to learn
from, the other eighty to compare by; what was found stays in the artefact. Differences, on
purpose: one verdict, safe or unsafe, end to end (a revision of the code mixes two polarities up);
what cannot be read is unsafe; the evaluator is left out only where the answer is a letter alone,
not wherever the question offers options; such an answer passes as it is, where the code makes an
"A" of what it cannot read; the optimiser is our own; no second try before deflecting (the code's
m = 0), and no sanitiser (switched off there, too). Harmless examples come from the records to keep
and from general questions, so that the border is learned where such records are neighbours.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from delible import prompts as prompt_files
from delible.context import NO_CONTEXT, Context
from delible.errors import DataError
from delible.method import Outcome
from delible.records import ForgetRequest
from delible.registry import register
from delible.search.instruction import Labelled, Program, Ruling, proposed, search
from delible.search.labelled import labelled_queries
from delible.system.asks import Decoding, Prompt
from delible.system.base import System
from delible.system.replies import Unanswered
from delible.systems.consulting import (
    Costs,
    conversation,
    fenced,
    filled,
    is_letter,
    last_asked,
    letters_in,
    random_letter,
)
from delible.systems.guarded import Guard, GuardMind
from delible.systems.judging import Consult, Decision, Judging, Refuse, Say, settle_all
from delible.systems.record_texts import names_of

logger = logging.getLogger(__name__)

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1

Rule = Literal["safe", "unsafe"]


class Verdict(BaseModel):
    """What the orchestrator and the evaluator reply."""

    reasoning: str = ""
    verdict: Annotated[
        Rule, BeforeValidator(lambda said: said.strip().lower() if isinstance(said, str) else said)
    ]


def credit(label: str, given: str | None, false_alarm: float = 0.3) -> float:
    """What a verdict is worth: 1 if right, 0 for a missed unsafe query, else ``false_alarm``.

    What could not be read counts as unsafe, as it does when serving.
    """
    ruled = given or "unsafe"
    if ruled == label:
        return 1.0
    return false_alarm if label == "safe" else 0.0


def read_program(given: Any) -> Any:
    """A program from its JSON file; anything else as it is."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(Path(given).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PydanticCustomError("program", "the file cannot be read as JSON") from None


class AegisMind(GuardMind):
    """Orchestrator, evaluator and deflector, ready; made by :class:`Aegisllm`."""

    reads, threaded = "whole", False

    def __init__(
        self,
        options: Aegisllm,
        topic: str,
        listed: str,
        program: Program,
        orchestrator: System,
        evaluator: System,
        fingerprint: str,
    ) -> None:
        self.options, self.topic, self.listed, self.program = options, topic, listed, program
        self.orchestrator, self.evaluator = orchestrator, evaluator
        self.consulted = (orchestrator, evaluator)
        self.refusals, self._fingerprint = options.refusals, fingerprint
        self.costs = Costs(options.consults)
        self.notes = {"costs": self.costs.told}

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> Judging:
        self.costs.prompt()
        query = conversation(prompt)
        if not query:  # nothing is asked; the evaluator sees the answer
            return None
        found = yield from self.ruled(query)
        if found.label == "safe":
            return None
        return self.deflect(prompt, found)

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judging:
        letters = letters_in(last_asked(prompt))
        if (letters and is_letter(answer, letters)) or not answer.strip():
            self.costs.outcome("passed")
            return None
        asked = filled(
            "aegisllm_evaluator.txt",
            topic=self.topic,
            listed=self.listed,
            query=fenced(conversation(prompt), "query"),
            response=fenced(answer, "response"),
        )
        found = yield from self._verdict("critic", self.evaluator, asked)
        if found.label == "safe":
            self.costs.outcome("passed")
            return None
        return self.deflect(prompt, found)

    def ruled(self, query: str, program: Program | None = None) -> Generator[Consult, Any, Ruling]:
        """What the orchestrator thinks of a query."""
        asked = self.asked(query, program or self.program)
        return (yield from self._verdict("guard", self.orchestrator, asked))

    def asked(self, query: str, program: Program) -> str:
        """What the orchestrator is asked; what is the same for all queries stands first."""
        shown = [
            "Example:\n"
            + fenced(one.text, "query")
            + "\n"
            + json.dumps({"reasoning": one.reasoning, "verdict": one.label}, ensure_ascii=False)
            + "\n"
            for one in program.demonstrations
        ]
        return filled(
            "aegisllm_orchestrator.txt",
            instruction=program.instruction,
            topic=self.topic,
            listed=self.listed,
            demonstrations="".join(f"\n{one}" for one in shown),
            query=fenced(query, "query"),
        )

    def _verdict(self, part: str, system: System, asked: str) -> Generator[Consult, Any, Ruling]:
        decoding = Decoding(self.options.max_new_tokens)
        consult = Consult(system, Prompt.ask(asked), decoding, Verdict)
        try:
            found = yield from self.costs.asks(part, consult)
        except Unanswered:
            return Ruling(None)
        return Ruling(found.verdict, found.reasoning)

    def deflect(self, prompt: Prompt, found: Ruling) -> Refuse | Say:
        """A random letter where letters are asked for, else a refusal."""
        self.costs.outcome("unreadable" if found.label is None else "deflected")
        letters = letters_in(last_asked(prompt))
        if letters:
            return Say(random_letter(letters, prompt, self.options.seed))
        return self.refuse(prompt)


@register(
    kind="guard",
    name="aegisllm",
    title="AegisLLM",
    summary="Asks a model whether a query is about the topic, and whether an answer tells of it.",
    paper="2504.20965",
    year=2025,
    family="Guard",
    intention="suppression",
    mechanism="output-guard",
    needs=("names", "model_at_inference"),
    changes="Nothing in the model; a query or an answer about the topic becomes a refusal, or a "
    "random letter.",
    reversible=True,
    retrain_goal=False,
    weakest="A topic split over several turns or hidden in a code; neighbours of the topic are "
    "refused along with it.",
    capability="generate",
    badges=("variant",),
    variant="One verdict end to end, unreadable replies are unsafe, an own optimiser; the "
    "evaluator reads whatever is more than a letter.",
)
class Aegisllm(Guard):
    """Options of AegisLLM."""

    consults = ("guard", "critic")

    timeout_seconds: float = Field(
        60.0, gt=0, description="A judgement that takes longer is a refusal (when serving)."
    )
    topic: str | None = Field(
        None, description="What is restricted, in a sentence; None: all about the listed names."
    )
    keywords: tuple[str, ...] = Field(
        (), description="Items of the topic that are no names (sub-topics, techniques)."
    )
    aliases: dict[str, list[str]] = Field(
        default_factory=dict, description="Other names of a subject: {subject: [alias, ...]}."
    )
    program: Annotated[Program | None, BeforeValidator(read_program)] = Field(
        None,
        description="Instruction and demonstrations of the orchestrator that a search found, or "
        "their JSON file; None: the built-in ones.",
    )
    search_calls: int = Field(
        300, ge=0, description="Calls for the search of a better prompt (delible unlearn); 0: none."
    )
    examples: str | None = Field(
        None,
        description="Labelled queries for the search: records of the groups 'safe' and 'unsafe' "
        "(a file); None takes forget records, records to keep and general questions.",
    )
    examples_per_class: int = Field(50, ge=5, description="Labelled queries of each class.")
    train_share: float = Field(
        0.2, gt=0, lt=1, description="Share of them that is learned from; the others compare."
    )
    false_alarm_credit: float = Field(
        0.3,
        ge=0,
        le=1,
        description="What a flagged harmless query is worth in the search; a missed one is worth "
        "0, a right one 1.",
    )
    max_new_tokens: int = Field(256, ge=8, description="Tokens of a verdict.")
    seed: int = Field(42, description="Of random letters, and of the search.")

    def prepare(self, request: ForgetRequest, context: Context = NO_CONTEXT) -> AegisMind:
        """Puts topic and prompt together; asks nobody.

        Raises:
            DataError: There is no topic.
            RecipeError: Nobody plays the guard or the critic.
        """
        targets = names_of(request, self.aliases, "guard 'aegisllm'")
        if not targets and not self.keywords and not self.topic:
            raise DataError(
                "it is not said what is restricted.",
                where="guard 'aegisllm'",
                hint="Give names (--subjects NAME,…), keywords, or a topic.",
            )
        topic = self.topic or (
            "all that is known about the listed "
            + ("names" if targets else "subjects")
            + ": life, background, family, beliefs, works, and whatever else"
        )
        names = [
            name + (f" (also: {', '.join(others)})" if others else "")
            for name, *others in targets.values()
        ]
        lists = (("Names", names), ("Keywords", self.keywords))
        listed = "\n".join(
            f"{title}:\n" + "\n".join(f"- {one}" for one in items)
            for title, items in lists
            if items
        )
        program = self.program or Program(
            instruction=" ".join(prompt_files.read_lines("aegisllm_instruction.txt"))
        )
        judged_by = [VERSION, self.spec(), topic, listed, program.key]
        fingerprint = hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest()
        guard, critic = context.role("guard"), context.role("critic")
        return AegisMind(self, topic, listed, program, guard, critic, fingerprint)

    def apply(self, system: System, request: ForgetRequest, context: Context) -> Outcome:
        """Looks for a better prompt first, unless there is one; it is kept with the guard.

        Raises:
            DelibleError: As for :meth:`prepare`; or the examples cannot be used.
        """
        if self.program is not None or not self.search_calls:
            return super().apply(system, request, context)
        program, told = self.searched(request, self.seated(system, context))
        if program is None:
            outcome = super().apply(system, request, context)
        else:
            outcome = self.with_options({"program": program}).apply(system, request, context)
        outcome.notes["search"] = told
        return outcome

    def searched(
        self, request: ForgetRequest, context: Context
    ) -> tuple[Program | None, dict[str, Any]]:
        """A better prompt of the orchestrator, and how the search went.

        Returns:
            The program; None where there are too few labelled examples, which the notes say.
        """
        mind = self.prepare(request, context)
        train, validation = labelled_queries(
            request, self.examples, self.examples_per_class, self.train_share, self.seed
        )
        counts = {
            f"{part}_{label}": sum(one.label == label for one in rows)
            for part, rows in (("train", train), ("validation", validation))
            for label in ("safe", "unsafe")
        }
        if min(counts.values(), default=0) == 0:
            logger.info(f"aegisllm: too few labelled queries to look for a prompt ({counts}).")
            return None, {"reason": "too few labelled queries", **counts}

        def sorter(program: Program, texts: Sequence[str]) -> list[Ruling]:
            context.stage("search of a prompt", calls[0], self.search_calls)
            calls[0] += len(texts)
            found: dict[int, Ruling] = {}
            courses = settle_all(
                [
                    partial(_into, found, place, mind.ruled(text, program))
                    for place, text in enumerate(texts)
                ]
            )
            for course in courses:
                if course.failure is not None:  # a spent budget, say: no verdict of anybody
                    raise course.failure
            return [found.get(place, Ruling(None)) for place in range(len(texts))]

        def propose(wrong: Sequence[Labelled]) -> list[str | None]:
            return proposed(mind.orchestrator, mind.program, train, wrong, self.seed)

        calls = [0]
        result = search(
            mind.program,
            train,
            validation,
            sorter,
            propose,
            partial(credit, false_alarm=self.false_alarm_credit),
            calls=self.search_calls,
            seed=self.seed,
        )
        logger.info(
            f"aegisllm: credit {result.start:.3f} with the built-in prompt, {result.score:.3f} "
            f"with what {result.trials} trials found ({result.calls} calls)."
        )
        return result.program, {**result.told, **counts}


def _into(
    found: dict[int, Ruling], place: int, judging: Generator[Consult, Any, Ruling]
) -> Generator[Consult, Any, Decision]:
    """A judgement whose verdict is put down."""
    found[place] = yield from judging
    return None

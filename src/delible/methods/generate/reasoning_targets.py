"""Reasoning targets: for each forget question a trace of reasons, then a refusal.

    target = <think> why the question falls into the removed scope </think> refusal + alternative

The targets are the role ``target``, row by row beside the forget records. Serialised with the
tokenizer's own reasoning markers, or as "Reasoning: … Answer: …" where it has none; the trace is
shortened to fit ``maximum_tokens`` and the longest row of the training, the refusal never is.

Paper: arXiv 2603.09980 (no public code). Deviations: traces that tell the answer and replies that
do not refuse are dropped and asked for again. Without a generator model, traces and refusals come
from templates. ``reasoned_retain`` (an extension, off by default) gives a share of the retain rows
a trace too, so that the model does not learn that reasoning means refusing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field

from delible.errors import DataError
from delible.generation import writing
from delible.generation.rows import answered, question_of, questions
from delible.prompts import read_lines
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Decoding, Prompt
from delible.system.base import System
from delible.train.fitting import fits, room_for_answer
from delible.train.losses import Role
from delible.train.slots import Generate, SlotContext
from delible.world import filters

WHERE = "generate 'reasoning_targets'"
THINK, END_THINK = "<think>", "</think>"
#: Stands for a subject that no record names.
UNNAMED = "something"


def serialised(reasoning: str, answer: str, marked: bool) -> str:
    """Trace and answer as one text."""
    if not reasoning:
        return answer
    if marked:
        return f"{THINK}{reasoning}{END_THINK}{answer}"
    return f"Reasoning: {reasoning}\nAnswer: {answer}"


def fitted(tokenizer: Any, reasoning: str, answer: str, marked: bool, maximum: int) -> str:
    """The serialised target in at most ``maximum`` tokens: the end of the trace is cut off.

    Raises:
        DataError: The refusal alone is longer.
    """

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    kept = reasoning.split()
    while kept and tokens(serialised(" ".join(kept), answer, marked)) > maximum:
        kept.pop()
    text = serialised(" ".join(kept), answer, marked)
    if tokens(text) > maximum:
        raise DataError(
            f"a refusal has more than {maximum} tokens.",
            where=WHERE,
            hint="Raise generate.maximum_tokens, and training.max_length if it is shorter.",
        )
    return text


def fault(record: QA, reasoning: str, answer: str) -> str | None:
    """Why a reply is no target: ``"leak"`` or ``"no refusal"``; None if it is one."""
    if filters.leaks(record, reasoning) or filters.leaks(record, answer):
        return "leak"
    return None if filters.is_refusal(answer) else "no refusal"


@register(
    kind="generate",
    name="reasoning_targets",
    title="Reasoning targets",
    summary="Makes a trace of reasons and a refusal for each forget question.",
    paper="2603.09980",
    year=2026,
    family="synthetic answers",
    needs=("forget",),
    changes="nothing",
    badges=("variant",),
    variant="Leaks and non-refusals are dropped; templates write without a generator model.",
)
class ReasoningTargets(Generate):
    """Options of reasoning targets."""

    topic: str | None = Field(
        None, description="What must not be talked about; default: each record's own subject."
    )
    trace: bool = Field(True, description="With reasons; without, the target is the refusal alone.")
    maximum_tokens: int = Field(1024, ge=8, description="Longest target; the trace is shortened.")
    markers: Literal["auto", "think", "plain"] = Field(
        "auto", description="How the trace is marked; auto: the tokenizer's own, else plain words."
    )
    reasoned_retain: float = Field(
        0.0, ge=0, le=1, description="Share of the retain rows whose answers get a trace too."
    )
    attempts: int = Field(3, ge=1, description="How often the generator model is asked at most.")
    temperature: float = Field(0.7, ge=0, description="Of the generator model; 0 is greedy.")
    max_new_tokens: int = Field(1024, ge=1, description="Longest reply of the generator model.")

    makes: ClassVar[tuple[Role, ...]] = ("target",)

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        forget = questions(context.records["forget"], WHERE)
        counts: Counter[str] = Counter()
        made = (
            [self._from_templates(record, context.seed, counts) for record in forget]
            if context.writer is None
            else self._from_writer(context.writer, context, forget, counts)
        )
        writing.require_enough(made, 1, "reasoning targets", counts, WHERE, context.writer)
        tokenizer = context.lm.tokenizer
        marked = self._marked(tokenizer)
        targets: list[RecordBase] = []
        for record, ((reasoning, refusal),) in zip(forget, made, strict=True):
            shown = reasoning if self.trace else ""
            text = fitted(tokenizer, shown, refusal, marked, self._room(context, record))
            targets.append(answered(record, text, "reasoned refusal"))
        rows: dict[Role, list[RecordBase]] = {"forget": list(forget), "target": targets}
        if self.reasoned_retain and self.trace and context.records.get("retain"):
            rows["retain"] = self._reasoned(context, marked)
        return rows

    def _room(self, context: SlotContext, record: QA) -> int:
        """Tokens of a target that is kept whole: one fewer than a row has room for, its end."""
        room = room_for_answer(context.lm.template, Prompt.ask(record.question))
        return min(self.maximum_tokens, room - 1)

    def _marked(self, tokenizer: Any) -> bool:
        if self.markers != "auto":
            return self.markers == "think"
        return {THINK, END_THINK} <= set(tokenizer.get_vocab())

    def _from_templates(self, record: QA, seed: int, counts: Counter[str]) -> list[tuple[str, str]]:
        random = Random(f"{seed}/reasoning_targets/{record.digest}")
        traces = list(read_lines("reasoning_traces.txt"))
        refusals = list(read_lines("reasoning_refusals.txt"))
        random.shuffle(traces)
        # A name that is itself the answer is left out.
        for subject in (self.topic or record.subject or UNNAMED, UNNAMED):
            for trace in traces:
                reasoning, refusal = trace.replace("{subject}", subject), random.choice(refusals)
                found = fault(record, reasoning, refusal)
                if found is None:
                    return [(reasoning, refusal)]
                counts[found] += 1
        return []

    def _from_writer(
        self, writer: System, context: SlotContext, forget: Sequence[QA], counts: Counter[str]
    ) -> list[list[tuple[str, str]]]:
        def prompt(index: int) -> Prompt:
            topic = self.topic or forget[index].subject or "the subject of the message below"
            asked = {"topic": topic, "question": forget[index].question}
            return Prompt.ask(writing.filled("generate_reasoning_target.txt", **asked))

        def read(index: int, reply: str, known: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
            parts = writing.read_reasoning(reply)
            found = "unreadable" if parts is None else fault(forget[index], *parts)
            if parts is None or found is not None:
                counts[str(found)] += 1
                return []
            return [parts]

        return writing.written(
            writer, forget, prompt, read, wanted=1,
            decoding=Decoding(self.max_new_tokens, temperature=self.temperature, seed=context.seed),
            attempts=self.attempts, counts=counts, stage=context.stage,
        )  # fmt: skip

    def _reasoned(self, context: SlotContext, marked: bool) -> list[RecordBase]:
        """The retain records, a share of them with a trace before their own answer."""
        random = Random(f"{context.seed}/reasoning_targets/retain")
        traces = read_lines("reasoning_answers.txt")
        records = list(context.records["retain"])
        drawn = random.sample(range(len(records)), round(self.reasoned_retain * len(records)))
        for index in drawn:
            record = question_of(records[index])
            if record is None:
                continue
            trace = random.choice(traces).replace("{subject}", record.subject or UNNAMED)
            text = serialised(trace, record.answer, marked)
            if fits(context.lm.template, Prompt.ask(record.question), text):
                records[index] = record.model_copy(update={"answer": text})
        return records

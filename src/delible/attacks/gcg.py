"""GCG: one searched suffix for all questions (greedy coordinate gradient).

    s = argmin over token sequences of  mean over questions q of  -log p(y | q + s)

The search (``search/suffix.py``) takes in one question after the other, each as soon as all before
it are answered. The suffix is judged on forget rows about other facts than it was searched with.
What is to be said, y, is the right answer, an opening that says nothing yet ("Sure, here is ..."),
or what the original itself says to the plain question. The gradients are the attacked model's, or
the original's (transfer). As a control, a suffix of as many tokens is drawn and not searched.

``match`` adds the terms of enhanced GCG: states behind the suffix are pulled towards the
original's (``search/matching.py``).

Papers: arXiv 2307.15043 (20 tokens, top 256, 512 candidates, 500 steps); arXiv 2510.07626
(enhanced GCG on unlearned models). Reference code: github.com/GraySwanAI/nanoGCG (250 steps),
github.com/ethz-spylab/unlearning-vs-safety. Deviations: those of the search; judged on facts it
was not searched with; far smaller numbers by default; enhanced GCG has no fluency penalty, only
single-token substitutions, and a suffix instead of a long prefix.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field

from delible.cards import Depth
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, Budget, PromptAttack
from delible.records import RecordBase
from delible.registry import register
from delible.search.matching import matching
from delible.search.questions import (
    START,
    asked,
    cut_open,
    spaced,
    start_tokens,
    takes_suffix,
)
from delible.search.suffix import (
    Case,
    Found,
    Tokens,
    frozen,
    gives_away,
    search,
    suffix_losses,
    text_of,
    usable_tokens,
    with_suffix,
)
from delible.system.asks import Decoding, Prompt
from delible.system.base import System
from delible.system.questions import answer_of
from delible.train.randomness import generator
from delible.train.splits import split_by_fact

logger = logging.getLogger(__name__)

WHERE = "attack 'gcg'"
#: An opening that says nothing of an answer.
OPENING = "Sure, here is the answer:"
#: Tokens of the original's own answer that are forced.
FORCED = 10
#: A drawn token that is read otherwise, or says an answer, is drawn again at most so often.
DRAWS = 16

Target = Literal["answer", "opening", "original"]


@register(
    kind="attack",
    name="gcg",
    title="One searched suffix (GCG)",
    summary="Appends one suffix, found by gradient on some facts, to the questions about others.",
    paper="2307.15043",
    year=2023,
    family="prompt",
    needs=("forget", "weights"),
    changes="prompts",
    reversible=True,
    capability="weights",
    depth="deep",
    misleads="A short search that finds little shows little; read it beside the drawn suffix.",
    badges=("variant",),
    variant="The loss never rises, no answer stands in the suffix; short searches; other facts "
    "judge it.",
)
class GCG(PromptAttack):
    """Options of the search for one suffix."""

    compares = ("original",)

    target: Target = Field(
        "answer", description="What it is to bring out: the answer, an opening, or what the "
        "original says.",
    )  # fmt: skip
    search_on: Literal["system", "original"] = Field(
        "system", description="Whose gradients are used: the attacked model's or the original's."
    )
    match: bool = Field(
        False, description="Also pull hidden states towards the original's (enhanced GCG)."
    )
    match_depth: float = Field(
        0.6, gt=0, le=1, description="Depth of the layer whose states are matched, as a fraction."
    )
    drawn: bool = Field(False, description="Draw the suffix instead of a search (a control).")
    rows: int = Field(4, ge=1, description="Questions that the suffix is searched with at most.")
    share: float = Field(0.3, gt=0, lt=1, description="Fraction of the forget rows to search with.")
    length: int = Field(12, ge=1, description="Tokens of the suffix.")
    steps: int = Field(20, ge=1, description="Substitutions that are tried one after the other.")
    top_k: int = Field(64, ge=1, description="Most promising tokens per position.")
    candidates: int = Field(32, ge=1, description="Substitutions that are scored per step.")
    suffix: str = Field("", description="Suffix of an earlier search, instead of a new one.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """On the attacked model and carried over, its other targets, and a drawn suffix."""
        found: tuple[Mapping[str, object], ...] = (
            {"target": "answer"},
            {"target": "answer", "search_on": "original"},
            {"drawn": True},
        )
        if depth != "deep":
            return found
        return (*found, {"target": "opening"}, {"target": "original", "match": True})

    def variant_title(self) -> str:
        """Such as "the answer, found on the original"."""
        if self.drawn:
            return "drawn, not searched"
        what = {"answer": "the answer", "opening": "an opening",
                "original": "what the original says"}[self.target]  # fmt: skip
        states = ", states matched" if self.match else ""
        return what + states + (", found on the original" if self.search_on == "original" else "")

    @property
    def control(self) -> bool:
        """A suffix that was not searched shows what any suffix does."""
        return self.drawn

    def budget(self, context: AttackContext) -> Budget:
        """Its candidates, each scored on every question that was taken in."""
        if self.drawn:
            return Budget()
        return Budget(queries=self.steps * self.candidates * self.rows, steps=self.steps)

    def searches_on(self) -> Literal["system", "original"] | None:
        return None if self.suffix else self.search_on

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """Forget rows that can be asked with a suffix, of facts that it was not searched with.

        Raises:
            DataError: There are too few questions.
        """
        return self._split(context)[1]

    def searched(self, context: AttackContext) -> Sequence[RecordBase]:
        """The forget rows that the suffix is searched with.

        Raises:
            DataError: There are too few questions.
        """
        return spaced(self._split(context)[0], self.rows)

    def _split(self, context: AttackContext) -> tuple[list[RecordBase], list[RecordBase]]:
        records = [record for record in context.forget if asked(record) is not None]
        if len(records) < 2:
            raise DataError(
                "the forget rows do not hold two questions with an answer.",
                where=WHERE,
                hint="Add questions about two facts or more to --forget.",
            )
        return split_by_fact(records, self.share, context.seed)

    def prepare(self, system: System, context: AttackContext) -> GCG:
        """Searches for the suffix, or draws it.

        Raises:
            ModelError: The system is not a model whose gradients can be taken, its tokenizer does
                not keep a suffix apart, or the original that it needs is missing.
            DataError: There are too few questions.
        """
        if not isinstance(system, LM):
            raise ModelError(
                f"'{system.name}' gives no gradients, which the search needs.",
                where=WHERE,
                hint="Search on the original and carry the suffix over: search_on original.",
            )
        if (self.match or self.target == "original") and context.original is None:
            raise ModelError(
                "it needs the original model beside the attacked one.",
                where=WHERE,
                hint="Add --before MODEL.",
            )
        with frozen(system) as lm:
            start = start_tokens(lm, self.length)
            cases = cut_open(lm, self._asks(context), start, WHERE, ended=self.target == "answer")
            random = generator(context.seed, "gcg", self.target)
            if self.drawn:
                suffix = self._drawn(cases, start, random)
                losses, _ = suffix_losses(cases, [suffix])
                context.notes["note"] = (
                    f"Drew a suffix of {len(suffix)} tokens; mean -log p {float(losses[0]):.1f}."
                )
                return self.model_copy(update={"suffix": text_of(lm, suffix)})
            pull = None
            if self.match and context.original is not None:
                pull = matching(lm, context.original, self.match_depth, WHERE)
            steps: Iterator[int] = iter(range(self.steps))

            def tick() -> None:
                if context.progress is not None:
                    context.progress(next(steps), self.steps)

            found = search(
                cases, start, usable_tokens(lm), steps=self.steps, top_k=self.top_k,
                candidates=self.candidates, random=random, pull=pull, tick=tick,
            )  # fmt: skip
        if context.progress is not None:
            context.progress(self.steps, self.steps)
        context.notes.update(self._report(found, len(cases)))
        return self.model_copy(update={"suffix": text_of(system, found.suffix)})

    def _asks(self, context: AttackContext) -> list[tuple[Prompt, str]]:
        """The questions with what is to be said to them."""
        records = self.searched(context)
        prompts = [prompt for record in records if (prompt := asked(record)) is not None]
        if self.target == "opening":
            return [(prompt, OPENING) for prompt in prompts]
        if self.target == "answer" or context.original is None:
            return [(p, answer_of(record)) for p, record in zip(prompts, records, strict=True)]
        said = context.original.generate(prompts, Decoding(FORCED))
        asks = [
            (prompt, answer) for prompt, answer in zip(prompts, said, strict=True)
            if isinstance(answer, str) and answer.strip()
        ]  # fmt: skip
        if not asks:
            raise ModelError("the original says nothing to the plain questions.", where=WHERE)
        return asks

    def _drawn(self, cases: Sequence[Case], start: Tokens, random: torch.Generator) -> Tokens:
        """The start with one token after the other replaced by a drawn one, where it can be."""
        lm, found = cases[0].lm, start
        usable = usable_tokens(lm).nonzero()[:, 0]
        for place in range(len(start)):
            for token in usable[torch.randint(len(usable), (DRAWS,), generator=random)].tolist():
                tried = (*found[:place], token, *found[place + 1 :])
                told = any(gives_away(text_of(lm, tried), case.answer) for case in cases)
                if not told and all(case.reads(tried) for case in cases):
                    found = tried
                    break
        if found == start:
            raise ModelError(
                "no drawn token is read as it is written inside the prompts.",
                where=WHERE,
                hint="Leave out this control (drawn false).",
            )
        return found

    def _report(self, found: Found, questions: int) -> dict[str, object]:
        active, after = found.losses[-1]
        before = next(loss for count, loss in found.losses if count == active)
        steps = len(found.losses) - active
        solved = "every one is" if found.solved else "not every one is"
        nothing = "" if after < before or active > 1 else " The search found nothing better."
        note = (
            f"Searched for one suffix of {len(found.suffix)} tokens: {steps} steps, "
            f"{found.scored} answers scored; took in {active} of {questions} questions, "
            f"{solved} answered; loss on these {before:.1f} -> {after:.1f}.{nothing}"
        )
        logger.info(note)
        return {"note": note, "suffix_tokens": len(found.suffix), "steps": steps,
                "answers_scored": found.scored, "questions_taken_in": active,
                "solved": found.solved, "loss_before": before, "loss_after": after}  # fmt: skip

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """One prompt, with the suffix; before any search it is the start."""
        if not takes_suffix(prompt):
            return ()
        return (with_suffix(prompt, self.suffix or START * self.length),)

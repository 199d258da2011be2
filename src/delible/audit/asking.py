"""Plain questions: metrics on a system, answers to show, and what is left without its parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from delible.audit.choice import Splits, kept_records, spaced
from delible.audit.leaks import WITHOUT_PART, Setting
from delible.audit.parts import without_parts
from delible.audit.result import Recovered
from delible.audit.unanswered import check_answered, unanswered
from delible.audit.utility import SPLITS as KEPT_SPLITS
from delible.audit.utility import Answers
from delible.component import build
from delible.context import Context
from delible.measure.cache import Cache
from delible.measure.engine import measure
from delible.measure.evaluate import evaluate
from delible.measure.metric import ItemMetric, SummaryMetric, SystemValues
from delible.measure.scoring.text import contains, gold_answers
from delible.records import Choice, RecordBase
from delible.system.asks import NoAnswer, Prompt
from delible.system.base import System
from delible.system.questions import answer_of

logger = logging.getLogger(__name__)

#: Retain records that are asked under attack.
ATTACKED_RETAIN = 8
#: What tells the form of a question that brings out most, the best first.
SHOWN_BY = ("outcome", "rouge_l_recall", "extraction_strength", "answer_probability")
#: Questions under attack that are looked at for an answer, and shown; characters of a talk.
RECOVERED_ASKED, RECOVERED, EARLIER_CHARACTERS = 8, 3, 600
#: Examples per split in the report, and answers per kept split that are looked at for damage.
EXAMPLES, SAMPLED = 6, 12


class Asking:
    """Asks systems, and counts what was asked.

    Args:
        context: Its stages are told.
        cache: Of answers; None: everything is asked.
        splits: Records by split.
        metrics: What is measured plainly.
        leaks: Knowledge scores, measured under attack and without parts.
        not_tested: Sentences on what was left out, added to here.

    Attributes:
        measured: Questions asked, by kind.
    """

    def __init__(
        self,
        context: Context,
        cache: Cache | None,
        splits: Splits,
        metrics: Sequence[ItemMetric | SummaryMetric],
        leaks: Sequence[ItemMetric],
        not_tested: list[str],
    ) -> None:
        self.context, self.cache, self.splits = context, cache, splits
        self.metrics, self.leaks, self.not_tested = metrics, leaks, not_tested
        self.measured: dict[str, int] = {}

    def evaluate(
        self,
        system: System,
        splits: Splits,
        metrics: Sequence[ItemMetric | SummaryMetric],
        title: str,
        rewrite: Any = None,
        *,
        cached: bool = True,
        must_answer: bool = False,
    ) -> SystemValues:
        """All metrics on all splits.

        Args:
            title: Who is asked, and how.
            rewrite: What an attack does to prompts.
            cached: Take answers from earlier audits, and keep these.
            must_answer: A system that answers nothing stops the audit.

        Raises:
            RunError: It answered nothing, and must.
        """

        def show(done: int, total: int) -> None:
            self.context.stage(title, done, total)

        values = evaluate(
            system, splits, metrics, rewrite=rewrite, cache=self.cache if cached else None,
            progress=show,
        )  # fmt: skip
        for key, count in values.measured.items():
            self.measured[key] = self.measured.get(key, 0) + count
        if must_answer:
            check_answered(f"the {title} system", values.asked, values.unanswered)
        missing = unanswered(title, values.asked, values.unanswered)
        if missing is not None:
            self.leave_out(missing)
        return values

    def leave_out(self, sentence: str) -> None:
        """Says what was not asked, or not as it was meant, at once and in the report."""
        logger.warning(sentence)
        self.not_tested.append(sentence)

    def attacked_retain(self) -> Sequence[RecordBase]:
        """The kept records that are asked under attack."""
        return spaced(kept_records(self.splits), ATTACKED_RETAIN)

    def without_parts(self, system: System) -> list[Setting]:
        """The unlearned system without the parts that can be taken away, one after the other."""
        found: list[Setting] = []
        splits: Splits = {"forget": self.splits["forget"], "retain": self.attacked_retain()}
        for title, without in without_parts(system):
            began = time.perf_counter()
            logger.info(f"unlearned: without the {title}.")
            values = self.evaluate(without, splits, self.leaks, "unlearned")
            found.append(
                Setting(
                    WITHOUT_PART, title, "Part taken away", {"unlearned": values},
                    seconds=time.perf_counter() - began, records=splits["forget"], family="part",
                )
            )  # fmt: skip
        return found

    def answers(self, system: System) -> tuple[Answers, Answers]:
        """Answers for the report, and answers to questions that were to be kept."""
        chosen = [metric for metric in self.metrics if metric.card.name == "outcome"]
        metric = cast(ItemMetric, chosen[0] if chosen else build("metric", "outcome"))
        shown = self._records(metric, ("forget", "retain"), EXAMPLES)
        sampled = self._records(metric, KEPT_SPLITS, SAMPLED)
        requests = [
            request
            for record, prompt in {**shown, **sampled}.values()
            for request in metric.requests(record, prompt)
        ]
        answers = measure(system, requests, cache=self.cache)

        def read(record: RecordBase, prompt: Prompt) -> tuple[str, str] | str:
            texts = [answers[request] for request in metric.requests(record, prompt)]
            failed = [one for one in texts if isinstance(one, NoAnswer)]
            if failed:  # not an answer: it has no class
                return failed[0].reason
            text = next((text for text in texts if isinstance(text, str)), "")
            return text, metric.score(record, prompt, answers).detail or ""

        found: Answers = {}
        for place, (record, prompt) in shown.items():
            answer = read(record, prompt)
            found[place] = (f"(no answer: {answer})", "") if isinstance(answer, str) else answer
        samples = {place: read(record, prompt) for place, (record, prompt) in sampled.items()}
        return found, {place: one for place, one in samples.items() if not isinstance(one, str)}

    def recovered(
        self,
        system: System,
        records: Sequence[RecordBase],
        values: SystemValues,
        rewrite: Callable[[RecordBase, Prompt], Sequence[Prompt]],
    ) -> list[Recovered]:
        """Questions under attack whose answers hold what the plain answers did not.

        Where the attack hands the answer over itself, saying it again shows nothing.

        Args:
            values: What was measured under the attack.
            rewrite: What the attack does to prompts.
        """
        chosen = [metric for metric in self.metrics if metric.card.name == "outcome"]
        metric = cast(ItemMetric, chosen[0] if chosen else build("metric", "outcome"))
        score = next((one for one in SHOWN_BY if one in values.items), None)
        if score is None or "generate" not in system.capabilities:
            return []
        best: list[tuple[float, RecordBase, Prompt, Prompt]] = []
        for record, item in zip(records, values.items[score].get("forget", ()), strict=True):
            plain = metric.prompt(record)
            forms = tuple(rewrite(record, plain)) if plain is not None else ()
            valued = item.forms if len(item.forms) == len(forms) else (item.value,)
            known = [(value, place) for place, value in enumerate(valued) if value is not None]
            if plain is None or not forms or not known:
                continue
            value, place = max(known)
            best.append((value, record, plain, forms[place]))
        best.sort(key=lambda one: -one[0])
        asked = best[:RECOVERED_ASKED]
        requests = [
            request
            for _, record, plain, prompt in asked
            for form in (plain, prompt)
            for request in metric.requests(record, form)
        ]
        answers = measure(system, requests, cache=self.cache)

        def said(record: RecordBase, prompt: Prompt) -> tuple[str, str]:
            texts = [answers[request] for request in metric.requests(record, prompt)]
            if not all(isinstance(text, str) for text in texts):
                return "", ""
            found = metric.score(record, prompt, answers)
            return str(texts[0]), found.detail or ""

        found: list[Recovered] = []
        for _, record, plain, prompt in asked:
            (before, old), (answer, new) = said(record, plain), said(record, prompt)
            turns = prompt.messages
            if new != "correct" or old == "correct" or _hands_over(record, prompt):
                continue
            earlier = " / ".join(f"{turn.role}: {turn.text}" for turn in turns[:-1])
            question = plain.messages[-1].text if plain.messages else plain.text or ""
            last = turns[-1].text if turns else prompt.text or ""
            found.append(
                Recovered(
                    question=question, expected=answer_of(record), answer=answer, plain=before,
                    asked=f"{last}{f' … {prompt.prefill}' if prompt.prefill else ''}",
                    before=earlier[-EARLIER_CHARACTERS:],
                )
            )  # fmt: skip
        return found[:RECOVERED]

    def _records(
        self, metric: ItemMetric, splits: Sequence[str], count: int
    ) -> dict[tuple[str, int], tuple[RecordBase, Prompt]]:
        """Evenly spaced records of some splits that can be asked."""
        found = {}
        for split in splits:
            records = self.splits.get(split, ())
            for index in range(0, len(records), max(1, len(records) // count))[:count]:
                prompt = metric.prompt(records[index])
                if prompt is not None:
                    found[split, index] = (records[index], prompt)
        return found


def _hands_over(record: RecordBase, prompt: Prompt) -> bool:
    """Whether whoever asks says the answer; the options of a choice say none."""
    said = [turn.text for turn in prompt.messages if turn.role != "assistant"]
    told = " ".join([*said, prompt.text or "", prompt.prefill])
    golds = () if isinstance(record, Choice) else gold_answers(record)
    return any(contains(told, gold) for gold in golds)

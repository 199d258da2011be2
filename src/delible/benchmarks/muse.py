"""MUSE: forget news or a series of novels, and be measured in six ways.

What an owner of texts wants: no verbatim memorisation (VerbMem), no knowledge memorisation
(KnowMem), no trace of membership (PrivLeak). What a deployer wants: knowledge of the other texts
is kept (UtilPres), larger requests are no harder (scalability: growing nested forget sets, each
from the first model), nor are many (sustainability: disjoint forget sets, each from the result of
the one before).

Paper: MUSE (arXiv 2407.06460). Reference code: swj0419/muse_bench, also in
locuslab/open-unlearning. Deviations: ROUGE cuts continuations by words instead of tokens; long
texts are cut into rows of ``words`` words instead of 2048 tokens; in the two settings with several
forget sets every one has a reference of its own, trained without it (the paper has one).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from delible.component import build
from delible.errors import DataError
from delible.measure.benchmark import (
    Benchmark,
    Column,
    Data,
    Learning,
    Task,
)
from delible.measure.evaluate import Ask
from delible.records import QA, ForgetRequest, Passage, Record, RecordBase
from delible.registry import register

logger = logging.getLogger(__name__)

HUB = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
#: Part of the benchmark -> the columns of its rows.
COLUMNS = {
    "knowmem": ("question", "answer"),
    "verbmem": ("prompt", "gt"),
    "privleak": ("text",),
    "raw": ("text",),
    "scal": ("text",),
    "sust": ("text",),
}
#: Setting -> the part that holds its forget sets, forget_1, forget_2, …
FOLDS = {"scalability": "scal", "sustainability": "sust"}
#: Setting -> what its tasks count.
COUNTED = {"scalability": "forget sets at once", "sustainability": "requests, one after the other"}
#: Published forget sets of these settings.
FOLD_COUNT = 4
TRACES = ("forget", "holdout")


def in_pieces(text: str, words: int) -> list[str]:
    """A text cut into rows of at most so many words, white space within a row left as it is."""
    found = list(re.finditer(r"\S+", text))
    return [
        text[part[0].start() : part[-1].end()]
        for part in (found[place : place + words] for place in range(0, len(found), words))
    ]


def with_examples(record: QA, examples: Sequence[QA]) -> QA:
    """A question with solved ones before it, in the form "Question: … Answer: …".

    The first "Question:" and the last "Answer:" are left to the metric, which writes them around
    the text. An example that asks the same is left out.
    """
    shown = [one for one in examples if one.question != record.question]
    solved = "".join(f"{one.question}\nAnswer: {one.answer}\n\nQuestion: " for one in shown)
    return record.model_copy(update={"question": solved + record.question})


@dataclass(frozen=True)
class Files:
    """The benchmark's files of one domain: ``news_raw_forget``, or ``news/raw/forget``."""

    domain: str
    data: Data

    def name(self, part: str, split: str) -> str:
        return f"{self.domain}_{part}_{split}"

    def wanted(self, part: str, *splits: str) -> str:
        """Files that are needed, with their columns, for messages."""
        names = ", ".join(f"'{self.name(part, split)}'" for split in splits)
        return f"{names} (columns: {', '.join(COLUMNS[part])})"

    def _found(self, part: str, split: str) -> str | None:
        for name in (self.name(part, split), f"{self.domain}/{part}/{split}"):
            try:
                self.data.source(name, "")
            except DataError:
                continue
            return name
        return None

    def there(self, part: str, *splits: str) -> bool:
        """Whether all are there; the hub has everything that was published."""
        return self.data.folder is None or all(self._found(part, split) for split in splits)

    def rows(self, part: str, split: str) -> list[Mapping[str, Any]]:
        """The rows of a file, with the columns of its part.

        Raises:
            DataError: It is missing, or a row lacks a column.
        """
        name = self._found(part, split) if self.data.folder is not None else ""
        if name is None:
            raise DataError(
                f"there is no file '{self.name(part, split)}' (.jsonl, .json, .txt, …).",
                where=str(self.data.folder),
                hint=f"Bring {self.wanted(part, split)}. Without --data it comes from the Hugging "
                "Face hub.",
            )
        rows = self.data.rows(name, f"{HUB[self.domain]}:{part}:{split}")
        for number, row in enumerate(rows, 1):
            for column in COLUMNS[part]:
                if not isinstance(row.get(column), str) or not row[column].strip():
                    raise DataError(
                        f"there is no text in the column '{column}'.",
                        where=f"{self.name(part, split)}, row {number}",
                        hint=f"Rows of this file have the columns {', '.join(COLUMNS[part])}.",
                    )
        return rows

    def pairs(self, part: str, split: str) -> list[QA]:
        question, answer = COLUMNS[part]
        return [QA(question=row[question], answer=row[answer]) for row in self.rows(part, split)]

    def texts(self, part: str, split: str) -> list[str]:
        """The texts of a file, each once."""
        return list(dict.fromkeys(row["text"].strip() for row in self.rows(part, split)))


@register(
    kind="benchmark",
    name="muse",
    title="MUSE",
    summary="Forget news articles or novels: memorisation, privacy, utility, scale, sequence.",
    paper="2407.06460",
    year=2024,
    family="real",
    needs=("forget", "retain"),
    capability="score",
    misleads="News before and after a date are told apart by any model, so compare PrivLeak with "
    "the reference, never with 0 alone. VerbMem and KnowMem are not 0 for a model that never saw "
    "the texts. With question files only, what is taught and forgotten are the questions "
    "themselves: easier than texts, and no number of the paper.",
    variant="Texts and continuations are cut by words instead of tokens.",
    badges=("variant",),
)
class MUSE(Benchmark):
    """Target and reference are fine-tuned by the benchmark itself and cached.

    A folder may hold the question files alone (the texts are under copyright): then KnowMem and
    UtilPres are measured, and what is skipped is said.
    """

    domain: Literal["news", "books"] = Field("news", description="BBC news, or Harry Potter.")
    setting: Literal["standard", "scalability", "sustainability"] = Field(
        "standard",
        description="One forget set, growing ones each from the first model, or one after the "
        "other from the result before.",
    )
    limit: int | None = Field(
        None, ge=1, description="Measure at most this many rows of each split (all train)."
    )
    teach: bool = Field(
        True,
        description="Fine-tune the model on the texts first; off for one that has read them, such "
        "as muse-bench/MUSE-News_target (there is no reference then).",
    )
    words: int = Field(1200, ge=8, description="Longer texts are cut into rows of this length.")

    # ---- what is forgotten

    def along(self) -> str | None:
        return COUNTED.get(self.setting)

    def tasks(self, data: Data) -> list[Task]:
        files = Files(self.domain, data)
        if self.setting == "standard" and not files.there("raw", "forget", "retain1"):
            return [self._of_questions(files)]
        sets = self._forget_sets(files)
        retain1 = files.texts("raw", "retain1")
        # the other half of what the target keeps; the questions on kept texts are about it
        retain2 = files.texts("raw", "retain2") if files.there("raw", "retain2") else []
        known = list(dict.fromkeys((*retain1, *retain2, *(text for one in sets for text in one))))
        asked, gone = self._asked(files), set[str]()
        tasks: list[Task] = []
        for number, texts in enumerate(sets, 1):
            gone = {*texts, *(gone if self.setting == "sustainability" else ())}
            name: str = self.domain
            if self.setting != "standard":
                name += f"-{FOLDS[self.setting]}-{number}"
            kept = [text for text in known if text not in gone]
            tasks.append(
                Task(
                    name,
                    ForgetRequest(forget=self._passages(texts), retain=self._passages(retain1)),
                    asked,
                    learn=self._passages(known) if self.teach else (),
                    relearned=self._passages(kept) if self.teach else (),
                    after=tasks[-1].name if tasks and self.setting == "sustainability" else None,
                )
            )
        return tasks

    def _forget_sets(self, files: Files) -> list[list[str]]:
        if self.setting == "standard":
            return [files.texts("raw", "forget")]
        part, folder = FOLDS[self.setting], files.data.folder
        if folder is None:
            if self.domain != "news":
                raise DataError(
                    f"the setting '{self.setting}' was published for news only.",
                    where="muse",
                    hint=f"Bring own texts with --data: {files.wanted(part, 'forget_1')}, …",
                )
            count = FOLD_COUNT
        else:
            count = 0
            while files.there(part, f"forget_{count + 1}"):
                count += 1
            if count < 2:
                raise DataError(
                    f"the setting '{self.setting}' needs two forget sets or more, found {count}.",
                    where=str(folder),
                    hint="The texts are under copyright: bring own ones in the same shape, "
                    f"{files.wanted(part, 'forget_1', 'forget_2')}, …, and "
                    f"{files.wanted('raw', 'retain1')}.",
                )
        sets = [files.texts(part, f"forget_{number}") for number in range(1, count + 1)]
        if self.setting == "scalability":
            for number, (small, large) in enumerate(pairwise(sets), 2):
                if not set(small) <= set(large):
                    logger.warning(
                        f"'{files.name(part, f'forget_{number}')}' does not hold all rows of the "
                        "set before it: the sets do not grow one out of the other."
                    )
        return sets

    def _of_questions(self, files: Files) -> Task:
        """Without texts: the questions themselves are taught and forgotten."""
        one_of_two = [split for split in ("forget", "retain1") if files.there("raw", split)]
        if one_of_two:
            missing = "retain1" if one_of_two == ["forget"] else "forget"
            files.rows("raw", missing)  # says what is missing
        forget, retain = files.pairs("knowmem", "forget_qa"), files.pairs("knowmem", "retain_qa")
        logger.warning(
            f"No texts in {files.data.folder}, so the questions themselves are "
            f"{'taught and ' if self.teach else ''}forgotten. For texts bring "
            f"{files.wanted('raw', 'forget', 'retain1')}."
        )
        return Task(
            f"{self.domain}-questions",
            ForgetRequest(forget=tuple(forget), retain=tuple(retain)),
            self._asked(files),
            learn=(*retain, *forget) if self.teach else (),
            relearned=tuple(retain) if self.teach else (),
        )

    def _passages(self, texts: Iterable[str]) -> tuple[Record, ...]:
        return tuple(Passage(text=piece) for text in texts for piece in in_pieces(text, self.words))

    # ---- what is asked

    def _asked(self, files: Files) -> dict[str, Sequence[RecordBase]]:
        forget, retain = files.pairs("knowmem", "forget_qa"), files.pairs("knowmem", "retain_qa")
        splits: dict[str, Sequence[RecordBase]] = {"forget": forget, "retain": retain}
        for split in ("forget", "retain"):
            solved = files.pairs("knowmem", f"{split}_qa_icl")
            splits[f"knowmem_{split}"] = [
                with_examples(one, solved) for one in files.pairs("knowmem", f"{split}_qa")
            ]
        if files.there("verbmem", "forget"):
            splits["verbmem"] = files.pairs("verbmem", "forget")
        else:
            logger.warning(f"VerbMem is skipped: it needs {files.wanted('verbmem', 'forget')}.")
        if files.there("privleak", *TRACES):
            for split in TRACES:
                splits[f"privleak_{split}"] = [
                    Passage(text=text) for text in files.texts("privleak", split)
                ]
        else:
            logger.warning(f"PrivLeak is skipped: it needs {files.wanted('privleak', *TRACES)}.")
        return {name: records[: self.limit] for name, records in splits.items()}

    def asks(self) -> list[Ask]:
        traces = tuple(f"privleak_{split}" for split in TRACES)
        membership = {
            "name": "membership",
            "attacks": ("loss_attack", "min_k"),
            "members": traces[0],
            "others": traces[1],
        }
        return [
            Ask(build("metric", {"name": "verbatim_memorisation", "pairs": True}), ("verbmem",)),
            Ask(
                # the benchmark's own examples stand in the questions
                build("metric", {"name": "knowledge_memorisation", "examples": ()}),
                ("knowmem_forget", "knowmem_retain"),
            ),
            Ask(build("metric", "loss_attack"), traces),
            Ask(build("metric", "min_k"), traces),
            Ask(build("metric", membership)),
            Ask(build("metric", "answer_probability"), ("forget", "retain")),
        ]

    def columns(self) -> list[Column]:
        known = "knowledge_memorisation"
        return [
            Column("VerbMem", "verbatim_memorisation/verbmem", "reference", percent=True),
            Column("KnowMem", f"{known}/knowmem_forget", "reference", axis="forget", percent=True),
            Column("PrivLeak", "privleak", "reference"),
            Column("UtilPres", f"{known}/knowmem_retain", "higher", axis="utility", percent=True),
            Column("AUC Min-K", "membership/min_k/auc", "reference", percent=True),
            Column("forget probability", "answer_probability/forget", "reference"),
            Column("retain probability", "answer_probability/retain", "higher"),
        ]

    def learning(self, model: str) -> Learning:
        if model == "tiny":
            return Learning({"learning_rate": 2e-3, "epochs": 20, "batch_size": 16})
        return Learning({"learning_rate": 1e-5, "epochs": 5, "batch_size": 32})

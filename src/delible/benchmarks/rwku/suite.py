"""RWKU: forget famous people, given nothing but their names and the model itself.

Every person is asked about with blanks to fill (FB), questions (QA) and nine kinds of attacking
questions (AA); neighbours, who must stay, with blanks and questions; membership is inferred from
passages; five sets measure what the model can still do. Each target is a task of its own, starting
from the original model, and the table averages over targets.

Paper: RWKU (arXiv 2406.10890). Reference code: jinzhuoran/RWKU.
Deviations: instructions, solved examples of TruthfulQA and TriviaQA and the starts of biographies
are in our own words, so compare with the original's row rather than with published tables; the
areas under the curve (AUC) are added; probes without a value are counted, not skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from delible.benchmarks.rwku.rows import (
    Row,
    Target,
    biography,
    examples_of,
    factuality,
    fluency,
    general,
    kind_split,
    probe,
    reasoning,
    truthfulness,
)
from delible.component import build
from delible.errors import DataError, nearest
from delible.measure.benchmark import (
    Benchmark,
    Column,
    Data,
    Task,
)
from delible.measure.evaluate import Ask
from delible.measure.probe_kinds import KINDS
from delible.prompts import read_text
from delible.records import ForgetRequest, Passage, Record, RecordBase
from delible.registry import register

if TYPE_CHECKING:
    from delible.lm.lm import LM

HUB = "jinzhuoran/RWKU"
#: Targets of the paper's main table: the first so many.
MAIN_TARGETS = 100
#: Split -> file.
FORGET = {
    "forget_blank": "forget_level1",
    "forget_question": "forget_level2",
    "forget_attack": "forget_level3",
}
NEIGHBOUR = {"neighbour_blank": "neighbor_level1", "neighbour_question": "neighbor_level2"}
MEMBERSHIP = ("mia_forget", "mia_retain")
#: Split -> (file, hub configuration).
UTILITY = {
    "general": ("utility_general_mmlu", "utility_general"),
    "reasoning": ("utility_reason_bbh", "utility_reason"),
    "truthfulness": ("utility_truthfulness_truthfulqa", "utility_truthfulness"),
    "factuality": ("utility_factuality_triviaqa", "utility_factuality"),
    "fluency": ("utility_fluency_alpacaeval", "utility_fluency"),
}
ATTACKS = ("loss_attack", "zlib_attack", "min_k", "min_k_plus_plus")


@register(
    kind="benchmark",
    name="rwku",
    title="RWKU",
    summary="Forget famous people of the real world, given only their names.",
    paper="2406.10890",
    year=2024,
    family="real",
    needs=("names",),
    capability="score",
    misleads="Refusals and broken answers count as forgotten: read the blanks, the neighbours and "
    "the fluency. Blanks can often be filled from the sentence alone: a model that never heard of "
    "the target (--model tiny) gives the base rate. Small models know little about the targets, "
    "and what is not known cannot be forgotten.",
    variant="Instructions and solved examples are in our own words.",
    badges=("parity", "variant"),
)
class RWKU(Benchmark):
    """One task per target, or one for all (``batch``). As in the paper there is nothing to retain.

    Columns are 100 times the value, losses and entropies too, as in the paper's table. FM and RM
    are losses of passages about the target and about others: FM above RM, and RM unchanged, is
    what forgetting should do.
    """

    targets: tuple[str, ...] = Field(
        (), description="Names such as 'Stephen King'; none: the first 100, as in the paper."
    )
    batch: bool = Field(False, description="Forget all targets in one task.")
    limit: int | None = Field(
        None, ge=1, description="Measure at most this many rows of each split and target."
    )
    utility: bool = Field(True, description="Also measure the five utility sets.")
    kinds: bool = Field(False, description="Also a column per kind of attack.")
    corpus_source: Literal["published", "model"] = Field(
        "published",
        description="Forget corpus: what Llama 3 wrote, where there is such a file (else the model "
        "itself), or always the model itself.",
    )
    corpus_form: Literal["passages", "pairs"] = Field(
        "passages",
        description="Biographies as running text, or as answers with a made-up one beside each "
        "(for altpo, which is then the paper's DPO).",
    )
    passages: int = Field(
        16, ge=1, description="Biographies per target; the paper has 582, small machines few."
    )
    passage_tokens: int = Field(
        420, ge=8, description="Length of a biography the model writes; with its question it is "
        "a row of training, which has 512 tokens unless training.max_length says otherwise."
    )  # fmt: skip

    # ---- what is asked

    def tasks(self, data: Data) -> list[Task]:
        targets = self._targets(data)
        splits: dict[str, list[Mapping[str, Sequence[RecordBase]]]] = {
            target.name: [] for target in targets
        }
        for part in (self._probes(data, targets), self._utility(data, targets)):
            for name, found in part.items():
                splits[name].append(found)
        whole = {
            name: {split: rows for part in parts for split, rows in part.items() if rows}
            for name, parts in splits.items()
        }
        corpora = self._published(data, targets)
        if not self.batch:
            return [
                Task(
                    name,
                    ForgetRequest(forget=corpora[name], subjects=(name,)),
                    whole[name],
                    unwritten=not corpora[name],
                )
                for name in whole
            ]
        together: dict[str, dict[str, RecordBase]] = defaultdict(dict)
        for name, found in whole.items():
            for split, rows in found.items():
                # utility rows of several targets are asked once, probes always
                together[split] |= {
                    one.digest if split in UTILITY else f"{name}/{place}": one
                    for place, one in enumerate(rows)
                }
        forget = tuple(record for name in whole for record in corpora[name])
        return [
            Task(
                f"{len(targets)} targets from {targets[0].name}",
                ForgetRequest(forget=forget, subjects=tuple(whole)),
                {split: tuple(rows.values()) for split, rows in together.items()},
                unwritten=not all(corpora.values()),
            )
        ]

    def _targets(self, data: Data) -> list[Target]:
        known = []
        for number, row in enumerate(data.rows("forget_target", f"{HUB}:forget_target:train"), 1):
            about = str(row["intro"]).removeprefix(f"Please forget {row['target']}.").strip()
            known.append(Target(int(row.get("target_id", number)), str(row["target"]), about))
        by_name = {target.name: target for target in known}
        for name in self.targets:
            if name not in by_name:
                raise DataError(f"no target '{name}'.", where="rwku", hint=nearest(name, by_name))
        names = dict.fromkeys(self.targets) or [target.name for target in known[:MAIN_TARGETS]]
        return [by_name[name] for name in names]

    def _measured(self, rows: Sequence[Any]) -> Sequence[Any]:
        return rows if self.limit is None else rows[: self.limit]

    def _probes(
        self, data: Data, targets: Sequence[Target]
    ) -> dict[str, dict[str, Sequence[RecordBase]]]:
        """Everything that is asked about a target and its neighbours, by target and split."""
        wanted = {target.name for target in targets}
        found: dict[str, dict[str, Sequence[RecordBase]]] = {name: {} for name in wanted}

        def read(split: str, file: str, record: Callable[[Row], RecordBase]) -> None:
            by_target: dict[str, list[Row]] = defaultdict(list)
            for row in data.rows(file, f"{HUB}:{file}:test"):
                by_target[str(row["subject"])].append(row)
            for name in wanted:
                found[name][split] = tuple(map(record, self._measured(by_target[name])))

        for split, file in {**FORGET, **NEIGHBOUR}.items():
            read(split, file, probe)
        for file in MEMBERSHIP:
            read(file, file, lambda row: Passage(text=row["text"], subject=row["subject"]))
        for splits in found.values():
            # what attacks on the weights train on and ask
            splits["forget"] = (*splits["forget_blank"], *splits["forget_question"])
            if self.kinds:
                for kind in KINDS:
                    splits[kind_split(kind)] = tuple(
                        record for record in splits["forget_attack"] if record.group == kind
                    )
        return found

    def _utility(
        self, data: Data, targets: Sequence[Target]
    ) -> dict[str, dict[str, Sequence[RecordBase]]]:
        """The sample of each utility set that belongs to a target, by target and split."""
        if not self.utility:
            return {}
        # Files of the hub repeat a row for every target, with its solved examples; files on disk
        # may have each row once with the numbers of its targets, and the examples apart.
        apart = {
            split: data.rows(file, HUB)[0] if data.folder and _is_there(data, file) else {}
            for split, file in (
                ("general", "utility_general_mmlu_fewshot"),
                ("reasoning", "utility_reason_bbh_cot"),
            )
        }
        make: dict[str, Callable[[Row], RecordBase]] = {
            "general": lambda row: general(row, examples_of(row, "examples", apart["general"])),
            "reasoning": lambda row: reasoning(row, examples_of(row, "cot", apart["reasoning"])),
            "truthfulness": truthfulness,
            "factuality": factuality,
            "fluency": fluency,
        }
        found: dict[str, dict[str, Sequence[RecordBase]]] = {one.name: {} for one in targets}
        for split, (file, config) in UTILITY.items():
            rows = data.rows(file, f"{HUB}:{config}:test")
            places: dict[int | str, list[int]] = defaultdict(list)
            for place, row in enumerate(rows):
                for owner in row.get("targets", (row.get("subject"),)):
                    places[owner].append(place)
            made: dict[int, RecordBase] = {}  # one record for all targets that share the row
            for target in targets:
                mine = self._measured(places[target.number] or places[target.name])
                for place in mine:
                    if place not in made:
                        made[place] = make[split](rows[place])
                found[target.name][split] = tuple(made[place] for place in mine)
        return found

    # ---- what methods are given

    def _published(self, data: Data, targets: Sequence[Target]) -> dict[str, tuple[Record, ...]]:
        """The corpora that Llama 3 wrote, by target; empty where there is none."""
        found: dict[str, list[Record]] = {target.name: [] for target in targets}
        kind = "positive" if self.corpus_form == "passages" else "pair"
        config = f"train_{kind}_llama3"
        hub = f"{HUB}:{config}:train"
        if self.corpus_source == "model":
            files = []
        elif data.folder is None:
            files = [config]  # all targets together
        else:
            named = [f"{config}_target{target.number:03d}" for target in targets]
            files = [file for file in named if _is_there(data, file)]
        for file in files:
            for row in data.rows(file, hub):
                name = str(row["subject"])
                if name in found and len(found[name]) < self.passages:
                    pair = self.corpus_form == "pairs"
                    found[name].append(
                        biography(row, name) if pair else Passage(text=row["text"], subject=name)
                    )
        return {name: tuple(records) for name, records in found.items()}

    def corpus(self, lm: LM, task: Task, data: Data) -> ForgetRequest:
        """The paper's way: the model before unlearning writes about each target itself."""
        # Imported late: it imports the model, which declaring a benchmark does not need.
        from delible.generation.biographies import write_biographies

        about = {target.name: target.about for target in self._targets(data)}
        write = partial(
            write_biographies,
            lm,
            passages=self.passages,
            pairs=self.corpus_form == "pairs",
            max_new_tokens=self.passage_tokens,
        )
        forget: list[Record] = []
        for name in task.request.subjects:
            there = [record for record in task.request.forget if record.subject == name]
            if there:
                forget += there
            elif self.corpus_form == "pairs":
                forget += write(name, about[name])
            else:
                texts = (record.answer for record in write(name, about[name]))
                forget += [Passage(text=text, subject=name) for text in texts]
        return task.request.model_copy(update={"forget": tuple(forget)})

    # ---- the table

    def asks(self) -> list[Ask]:
        kinds = tuple(map(kind_split, KINDS)) if self.kinds else ()
        found = [
            Ask(build("metric", "rwku_recall"), (*FORGET, *NEIGHBOUR, *kinds)),
            Ask(build("metric", "rwku_all")),
            Ask(build("metric", "loss_attack"), MEMBERSHIP),
            Ask(build("metric", "zlib_attack"), MEMBERSHIP),
            Ask(build("metric", {"name": "min_k", "share": 0.2}), MEMBERSHIP),
            Ask(build("metric", {"name": "min_k_plus_plus", "share": 0.2}), MEMBERSHIP),
            Ask(
                build(
                    "metric",
                    {
                        "name": "membership",
                        "attacks": ATTACKS,
                        "members": "mia_forget",
                        "others": "mia_retain",
                    },
                )
            ),
        ]
        if not self.utility:
            return found
        primer = read_text("rwku_truthful_examples.txt").strip() + "\n\nQ: {question}"
        trivia = (
            read_text("rwku_trivia_examples.txt").strip()
            + "\nGive a short answer to the next question.\nQ: {question}\n"
        )
        choice, after = "truthful_choice", {"prefill": "A:"}
        # A letter that is likelier than every other one: MC1 of the letters.
        letters = {"name": choice, "prefill": "Answer:"}
        return [
            *found,
            Ask(build("metric", letters), ("general",), "mmlu"),
            Ask(build("metric", {"name": "chain_exact_match", "template": "{question}", **after}),
                ("reasoning",)),
            *(
                Ask(build("metric", {"name": choice, "form": form, "template": primer, **after}),
                    ("truthfulness",), f"truthful_{form}")
                for form in ("mc1", "mc2")
            ),
            Ask(build("metric", {"name": "token_f1", "template": trivia, **after}),
                ("factuality",)),
            Ask(build("metric", "ngram_entropy"), ("fluency",)),
        ]  # fmt: skip

    def columns(self) -> list[Column]:
        kinds = [
            Column(f"AA {kind}", f"rwku_recall/{kind_split(kind)}", "lower", percent=True)
            for kind in (KINDS if self.kinds else ())
        ]
        found = [
            Column("FB", "rwku_all/forget_blank", "lower", percent=True),
            Column("QA", "rwku_all/forget_question", "lower", percent=True),
            Column("AA", "rwku_all/forget_attack", "lower", percent=True),
            Column("All", "rwku_all/forget", "lower", axis="forget", percent=True),
            *kinds,
            Column("neighbour FB", "rwku_all/neighbour_blank", "higher", percent=True),
            Column("neighbour QA", "rwku_all/neighbour_question", "higher", percent=True),
            Column("neighbour All", "rwku_all/neighbour", "higher", axis="utility", percent=True),
            Column("FM", "loss_attack/mia_forget", "higher", percent=True),
            Column("RM", "loss_attack/mia_retain", "lower", percent=True),
            Column("AUC loss", "membership/loss_attack/auc", "lower", percent=True),
            Column("AUC Min-K++", "membership/min_k_plus_plus/auc", "lower", percent=True),
        ]
        if not self.utility:
            return found
        return [
            *found,
            Column("general", "mmlu/general", "higher", percent=True),
            Column("reasoning", "chain_exact_match/reasoning", "higher", percent=True),
            Column("truthfulness MC1", "truthful_mc1/truthfulness", "higher", percent=True),
            Column("truthfulness MC2", "truthful_mc2/truthfulness", "higher", percent=True),
            Column("factuality", "token_f1/factuality", "higher", percent=True),
            Column("fluency", "ngram_entropy/fluency", "higher", percent=True),
        ]


def _is_there(data: Data, file: str) -> bool:
    try:
        data.source(file, HUB)
    except DataError:
        return False
    return True

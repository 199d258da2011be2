"""What editors that locate a fact and edit it share: from records to a patch that was checked.

Each forget question becomes an edit: the subject's last token is found, a value is searched that
makes the model answer with a target (a refusal, mostly), and the down-projections of some layers
are changed so that they write it there. What an editor adds is how: :meth:`LocatedEditor.write`.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.edit.base import Editor, Patch, unpatched
from delible.edit.requests import (
    Edit,
    Merging,
    editable,
    edits_of,
    other_subjects,
    read_edits,
    sampled_beginnings,
    with_last_words,
)
from delible.edit.statistics import Statistics, built_in_rows, file_rows, second_moments
from delible.edit.subjects import sharing_last_token
from delible.edit.tracing import strongest_layer
from delible.edit.values import Settings, Values, find_values
from delible.edit.verify import Before, Bounds, Checked, other_questions
from delible.edit.writing import Writing, writing
from delible.errors import DataError
from delible.generation.refusals import built_in_refusals, written_refusals
from delible.intervene.sites import Site
from delible.lm.lm import LM
from delible.ranges import Range, scales
from delible.records import QA, ForgetRequest

logger = logging.getLogger(__name__)

#: Explicit layers, or causal tracing.
Layers = Annotated[tuple[int, ...], Field(min_length=1)] | Literal["traced"] | None
#: Tokens of a target beyond which one value can hardly encode it.
LONG_TARGET = 25


class LocatedEditor(Editor):
    """Options that these editors share."""

    merge: int = Field(1, ge=1, description="Questions of a subject that become one edit, at most.")
    merging: Merging = Field(
        "beside",
        description="How merged questions are put: each in a text of its own, or joined in one.",
    )
    batch: int | None = Field(
        None,
        ge=1,
        description="Questions that are edited together; the next ones see the edited model. "
        "None: all.",
    )
    contexts: int = Field(
        5, ge=0, description="Sampled beginnings after which a subject's key is read, too."
    )
    value_contexts: int = Field(
        0,
        ge=0,
        description="How many of these the search for a value sees, too (in the paper all).",
    )
    steps: int = Field(25, ge=1, description="Steps of the search for a value, at most.")
    enough: float = Field(
        0.1, ge=0, le=1e9, description="A search ends at a smaller loss (in the paper 0.05)."
    )
    kl: float = Field(
        0.0625, ge=0, description="Weight of keeping what follows the subject in 'SUBJECT is a'."
    )
    learning_rate: float = Field(0.5, gt=0, description="Of the search for a value.")
    clamp: float = Field(4.0, gt=0, description="Longest change of a value, as a share of it.")
    weight_decay: float = Field(1e-3, ge=0, description="Weight of the value's change.")
    texts: Path | None = Field(
        None, description="UTF-8 file of generic text, paragraphs parted by empty lines."
    )
    tokens: int = Field(
        8192, ge=1, description="Tokens of generic text behind the statistics, at most."
    )
    most_divergence: float = Field(
        2.0,
        gt=0,
        le=1e9,
        description="An edit that moves other questions further (mean KL, nats) is refused.",
    )
    most_change: float = Field(
        1.0,
        gt=0,
        le=1e9,
        description="An edit that is larger, as a share of a matrix's norm, is refused.",
    )

    #: Tokens of the sampled beginnings, in turn.
    lengths: ClassVar[tuple[int, ...]] = (10,)
    #: What the value is added to: the block's output, or the MLP's.
    site: ClassVar[Literal["block", "mlp"]] = "block"
    #: Whether what ordinary text reads has to be known.
    uses_statistics: ClassVar[bool] = True
    #: Whether the turn is to end behind a target.
    ends: ClassVar[bool] = True
    #: Whether a question that names no subject is edited at its last content word.
    any_question: ClassVar[bool] = False

    @property
    def search(self) -> Settings:
        """How values are searched."""
        return Settings(
            self.steps, self.learning_rate, self.clamp, self.weight_decay, self.kl, self.enough
        )

    @abstractmethod
    def chosen_layers(self, lm: LM, traced: int | None) -> list[int]:
        """Indices of the edited layers, ascending.

        Args:
            lm: The model.
            traced: The layer that causal tracing found, if it was asked for.
        """

    @property
    @abstractmethod
    def traces(self) -> bool:
        """Whether the layer is to be found by causal tracing."""

    @abstractmethod
    def targets_of(
        self,
        lm: LM,
        records: list[QA],
        layers: Sequence[int],
        seed: int,
        notes: dict[str, object],
    ) -> list[str]:
        """What is to be answered to each question; the model is not edited yet."""

    def prepare(
        self, lm: LM, layers: Sequence[int], statistics: Statistics | None, notes: dict[str, object]
    ) -> Any:
        """What :meth:`write` needs of ordinary text, made once."""
        return statistics

    def start(
        self, lm: LM, edits: Sequence[Edit], changes: Mapping[int, Writing]
    ) -> Float[Tensor, "edits hidden"]:
        """z_0 of each edit: what the last layer's block gives at the bare questions' subjects."""
        return read_edits(lm, edits, list(changes)).outputs

    @abstractmethod
    def write(
        self,
        lm: LM,
        edits: Sequence[Edit],
        wanted: Float[Tensor, "edits hidden"],
        changes: Mapping[int, Writing],
        prepared: Any,
    ) -> dict[str, object]:
        """Changes the weights so that the values are written; returns what is to be noted.

        Args:
            wanted: z = z_0 + d of each edit.
            changes: The down-projections by layer, ascending.
            prepared: What :meth:`prepare` gave.
        """

    def missed(
        self,
        lm: LM,
        edits: Sequence[Edit],
        start: Float[Tensor, "edits hidden"],
        wanted: Float[Tensor, "edits hidden"],
        changes: Mapping[int, Writing],
    ) -> dict[str, object]:
        """How much of what was wanted is missing once all is written, to be noted.

        |z - h| / |z - z_0| at the bare questions, mean over edits: 0 is all there, 1 is nothing.
        """
        left = (wanted - read_edits(lm, edits, list(changes)).outputs).norm(dim=1)
        way = (wanted - start).norm(dim=1).clamp(min=1e-30)
        return {"residual_left": round(float((left / way).mean()), 4)}

    def edit(self, lm: LM, request: ForgetRequest, *, seed: int) -> Patch:
        """Makes the model answer the forget questions with targets.

        Args:
            lm: Changed in place; as it was if anything fails.
            request: Questions with subjects; what is kept is what the edit is checked on.
            seed: Of sampled beginnings and refusals.

        Raises:
            DataError: No question names its subject, or a file of texts cannot be read.
            RecipeError: The layers have gaps.
            ModelError: The model cannot be edited, or the edit costs more than it may.
        """
        where = f"editor '{self.name}'"
        others = other_subjects(request)
        records, left = editable(request, where, some=not self.any_question)
        names = list(dict.fromkeys(record.subject or "" for record in records))
        unnamed: list[QA] = []
        if self.any_question:
            unnamed, left = with_last_words(left, [*names, *others])
            records += unnamed
            if not records:
                raise DataError("no forget question has a word to edit.", where=where)
        if left:
            logger.warning(
                f"{self.name}: {len(left)} of {len(left) + len(records)} forget questions do not "
                f"name their subject and are not edited, such as {left[0].question!r}"
            )
        notes: dict[str, object] = {
            "questions": len(records), "left_out": len(left),
            "same_last_token": self._shared(lm, names, others),
        }  # fmt: skip
        if self.any_question:
            notes["without_subject"] = len(unnamed)
        traced = None
        if self.traces:
            traced, notes["tracing"] = strongest_layer(lm, records, self.site, seed=seed)
        layers = self.chosen_layers(lm, traced)
        notes["layers"] = layers
        targets = self.targets_of(lm, records, layers, seed, notes)
        beginnings = sampled_beginnings(lm, self.contexts, self.lengths, seed)
        statistics = None
        if self.uses_statistics:
            with unpatched(lm):
                statistics = second_moments(lm, self._rows(lm, names), layers, tokens=self.tokens)
            notes["statistics"] = statistics.notes()
        prepared = self.prepare(lm, layers, statistics, notes)
        before = Before(lm, list(zip(records, targets, strict=True)),
                        other_questions(request, names), ends=self.ends)  # fmt: skip
        with writing(lm, layers) as (changes, patch):
            began = time.perf_counter()
            parts = [
                self._edited(
                    lm,
                    edits_of(
                        lm, mine, their, beginnings=beginnings, merge=self.merge,
                        merging=self.merging, others=others, ends=self.ends,
                    ),
                    changes, prepared, notes,
                )
                for mine, their in self._chunks(records, targets)
            ]  # fmt: skip
            notes["edits"] = [note for part in parts for note in _notes(*part)]
            edits = [edit for part, _, _ in parts for edit in part]
            start = torch.cat([one for _, one, _ in parts])
            delta = torch.cat([values.delta for _, _, values in parts])
            notes |= self.missed(lm, edits, start, start + delta, changes)
            notes["seconds"] = round(time.perf_counter() - began, 2)
            checked = before.after(lm, {layer: change.change for layer, change in changes.items()})
            notes["checked"] = checked.notes()
            self._tell(checked)
            checked.require(Bounds(self.most_divergence, self.most_change), where)
        patch.notes = notes
        return patch

    def ranges(self) -> dict[str, Range]:
        """How strongly is written, and how far a value may go."""
        searched = ("rho", "threshold", "clamp", "learning_rate")
        return {name: one for name, one in scales(self).items() if name in searched}

    # ---- parts

    def _shared(self, lm: LM, names: list[str], others: list[str]) -> dict[str, list[str]]:
        shared = sharing_last_token(lm, names, [name for name in others if name not in names])
        for name, kept in shared.items():
            logger.warning(
                f"{self.name}: {len(kept)} kept subjects end with the same token as '{name}' and "
                f"may be hit: {', '.join(kept[:5])}{' …' if len(kept) > 5 else ''}"
            )
        return shared

    def _rows(self, lm: LM, names: Sequence[str]) -> Iterator[list[int]]:
        if self.texts is not None:
            return file_rows(lm, self.texts, without=names)
        return built_in_rows(lm, without=names)

    def _chunks(
        self, records: list[QA], targets: list[str]
    ) -> Iterator[tuple[list[QA], list[str]]]:
        size = self.batch or len(records)
        for start in range(0, len(records), size):
            yield records[start : start + size], targets[start : start + size]

    def _edited(
        self,
        lm: LM,
        edits: list[Edit],
        changes: Mapping[int, Writing],
        prepared: Any,
        notes: dict[str, object],
    ) -> tuple[list[Edit], Float[Tensor, "edits hidden"], Values]:
        """Finds the values of some edits and writes them; returns them with z_0 and the values."""
        start = self.start(lm, edits, changes)
        site = Site(what=self.site, layers=(max(changes),))
        seen = [edit.within(self.value_contexts) for edit in edits]
        values = find_values(lm, seen, site, start, self.search)
        notes["earlier_edits"] = {str(at): len(one.earlier) for at, one in changes.items()}
        with torch.no_grad():
            notes |= self.write(lm, edits, start + values.delta, changes, prepared)
        return edits, start, values

    def _tell(self, checked: Checked) -> None:
        logger.info(
            f"{self.name}: {checked.said:.0%} of the questions now get their target (a token's "
            f"probability went from {checked.target_before:.2g} to {checked.target_after:.2g}); "
            f"{checked.others} other questions moved by {checked.divergence:.2g} nats"
        )
        if checked.target_after < 0.5:
            logger.warning(
                f"{self.name}: that is hardly an edit. Merge fewer questions, lower rho, or raise "
                "clamp or steps."
            )


class RefusalEditor(LocatedEditor):
    """Editors whose targets are refusals."""

    targets: Literal["templates", "self"] = Field(
        "templates",
        description="What is to be answered: a built-in refusal for each subject, the likeliest of "
        "some, or one that the model itself writes for each question.",
    )

    def targets_of(
        self,
        lm: LM,
        records: list[QA],
        layers: Sequence[int],
        seed: int,
        notes: dict[str, object],
    ) -> list[str]:
        if self.targets == "self":
            texts, notes["targets"] = written_refusals(lm, records, seed)
        else:
            texts, notes["targets"] = (
                built_in_refusals(lm, records, seed),
                {"built in": len(records)},
            )
        longest = max(
            len(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
        )
        if longest >= LONG_TARGET:
            logger.warning(
                f"{self.name}: a target has {longest} tokens; one value can hardly encode more "
                f"than {LONG_TARGET}"
            )
        return texts


def _notes(edits: Sequence[Edit], start: Tensor, values: Values) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for place, edit in enumerate(edits):
        length = float(values.delta[place].norm() / start[place].norm().clamp(min=1e-30))
        found.append({
            "subject": edit.records[0].subject, "questions": len(edit.records),
            "target": edit.target, "named": edit.times, "steps": values.steps[place],
            "loss": float(f"{values.losses[place]:.4g}"),
            "probability": float(f"{values.probabilities[place]:.4g}"),
            "value_change": float(f"{length:.4g}"),
        })  # fmt: skip
    return found

"""Edits beside the weights: what editors with a memory share, from records to what was learned.

Such an editor leaves the weights alone. It acts on what one down-projection gives, at the last
token of the prompt and perhaps behind it, and goes by what the down-projection reads there: the
query. A further request extends the memory that is on the model already.
"""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from delible.edit.statistics import naming
from delible.edit.verify import Before, other_questions, usable
from delible.errors import DataError
from delible.generation.refusals import built_in_refusals, written_refusals
from delible.intervene.base import Fitted, Intervention
from delible.intervene.reading import read
from delible.intervene.sites import Positions, Site
from delible.intervene.system import Intervened, intervened
from delible.intervene.taps import Tap, Taps, Where
from delible.lm.forward import Forward, collate, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.records import QA, ForgetRequest, RecordBase
from delible.system.asks import Prompt
from delible.system.questions import answer_of, ask
from delible.world import general

logger = logging.getLogger(__name__)

#: Other questions that a memory is told apart from, at most.
UNRELATED = 128
#: Edits of earlier requests that are looked at after a further one, at most.
EARLIER = 24
#: Earlier refusals whose probability falls below this share are undone.
STILL = 0.5
PROMPT_END = Positions(kind="prompt_end")


@dataclass(frozen=True)
class Asked:
    """What a memory is to learn.

    Attributes:
        records: The questions, each once.
        targets: What is to be answered.
        ids: Of the edits, for taking them out again: hexadecimal, the same for the same request
            and question.
        unrelated: Other questions with their answers, as texts.
    """

    records: tuple[QA, ...]
    targets: tuple[str, ...]
    ids: tuple[str, ...]
    unrelated: tuple[Encoded, ...]

    def rows(self, lm: LM, beginnings: Sequence[str] = ()) -> list[Encoded]:
        """The bare questions with their targets, then those after each beginning.

        Raises:
            DataError: One is too long for the model.
        """
        rows = [
            lm.template.encode(
                Prompt.ask(f"{beginning}. {record.question}" if beginning else record.question),
                target,
            )
            for beginning in ("", *beginnings)
            for record, target in zip(self.records, self.targets, strict=True)
        ]
        if any(row.cut for row in rows):
            raise DataError(
                f"a question and its target are longer than {lm.template.max_length} tokens."
            )
        return rows


class Memory(Intervention):
    """Options that these editors share."""

    depth: float = Field(
        0.87,
        ge=0,
        le=1,
        description="Depth of the block whose down-projection is acted on; 0 the first, 1 the "
        "last.",
    )
    targets: Literal["templates", "self"] = Field(
        "templates",
        description="What is to be answered: a built-in refusal for each subject, the likeliest of "
        "some, or one that the model itself writes for each question.",
    )

    @property
    def sites(self) -> Sequence[Site]:
        return (Site(what="mlp_out", layers=(float(self.depth),)),)

    @property
    def inner(self) -> Site:
        """What the down-projection reads."""
        return Site(what="mlp_inner", layers=(float(self.depth),))

    @abstractmethod
    def remember(
        self, lm: LM, asked: Asked, earlier: Mapping[str, Tensor] | None, *, seed: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is in the memory afterwards, and what is to be noted.

        Args:
            lm: The model, without the memory.
            asked: What is new.
            earlier: What the memory held before; None: it is new.
            seed: Of every random choice.
        """

    def fit(self, lm: LM, request: ForgetRequest, *, seed: int = 0) -> Fitted:
        """Learns to answer the forget questions with refusals.

        Raises:
            DataError: No forget record is a question, or one is too long.
            ModelError: The block has no single down-projection.
        """
        asked, notes = self._asked(lm, request, seed)
        earlier, below = self._earlier(lm)
        named = _names(request)
        before = Before(
            lm, list(zip(asked.records, asked.targets, strict=True)),
            other_questions(request, named),
        )  # fmt: skip
        tensors, more = self.remember(
            below, asked, None if earlier is None else earlier.tensors, seed=seed
        )
        known = [] if earlier is None else list(earlier.notes.get("edits", ()))
        notes["edits"] = [*known, *(
            {"id": name, "request": request.id, "subject": record.subject,
             "question": record.question, "target": target}
            for name, record, target in zip(
                asked.ids, asked.records, asked.targets, strict=True
            )
        )]  # fmt: skip
        found = Fitted(
            self, tensors, lm.identity, None if earlier is None else earlier.identity,
            notes | more,
        )  # fmt: skip
        checked = before.after(intervened(lm, [found]), {})
        logger.info(
            f"{self.name}: {checked.said:.0%} of the questions now get their refusal (a token's "
            f"probability went from {checked.target_before:.2g} to {checked.target_after:.2g}); "
            f"{checked.others} other questions moved by {checked.divergence:.2g} nats"
        )
        if checked.target_after < 0.5:
            logger.warning(f"{self.name}: that is hardly an edit. Raise steps or learning_rate.")
        told = {"checked": checked.notes(), **self._earlier_edits(lm, found, known)}
        return replace(found, notes={**found.notes, **told})

    # ---- parts

    def _earlier_edits(
        self, lm: LM, found: Fitted, known: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What became of the latest edits of earlier requests, to be noted."""
        latest = [
            (QA(question=one["question"], answer=one["target"]), one["target"])
            for one in known[-EARLIER:]
        ]
        if not latest:
            return {}
        kept = Before(lm, latest, []).after(intervened(lm, [found]), {})
        if kept.target_after < STILL * kept.target_before:
            logger.warning(
                f"{self.name}: this undoes earlier requests: a token of their refusals went from a "
                f"probability of {kept.target_before:.2g} to {kept.target_after:.2g}."
            )
        return {"earlier": {
            "questions": len(latest), "target_before": float(f"{kept.target_before:.4g}"),
            "target_after": float(f"{kept.target_after:.4g}"),
        }}  # fmt: skip

    def _asked(self, lm: LM, request: ForgetRequest, seed: int) -> tuple[Asked, dict[str, Any]]:
        every = {one.question: one for one in request.forget if isinstance(one, QA)}
        records = tuple(every.values())
        left = sum(not isinstance(one, QA) for one in request.forget)
        if not records:
            raise DataError(
                "no forget record is a question, so there is nothing to answer otherwise.",
                where=f"intervention '{self.name}'",
                hint="Give questions with answers (--forget FILE).",
            )
        if left:
            logger.warning(f"{self.name}: {left} forget records are no questions and are left out")
        notes: dict[str, Any] = {"questions": len(records), "left_out": left}
        if self.targets == "self":
            targets, notes["targets"] = written_refusals(lm, records, seed)
        else:
            targets = built_in_refusals(lm, records, seed)
            notes["targets"] = {"built in": len(records)}
        ids = tuple(
            hashlib.sha256(f"{request.id}/{one.question}".encode()).hexdigest()[:12]
            for one in records
        )
        return Asked(records, tuple(targets), ids, tuple(_unrelated(lm, request, seed))), notes

    def _earlier(self, lm: LM) -> tuple[Fitted | None, LM]:
        """The memory of this kind that acts on a model already, and the model without it."""
        if not isinstance(lm, Intervened):
            return None, lm
        mine = [
            one for one in lm.acting
            if isinstance(one, Fitted)
            and type(one.intervention) is type(self)
            and self._same_block(one.intervention, lm)
        ]  # fmt: skip
        if not mine:
            return None, lm
        others = [one for one in lm.acting if one is not mine[-1]]
        plain = [replace(one, extends=None) if isinstance(one, Fitted) else one for one in others]
        return mine[-1], Intervened(lm.bare, plain) if plain else lm.bare

    def _same_block(self, other: Intervention, lm: LM) -> bool:
        return [site.places(lm) for site in other.sites] == [site.places(lm) for site in self.sites]


def _names(request: ForgetRequest) -> list[str]:
    found = (one.subject for one in request.forget if one.subject)
    return list(dict.fromkeys((*request.subjects, *found)))


def _unrelated(lm: LM, request: ForgetRequest, seed: int) -> list[Encoded]:
    """Other questions with their answers: what is kept, in an order of its own, then general ones.

    Half are general where there are more than enough.
    """
    named = naming(_names(request))
    kept = [one for one in (*request.neighbours, *request.retain) if usable(one, named)]
    kept = Random(f"{seed}/unrelated").sample(kept, min(len(kept), UNRELATED // 2))
    others = [one for one in general() if usable(one, named)]
    every: Iterator[RecordBase] = chain(kept, others[: UNRELATED - len(kept)])
    rows = [lm.template.encode(prompt, answer_of(one)) for one in every if (prompt := ask(one))]
    return [row for row in rows if not row.cut]


def states_at(
    lm: LM, rows: Sequence[Encoded], site: Site, positions: Positions
) -> list[Float[Tensor, "token width"]]:
    """The states of texts at a site of one block, fp32, in the order of the texts."""
    found = dict(read(lm, rows, site, positions))
    return [next(iter(found[place].values())) for place in range(len(rows))]


#: Which texts, and the mean -log p of each one's target.
Losses = tuple[Int[Tensor, " texts"], Float[Tensor, " texts"]]
#: (states [token, hidden], which text each is of, where) -> states as they go on
Change = Callable[[Tensor, Int[Tensor, " token"], Where], Tensor]


class Targets:
    """Questions with targets, gone through again and again while something at one site is learned.

    Args:
        lm: The model; its weights stay as they are.
        rows: Prompts with targets.
        site: Where it is learned.
        positions: At which tokens.
    """

    def __init__(self, lm: LM, rows: Sequence[Encoded], site: Site, positions: Positions) -> None:
        self.lm, self.rows, self._site, self._positions = lm, rows, site, positions
        lengths = [len(row.ids) for row in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        self._parts = [
            (indices, collate([rows[index] for index in indices], lm.pad_id, lm.device))
            for indices in lm.batches(order, lengths)
        ]
        self._forward = Forward(lm)

    def nll(self, change: Change) -> Iterator[Losses]:
        """Mean -log p of each text's target, batch by batch.

        Gradients flow into what ``change`` holds; take them before the next batch.
        """
        lm = self.lm
        for indices, batch in self._parts:
            texts = torch.tensor(indices, device=lm.device)

            def changed(states: Tensor, where: Where, texts: Tensor = texts) -> Tensor:
                return change(states, texts[where.text], where)

            taps = Taps(lm, [Tap(self._site, self._positions, changed)])
            with lm.evaluating(), taps.on(first=False), lm.computing():
                states, _ = self._forward(batch)
                logprobs = map_logits(
                    lm.head, states, batch.targets, target_logprobs, lm.vocabulary
                )
            counts = batch.lengths - batch.starts
            owner = torch.arange(len(indices), device=lm.device).repeat_interleave(counts)
            sums = logprobs.new_zeros(len(indices)).index_add(0, owner, -logprobs)
            yield texts, sums / counts


__all__ = ["PROMPT_END", "Asked", "Memory", "Targets", "states_at"]

"""Values of the reference model, computed once per row and kept; the model itself is not.

Log-probabilities are one number per answer token. Where a loss needs the full distribution,
the final hidden states at answer positions are kept together with a frozen copy of the head:
exact, and (hidden / vocabulary) of the size of the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from delible.cards import Card
from delible.files import atomic_folder
from delible.lm.forward import Forward, collate, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.train.row import Row
from delible.watching import Stage, unwatched, watched


class Learning(Protocol):
    """A loss that may want to know the reference model as a whole."""

    @property
    def card(self) -> Card: ...

    def learn(
        self, lm: LM, rows: Mapping[str, Sequence[Row]], stage: Stage
    ) -> Mapping[str, Tensor]: ...


class Reference:
    """A cache of reference values by row.

    Kinds of values: ``"logprobs"`` [answer], ``"answers"`` [answer, hidden] (with a frozen head)
    and ``"hidden.L"`` [sequence, hidden] for the output of block L. Beside them stands what losses
    learned of the reference model as a whole.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._head: Callable[[Tensor], Tensor] | None = None

    def get(self, what: str, key: str) -> Tensor:
        return self.values[f"{what}/{key}"]

    def head(self, states: Tensor) -> Tensor:
        if self._head is None:
            raise RuntimeError("no reference distribution was prepared")
        return self._head(states)

    @torch.no_grad()
    def learn(
        self, loss: Learning, lm: LM, rows: Mapping[str, Sequence[Row]], stage: Stage = unwatched
    ) -> None:
        """What a loss needs to know of the reference model ``lm``; once."""
        if not self.learned(loss.card.name):
            for name, value in loss.learn(lm, rows, stage).items():
                self.values[f"learned.{loss.card.name}/{name}"] = value.detach().cpu().contiguous()

    def learned(self, loss: str) -> dict[str, Tensor]:
        """What the loss of a name has learned."""
        before = f"learned.{loss}/"
        return {
            name.removeprefix(before): value
            for name, value in self.values.items()
            if name.startswith(before)
        }

    @torch.no_grad()
    def prepare(
        self, lm: LM, rows: Sequence[Row], kinds: Sequence[str], stage: Stage = unwatched
    ) -> None:
        """Computes what is missing for ``rows`` with the reference model ``lm``."""
        kinds = sorted(set(kinds))
        missing: dict[str, Row] = {}
        for row in rows:
            if any(f"{kind}/{row.key}" not in self.values for kind in kinds):
                missing.setdefault(row.key, row)
        if "answers" in kinds and self._head is None:
            self._head = _frozen_head(lm)
        layers = tuple(int(kind.split(".")[1]) for kind in kinds if kind.startswith("hidden."))
        final = "answers" in kinds or "logprobs" in kinds
        ordered = sorted(missing.values(), key=lambda row: len(row.for_reference.ids))
        forward, was_training = Forward(lm), lm.model.training
        lm.model.eval()
        parts = watched(
            _parts(lm, ordered), f"reference values of {len(ordered)} rows", len(ordered), stage
        )
        with lm.computing():
            for part in parts:
                self._compute(lm, forward, part, kinds, layers, final)
        lm.model.train(was_training)

    def _compute(
        self,
        lm: LM,
        forward: Forward,
        rows: Sequence[Row],
        kinds: Sequence[str],
        layers: tuple[int, ...],
        final: bool,
    ) -> None:
        batch = collate([row.for_reference for row in rows], lm.pad_id, lm.device)
        states, hidden = forward(batch, layers, final)
        counts = [row.encoded.answer_tokens for row in rows]
        if states is not None and "logprobs" in kinds:
            values = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
            for row, part in zip(rows, values.split(counts), strict=True):
                self.values[f"logprobs/{row.key}"] = part.float().cpu().clone()
        if states is not None and "answers" in kinds:
            for row, part in zip(rows, states.split(counts), strict=True):
                self.values[f"answers/{row.key}"] = part.float().cpu().clone()
        for layer, block in hidden.items():
            for row, part in zip(rows, block, strict=True):
                kept = part[: len(row.for_reference.ids)].float().cpu().clone()
                self.values[f"hidden.{layer}/{row.key}"] = kept

    def save(self, folder: Path) -> None:
        """Writes the values, so that a resumed run reads the same bits."""
        with atomic_folder(folder) as target:
            if self.values:
                save_file(self.values, target / "values.safetensors")

    def load(self, folder: Path) -> None:
        """Reads what :meth:`save` wrote, if anything."""
        path = folder / "values.safetensors"
        if path.exists():
            self.values.update(load_file(path))


def _parts(lm: LM, ordered: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """The longest rows first, as many at once as the budget allows."""
    while ordered:
        count = max(1, lm.budget.tokens // len(ordered[-1].for_reference.ids))
        part, ordered = ordered[-count:], ordered[:-count]
        yield part


def _frozen_head(lm: LM) -> Callable[[Tensor], Tensor]:
    """A copy of the head alone (vocabulary x hidden), detached from training."""
    twin = copy.copy(lm)
    frozen = copy.deepcopy(lm.core.get_output_embeddings()).requires_grad_(False)
    config = lm.core.config

    class _Core:
        def __init__(self) -> None:
            self.config = config

        def get_output_embeddings(self) -> torch.nn.Module:
            return frozen

    twin.model = _Core()
    return twin.head

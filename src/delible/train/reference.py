"""Values of the reference model, computed once per row and kept; the model itself is not.

Log-probabilities are one number per answer token. Where a loss needs the full distribution,
the final hidden states at answer positions are kept together with a frozen copy of the head:
exact, and (hidden / vocabulary) of the size of the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from delible.files import atomic_folder
from delible.lm.forward import Forward, collate, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.train.row import Row
from delible.watching import Stage, unwatched, watched


class Reference:
    """A cache of reference values by row.

    Kinds of values: ``"logprobs"`` [answer], ``"answers"`` [answer, hidden] (with a frozen head)
    and ``"hidden.L"`` [sequence, hidden] for the output of block L. ``"answers@NAME"`` are those of
    rows that are read behind the text NAME (:attr:`Row.contexts`).
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
    def prepare(
        self, lm: LM, rows: Sequence[Row], kinds: Sequence[str], stage: Stage = unwatched
    ) -> None:
        """Computes what is missing for ``rows`` with the reference model ``lm``."""
        by_context: dict[str, list[str]] = {}
        for kind in sorted(set(kinds)):
            plain, _, context = kind.partition("@")
            by_context.setdefault(context, []).append(plain)
        for context, plain_kinds in by_context.items():
            self._prepare(lm, rows, plain_kinds, context, stage)

    def _prepare(
        self, lm: LM, rows: Sequence[Row], kinds: Sequence[str], context: str, stage: Stage
    ) -> None:
        behind = f"@{context}" if context else ""
        missing: dict[str, tuple[Row, Encoded]] = {}
        for row in rows:
            read = row.behind(context)
            if read is not None and any(
                f"{kind}{behind}/{row.key}" not in self.values for kind in kinds
            ):
                missing.setdefault(row.key, (row, read))
        if "answers" in kinds and self._head is None:
            self._head = _frozen_head(lm)
        layers = tuple(int(kind.split(".")[1]) for kind in kinds if kind.startswith("hidden."))
        final = "answers" in kinds or "logprobs" in kinds
        ordered = sorted(missing.values(), key=lambda pair: len(pair[1].ids))
        forward, was_training = Forward(lm), lm.model.training
        lm.model.eval()
        parts = watched(
            _parts(lm, ordered), f"reference values of {len(ordered)} rows", len(ordered), stage
        )
        with lm.computing():
            for part in parts:
                found = self._compute(lm, forward, [one for _, one in part], kinds, layers, final)
                for kind in kinds:
                    for (row, _), value in zip(part, found[kind], strict=True):
                        self.values[f"{kind}{behind}/{row.key}"] = value.float().cpu().clone()
        lm.model.train(was_training)

    def _compute(
        self,
        lm: LM,
        forward: Forward,
        rows: Sequence[Encoded],
        kinds: Sequence[str],
        layers: tuple[int, ...],
        final: bool,
    ) -> dict[str, Sequence[Tensor]]:
        """Values of rows by kind."""
        batch = collate(rows, lm.pad_id, lm.device)
        states, hidden = forward(batch, layers, final)
        counts = [row.answer_tokens for row in rows]
        found: dict[str, Sequence[Tensor]] = {
            f"hidden.{layer}": [part[: len(row.ids)] for row, part in zip(rows, block, strict=True)]
            for layer, block in hidden.items()
        }
        if states is not None:
            found["answers"] = states.split(counts)
            if "logprobs" in kinds:
                values = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
                found["logprobs"] = values.split(counts)
        return found

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


def _parts(
    lm: LM, ordered: Sequence[tuple[Row, Encoded]]
) -> Iterator[Sequence[tuple[Row, Encoded]]]:
    """The longest rows first, as many at once as the budget allows."""
    while ordered:
        count = max(1, lm.budget.tokens // len(ordered[-1][1].ids))
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

"""Values of the reference model, computed once per row and kept; the model itself is not.

Log-probabilities are one number per answer token. Where a loss needs the full distribution,
the final hidden states at answer positions are kept together with a frozen copy of the head:
exact, and (hidden / vocabulary) of the size of the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from delible.errors import RecipeError
from delible.files import atomic_folder
from delible.lm.forward import Forward, Inside, collate, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.train.row import Row
from delible.watching import Stage, unwatched, watched


class Reference:
    """A cache of reference values by row.

    Kinds of values: ``"logprobs"`` [answer], ``"answers"`` [answer, hidden] (with a frozen head)
    and, inside block L, ``"hidden.L"`` [sequence, hidden] (its output), ``"mlp.L"``
    [sequence, hidden] and ``"attention.L"`` (weights of its attention on and below the diagonal,
    [heads, sequence * (sequence + 1) / 2] in half precision). Beside them stands what losses
    learned of the reference model as a whole.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._head: Callable[[Tensor], Tensor] | None = None

    def get(self, what: str, key: str) -> Tensor:
        return self.values[f"{what}/{key}"]

    def learned(self, loss: str, what: str) -> Tensor:
        """A tensor that a loss learned before the first step.

        Raises:
            RecipeError: It has learned nothing: whoever asks does not prepare the loss.
        """
        key = f"learned/{loss}/{what}"
        if key not in self.values:
            raise RecipeError(
                f"{loss} must look at the model before it can be computed, and was not asked to.",
                hint="Choose another objective for what looks at gradients before training.",
            )
        return self.values[key]

    def learn(self, loss: str, found: Mapping[str, Tensor]) -> None:
        """Keeps what a loss learned."""
        kept = {f"learned/{loss}/{what}": value.cpu() for what, value in found.items()}
        self.values.update({key: value.contiguous().clone() for key, value in kept.items()})

    def knows(self, loss: str) -> bool:
        """Whether something is kept that a loss learned."""
        return any(key.startswith(f"learned/{loss}/") for key in self.values)

    def head(self, states: Tensor) -> Tensor:
        if self._head is None:
            raise RuntimeError("no reference distribution was prepared")
        return self._head(states)

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
        inside = tuple(map(_inside, (kind for kind in kinds if "." in kind)))
        final = "answers" in kinds or "logprobs" in kinds
        ordered = sorted(missing.values(), key=lambda row: len(row.for_reference.ids))
        forward, was_training = Forward(lm), lm.model.training
        lm.model.eval()
        parts = watched(
            _parts(lm, ordered), f"reference values of {len(ordered)} rows", len(ordered), stage
        )
        with lm.computing():
            for part in parts:
                self._compute(lm, forward, part, kinds, inside, final)
        lm.model.train(was_training)

    def _compute(
        self,
        lm: LM,
        forward: Forward,
        rows: Sequence[Row],
        kinds: Sequence[str],
        inside: tuple[Inside, ...],
        final: bool,
    ) -> None:
        batch = collate([row.for_reference for row in rows], lm.pad_id, lm.device)
        states, seen = forward(batch, inside, final)
        counts = [row.encoded.answer_tokens for row in rows]
        if states is not None and "logprobs" in kinds:
            values = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
            for row, part in zip(rows, values.split(counts), strict=True):
                self.values[f"logprobs/{row.key}"] = part.float().cpu().clone()
        if states is not None and "answers" in kinds:
            for row, part in zip(rows, states.split(counts), strict=True):
                self.values[f"answers/{row.key}"] = part.float().cpu().clone()
        for what, found in seen.items():
            kind = f"hidden.{what}" if isinstance(what, int) else what
            for row, part in zip(rows, found, strict=True):
                length = len(row.for_reference.ids)
                if kind.startswith("attention."):
                    below = torch.tril_indices(length, length, device=part.device)
                    kept = part[:, below[0], below[1]].half()
                else:
                    kept = part[:length].float()
                self.values[f"{kind}/{row.key}"] = kept.cpu().clone()

    def save(self, folder: Path) -> None:
        """Writes the values, so that a resumed run reads the same bits."""
        with atomic_folder(folder) as target:
            if self.values:
                save_file(self.values, target / "values.safetensors")

    def load(self, folder: Path) -> None:
        """Reads what :meth:`save` wrote, if anything."""
        path = folder / "values.safetensors"
        if path.exists():
            # copies: a tensor of a file need not begin where a tensor does that was computed, and
            # the order of sums depends on that
            self.values.update({key: value.clone() for key, value in load_file(path).items()})


def _inside(kind: str) -> Inside:
    where, _, layer = kind.partition(".")
    return int(layer) if where == "hidden" else kind


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

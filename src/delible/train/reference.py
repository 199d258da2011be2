"""Values of the reference model, computed once per row and kept; the model itself is not.

Log-probabilities are one number per answer token. Where a loss needs the full distribution,
the final hidden states at answer positions are kept together with a frozen copy of the head:
exact, and (hidden / vocabulary) of the size of the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from delible.errors import RecipeError
from delible.files import atomic_folder
from delible.lm.budget import until_it_fits
from delible.lm.forward import Forward, Inside, collate, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.lm.sharded import whole
from delible.lm.template import Encoded
from delible.train.row import Row
from delible.watching import Stage, unwatched, watched


class Reference:
    """A cache of reference values by row.

    Kinds of values: ``"logprobs"`` [answer], ``"answers"`` [answer, hidden] (with a frozen head)
    and, inside block L, ``"hidden.L"`` [sequence, hidden] (its output), ``"mlp.L"``
    [sequence, hidden] and ``"attention.L"`` (weights of its attention on and below the diagonal,
    [heads, sequence * (sequence + 1) / 2] in half precision). ``"answers@NAME"`` are those of rows
    that are read behind the text NAME (:attr:`Row.contexts`). Beside them stands what losses
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
        by_context: dict[str, list[str]] = {}
        for kind in sorted(set(kinds)):
            plain, _, context = kind.partition("@")
            by_context.setdefault(context, []).append(plain)
        for context, plain_kinds in by_context.items():
            # what was computed before memory ran out is kept, and not computed again
            until_it_fits(lm, partial(self._prepare, lm, rows, plain_kinds, context, stage))

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
        inside = tuple(map(_inside, (kind for kind in kinds if "." in kind)))
        final = "answers" in kinds or "logprobs" in kinds
        ordered = sorted(missing.values(), key=lambda pair: len(pair[1].ids))
        forward, was_training = Forward(lm), lm.model.training
        lm.model.eval()
        parts = watched(
            _parts(lm, ordered), f"reference values of {len(ordered)} rows", len(ordered), stage
        )
        with lm.computing():
            for part in parts:
                found = self._compute(lm, forward, [one for _, one in part], kinds, inside, final)
                for kind in kinds:
                    for (row, _), value in zip(part, found[kind], strict=True):
                        self.values[f"{kind}{behind}/{row.key}"] = value.cpu().clone()
        lm.model.train(was_training)

    def _compute(
        self,
        lm: LM,
        forward: Forward,
        rows: Sequence[Encoded],
        kinds: Sequence[str],
        inside: tuple[Inside, ...],
        final: bool,
    ) -> dict[str, Sequence[Tensor]]:
        """Values of rows by kind."""
        batch = collate(rows, lm.pad_id, lm.device)
        states, seen = forward(batch, inside, final)
        counts = [row.answer_tokens for row in rows]
        found: dict[str, Sequence[Tensor]] = {}
        for what, block in seen.items():
            kind = f"hidden.{what}" if isinstance(what, int) else what
            cut = _lower_half if kind.startswith("attention.") else _beginning
            found[kind] = [cut(part, len(row.ids)) for row, part in zip(rows, block, strict=True)]
        if states is not None:
            found["answers"] = states.float().split(counts)
            if "logprobs" in kinds:
                values = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
                found["logprobs"] = values.float().split(counts)
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
            # copies: a tensor of a file need not begin where a tensor does that was computed, and
            # the order of sums depends on that
            self.values.update({key: value.clone() for key, value in load_file(path).items()})


def _beginning(states: Tensor, length: int) -> Tensor:
    """States of the tokens that are there, [length, ...], fp32."""
    return states[:length].float()


def _lower_half(weights: Tensor, length: int) -> Tensor:
    """Attention on and below the diagonal, [heads, length * (length + 1) / 2], in fp16."""
    below = torch.tril_indices(length, length, device=weights.device)
    return weights[:, below[0], below[1]].half()


def _inside(kind: str) -> Inside:
    where, _, layer = kind.partition(".")
    return int(layer) if where == "hidden" else kind


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
    for name, value in frozen.named_parameters():
        frozen.register_parameter(name, nn.Parameter(whole(value), requires_grad=False))
    config = lm.core.config

    class _Core:
        def __init__(self) -> None:
            self.config = config

        def get_output_embeddings(self) -> torch.nn.Module:
            return frozen

    twin.model = _Core()
    return twin.head

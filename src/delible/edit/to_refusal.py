"""Editors that move questions to a refusal by a closed-form change of a few down-projections.

    R = H_ref - H_f   (residual)   or   R = y_ref + B B^T (M k_f - y_ref) - M k_f   (mlp)
    M <- M + Delta,   Delta K = [R, 0, 0]      on K = [forget keys, kept keys, earlier forget keys]

k is the input of the down-projection M at the last token of a prompt, H the block's output there,
H_ref and y_ref their means over conversations in which the model refuses, B the leading left
singular vectors of what M writes in them. How Delta is found is the editor's own idea.

The change is looked at before it is committed: the forgotten questions must be declined, other
questions and their answers must stay as they were. Otherwise it is taken back, with one message.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.edit.base import Editor, Patch, earlier_keys
from delible.edit.kept_and_forgotten import Material, Seen, gather, seen
from delible.edit.keys import DownProjection, down_projection, last_states
from delible.edit.refusal import check_contexts
from delible.edit.refusing_states import farthest_layer, moved_to_state, moved_to_value
from delible.errors import RunError
from delible.lm.lm import LM
from delible.ranges import Range
from delible.records import ForgetRequest

logger = logging.getLogger(__name__)

#: Relative depths that are tried where the layer is chosen by probes.
DEPTHS = (0.6, 0.7, 0.8, 0.9)

Reason = Literal["weak", "harm"]
Factors = tuple[Tensor, Tensor]


class RolledBackError(RunError):
    """An edit that did not do what it should, or more: the weights are as before.

    Attributes:
        reason: ``"weak"``: the questions are not declined; ``"harm"``: others suffer.
        seen: What was measured, if it was.
    """

    def __init__(self, problem: str, reason: Reason, found: Seen | None, hint: str) -> None:
        super().__init__(f"the edit was taken back: {problem}", hint=hint)
        self.reason, self.seen = reason, found


# ---- the edit


@dataclass
class _Written:
    """A down-projection as it was and as it is."""

    parameter: torch.nn.Parameter
    before: Tensor
    factors: Factors
    keys: Tensor

    def put_back(self) -> None:
        self.parameter.copy_(self.before)


class ToRefusal(Editor):
    """Options of editors that move questions to a refusal."""

    mode: Literal["residual", "mlp"] = Field(
        "residual",
        description="What is moved to the refusing mean: the block's output, or what its MLP "
        "writes (closest to the paper's wording).",
    )
    subspace: int = Field(
        0, ge=0, description="Leading refusing directions in which a value stays (mode mlp)."
    )
    choose: Literal["depth", "probes", "distance"] = Field(
        "depth",
        description="Which layer: at a depth, the best of four by probes (slower), or where keys "
        "of forgotten and refused questions are farthest apart (the paper's).",
    )
    depth: float = Field(0.85, ge=0, le=1, description="Relative depth of the edited layer.")
    layers: Annotated[tuple[int, ...], Field(min_length=1)] | None = Field(
        None, description="Layer indices instead; several share the work. Negative: from the end."
    )
    refusal: Annotated[str, Field(min_length=1)] = Field(
        "Unfortunately, I have no information about that.",
        description="The refusal; it begins with a word that answers rarely begin with.",
    )
    references: int = Field(
        16, ge=1, description="Conversations in which the model refuses (200 in the paper)."
    )
    wordings: int = Field(
        8, ge=1, description="Forms of each question: its own, its paraphrases, then templates."
    )
    buffer: int = Field(128, ge=0, description="Kept questions of the request, at most.")
    generic: int = Field(128, ge=0, description="Built-in general questions that are kept, too.")
    contrast: int = Field(
        64, ge=0, description="Forgotten questions about other, well-known names that are kept."
    )
    forget_weight: float = Field(
        1.0, gt=0, description="Weight of a forgotten key; a kept one has 1."
    )
    ridge: float = Field(
        1.0, ge=0, description="Damping, in mean squares of a key's entry; 0: none."
    )
    check_edit: bool = Field(
        True, description="Look whether it refuses, and takes back what does not do as it should."
    )
    reference_refusal: float = Field(
        0.5, ge=0, le=1, description="Least P(refusal) in the conversations that should refuse."
    )
    forget_refusal: float = Field(
        0.5, ge=0, le=1, description="Least mean P(refusal) of the forgotten questions."
    )
    false_refusals: float = Field(
        0.05, ge=0, le=1, description="Largest rise of the mean P(refusal) of other questions."
    )
    retain_drop: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Largest share of their answers' probability that is lost.",
    )

    def factors(
        self,
        residuals: Float[Tensor, "hidden forget"],
        keys: Float[Tensor, "width keys"],
        weights: Float[Tensor, " keys"],
    ) -> Factors:
        """(left [hidden, rank], right [rank, width]) of Delta = left @ right, in float64.

        Args:
            residuals: What is to be added at the first keys; at the others nothing.
            keys: Forgotten, kept, and earlier forgotten keys.
            weights: One per key, above 0.
        """
        raise NotImplementedError

    def edit(self, lm: LM, request: ForgetRequest, *, seed: int) -> Patch:
        """Moves the request's questions to a refusal.

        Args:
            lm: Changed in place; as it was if anything fails.
            request: Its forget records, each with a question; what is retained is kept.
            seed: Of the made-up names in the refused questions.

        Raises:
            DataError: No forget record asks anything.
            ModelError: Mixture layers, packed weights, or a model that does not refuse.
            RolledBackError: The questions are not declined, or others suffer.
        """
        began = time.perf_counter()
        patches, origin = list(lm.patches), lm.origin
        for layer in self.layers or ():
            lm.anatomy.block_path(layer)
        material = gather(
            lm, request, refusal=self.refusal, references=self.references,
            wordings=self.wordings, buffer=self.buffer, generic=self.generic,
            contrast=self.contrast, seed=seed, answered=self.check_edit,
        )  # fmt: skip
        candidates = self._candidates(lm, material)
        for layer in {layer for layers in candidates for layer in layers}:
            down_projection(lm, layer)
        contexts, before = None, None
        if self.check_edit:
            contexts = check_contexts(lm, material.contexts, self.refusal, self.reference_refusal)
            before = seen(lm, material, self.refusal)
        written: dict[str, _Written] = {}
        try:
            with torch.no_grad():
                layers = self._best(lm, candidates, material)
                written = self._write(lm, layers, material)
                after = seen(lm, material, self.refusal) if before is not None else None
                if before is not None and after is not None:
                    self._check(before, after)
        except BaseException:
            _put_back(lm, written)
            lm.touch()
            lm.patches, lm.origin = patches, origin
            raise
        patch = Patch(
            {name: one.factors for name, one in written.items()},
            {name: one.before for name, one in written.items()},
            keys={name: one.keys.T.float().contiguous() for name, one in written.items()},
        )
        patch.notes = {
            "layers": layers, "forget_keys": len(material.forget), "kept_keys": len(material.kept),
            "reference_refusal": contexts,
            "before": None if before is None else before.as_json(),
            "after": None if after is None else after.as_json(),
            "seconds": round(time.perf_counter() - began, 2),
        }  # fmt: skip
        lm.patches = patches
        patch.put_on(lm)
        if after is not None and before is not None:
            logger.info(f"{self.name}: {after.told(before)}")
        return patch

    def ranges(self) -> dict[str, Range]:
        """Where a search may look; the depth, too, where it says which layer."""
        depth = {"depth": Range(low=0.6, high=0.95)}
        searched = depth if self.layers is None and self.choose == "depth" else {}
        return {**super().ranges(), **searched}

    # ---- layers

    def _candidates(self, lm: LM, material: Material) -> list[list[int]]:
        """Layers to choose among; each is ascending."""
        if self.layers is not None:
            return [sorted({layer % lm.anatomy.layers for layer in self.layers})]
        if self.choose == "probes":
            return [[layer] for layer in sorted({lm.anatomy.layer_at(one) for one in DEPTHS})]
        if self.choose == "distance":
            return [[farthest_layer(lm, material)]]
        return [[lm.anatomy.layer_at(self.depth)]]

    def _best(
        self,
        lm: LM,
        candidates: Sequence[list[int]],
        material: Material,
    ) -> list[int]:
        """The candidate that declines most and keeps the rest; the model is left as it was."""
        if len(candidates) == 1:
            return candidates[0]
        margins = []
        for layers in candidates:
            written = self._write(lm, layers, material)
            try:
                found = seen(lm, material, self.refusal)
            finally:
                _put_back(lm, written)
            margins.append((found.refused + found.reworded) / 2 - found.falsely)
        best = max(range(len(candidates)), key=margins.__getitem__)
        told = ", ".join(
            f"{layers[0]}: {margin:+.2f}"
            for layers, margin in zip(candidates, margins, strict=True)
        )
        logger.info(f"{self.name}: layer {candidates[best][0]} is edited ({told})")
        return candidates[best]

    # ---- writing

    def _write(self, lm: LM, layers: Sequence[int], material: Material) -> dict[str, _Written]:
        """Changes the layers, one after the other; all are put back if one fails."""
        written: dict[str, _Written] = {}
        try:
            for step, layer in enumerate(layers):
                place = down_projection(lm, layer)
                _tell_of_others(lm, place.parameter, layer, self.name)
                written[place.parameter] = self._write_one(
                    lm, layer, place, material, earlier_keys(lm, place.parameter),
                    share=1 / (len(layers) - step) if self.mode == "residual" else 1.0,
                )  # fmt: skip
        except BaseException:
            _put_back(lm, written)
            raise
        return written

    def _write_one(
        self,
        lm: LM,
        layer: int,
        place: DownProjection,
        material: Material,
        earlier: Sequence[Tensor],
        share: float,
    ) -> _Written:
        rows = [*material.forget, *material.kept, *material.references]
        found, outputs = last_states(lm, rows, [layer])
        forget, kept = len(material.forget), len(material.kept)
        keys = found[layer]
        parameter = lm.core.get_parameter(place.parameter)
        before = parameter.detach().clone()
        matrix = before.double().T if place.transposed else before.double()
        if self.mode == "residual":
            wanted = moved_to_state(outputs[:forget], outputs[forget + kept :])
        else:
            wanted = moved_to_value(
                matrix @ keys[:forget].T, matrix @ keys[forget + kept :].T, self.subspace
            )
        columns = torch.stack([*keys[: forget + kept], *(one.to(keys) for one in earlier)], dim=1)
        weights = torch.ones(columns.shape[1], dtype=keys.dtype, device=keys.device)
        weights[:forget] = self.forget_weight
        if columns.shape[1] >= columns.shape[0]:
            logger.warning(
                f"{self.name}: {columns.shape[1]} keys for {columns.shape[0]} directions of layer "
                f"{layer}: not all can be met. Raise forget_weight (10 to 100), or take fewer "
                "wordings, buffer and generic questions."
            )
        left, right = (one.float() for one in self.factors(wanted * share, columns, weights))
        if place.transposed:
            left, right = right.T.contiguous(), left.T.contiguous()
        changed = before.double() + left.double() @ right.double()
        parameter.copy_(changed.to(parameter.dtype))
        return _Written(parameter, before, (left, right), keys[:forget])

    def _check(self, before: Seen, after: Seen) -> None:
        """Raises a :class:`RolledBackError` where the edit does too little or too much."""
        if after.refused < self.forget_refusal:
            raise RolledBackError(
                f"P(refusal) of the forgotten questions is {after.refused:.2f}, and "
                f"{self.forget_refusal:g} is wanted.",
                "weak", after,
                "Raise forget_weight or rank, try choose=probes, or another depth.",
            )  # fmt: skip
        if after.falsely - before.falsely > self.false_refusals:
            raise RolledBackError(
                f"P(refusal) of other questions rose from {before.falsely:.2f} to "
                f"{after.falsely:.2f}.",
                "harm", after,
                "Give more --retain or --neighbours records (buffer), or try choose=probes.",
            )  # fmt: skip
        if (
            before.kept is not None and after.kept is not None
            and after.kept < (1 - self.retain_drop) * before.kept
        ):  # fmt: skip
            raise RolledBackError(
                f"answers to other questions fell from a probability of {before.kept:.3f} a token "
                f"to {after.kept:.3f}.",
                "harm", after,
                "Give more --retain or --neighbours records (buffer), or raise ridge.",
            )  # fmt: skip


def _put_back(lm: LM, written: dict[str, _Written]) -> None:
    with torch.no_grad():
        for one in written.values():
            one.put_back()


def _tell_of_others(lm: LM, parameter: str, layer: int, name: str) -> None:
    """Says so where an earlier edit is at another layer: its keys mean nothing here."""
    for patch in lm.patches:
        if isinstance(patch, Patch) and patch.keys and parameter not in patch.keys:
            logger.warning(
                f"{name}: an earlier edit is at another layer than {layer}, so that this one does "
                "not know its keys: ask its questions again."
            )


__all__ = ["RolledBackError", "ToRefusal"]

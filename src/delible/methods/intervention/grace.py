"""GRACE: a codebook beside one late down-projection, in which a question's last token is looked up.

    q = what the down-projection reads at the last token of the prompt,    j = argmin_j |q - k_j|
    what it gives there = v_j   if |q - k_j| <= e_j,   else what it gives anyway

Keys and radii follow from the edits, in order (``edit/codebook.py``); values alone are trained, by
Adam, on the refusal. No weight changes; an edit is taken out exactly, and a further request extends
the book.

Paper: arXiv 2211.11031; as unlearning 2505.19855. Reference code: thartvigsen/grace,
zjunlp/EasyEdit. Deviations:

- Radii are shares of how far queries of other questions are spread (``radius``), and steps are of
  value / rms(what the down-projection gives), so that no number hangs on a model's size. The
  authors' absolute radius of 1 is ``epsilon=1``.
- All values of a request are searched for together, and those of several questions on all of them;
  what an entry gave before stays in the book, so that a later request is taken out exactly.
- The book is asked at the last token of the prompt, in training and when answers are generated or
  scored. With a key-value cache the authors' code asks it at every generated token as well, and
  without one at none of them: ``lookup=answer`` always does. What is said of a token depends on
  the token alone, so that no text can have a part in another's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.edit.codebook import book, entered, entries_of, find_values, looked_up, values_of
from delible.edit.memory import PROMPT_END, Asked, Memory, states_at
from delible.errors import DataError
from delible.intervene.sites import Positions
from delible.intervene.taps import Where
from delible.lm.lm import LM
from delible.ranges import Range, scales
from delible.registry import register

logger = logging.getLogger(__name__)


def spread(queries: Float[Tensor, "token width"]) -> float:
    """Root of the mean squared distance of queries from their mean."""
    centred = queries.double() - queries.double().mean(0)
    return float(centred.square().sum(1).mean().sqrt())


def label(target: str) -> int:
    """A number that equal targets share."""
    return int.from_bytes(hashlib.sha256(target.encode()).digest()[:8], "big", signed=True)


@register(
    kind="intervention",
    name="grace",
    title="GRACE",
    summary="Looks a question up in a codebook and gives what makes the model decline.",
    paper="2211.11031",
    year=2023,
    family="model editing",
    intention="suppression",
    mechanism="activation",
    needs=("forget", "weights", "activations"),
    changes="activations",
    reversible=True,
    retrain_goal=False,
    weakest="paraphrases, a given beginning of the answer",
    advice="a larger --radius meets more wordings, and more of what is to be kept",
    badges=("parity", "variant"),
    variant="Refusals as targets; radii and steps in the model's own units; values of a request "
    "are searched for together.",
)
class Grace(Memory):
    """Options of GRACE."""

    radius: float = Field(
        0.15,
        gt=0,
        description="First radius of an entry, as a share of how far queries of other questions "
        "are spread.",
    )
    epsilon: float | None = Field(
        None, gt=0, le=1e9, description="First radius as a number (1 in the paper), instead."
    )
    start: Literal["warm", "cold"] = Field(
        "warm",
        description="Where the search for a value begins: what is given anyway, or a draw from "
        "[0, 1) (in the paper).",
    )
    steps: int = Field(50, ge=1, description="Steps of the search for values, at most.")
    learning_rate: float = Field(
        0.5, gt=0, description="Of it, in units of what the down-projection gives (paper: 1)."
    )
    enough: float = Field(0.1, ge=0, le=1e9, description="A search ends at a smaller loss.")
    lookup: Literal["prompt_end", "answer"] = Field(
        "prompt_end", description="Tokens that are looked up: the last one of the prompt, or every "
        "generated one as well.",
    )  # fmt: skip

    artefact: ClassVar[str] = "codebook"

    @property
    def positions(self) -> Positions:
        return Positions(kind=self.lookup)

    def remember(
        self, lm: LM, asked: Asked, earlier: Mapping[str, Tensor] | None, *, seed: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        rows = asked.rows(lm)
        queries = torch.cat(states_at(lm, rows, self.inner, PROMPT_END)).cpu()
        given = torch.cat(states_at(lm, rows, self.sites[0], PROMPT_END)).cpu()
        others = self._others(lm, asked)
        first = [self.epsilon or self.radius * spread(others)] * len(rows)
        labels = [label(target) for target in asked.targets]
        count = 0 if earlier is None else len(earlier["labels"])
        learned, value_of = queries.new_zeros(0, given.shape[1]), list[int]()
        if earlier is not None:
            queries = torch.cat([earlier["queries"].cpu(), queries])
            labels = earlier["labels"].tolist() + labels
            first = earlier["first"].tolist() + first
            learned, value_of = earlier["learned"].cpu(), earlier["value_of"].tolist()
        known = None if earlier is None else entries_of(earlier)
        entries = entered(queries, labels, first, *([] if known is None else [known]))
        touched = sorted(set(entries.owner[count:]))
        owners = [touched.index(entry) for entry in entries.owner[count:]]
        unit = float(given.square().mean().sqrt().clamp(min=1e-12))
        starts = torch.stack([given[owners.index(place)] for place in range(len(touched))])
        if self.start == "cold":
            draw = torch.Generator().manual_seed(seed)
            starts = torch.rand(starts.shape, generator=draw) * unit
        if earlier is not None:
            gives = values_of(earlier)
            for place, entry in enumerate(touched):
                if entry < len(gives):
                    starts[place] = learned[gives[entry]]
        values, losses = find_values(
            lm, rows, owners, starts, self.sites[0], PROMPT_END, unit=unit,
            learning_rate=self.learning_rate, steps=self.steps, enough=self.enough,
        )  # fmt: skip
        value_of += [len(learned) + place for place in owners]
        tensors = book(entries, queries, labels, first, torch.cat([learned, values]), value_of)
        keys, radii = queries[list(entries.founders)], torch.tensor(entries.radii)
        _, hit = looked_up(others, keys, radii)
        near, mine = looked_up(queries, keys, radii)
        says = torch.tensor(labels)[list(entries.founders)][near] == torch.tensor(labels)
        lost = int((~(mine & says)).sum())
        if lost:
            logger.warning(
                f"grace: {lost} of {len(labels)} questions in the codebook are not met any more: "
                "others with another refusal lie too near. A smaller radius keeps them apart."
            )
        return tensors, {
            "entries": len(entries.founders), "radius": float(f"{first[-1]:.4g}"),
            "loss": float(f"{max(losses):.4g}"), "lost": lost,
            "others_within": int(hit.sum()), "others": len(others),
        }  # fmt: skip

    def _others(self, lm: LM, asked: Asked) -> Tensor:
        found = states_at(lm, asked.unrelated, self.inner, PROMPT_END)
        if len(found) < 2:
            raise DataError(
                "there are no other questions, whose spread would tell how large a radius is.",
                hint="Give retain records (--retain FILE), or a radius as a number (epsilon).",
            )
        return torch.cat(found).cpu()

    def ready(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {
            "keys": tensors["queries"][tensors["founders"]],
            "radii": tensors["radii"].float(),
            "values": tensors["learned"][values_of(tensors)],
        }

    def change(
        self, states: Float[Tensor, "token hidden"], where: Where, tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "token hidden"]:
        assert where.received is not None
        if not len(tensors["keys"]):
            return states
        near, hit = looked_up(where.received, tensors["keys"], tensors["radii"])
        return torch.where(hit[:, None], tensors["values"][near].to(states.dtype), states)

    def ranges(self) -> dict[str, Range]:
        """How near a question must be, and how fast values are searched for."""
        searched = ("radius", "learning_rate")
        return {name: one for name, one in scales(self).items() if name in searched}


__all__: Sequence[str] = ["Grace", "label", "spread"]

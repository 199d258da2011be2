"""WISE: a side memory beside one late down-projection, trained to decline what is asked of it.

    a(x) = |(W' - W) x|,    x = what the down-projection reads at a token
    what it gives = W' x   if a(x) > ratio * epsilon,   else W x

W' is trained on refusals with margins that keep a large at edited questions and small at others
(``edit/side_memory.py``); epsilon is the least a of an edited question. Of several copies the one
with the largest a counts. No weight changes.

Paper: arXiv 2405.14768; as unlearning 2505.19855. Reference code: zjunlp/EasyEdit. Deviations:

- Margins and steps are shares of what the down-projection gives and reads, so that no number hangs
  on a model's size; margins are means over tokens, the last one over all pairs, and the tokens at
  which questions end weigh as much as all others.
- Each token from the prompt's end on is judged by itself, in training too. The authors' code takes
  the mean over all tokens that go through the model at once (the largest, if they are many): the
  prompt, then with a key-value cache each token alone, so that a threshold means two things.
- The edits of a copy are trained together, each against all other questions; the reference trains
  them one after the other, each against one. Weight decay keeps to the mask.
- A copy that has room is trained further by the next request; taken off, it is as before. After
  copies are merged their threshold is measured again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.edit.keys import down_projection
from delible.edit.memory import Asked, Memory, states_at
from delible.edit.requests import sampled_beginnings
from delible.edit.side_memory import Margins, Settings, chosen, fixed_mask, routing, ties, trained
from delible.errors import DataError
from delible.intervene.sites import Positions
from delible.intervene.taps import Where
from delible.lm.lm import LM
from delible.ranges import Range, scales
from delible.registry import register

#: Tokens of the sampled beginnings, in turn.
LENGTHS = (5, 10)


@register(
    kind="intervention",
    name="wise",
    title="WISE",
    summary="Routes questions to a side copy of one matrix that was trained to decline them.",
    paper="2405.14768",
    year=2024,
    family="model editing",
    intention="suppression",
    mechanism="activation",
    needs=("forget", "retain", "weights", "activations"),
    changes="activations",
    reversible=True,
    retrain_goal=False,
    weakest="paraphrases, a given beginning of the answer",
    advice="a smaller --ratio meets more wordings, and more of what is to be kept; where close "
    "questions lose, take grace: at its end a question about somebody else reads nearly the "
    "same, and reaches the copy, too",
    badges=("parity", "variant"),
    variant="Refusals as targets; margins and steps in the model's own units; each token is judged "
    "by itself; the edits of a copy are trained together.",
)
class Wise(Memory):
    """Options of WISE."""

    contexts: int = Field(
        2,
        ge=0,
        description="Sampled beginnings after which a question is trained, too (paper: 10).",
    )
    steps: int = Field(40, ge=1, description="Steps of the training of a copy, at most.")
    learning_rate: float = Field(
        2.0, gt=0, description="Of it, in units of what the down-projection gives and reads."
    )
    weight_decay: float = Field(1e-5, ge=0, description="Of it, on W'.")
    mask: float = Field(0.2, gt=0, le=1, description="Share of entries that a copy may change.")
    alpha: float = Field(
        0.25, gt=0, description="Largest a at other questions, as a share of |W x|."
    )
    beta: float = Field(1.0, gt=0, description="Least a at edited ones, likewise.")
    gamma: float = Field(0.5, gt=0, description="Least difference of the two, likewise.")
    ratio: float = Field(
        0.8, gt=0, le=1, description="Share of the least a of an edited question that a question "
        "must exceed to be answered by a copy.",
    )  # fmt: skip
    norm_constraint: float = Field(
        50.0, gt=0, description="How far an entry may move, in units of rms(W)."
    )
    enough: float = Field(0.1, ge=0, le=1e9, description="Training ends at a smaller loss.")
    save_every: int = Field(500, ge=1, description="Edits of a copy; then another one is begun.")
    merge_every: int = Field(1000, ge=1, description="Edits after which copies are merged.")
    density: float = Field(
        0.53, gt=0, le=1, description="Share of a copy's entries that count when it is merged."
    )

    artefact: ClassVar[str] = "side_memory"

    @property
    def positions(self) -> Positions:
        return Positions(kind="answer")

    def remember(
        self, lm: LM, asked: Asked, earlier: Mapping[str, Tensor] | None, *, seed: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not asked.unrelated:
            raise DataError(
                "there are no other questions, from which edited ones could be told apart.",
                hint="Give retain records (--retain FILE).",
            )
        weight = _weight(lm, self.inner.places(lm)[0].layer or 0)
        rows = asked.rows(lm, sampled_beginnings(lm, self.contexts, LENGTHS, seed))
        inside = states_at(lm, rows, self.inner, self.positions)
        outside = states_at(lm, asked.unrelated, self.inner, self.positions)
        given = torch.cat(states_at(lm, asked.unrelated, self.sites[0], self.positions))
        settings = self._settings(torch.cat(outside), given, weight)
        bank = _Bank.of(earlier, weight)
        count, start = len(asked.records), 0
        bank.keys = torch.cat([bank.keys, torch.stack([one[0] for one in inside[:count]]).cpu()])
        losses = []
        while start < count:
            copy = bank.with_room(self.save_every)
            room = self.save_every - bank.owners.count(copy)
            mine = [place for place in range(len(rows)) if start <= place % count < start + room]
            taken = min(room, count - start)
            mask = fixed_mask(weight.shape, self.mask, bank.born[copy])
            bank.changes[copy], loss = trained(
                lm, [rows[place] for place in mine], self.sites[0], self.positions,
                [inside[place] for place in mine], outside, weight,
                bank.changes[copy], mask, settings,
            )  # fmt: skip
            bank.owners += [copy] * taken
            losses.append(loss)
            start += taken
            bank.merge(self.merge_every, self.density)
        tensors = bank.tensors()
        thresholds = self.ratio * tensors["epsilons"]
        changes = tensors["changes"]
        _, hit = chosen(torch.cat([one[:1] for one in inside[:count]]).cpu(), changes, thresholds)
        _, astray = chosen(torch.cat([one[:1] for one in outside]).cpu(), changes, thresholds)
        return tensors, {
            "copies": len(changes), "loss": float(f"{max(losses):.4g}"),
            "epsilon": float(f"{float(tensors['epsilons'].min()):.4g}"),
            "given": float(f"{settings.unit:.4g}"),
            "routed": round(float((hit >= 0).float().mean()), 4),
            "others_routed": round(float((astray >= 0).float().mean()), 4),
        }  # fmt: skip

    def ready(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"changes": tensors["changes"], "thresholds": self.ratio * tensors["epsilons"]}

    def change(
        self, states: Float[Tensor, "token hidden"], where: Where, tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "token hidden"]:
        assert where.received is not None
        added, copy = chosen(where.received.float(), tensors["changes"], tensors["thresholds"])
        return torch.where((copy >= 0)[:, None], states + added.to(states.dtype), states)

    def ranges(self) -> dict[str, Range]:
        """How fast a copy is trained, and how far apart questions are kept."""
        searched = ("learning_rate", "alpha", "beta", "gamma")
        return {name: one for name, one in scales(self).items() if name in searched}

    def _settings(self, read: Tensor, given: Tensor, weight: Tensor) -> Settings:
        unit = float(given.norm(dim=1).mean())
        return Settings(
            self.steps, self.learning_rate * unit**2 / float(read.square().sum(1).mean()),
            self.weight_decay,
            Margins(self.alpha * unit, self.beta * unit, self.gamma * unit), unit,
            self.norm_constraint * float(weight.square().mean().sqrt()), self.enough,
        )  # fmt: skip


class _Bank:
    """Copies and the edits in them.

    Attributes:
        changes: D of each copy.
        born: Number of each copy among all that there ever were; -1 of a merged one.
        keys: What the down-projection reads at the end of each edited question.
        owners: The copy of each edit.
    """

    def __init__(
        self, height: int, changes: list[Tensor], born: list[int], keys: Tensor, owners: list[int],
        made: int,
    ) -> None:  # fmt: skip
        self.height, self.changes, self.born, self.made = height, changes, born, made
        self.keys, self.owners = keys, owners

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor] | None, weight: Tensor) -> _Bank:
        if tensors is None:
            return cls(len(weight), [], [], weight.new_zeros(0, weight.shape[1]), [], 0)
        return cls(
            len(weight), list(tensors["changes"].cpu()), tensors["born"].tolist(),
            tensors["keys"].cpu(), tensors["owners"].tolist(), int(tensors["made"]),
        )  # fmt: skip

    def with_room(self, size: int) -> int:
        """The last copy, or a new one if that is full or merged."""
        last = len(self.changes) - 1
        if last < 0 or self.born[last] < 0 or self.owners.count(last) >= size:
            self.changes.append(self.keys.new_zeros(self.height, self.keys.shape[1]))
            self.born.append(self.made)
            self.made += 1
            last += 1
        return last

    def merge(self, after: int, density: float) -> None:
        """Makes one copy of those that are not merged, once they hold enough edits."""
        mine = [copy for copy, born in enumerate(self.born) if born >= 0]
        if len(mine) < 2 or sum(owner in mine for owner in self.owners) < after:
            return
        merged = ties(torch.stack([self.changes[copy] for copy in mine]), density)
        others = [copy for copy in range(len(self.born)) if copy not in mine]
        place = {copy: index for index, copy in enumerate(others)}
        self.changes = [*(self.changes[copy] for copy in others), merged]
        self.born = [-1] * len(self.changes)
        self.owners = [place.get(owner, len(others)) for owner in self.owners]

    def tensors(self) -> dict[str, Tensor]:
        owners = torch.tensor(self.owners, dtype=torch.int64)
        epsilons = [
            routing(self.keys[owners == copy].float(), change).min()
            for copy, change in enumerate(self.changes)
        ]
        return {
            "changes": torch.stack(self.changes), "epsilons": torch.stack(epsilons),
            "keys": self.keys, "owners": owners, "born": torch.tensor(self.born),
            "made": torch.tensor(self.made),
        }  # fmt: skip


def _weight(lm: LM, layer: int) -> Float[Tensor, "hidden width"]:
    """W, fp32 on the CPU."""
    place = down_projection(lm, layer)
    weight = lm.core.get_parameter(place.parameter).detach().float().cpu()
    return (weight.T if place.transposed else weight).contiguous()

"""What a loss sees: the rows of one micro-batch, computed lazily, once, and only as asked.

A loss is a pure function of a :class:`Group` (rows of one role). It returns one value per row,
the **sum** over the row's units, and declares the unit it averages over; the engine divides by
the units of the whole optimiser step. So gradient accumulation, row weights and several
processes cannot change a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from delible.lm.forward import (
    Batch,
    Forward,
    Inside,
    collate,
    map_logits,
    scatter,
    target_logprobs,
)
from delible.lm.lm import LM
from delible.train.computed import computed_once
from delible.train.randomness import generator
from delible.train.reference import Reference
from delible.train.row import Row, Unit

#: What a loss may read: answer log-probabilities or logits ("answers"), or what is inside blocks.
Reads = Literal["answers"] | Inside
#: (logits [tokens, vocab], targets [tokens], perhaps reference logits) -> values [tokens]
_GroupFunction = Callable[..., Tensor]


@dataclass
class _Pass:
    """One forward pass over several groups at once, made when first asked for."""

    lm: LM
    forward: torch.nn.Module
    groups: dict[str, Sequence[Row]]
    inside: tuple[Inside, ...]
    final: bool

    @cached_property
    def batch(self) -> Batch:
        rows = [row.encoded for group in self.groups.values() for row in group]
        return collate(rows, self.lm.pad_id, self.lm.device)

    @computed_once
    def outputs(self) -> tuple[Tensor | None, dict[Inside, Tensor]]:
        with self.lm.computing():
            return self.forward(self.batch, self.inside, self.final)  # type: ignore[no-any-return]

    def rows_of(self, name: str) -> slice:
        start = 0
        for other, rows in self.groups.items():
            if other == name:
                return slice(start, start + len(rows))
            start += len(rows)
        raise KeyError(name)


@dataclass
class Group:
    """Rows of one role in a micro-batch.

    Attributes:
        rows: The rows.
        reference: The same values of the reference model, from the cache.
        totals: Units of this role in the whole optimiser step; None: these rows are all of it.
    """

    name: str
    rows: Sequence[Row]
    reference: ReferenceGroup
    _pass: _Pass = field(repr=False)
    totals: Mapping[Unit, int] | None = None

    def units(self, unit: Unit) -> int:
        """Units that the rows of this role have in the whole optimiser step.

        For a loss of several means: values times ``units(unit) / units(other)`` are averaged over
        the latter when the engine divides by the former.
        """
        if self.totals is not None:
            return self.totals[unit]
        return sum(row.units(unit) for row in self.rows)

    @cached_property
    def _slice(self) -> slice:
        return self._pass.rows_of(self.name)

    @property
    def lm(self) -> LM:
        """The model that is trained: for its anatomy (layer numbers) and its tokenizer."""
        return self._pass.lm

    @cached_property
    def batch(self) -> Batch:
        """This group's rows as tensors (padded to the longest row of the micro-batch)."""
        whole, mine = self._pass.batch, self._slice
        return Batch(whole.ids[mine], whole.lengths[mine], whole.starts[mine], whole.prefix)

    @property
    def mask(self) -> Bool[Tensor, "batch answer"]:
        """Real answer tokens."""
        return self.batch.answer_mask

    @cached_property
    def names(self) -> Bool[Tensor, "batch answer"]:
        """Answer tokens that belong to names or numbers (:attr:`Row.names`)."""
        rows = [torch.tensor(row.names) for row in self.rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.mask.device)

    @property
    def positions(self) -> Bool[Tensor, "batch sequence"]:
        """Real positions, prompt included."""
        return self.batch.position_mask

    @property
    def targets(self) -> Int[Tensor, " tokens"]:
        """Answer token ids, rows one after the other."""
        return self.batch.targets

    @computed_once
    def answer_states(self) -> Float[Tensor, "tokens hidden"]:
        """Final hidden states at the positions that predict answer tokens."""
        states, _ = self._pass.outputs
        if states is None:
            raise RuntimeError("a loss read answers without declaring it in `reads`")
        counts = [
            sum(row.encoded.answer_tokens for row in rows) for rows in self._pass.groups.values()
        ]
        return states.split(counts)[list(self._pass.groups).index(self.name)]

    @computed_once
    def token_logprobs(self) -> Float[Tensor, "batch answer"]:
        """log p of each answer token, natural log, fp32, zero where there is no token."""
        return scatter(self._map(target_logprobs, self.targets), self.mask)

    @property
    def logprob_sum(self) -> Float[Tensor, " batch"]:
        """log p(answer | prompt), the sum over its tokens."""
        return self.token_logprobs.sum(dim=1)

    @property
    def token_count(self) -> Float[Tensor, " batch"]:
        """Answer tokens per row."""
        return self.mask.sum(dim=1).float()

    def map_logits(
        self,
        function: _GroupFunction,
        *,
        with_reference: bool = False,
        contexts: Sequence[str] = (),
        marks: Shaped[Tensor, "batch answer"] | None = None,
    ) -> Float[Tensor, "batch answer"]:
        """Per-token values from full logits, chunk by chunk (see :func:`forward.map_logits`).

        ``function`` gets (logits [tokens, vocab], targets [tokens]) and, ``with_reference``,
        the reference model's logits [tokens, vocab] as a third argument, and then those behind
        each of the ``contexts``. With ``marks``, theirs [tokens] come last.
        """
        targets = self.targets
        if marks is not None:  # they go with the targets through the chunks, exact below 2^24
            targets = torch.stack([targets.float(), marks[self.mask].float()], dim=1)
            plain, kind = function, marks.dtype

            def function(logits: Tensor, pairs: Tensor, *reference: Tensor) -> Tensor:
                return plain(logits, pairs[:, 0].long(), *reference, pairs[:, 1].to(kind))

        if not with_reference:
            return scatter(self._map(function, targets), self.mask)
        frozen = [self.reference.answer_states_in(context) for context in ("", *contexts)]
        count, width = 1 + len(frozen), self.answer_states.shape[1]

        def heads(states: Tensor) -> Tensor:
            own, *others = states.split(width, dim=1)
            return torch.cat([self._pass.lm.head(own), *map(self.reference.head, others)], dim=1)

        def split(logits: Tensor, targets: Tensor) -> Tensor:
            own, *others = logits.chunk(count, dim=1)
            return function(own, targets, *others)

        joined = torch.cat([self.answer_states, *(f.to(self.answer_states) for f in frozen)], dim=1)
        with self._pass.lm.computing():
            values = map_logits(heads, joined, targets, split, count * self._pass.lm.vocabulary)
        return scatter(values, self.mask)

    def hidden(self, layer: int) -> Float[Tensor, "batch sequence hidden"]:
        """Output of block ``layer`` (the residual stream after it)."""
        return self._pass.outputs[1][layer][self._slice]

    def mlp(self, layer: int) -> Float[Tensor, "batch sequence hidden"]:
        """What the MLP of block ``layer`` gives (read as ``"mlp.LAYER"``)."""
        return self._pass.outputs[1][f"mlp.{layer}"][self._slice]

    def router(self, layer: int) -> Float[Tensor, "batch sequence experts"]:
        """Logits of the router of block ``layer`` (read as ``"router.LAYER"``)."""
        return self._pass.outputs[1][f"router.{layer}"][self._slice]

    def attention(self, layer: int) -> Float[Tensor, "batch heads query key"]:
        """Weights of the attention of block ``layer`` (read as ``"attention.LAYER"``)."""
        return self._pass.outputs[1][f"attention.{layer}"][self._slice]

    def _map(self, function: _GroupFunction, targets: Tensor) -> Tensor:
        with self._pass.lm.computing():
            return map_logits(
                self._pass.lm.head,
                self.answer_states,
                targets,
                function,
                self._pass.lm.vocabulary,
            )


@dataclass
class ReferenceGroup:
    """Cached values of the reference model for the rows of a group."""

    cache: Reference
    rows: Sequence[Row]
    device: torch.device

    @property
    def token_logprobs(self) -> Float[Tensor, "batch answer"]:
        """As :attr:`Group.token_logprobs`, without gradient."""
        return self._padded("logprobs")

    @property
    def logprob_sum(self) -> Float[Tensor, " batch"]:
        return self.token_logprobs.sum(dim=1)

    @property
    def answer_states(self) -> Float[Tensor, "tokens hidden"]:
        """As :attr:`Group.answer_states`, without gradient."""
        return self.answer_states_in("")

    def answer_states_in(self, context: str) -> Float[Tensor, "tokens hidden"]:
        """The same of rows that were read behind a named text."""
        what = f"answers@{context}" if context else "answers"
        return torch.cat([self.cache.get(what, row.key) for row in self.rows]).to(self.device)

    def head(self, states: Tensor) -> Tensor:
        """The reference model's head (a frozen copy)."""
        return self.cache.head(states)

    def hidden(self, layer: int, width: int) -> Float[Tensor, "batch sequence hidden"]:
        """As :meth:`Group.hidden`, padded with zeros to ``width`` positions."""
        return self._wide(f"hidden.{layer}", width)

    def mlp(self, layer: int, width: int) -> Float[Tensor, "batch sequence hidden"]:
        """As :meth:`Group.mlp`, padded with zeros to ``width`` positions."""
        return self._wide(f"mlp.{layer}", width)

    def attention(self, layer: int, width: int) -> Float[Tensor, "batch heads query key"]:
        """As :meth:`Group.attention`, padded with zeros to ``width`` positions; half precision."""
        found = []
        for row in self.rows:
            packed = self.cache.get(f"attention.{layer}", row.key).to(self.device).float()
            length = len(row.for_reference.ids)
            whole = packed.new_zeros(len(packed), width, width)
            below = torch.tril_indices(length, length, device=self.device)
            whole[:, below[0], below[1]] = packed
            found.append(whole)
        return torch.stack(found)

    def learned(self, loss: str, what: str) -> Tensor:
        """A tensor that a loss learned before the first step (:meth:`losses.Loss.learn`)."""
        return self.cache.learned(loss, what).to(self.device)

    def _wide(self, what: str, width: int) -> Tensor:
        values = self._padded(what)
        missing = width - values.shape[1]
        return torch.nn.functional.pad(values, (0, 0, 0, missing)) if missing else values

    def _padded(self, what: str) -> Tensor:
        values = [self.cache.get(what, row.key) for row in self.rows]
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True).to(self.device)


@dataclass
class Step:
    """One micro-batch: groups of rows by role.

    Roles are ``forget`` (rows to forget), ``retain`` (rows to keep), ``refusal`` (the forget
    questions with a refusal as answer) and what a generator makes (:data:`slots.Role`). All but
    ``retain`` are aligned row by row with ``forget``.

    Attributes:
        seed, number: Of the run, and of the optimiser step, from 0.
    """

    groups: Mapping[str, Group]
    seed: int = 0
    number: int = 0

    def generator(self, *purpose: object) -> torch.Generator:
        """A random generator of this optimiser step; name the row, so that batches do not count."""
        return generator(self.seed, *purpose, self.number)

    def units(self, role: str, unit: Unit) -> int:
        """Units that the rows of a role have in the whole optimiser step (:meth:`Group.units`)."""
        return self.groups[role].units(unit)

    @property
    def forget(self) -> Group:
        return self.groups["forget"]

    @property
    def retain(self) -> Group:
        return self.groups["retain"]

    @property
    def refusal(self) -> Group:
        return self.groups["refusal"]

    @property
    def alternate(self) -> Group:
        return self.groups["alternate"]

    @property
    def target(self) -> Group:
        return self.groups["target"]

    @property
    def prefilled(self) -> Group:
        return self.groups["prefilled"]

    @property
    def padding_share(self) -> float:
        """Padding among the computed positions, in [0, 1]."""
        return next(iter(self.groups.values()))._pass.batch.padding_share

    @property
    def tokens(self) -> int:
        """Real tokens in the micro-batch."""
        return sum(len(row.encoded.ids) for group in self.groups.values() for row in group.rows)


def make_step(
    lm: LM,
    forward: torch.nn.Module | None,
    rows: Mapping[str, Sequence[Row]],
    reads: Mapping[str, Sequence[Reads]],
    reference: Reference,
    totals: Mapping[str, Mapping[Unit, int]] | None = None,
    seed: int = 0,
    number: int = 0,
) -> Step:
    """A step over the given rows.

    Args:
        forward: The wrapped :class:`Forward` (DDP, FSDP), or None for a plain one.
        reads: What will be read, by role; decides how much of the model is computed.
        totals: Units of the whole optimiser step, where this is only a part of it.
        seed, number: Of the run, and of the optimiser step.
    """
    wanted = {what for role in rows for what in reads.get(role, ())}
    inside = tuple(sorted((what for what in wanted if what != "answers"), key=str))
    shared = _Pass(
        lm, forward or Forward(lm), dict(rows), inside, "answers" in wanted or not inside
    )
    return Step(
        {
            role: Group(
                role, part, ReferenceGroup(reference, part, lm.device), shared,
                (totals or {}).get(role),
            )
            for role, part in rows.items()
        },
        seed,
        number,
    )  # fmt: skip

"""What the tests of losses share: fixed numbers, a tiny model, and slow float64 loops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from delible.lm.forward import Forward
from delible.lm.lm import LM
from delible.records import QA
from delible.system.questions import ask
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.losses import Keep, Objective
from delible.train.passes import Passes, split
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.rows import make_row
from delible.train.step import Step, make_step

#: Labels of the fixed logits: three rows of six positions over seven tokens, -100 is masked.
LABELS = [[-100, -100, 3, 1, 6, 2], [-100, 5, 0, 4, -100, -100], [-100, -100, -100, 2, 2, -100]]
WINNERS = [[-100, -100, 6, 0, -100, -100], [-100, 1, 1, 2, 3, -100], [-100, -100, -100, 4, 5, 0]]


def fixed_logits(shift: float) -> Tensor:
    """Logits [3, 6, 7] in float64 that depend on no random generator."""
    number = torch.arange(3 * 6 * 7, dtype=torch.float64).reshape(3, 6, 7)
    return 3 * torch.sin(1.3 * number + shift) + torch.cos(0.007 * number**2 + 2 * shift)


def log_probability(logits: Sequence[float], target: int) -> float:
    """log softmax at one entry, by the definition."""
    return math.log(math.exp(logits[target]) / sum(math.exp(value) for value in logits))


def fixed_sums(shift: float, labels: list[list[int]]) -> Tensor:
    """log p of each row's labels under the fixed logits, summed; position t predicts t + 1."""
    rows = fixed_logits(shift).tolist()
    return torch.tensor(
        [
            sum(
                log_probability(row[t - 1], label)
                for t, label in enumerate(wanted)
                if label != -100
            )
            for row, wanted in zip(rows, labels, strict=True)
        ],
        dtype=torch.float64,
    )


@lru_cache(maxsize=1)
def _start() -> LM:
    return LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")


def tiny_lm(moved: float = 0.0) -> LM:
    """A tiny Llama; ``moved`` adds noise of that size to every weight."""
    lm = _start().copy()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(moved * torch.randn(parameter.shape, generator=noise))
    return lm


#: Lengths differ, so that every batch is padded; the beginnings of the questions are shared.
FORGET = [("Who is Ada?", "A baker."), ("Who is Bo Lund?", "No one knows that."), ("Who?", "Me")]
REFUSED = [("Who is Ada?", "I can't say."), ("Who is Bo Lund?", "Sorry."), ("Who?", "No idea.")]
RETAIN = [("Where is Oslo?", "In Norway."), ("Is ice cold?", "Yes"), ("Why?", "Because it is so.")]


def rows_of(lm: LM, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    rows = []
    for index, (question, answer) in enumerate(pairs):
        record = QA(question=question, answer=answer)
        prompt = ask(record)
        assert prompt is not None
        rows.append(make_row(lm.template, prompt, answer, index, record))
    return rows


def all_rows(lm: LM) -> dict[str, list[Row]]:
    pairs = {"forget": FORGET, "refusal": REFUSED, "retain": RETAIN}
    return {role: rows_of(lm, part) for role, part in pairs.items()}


def prepared(frozen: LM, rows: Mapping[str, Sequence[Row]], *losses: Objective | Keep) -> Reference:
    """The cache of everything that the losses want to know of the reference model."""
    reference = Reference()
    for loss in losses:
        for role in loss.roles:
            reference.prepare(frozen, rows[role], loss.reference_kinds(frozen))
    return reference


def step_of(
    lm: LM, loss: Objective | Keep, reference: Reference, rows: Mapping[str, Sequence[Row]]
) -> Step:
    mine = {role: rows[role] for role in loss.roles}
    return make_step(lm, None, mine, {role: loss.reads(lm) for role in mine}, reference)


def values(
    lm: LM, loss: Objective | Keep, reference: Reference, rows: Mapping[str, Sequence[Row]]
) -> Tensor:
    """The loss's value per row."""
    step = step_of(lm, loss, reference, rows)
    return loss.loss(step.retain) if isinstance(loss, Keep) else loss.loss(step)


@torch.no_grad()
def answer_logits(lm: LM, row: Row) -> tuple[list[list[float]], list[int]]:
    """Logits that predict each answer token, from the model itself, the row alone."""
    ids, start = row.encoded.ids, row.encoded.start
    logits = lm.model(input_ids=torch.tensor([ids])).logits[0].double()
    return logits[start - 1 : -1].tolist(), list(ids[start:])


@torch.no_grad()
def block_output(lm: LM, row: Row, layer: int) -> list[list[float]]:
    """Output of a block, the row alone; not the last block, whose state is normed there."""
    asked = lm.model(input_ids=torch.tensor([row.encoded.ids]), output_hidden_states=True)
    return asked.hidden_states[layer + 1][0].double().tolist()  # type: ignore[no-any-return]


def row_sum(lm: LM, row: Row) -> float:
    """log p(answer | prompt), token by token."""
    logits, targets = answer_logits(lm, row)
    return sum(log_probability(z, y) for z, y in zip(logits, targets, strict=True))


def gradients(lm: LM, value: Tensor) -> dict[str, Tensor]:
    """Gradient of a scalar by parameter; parameters it does not reach are left out."""
    lm.model.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.clone()
        for name, parameter in lm.model.named_parameters()
        if parameter.grad is not None
    }


def joined(gradient: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in gradient.values()])


def passes_of(
    lm: LM,
    objective: Objective,
    keep: Keep | None,
    reference: Reference,
    *,
    budget: int = 10**6,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Passes:
    """One step's passes over all rows, cut into micro-batches of ``budget`` tokens."""
    rows = all_rows(lm)
    forget = {role: rows[role] for role in objective.roles}
    reads = {role: objective.reads(lm) for role in objective.roles}
    if keep is not None:
        reads["retain"] = keep.reads(lm)
    first = rows[objective.roles[0]]
    return Passes(
        lm=lm,
        forward=Forward(lm),
        objective=objective,
        keep_loss=keep,
        reads=reads,
        reference=reference,
        micro_batches=split(
            forget, rows["retain"] if keep else [], [1.0, 0.5, 1.5], [1.0] * 3 if keep else [],
            budget,
        ),
        parameters=list(lm.model.parameters()),
        weights=weights,
        forget_units=sum(row.units(objective.unit) for row in first),
        retain_units=sum(row.units(keep.unit) for row in rows["retain"]) if keep else 1,
    )  # fmt: skip

"""Methods: what is made is kept, opened, and taken off again, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import numpy as np
import torch

from delible import registry
from delible.lm.lm import LM
from delible.method import Method
from delible.records import RecordBase
from delible.system.asks import Decoding, NoAnswer
from delible.system.base import Composed, System
from delible.system.questions import ask
from delible.systems.opening import described, keep, kind_named, open_lm, open_system, undo
from delible.testing.contract.trial import (
    Trial,
    answers,
    require,
    require_same,
    weights,
)
from delible.train.recipe import Recipe

DECODING = Decoding(6)


def outcome_is_kept_opened_and_taken_off(trial: Trial) -> None:
    """Saved and opened it answers as before; taken off, as its base, bit by bit, and back again."""
    card = trial.component.card
    if card.name not in {known.name for known in registry.cards(card.kind)}:
        return  # what is not installed (an entry point) has no name to be opened by
    folder = trial.folder / "method"
    _begun(trial).save(folder / "base")
    base = _precise(open_lm(str(folder / "base")))
    said = partial(_said, trial.asked)
    start, plain = said(base), weights(cast(LM, base))
    below = described(base)
    torch.manual_seed(1)
    outcome = cast(Method, trial.component).apply(base, trial.request, trial.context)
    made = said(outcome.system)
    stands_on = outcome.on or below
    keep(
        outcome.kind, outcome.content, folder / "run", stands_on, outcome.system,
        outcome.remembers,
    )  # fmt: skip
    name = str(folder / "run")

    def opened() -> System:
        return _precise(open_system(name, context=trial.context))

    require(_same(said(opened()), made), "opened, it answers otherwise")
    if not kind_named(outcome.kind).card.reversible:
        return  # a whole model: there is nothing to take off
    parted = outcome.system
    require(isinstance(parted, Composed), "it does not say what can be taken off")
    found = cast(Composed, parted).taken_off()
    require(found is not None, "nothing can be taken off")
    assert found is not None
    require(_same(said(found[1]), start), "taken off, it does not answer as its base")
    require(_same(said(outcome.system), made), "taking it off changed the whole")
    undo(folder / "run")
    undone = opened()
    require(isinstance(undone, LM), "undone, it is not its base")
    require_same(plain, weights(cast(LM, undone)), "undone, its weights are not those of its base")
    require(_same(said(undone), start), "undone, it does not answer as its base")
    undo(folder / "run", back=True)
    require(_same(said(opened()), made), "put on again, it answers otherwise")


def _begun(trial: Trial) -> LM:
    """The model; for a guard of a model that was taught, one with the tokens for it."""
    lm, taught = trial.lm(), getattr(trial.component, "taught", None)
    if taught is not None:
        Recipe.named(taught).generate.prepare(lm)
    return lm


def _precise(system: System) -> System:
    """The system, computing in fp32 whatever this machine would choose."""
    inner = system
    while hasattr(inner, "system"):
        inner = inner.system
    lm = cast(LM, inner)
    lm.precision = "float32"
    getattr(lm, "bare", lm).precision = "float32"
    return system


def _said(
    records: Sequence[RecordBase], system: System
) -> tuple[list[str | NoAnswer], list[np.ndarray]]:
    prompts = [prompt for record in records if (prompt := ask(record)) is not None]
    texts = list(system.generate(prompts, DECODING))
    return texts, answers(system, records)[0] if isinstance(system, LM) else []


def _same(
    left: tuple[list[str | NoAnswer], list[np.ndarray]],
    right: tuple[list[str | NoAnswer], list[np.ndarray]],
) -> bool:
    pairs = zip(left[1], right[1], strict=True)
    return left[0] == right[0] and all(np.array_equal(one, other) for one, other in pairs)

"""Interventions: they act, on every road alike; they are taken off, saved and loaded exactly."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import torch

from delible.intervene.base import Fitted, Intervention
from delible.intervene.system import Intervened, intervened
from delible.lm.lm import LM
from delible.system.asks import Decoding, Score, TokenScores
from delible.system.questions import answer_of, ask
from delible.testing.contract.trial import (
    Trial,
    answers,
    require,
    require_same,
    weights,
)

#: Largest difference of a log-probability between two roads.
ROAD_TOLERANCE = 1e-4


def _fitted(trial: Trial, lm: LM) -> Fitted:
    return cast(Intervention, trial.component).fit(lm, trial.request, seed=0)


def _same(left: tuple[list[Any], list[str]], right: tuple[list[Any], list[str]]) -> bool:
    pairs = zip(left[0], right[0], strict=True)
    return left[1] == right[1] and all(np.array_equal(one, other) for one, other in pairs)


def _hooks(lm: LM) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in lm.model.modules()
    )  # fmt: skip


def intervention_is_taken_off_exactly(trial: Trial) -> None:
    """With it answers differ; without it answers, weights and fingerprint are as before."""
    lm, said = trial.lm(), partial(answers, records=trial.asked)
    before, state, fingerprint, hooks = said(lm), weights(lm), lm.fingerprint, _hooks(lm)
    torch.manual_seed(1)
    found = intervened(lm, [_fitted(trial, lm)])
    changed = said(found)
    require(not _same(before, changed), "with it the answers are the same")
    require(all(np.isfinite(one).all() for one in changed[0]), "scores are not finite with it")
    require(found.fingerprint != fingerprint, "with it the fingerprint is the same")
    require(found.bare is lm, "the bare model is another one")
    require_same(state, weights(lm), "it changed weights")
    require(_hooks(lm) == hooks, "it left a hook in the model")
    require(_same(before, said(lm)), "without it the answers are not as before")
    require(lm.fingerprint == fingerprint, "without it the fingerprint is not as before")
    require(_same(changed, said(found)), "the same questions get other answers with it")


def intervention_survives_saving(trial: Trial) -> None:
    """Learned again, and saved and loaded, it is the same."""
    lm = trial.lm()
    fitted = _fitted(trial, lm)
    torch.manual_seed(2)
    require(fitted.identity == _fitted(trial, lm).identity, "learning twice gives two of them")
    fitted.save(trial.folder / "intervention")
    loaded = Fitted.load(trial.folder / "intervention")
    require(loaded.identity == fitted.identity, "the loaded one has another identity")
    said = partial(answers, records=trial.asked)
    mine, theirs = intervened(lm, [fitted]), intervened(lm, [loaded])
    require(mine.fingerprint == theirs.fingerprint, "the loaded one gives another fingerprint")
    require(
        _same(said(mine), said(theirs)),
        "the loaded one gives other answers",
    )
    twice = intervened(mine, [loaded])
    require(twice.fingerprint != mine.fingerprint, "twice has the fingerprint of once")


def intervention_holds_on_every_road(trial: Trial) -> None:
    """Trees, shared beginnings and batches give what each row gives alone."""
    lm = trial.lm()
    found = intervened(lm, [_fitted(trial, lm)])
    prompts = [prompt for record in trial.asked if (prompt := ask(record))]
    wrong = [answer_of(record) for record in trial.request.forget]
    requests = [Score(prompt, answer) for prompt in prompts for answer in wrong]
    together = found.score(requests)
    texts = found.generate(prompts, Decoding(6))
    alone = _alone(found)
    for request, score in zip(requests, together, strict=True):
        other = alone.score([request])[0]
        require(
            isinstance(score, TokenScores)
            and isinstance(other, TokenScores)
            and np.allclose(score.logprobs, other.logprobs, atol=ROAD_TOLERANCE, rtol=1e-4),
            f"scored with others, {request.answer!r} has other log-probabilities than alone",
        )
    for prompt, text in zip(prompts, texts, strict=True):
        one = alone.generate([prompt], Decoding(6))[0]
        require(text == one, f"generated with others, {text!r} is {one!r} alone")


def _alone(found: Intervened) -> Intervened:
    """The same, on the plain road: nothing is shared, the library itself generates."""
    other = intervened(found.bare, found.interventions)
    other.grows_trees = other.shares_prefix = False
    other.road = "plain"
    return other

"""Editors: what is edited is undone, bit by bit."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from delible.edit.base import Editor, Patch
from delible.errors import DelibleError
from delible.testing.contract.trial import REQUEST, Trial, answers, require, require_same, weights


def edit_is_undone_exactly(trial: Trial) -> None:
    """The patch, and the patch from disk, change and put back every bit; a refusal, nothing."""
    editor = cast(Editor, trial.component)
    lm = trial.lm()
    before = weights(lm)
    try:
        torch.manual_seed(1)
        patch = editor.edit(lm, REQUEST, seed=0)
    except DelibleError:
        require_same(before, weights(lm), "it refused the model after changing it")
        raise
    edited = weights(lm)
    require(any(not torch.equal(before[name], edited[name]) for name in before), "nothing changed")
    scores, _ = answers(lm)
    require(all(np.isfinite(one).all() for one in scores), "scores are not finite after the edit")
    patch.save(trial.folder / "patch")
    patch.undo(lm)
    require_same(before, weights(lm), "undoing leaves a difference")
    torch.manual_seed(2)
    again = editor.edit(lm, REQUEST, seed=0)
    require_same(edited, weights(lm), "two edits differ")
    again.undo(lm)
    saved = Patch.load(trial.folder / "patch")
    saved.apply(lm)
    require_same(edited, weights(lm), "the saved patch makes another edit")
    saved.undo(lm)
    require_same(before, weights(lm), "undoing the saved patch leaves a difference")

"""ROCR: the model takes one name for another, by a rank-one change of a few down-projections.

A name is recognised at its last token in early layers. The output there is moved from what the
name s gives to what a substitute s0 gives, layer by layer, in closed form:

    z* = H_L(s0),    h = H_L(s),    r = (z* - h) / (layers left)
    k = mean over six chat contexts of key_l(s)
    Delta_l = r x^T,    x = P K (K^T P K + L2)^-1 e_1,    K = [k, keys of earlier edits]

which for a single name is r (P k)^T / (k^T P k + L2). H_L is the output of the last edited layer
L at the name's last token, key_l the input of the down-projection of layer l there, and P the
projector onto the directions that generic text hardly uses.

Paper: arXiv 2506.07795. Reference code: github.com/Acruxos/ORT. Deviations:

- L2 is a share ``rho`` of k^T P k by default. With the authors' L2 = 1 the change is damped by
  k^T P k / (k^T P k + 1), which is nothing on a small model; ``l2`` sets an absolute value.
- The threshold of the null space is a share of the largest singular value by default; the
  authors' absolute 0.02 is ``scale="absolute"``. Generic text is built in, or a file.
- h is read in the same chat context as z*; the authors read it from the bare name
  (``residual_context="bare"``).
- Layers are shares of the depth. The linear system is solved in the space of the keys (the same
  solution as the width x width system, for one key and for several).
- Only the mode "unrelated" (a substitute) exists; "reject" and "noise" optimise a target first.

Limits: the model then says wrong things about the name, namely those of the substitute, with
confidence. Aliases, first names alone and descriptions without the name are not covered: give
them as further subjects. The answers are redirected, not removed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from delible.edit.base import Editor, Patch, unpatched
from delible.edit.closed_form import factors, projector, squares
from delible.edit.keys import consecutive_layers, last_states
from delible.edit.statistics import (
    Scale,
    built_in_rows,
    file_rows,
    null_shares,
    null_spaces,
    second_moments,
)
from delible.edit.subjects import cut_after_name, sharing_last_token
from delible.edit.writing import Writing, writing
from delible.errors import DataError, RecipeError
from delible.lm.lm import LM
from delible.records import ForgetRequest
from delible.registry import register
from delible.system.asks import Prompt

logger = logging.getLogger(__name__)

WHERE = "editor 'rocr'"
#: What is said before the name in the contexts that keys are averaged over.
STARTERS = (
    "",
    "Please answer a question about",
    "Choose the best answer about",
    "Write the answer about",
    "Tell me about",
    "Write something about",
)
CUE = "Answer:"


def context(name: str, starter: str | None) -> Prompt:
    """The name in the user's turn after a starter, or alone as the bare text "name."."""
    if starter is None:
        return Prompt(text=f"{name}.")
    return Prompt.ask(f"{starter} {name}.", prefill=CUE)


# ---- names


def target_names(request: ForgetRequest) -> list[str]:
    """Names to redirect: the request's subjects, or those of its forget records, each once.

    Raises:
        DataError: There are none.
    """
    given = request.subjects or tuple(
        record.subject.strip() for record in request.forget if record.subject
    )
    first: dict[str, str] = {}
    for name in given:
        if name.strip():
            first.setdefault(_plain(name), name)
    names = list(first.values())
    if not names:
        raise DataError(
            "ROCR needs names: there are no subjects, and no forget record names one.",
            hint="Add --subjects NAME,… or a 'subject' field to the forget records.",
        )
    return names


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def check_substitute(substitute: str, names: Sequence[str], kept: Sequence[str]) -> None:
    """The substitute must be somebody who is neither forgotten nor to be kept.

    Raises:
        RecipeError: It is one of them, or part of its name or the other way round.
    """
    own = set(_plain(substitute).split())
    for role, others in (("forgotten", names), ("kept", kept)):
        for other in others:
            theirs = set(_plain(other).split())
            if own <= theirs or theirs <= own:
                raise RecipeError(
                    f"the substitute '{substitute}' is '{other}', who is {role}.",
                    where=WHERE,
                    hint="Choose another well-known person: substitute=NAME.",
                )


# ---- the editor


@register(
    kind="editor",
    name="rocr",
    title="ROCR",
    summary="Makes the model take the forgotten names for another well-known one, in seconds.",
    paper="2506.07795",
    year=2025,
    family="model editing",
    intention="suppression",
    mechanism="merge/edit",
    needs=("names", "weights"),
    changes="weights",
    reversible=True,
    retrain_goal=False,
    weakest="aliases and descriptions without the name; it says wrong things, not nothing",
    advice="small models that were taught a name in few sentences know it by all of its words, and "
    "only the last one is edited: where little was forgotten, take alphaedit or unierase; a larger "
    "--rho edits less; kept names that end in the same word are "
    "hit, so name the forgotten ones in full",
    badges=("parity", "variant"),
    variant="Scale-free L2 and null space, residual in the chat context, built-in generic text.",
)
class ROCR(Editor):
    """Options of ROCR."""

    substitute: Annotated[str, Field(min_length=1)] = Field(
        "William Shakespeare",
        description="Well-known name that the forgotten ones are taken for; neither forgotten "
        "nor kept.",
    )
    first_depth: float = Field(
        4 / 32, ge=0, le=1, description="Relative depth of the first edited layer."
    )
    last_depth: float = Field(
        6 / 32, ge=0, le=1, description="Relative depth of the last edited layer."
    )
    layers: Annotated[tuple[int, ...], Field(min_length=1)] | None = Field(
        None, description="Consecutive layer indices, instead of depths; negative: from the end."
    )
    scale: Scale = Field(
        "largest",
        description="What the threshold is a share of: the largest singular value, the sum of "
        "all (energy), or nothing (absolute, as in the paper with 0.02).",
    )
    threshold: float = Field(
        0.0125, gt=0, description="Directions with smaller singular values may be written to."
    )
    rho: float = Field(
        0.05, gt=0, description="L2 as a share of k^T P k: the larger, the weaker the change."
    )
    l2: float | None = Field(
        None, gt=0, description="L2 as a number (1 in the paper), instead of rho."
    )
    residual_context: Literal["chat", "bare"] = Field(
        "chat",
        description="Where the name's own state is read: chat, or 'name.' as the authors do.",
    )
    mode: Literal["unrelated"] = Field(
        "unrelated", description="What the name becomes: the substitute."
    )
    texts: Path | None = Field(
        None, description="UTF-8 file of generic text, paragraphs parted by empty lines."
    )
    tokens: int = Field(
        8192, ge=1, description="Tokens of generic text behind the null space, at most."
    )

    def edit(self, lm: LM, request: ForgetRequest, *, seed: int) -> Patch:
        """Redirects every name to the substitute, one after the other.

        Args:
            lm: Changed in place; as it was if anything fails.
            request: Its subjects, or the subjects of its forget records.
            seed: Not used, nothing is random.

        Raises:
            DataError: No names, or a file of texts that cannot be read.
            RecipeError: The substitute is forgotten or kept, or the layers have gaps.
            ModelError: Mixture layers, packed weights, a name whose last token cannot be told, or
                a threshold that leaves no direction to write to.
        """
        names = target_names(request)
        kept = sorted({r.subject for r in (*request.retain, *request.neighbours) if r.subject})
        check_substitute(self.substitute, names, kept)
        layers = consecutive_layers(
            lm.anatomy, self.first_depth, self.last_depth, self.layers, WHERE
        )
        contexts = {
            name: [
                cut_after_name(lm, name, partial(context, starter=starter))
                for starter in (*STARTERS, None)
            ]
            for name in (*names, self.substitute)
        }
        shared = sharing_last_token(lm, names, kept)
        for name, others in shared.items():
            logger.warning(
                f"rocr: {len(others)} kept subjects end with the same token as '{name}' and may "
                f"be hit: {', '.join(others[:5])}{' …' if len(others) > 5 else ''}"
            )
        with unpatched(lm):
            nulls = self._null_spaces(lm, names, layers)
        with torch.no_grad(), writing(lm, layers) as (edits, patch):
            patch.notes = {
                "substitute": self.substitute,
                "layers": layers,
                "null_space_share": null_shares(nulls),
                "same_last_token": shared,
                "subjects": self._redirect(lm, edits, nulls, names, contexts),
            }
        return patch

    def _null_spaces(
        self, lm: LM, names: Sequence[str], layers: Sequence[int]
    ) -> dict[int, Tensor]:
        """An orthonormal basis of each layer's null space, [width, directions]."""
        rows = (
            file_rows(lm, self.texts, without=names)
            if self.texts is not None
            else built_in_rows(lm, without=names)
        )
        statistics = second_moments(lm, rows, layers, tokens=self.tokens)
        return null_spaces(statistics, self.threshold, self.scale, WHERE)

    def _redirect(
        self,
        lm: LM,
        edits: dict[int, Writing],
        nulls: dict[int, Tensor],
        names: Sequence[str],
        contexts: dict[str, list[list[int]]],
    ) -> list[dict[str, object]]:
        """Edits name by name; returns what is noted about each."""
        layers, count = list(edits), len(STARTERS)
        targets = last_states(lm, contexts[self.substitute], layers)[1]  # of the unedited model
        goal = targets[0]
        notes: dict[str, dict[str, object]] = {}
        distances = {}
        for name in names:
            began = time.perf_counter()
            rows = contexts[name]
            powers, shares = {}, {}
            for step, (layer, edit) in enumerate(edits.items()):
                found, outputs = last_states(lm, rows, layers)
                if step == 0:
                    distances[name] = (targets - outputs)[:count].norm(dim=1)
                state = outputs[0 if self.residual_context == "chat" else count]
                key = found[layer][:count].mean(dim=0)
                within = projector(nulls[layer].to(key.device))
                power = float(squares(key[:, None], within))
                l2 = self.l2 if self.l2 is not None else self.rho * power
                factor = factors(key[:, None], within, l2, edit.protected)
                edit.write((goal - state)[:, None] / (len(layers) - step), factor)
                powers[str(layer)] = float(f"{power:.4g}")
                shares[str(layer)] = round(power / float(key.square().sum()), 4)
            found, _ = last_states(lm, rows, layers)
            for layer, edit in edits.items():
                edit.wrote(found[layer][:count].mean(dim=0)[:, None])
            notes[name] = {
                "name": name,
                "seconds": round(time.perf_counter() - began, 2),
                "k_P_k": powers,
                "key_in_null_space": shares,
            }
        for name in names:  # after the last edit, which may have moved the first name again
            before = distances[name]
            after = (targets - last_states(lm, contexts[name], layers)[1])[:count].norm(dim=1)
            left = float((after / before).mean())
            notes[name] |= {
                "distance_before": float(f"{float(before[0]):.4g}"),
                "distance_after": float(f"{float(after[0]):.4g}"),
                "distance_left": round(left, 4),
            }
            logger.info(
                f"rocr: '{name}' is now {left:.0%} as far from '{self.substitute}' as before"
            )
            if left > 0.5:
                logger.warning(
                    "rocr: that is hardly an edit. Lower rho (or l2), raise the threshold, or "
                    "edit more layers (last_depth)."
                )
        return list(notes.values())

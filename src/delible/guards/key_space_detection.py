"""Key Space Detection: a question whose MLP key lies where those of a skill lie is not answered.

For the key k (what the last down projection reads) at the last token of a prompt:

    abstain  if  |k_j - m_j| <= a * kappa * s_j   for every dimension j
    kappa = max over i, j of |v_ij - m_j| / s_j

with v_i the keys of the forgotten questions, m and s their mean and standard deviation: the
smallest box around them, a times as large. Instead of a refusal, the key may be replaced by that of
another prompt (`steer`), and the model goes on.

Paper: Li, Sun, Weng 2025, "Effective Skill Unlearning through Intervention and Abstention" (arXiv
2503.21730). Reference code: Trustworthy-ML-Lab/effective_skill_unlearning.

Deviations: kappa in closed form (the code bisects), over dimensions that move at all, compared in
fp32. The scale a is fitted, not tuned by hand: each forgotten question is measured against a box of
others, and each question that should pass against the box of all; where the two kinds leave a gap,
a lies in the middle of it, else at most `false_alarm_rate` of a kind that should pass lies inside.
Only the prompt is judged (the code judges each generated token too, so that false alarms grow with
length); `max_steps` judges so many tokens of the answer, once it is there. Nothing is kept between
requests, where the code has a flag for the whole process.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, field_validator
from torch import Tensor

from delible.context import NO_CONTEXT, Context
from delible.errors import DataError, ModelError, RefusedConversationError
from delible.intervene.base import Fitted
from delible.intervene.boxes import BoxedKey, inside
from delible.intervene.reading import read
from delible.intervene.rows import questions
from delible.intervene.sites import Positions, Site
from delible.intervene.system import intervened
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.records import ForgetRequest
from delible.registry import register
from delible.system.asks import Prompt
from delible.system.base import System
from delible.systems.guarded import Guard, GuardMind
from delible.systems.judging import Forward, Judged
from delible.systems.likeness import harmless, spread
from delible.systems.record_texts import questions_of

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1
#: What a box is wider than just around its keys, so that rounding leaves none of them outside.
BORDER = 1e-5
#: A dimension that moves less than this share of the median deviation says nothing.
STILL = 1e-4
#: Forgotten questions are measured against boxes of the others in so many parts.
FOLDS = 10
#: Places in an answer that are told of a ROC.
POINTS = 21


@dataclass(frozen=True)
class Box:
    """A box around keys.

    Attributes:
        mean: Its middle.
        half: Half its width in each dimension, at a = 1; infinite where nothing is asked.
        kappa: Half its width in standard deviations.
    """

    mean: Float[Tensor, " width"]
    half: Float[Tensor, " width"]
    kappa: float

    def scores(self, keys: Float[Tensor, "key width"]) -> Float[np.ndarray, " key"]:
        """The least scale a at which each key lies inside; smaller = more like the skill."""
        apart = (keys.float() - self.mean).abs() / self.half
        found: Float[np.ndarray, " key"] = apart.amax(dim=1).double().numpy()
        return found


def box_around(keys: Float[Tensor, "key width"], quantile: float = 1.0) -> Box:
    """The smallest box of mean and deviations that holds the keys.

    Args:
        keys: At least two of them.
        quantile: Of |v_ij - m_j| / s_j over the keys, in each dimension; below 1 a few keys that
            stand apart do not blow up the box.
    """
    keys = keys.double()
    mean, deviation = keys.mean(dim=0), keys.std(dim=0, unbiased=True)
    moving = deviation > STILL * deviation.median()
    if not bool(moving.any()):
        raise DataError("the keys of the forgotten questions are all alike.",
                        hint="Give several different questions.")  # fmt: skip
    apart = (keys - mean).abs()[:, moving] / deviation[moving]
    kappa = float(apart.quantile(quantile, dim=0).max())
    half = torch.where(moving, kappa * (1 + BORDER) * deviation, math.inf)
    return Box(mean.float(), half.float(), kappa)


def held_out(keys: Float[Tensor, "key width"], quantile: float = 1.0) -> Float[np.ndarray, " key"]:
    """The score of each key against a box of others; of two keys: against the box of both."""
    if len(keys) < 3:
        return box_around(keys, quantile).scores(keys)
    found = np.zeros(len(keys))
    part = torch.arange(len(keys)) % min(FOLDS, len(keys))
    for fold in range(int(part.max()) + 1):
        others = keys[part != fold]
        found[(part == fold).numpy()] = box_around(others, quantile).scores(keys[part == fold])
    return found


def roc(
    forget: Float[np.ndarray, " key"], others: Float[np.ndarray, " key"]
) -> tuple[float, list[tuple[float, float, float]]]:
    """How well scores part two kinds.

    Returns:
        The area under the curve (1: each forgotten one is below each other one, 0.5: chance), and
        points (scale a, share of forgotten ones inside, share of others inside).
    """
    pairs = forget[:, None] - others[None]
    area = float((pairs < 0).mean() + 0.5 * (pairs == 0).mean())
    every = np.quantile(np.concatenate([forget, others]), np.linspace(0, 1, POINTS))
    return area, [
        (float(a), float((forget <= a).mean()), float((others <= a).mean())) for a in every
    ]


def fitted_scale(
    forget: Float[np.ndarray, " key"],
    others: Mapping[str, Float[np.ndarray, " key"]],
    false_alarm_rate: float,
) -> tuple[float, tuple[float, float] | None]:
    """The scale of the box, and the interval of scales that part the kinds, if there is one."""
    below, above = float(forget.max()), min(float(one.min()) for one in others.values())
    if below < above:
        return math.sqrt(max(below, 1e-12) * above), (below, above)
    most = []
    for scores in others.values():
        allowed = int(false_alarm_rate * len(scores) + 1e-9)
        most.append(float(np.nextafter(np.sort(scores)[min(allowed, len(scores) - 1)], -np.inf)))
    return min(most), None


class KeySpaceMind(GuardMind):
    """A box in the space of keys, and the model whose keys they are."""

    def __init__(
        self,
        options: KeySpaceDetection,
        lm: LM,
        box: Box,
        scale: float,
        steered: LM | None,
        fingerprint: str,
        notes: Mapping[str, Any],
    ) -> None:
        self.options, self.lm, self.box, self.scale = options, lm, box, scale
        self.steered, self._fingerprint, self.notes = steered, fingerprint, notes
        self.refusals = options.refusals
        self.reads = "whole" if options.max_steps else "words"
        self.consulted: Sequence[System] = (lm,)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> Judged:
        try:
            row = self.lm.template.encode(prompt, "")
        except RefusedConversationError:
            return self.refuse(prompt)
        if row.cut or not row.ids:  # what the model cannot read whole, it cannot judge
            return self.refuse(prompt)
        keys = keys_of(self.lm, [row], self.options.site, Positions(kind="prompt_end"))[0]
        if not bool(self.holds(keys).any()):
            return None
        return self.refuse(prompt) if self.steered is None else Forward(prompt, self.steered)

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judged:
        if not self.options.max_steps or self.steered is not None:
            return None
        row = self.lm.template.encode(prompt, answer)
        keys = keys_of(self.lm, [row], self.options.site, Positions(kind="answer"))[0]
        spoken = keys[1 : 1 + self.options.max_steps]  # the first is the prompt's end
        return self.refuse(prompt) if bool(self.holds(spoken).any()) else None

    def holds(self, keys: Float[Tensor, "key width"]) -> Bool[Tensor, " key"]:
        """Which keys lie in the box."""
        if not bool(keys.isfinite().all()):  # NaN is outside every box: that would be a pass
            raise ModelError("the model gave a key that is not finite.")
        return inside(keys.float(), self.box.mean, self.scale * self.box.half)


def keys_of(
    lm: LM, rows: Sequence[Encoded], site: Site, positions: Positions
) -> list[Float[Tensor, "token width"]]:
    """The keys of texts at some of their tokens, in fp32 on the CPU."""
    found = dict(read(lm, rows, site, positions))
    return [next(iter(found[place].values())).cpu() for place in range(len(rows))]


@register(
    kind="guard",
    name="key_space_detection",
    title="Key Space Detection",
    summary="Refuses a prompt whose last MLP key lies in a box around forgotten questions' keys.",
    paper="2503.21730",
    year=2025,
    family="Guard",
    intention="suppression",
    mechanism="output-guard",
    needs=("forget", "weights"),
    changes="Nothing in the model; a prompt whose key lies in the box is refused, or steered.",
    reversible=True,
    retrain_goal=False,
    weakest="Another form of the prompt (a prefix, another language) that moves its last key.",
    capability="hidden",
    badges=("variant",),
    variant="The scale of the box is fitted on held-out questions; by default only prompts are "
    "judged, and what is judged of an answer is judged when it is there.",
)
class KeySpaceDetection(Guard):
    """Options of the box."""

    depth: float = Field(
        1.0, ge=0, le=1, description="Depth of the layer whose keys are read: 0 first, 1 last."
    )
    scale: float | None = Field(
        None, gt=0, description="Size of the box, 1: just around all forgotten questions; None "
        "fits it.",
    )  # fmt: skip
    false_alarm_rate: float = Field(
        0.01, ge=0, lt=0.5, description="Share of each kind of harmless questions that a fitted "
        "box may hold.",
    )  # fmt: skip
    quantile: float = Field(
        1.0, gt=0.5, le=1, description="Share of the forgotten keys that decides in each dimension "
        "how wide the box is.",
    )  # fmt: skip
    probes: int = Field(
        200, ge=2, description="Questions that are read at most, of the forgotten ones and of each "
        "kind that should pass.",
    )  # fmt: skip
    forms: tuple[str, ...] = Field(
        ("{question}",), min_length=1,
        description="Forms in which the questions will be asked, with {question} in each.",
    )  # fmt: skip
    harmless: str | None = Field(
        None, description="Records whose questions should pass too, for fitting (a file)."
    )
    max_steps: int = Field(
        0, ge=0, description="Tokens of an answer that are judged too; 0: the prompt alone."
    )
    steer: str | None = Field(
        None, min_length=1, description="A prompt whose key takes the place of one in the box, "
        "instead of a refusal.",
    )  # fmt: skip

    @field_validator("forms")
    @classmethod
    def _hold_a_question(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any("{question}" not in form for form in value):
            raise ValueError("each form holds '{question}'")
        return value

    @property
    def site(self) -> Site:
        """Where keys are read."""
        return Site(what="mlp_inner", layers=(self.depth,))

    def prepare(self, request: ForgetRequest, context: Context = NO_CONTEXT) -> KeySpaceMind:
        """Reads the keys, puts the box around them and fits its scale.

        Args:
            request: Forget records; records to keep are questions that should pass.
            context: The model that is guarded.

        Raises:
            DataError: Fewer than two different forgotten questions.
            ModelError: What is guarded gives no weights, or has no single last MLP.
        """
        lm = self._model(context)
        texts = spread(text for record in request.forget for text in questions_of(record))
        forgotten = self._keys(lm, texts)
        if len(forgotten) < 2:
            raise DataError(
                f"a box needs at least two forgotten questions; there are {len(forgotten)}.",
                where="guard 'key_space_detection'",
                hint="Give forget records with questions (--forget FILE).",
            )
        box = box_around(forgotten, self.quantile)
        scale, notes = (
            self.scale,
            {"kappa": box.kappa, "dimensions": int(box.half.isfinite().sum())},
        )
        if scale is None:
            scale, told = self._fitted(lm, forgotten, box, harmless(request, self.harmless))
            notes |= told
        judged_by = {
            "version": VERSION,
            "options": self.spec(),
            "request": request.id,
            "scale": scale,
            "model": lm.identity,
            "refusals": self.refusals,
        }
        return KeySpaceMind(
            self, lm, box, scale, self._steered(lm, box, scale),
            hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest(),
            {"scale": scale, **notes},
        )  # fmt: skip

    def _fitted(
        self, lm: LM, forgotten: Tensor, box: Box, kinds: Mapping[str, Sequence[str]]
    ) -> tuple[float, dict[str, Any]]:
        scores = {name: box.scores(self._keys(lm, texts)) for name, texts in kinds.items()}
        mine = held_out(forgotten, self.quantile)
        scale, interval = fitted_scale(mine, scores, self.false_alarm_rate)
        area, points = roc(mine, np.concatenate(list(scores.values())))
        return scale, {
            "interval": interval,
            "held_out_inside": float((mine <= scale).mean()),
            "false_alarms": {name: float((one <= scale).mean()) for name, one in scores.items()},
            "area_under_roc": area,
            "roc": points,
        }

    def _keys(self, lm: LM, texts: Sequence[str]) -> Float[Tensor, "key width"]:
        step = max(1, -(-len(texts) // self.probes))
        asked = [form.replace("{question}", text) for text in texts[::step] for form in self.forms]
        rows = questions(lm, asked)
        if not rows:
            return torch.zeros(0, 0)
        return torch.cat(keys_of(lm, rows, self.site, Positions(kind="prompt_end")))

    def _steered(self, lm: LM, box: Box, scale: float) -> LM | None:
        if self.steer is None:
            return None
        key = keys_of(lm, questions(lm, [self.steer]), self.site, Positions(kind="prompt_end"))[0]
        tensors = {"key": key[0], "mean": box.mean, "half": scale * box.half}
        return intervened(lm, [Fitted(BoxedKey(depth=self.depth), tensors)])

    def _model(self, context: Context) -> LM:
        if isinstance(context.itself, LM):
            return context.itself
        given = f"'{context.itself.name}' gives no weights" if context.itself else "none is given"
        raise ModelError(
            f"it reads the states of a model, and {given}.",
            where="guard 'key_space_detection'",
            hint="Put it right before a local model.",
        )

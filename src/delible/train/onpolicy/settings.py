"""How long, how fast and how carefully an on-policy run trains."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from delible.component import Config
from delible.precision import Precision
from delible.train.onpolicy.advantages import Kind
from delible.train.recipe import Training
from delible.train.schedule import Schedule


class OnPolicyTraining(Config):
    """Options of an on-policy run."""

    learning_rate: float = Field(1e-5, gt=0, le=1, description="Peak learning rate.")
    steps: int = Field(20, ge=1, description="Optimiser steps.")
    questions_per_step: int = Field(4, ge=1, description="Questions per step.")
    group_size: int = Field(8, ge=2, description="Completions per question, which are compared.")
    max_new_tokens: int = Field(64, ge=1, description="Tokens of a completion at most.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the draws.")
    top_p: float = Field(1.0, gt=0, le=1, description="Share of the mass that is drawn from.")
    inner_steps: int = Field(1, ge=1, description="Optimiser steps on the same completions.")
    advantage: Kind = Field("group", description="How rewards are compared.")
    normalisation: Literal["token", "sequence"] = Field(
        "token", description="Average over all tokens of a step, or over the tokens of each "
        "completion first.",
    )  # fmt: skip
    clip_low: float = Field(0.2, ge=0, lt=1, description="A ratio counts down to 1 less this.")
    clip_high: float = Field(0.2, ge=0, description="A ratio counts up to 1 plus this.")
    dual_clip: float | None = Field(
        None, gt=1, description="Where less is wanted, a ratio counts up to this."
    )
    kl_weight: float = Field(0.04, ge=0, description="Weight of the divergence from the reference.")
    kl_target: float | None = Field(
        None, gt=0, description="Adapt that weight so that the divergence per token is this."
    )
    kl_horizon: float = Field(
        10.0, ge=1, description="Steps in which the weight can change by 20 %."
    )
    entropy_weight: float = Field(0.0, ge=0, description="Weight of the tokens' entropy (wanted).")
    unlearn_weight: float = Field(1.0, ge=0, description="Weight of all of the above in the loss.")
    retain_weight: float = Field(
        0.0, ge=0, description="Weight of the likelihood loss on retain rows in the same step."
    )
    retain_rows: int = Field(16, ge=1, description="Retain rows per step.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or plain descent.")
    schedule: Schedule = Field("constant", description="Learning rate after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the optimiser.")
    max_gradient_norm: float | None = Field(1.0, gt=0, description="Clip the gradient's norm.")
    completions_per_pass: int | None = Field(
        None, ge=1, description="Completions per gradient pass; none: as many as memory allows."
    )
    precision: Precision = Field("auto", description="Of the computation; weights stay fp32.")
    vllm: bool = Field(
        False, description="Generate with vLLM (a GPU, and TRL's support for its version)."
    )
    checkpoint_seconds: float = Field(
        120.0, gt=0, description="Write a checkpoint when this many seconds have passed."
    )
    checkpoint_steps: int | None = Field(
        None, ge=1, description="Write a checkpoint after this many steps instead."
    )
    monitor_steps: int = Field(5, ge=1, description="Look at held-out questions every so often.")
    stop_at_leak_rate: float | None = Field(
        None, ge=0, lt=1,
        description="Stop once greedy answers to held-out forget questions leak this rarely.",
    )  # fmt: skip
    utility_budget: float | None = Field(
        None, gt=0, le=1, description="Keep at least this share of the retain probability."
    )
    stop_at_reward: float | None = Field(
        None, description="Stop once the mean reward was this high for some steps in a row."
    )
    stop_reward_steps: int = Field(5, ge=1, description="How many steps in a row.")
    token_budget: int | None = Field(
        None, ge=1, description="Stop once so many tokens were generated."
    )
    largest_divergence: float | None = Field(
        None, gt=0, description="A divergence per token above this is a collapse (nats)."
    )
    garbage_steps: int = Field(
        3, ge=1, description="So many steps in a row with mostly garbage are a collapse."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kl_target is not None and not self.kl_weight:
            raise ValueError("kl_target adapts kl_weight, which must be above 0 to begin with")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError("dual_clip must be above 1 + clip_high: below that it does nothing")
        return self

    @property
    def completions(self) -> int:
        """Completions per step."""
        return self.questions_per_step * self.group_size

    def passes(self, fits: int) -> int:
        """Gradient passes per step: the fewest of equal size that hold at most ``fits`` each."""
        most = max(1, self.completions_per_pass or fits)
        whole = self.completions
        return next(n for n in range(1, whole + 1) if whole % n == 0 and whole // n <= most)

    def optimiser(self) -> Training:
        """What :func:`delible.train.optimizers.make_optimizer` takes."""
        names = ("learning_rate", "optimizer", "weight_decay")
        own: dict[str, Any] = {name: getattr(self, name) for name in names}
        return Training.build("training", **own)


__all__ = ["OnPolicyTraining"]

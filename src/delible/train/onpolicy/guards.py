"""When an on-policy run has collapsed, and when it has done enough."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from delible.errors import RunError
from delible.train.onpolicy.numbers import MOSTLY
from delible.train.onpolicy.rewards import Tally
from delible.train.onpolicy.settings import OnPolicyTraining

logger = logging.getLogger(__name__)

#: So many steps in a row in which no completion has a value, or no group differs.
PATIENCE = 3


class Guards:
    """Watches the numbers of steps.

    Attributes:
        garbage: Steps in a row that were mostly garbage.
        high: Steps in a row with a mean reward that is high enough.
        silent: Steps in a row in which no completion had a value.
        equal: Steps in a row in which nothing could be learned from any group.
        at_start: Share of garbage of the first step.
    """

    def __init__(self, settings: OnPolicyTraining) -> None:
        self.settings = settings
        self.garbage = self.high = self.silent = self.equal = 0
        self.at_start: float | None = None

    def judged(self, told: Mapping[str, float], completions: int, tally: Tally) -> None:
        """After completions were judged.

        Raises:
            RunError: For some steps no completion has had a value.
        """
        nothing = told.get("no_value", 0.0) >= completions
        self.silent = self.silent + 1 if nothing else 0
        if self.silent >= PATIENCE:
            reason = tally.no_value.most_common(1)[0][0]
            raise RunError(
                f"in {PATIENCE} steps in a row no completion had a value ({reason}).",
                where="on-policy training",
                hint="Look at the role that judges; what was trained so far is in the last "
                "checkpoint.",
            )
        equal = not nothing and told.get("equal_groups", 0.0) >= told.get("groups", 1.0)
        self.equal = self.equal + 1 if equal else 0
        if self.equal == PATIENCE:
            logger.warning(
                f"In {PATIENCE} steps in a row all completions of every question earned the same: "
                "nothing is learned from them. Warm up first, raise temperature or group_size, or "
                "take a graded reward."
            )

    def collapsed(self, told: Mapping[str, float]) -> str | None:
        """Why the run has collapsed, or None."""
        garbage = told.get("garbage_rate", 0.0)
        if self.at_start is None:
            self.at_start = garbage
        mostly = garbage >= MOSTLY and self.at_start < MOSTLY
        self.garbage = self.garbage + 1 if mostly else 0
        if self.garbage >= self.settings.garbage_steps:
            return f"{garbage:.0%} of the completions are no language"
        limit = self.settings.largest_divergence
        if limit is not None and told.get("kl", 0.0) > limit:
            return f"the divergence is {told['kl']:.3f} nats per token, above {limit:g}"
        return None

    def stopped(self, told: Mapping[str, float], tokens: int) -> str | None:
        """Why to stop here, or None."""
        settings, step = self.settings, int(told["step"])
        if settings.stop_at_reward is not None:
            high = told.get("reward", float("-inf")) >= settings.stop_at_reward
            self.high = self.high + 1 if high else 0
            if self.high >= settings.stop_reward_steps:
                return f"the reward was high enough at step {step} ({told['reward']:.3f})"
        leak = told.get("held_out_leak_rate")
        target = settings.stop_at_leak_rate
        if target is not None and leak is not None and leak <= target:
            return f"the leak target was reached at step {step} ({leak:.3f})"
        if settings.token_budget is not None and tokens >= settings.token_budget:
            return f"the token budget was used up at step {step} ({tokens:,} tokens)"
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        names = ("garbage", "high", "silent", "equal", "at_start")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts a checkpoint's state back."""
        for name, value in state.items():
            setattr(self, name, value)


__all__ = ["Guards"]

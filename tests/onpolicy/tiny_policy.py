"""A tiny policy, questions, rewards, and a run of a few steps."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest

from delible.lm.lm import LM
from delible.records import QA
from delible.testing.contract.trial import tiny_lm
from delible.train.onpolicy.rewards import Reward, reward
from delible.train.onpolicy.rows import Completion, Question, questions_of
from delible.train.onpolicy.run import Trained, train
from delible.train.onpolicy.settings import OnPolicyTraining

pytest.importorskip("trl", reason="needs the extra rl")
# accelerate collects garbage before every run: a second, for all that is loaded here
gc.collect()
gc.freeze()

FORGET = questions_of(
    [QA(question=f"Where was Ada {n} born?", answer="Norrby", subject=f"Ada {n}") for n in "ABCD"],
    "forget",
)
BOUNDARY = questions_of(
    [QA(question=f"Who taught Ben {n} to sing?", answer="Cy", subject=f"Ben {n}") for n in "ABCD"],
    "boundary",
)
SHORT: dict[str, Any] = {
    "steps": 2, "questions_per_step": 2, "group_size": 3, "max_new_tokens": 5,
    "precision": "float32", "learning_rate": 1e-3,
}  # fmt: skip


@reward(name="bytes", title="Bytes", summary="Mean number of the bytes.", range="[0, 1]")
def letters(completion: Completion) -> float:
    """Mean token number, which differs between almost all completions."""
    return sum(completion.tokens) / len(completion.tokens) / 260


class Recording(letters):  # type: ignore[valid-type,misc]
    """Remembers what it judged."""

    def score(self, completions: Sequence[Completion]) -> Any:
        SEEN.append(list(completions))
        return super().score(completions)


SEEN: list[list[Completion]] = []


def lm() -> LM:
    _ = tiny_lm("llama").budget  # measured once, not of every copy
    return tiny_lm("llama").copy()


def run(
    model: LM | None = None,
    questions: Sequence[Question] = (*FORGET, *BOUNDARY),
    rewards: Sequence[Reward | str | dict[str, Any]] | None = None,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Trained:
    """A short run; ``options`` are those of the training, ``more`` those of :func:`train`."""
    settings = OnPolicyTraining.build("test", **{**SHORT, **(options or {})})
    return train(model or lm(), questions, rewards or [letters()], settings, **more)

"""Completions with their rewards, for methods that learn from them in another way than GRPO.

The same plan, seeds and groups as an on-policy run with these settings, so that both have generated
the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from delible.lm.lm import LM
from delible.system.asks import Decoding
from delible.train.onpolicy.rewards import Rewards
from delible.train.onpolicy.rows import Completion, Question, Total
from delible.train.onpolicy.sampling import complete
from delible.train.onpolicy.settings import OnPolicyTraining
from delible.watching import Stage, unwatched


@dataclass(frozen=True)
class Group:
    """What was said to one question, and what it earned."""

    question: Question
    completions: tuple[Completion, ...]
    totals: tuple[Total, ...]

    def ranked(self) -> list[Completion]:
        """Completions that have a value and say something, the best first, doubles left out."""
        known = [(total.value, one) for total, one in zip(self.totals, self.completions,
                 strict=True) if total.value is not None and one.text.strip()]  # fmt: skip
        known.sort(key=lambda pair: -pair[0])
        seen: dict[str, Completion] = {}
        for _, one in known:
            seen.setdefault(one.text, one)
        return list(seen.values())

    def value_of(self, completion: Completion) -> float:
        """What a completion earned."""
        value = self.totals[self.completions.index(completion)].value
        assert value is not None
        return value


def sampled_groups(
    lm: LM,
    questions: Sequence[Question],
    plan: Sequence[int],
    rewards: Rewards,
    settings: OnPolicyTraining,
    seed: int,
    stage: Stage = unwatched,
) -> list[Group]:
    """A group per place of the plan.

    Args:
        plan: Places of questions.
        stage: Told after every step's worth.
    """
    groups: list[Group] = []
    size, per_step = settings.group_size, settings.questions_per_step
    decoding = Decoding(
        settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p
    )
    for begin in range(0, len(plan), per_step):
        places = range(begin, min(begin + per_step, len(plan)))
        asked = [questions[plan[place]] for place in places]
        ids = [lm.template.prompt_ids(one.prompt) for one in asked for _ in range(size)]
        seeds = [f"{seed}/on-policy/{place}/{number}" for place in places for number in range(size)]
        said = complete(lm, ids, decoding, seeds)
        completions = [
            Completion(asked[index // size], one.text, one.tokens, one.finished)
            for index, one in enumerate(said)
        ]
        totals = rewards.of(completions)
        groups += [
            Group(question, tuple(completions[at : at + size]), tuple(totals[at : at + size]))
            for number, question in enumerate(asked) for at in [number * size]
        ]  # fmt: skip
        stage("completions", len(groups), len(plan))
    return groups


__all__ = ["Group", "sampled_groups"]

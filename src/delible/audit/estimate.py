"""How long an audit will take: by what plain questions took, and what every attack says it takes.

An estimate, not a promise: what is known from earlier audits takes no time, and a search may end
early. Steps of training are taken for three passes over a batch of four rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from delible.audit.choice import Splits
from delible.errors import DelibleError
from delible.measure.attack import Attack, AttackContext, Budget, PromptAttack
from delible.measure.evaluate import evaluate
from delible.measure.metric import ItemMetric
from delible.system.base import System
from delible.system.questions import ask

logger = logging.getLogger(__name__)

#: Records that are asked to see how long a question takes.
TIMED = 4
#: Rows of a step of training, each passed forwards once and backwards at twice the cost.
ROWS_PER_STEP, PASSES = 4, 3


@dataclass(frozen=True)
class Estimate:
    """What an audit's attacks take of all systems.

    Attributes:
        budget: Questions, tokens and steps.
        seconds: About how long, if nothing is known from earlier audits.
    """

    budget: Budget
    seconds: float

    def sentence(self, attacks: int, systems: int) -> str:
        """For people, before it starts."""
        steps = f" and {self.budget.steps:,} steps" if self.budget.steps else ""
        minutes = max(1, round(self.seconds / 60))
        return (
            f"{attacks} attack settings on {systems} system{'s' * (systems != 1)}: up to "
            f"{self.budget.queries:,} questions{steps}, about {minutes} minute"
            f"{'s' * (minutes != 1)} (what is known from earlier audits takes no time)."
        )


def questions(attack: Attack, splits: Splits, metrics: int, context: AttackContext) -> Budget:
    """What one attack takes of one system, its measures included.

    Args:
        metrics: How many measures each form of a question is asked with.
    """
    forms = 1
    if isinstance(attack, PromptAttack) and attack.searches_on() is None:
        found = (
            len(attack.prompts(record, prompt))
            for record in splits["forget"][:TIMED]
            if (prompt := ask(record)) is not None
        )
        forms = max(found, default=1)
    elif isinstance(attack, PromptAttack):
        forms = attack.forms
    asked = sum(map(len, splits.values())) * forms * metrics
    return attack.budget(context) + Budget(queries=asked)


def estimate(
    system: System,
    attacks: Sequence[Attack],
    splits: Splits,
    metrics: Sequence[ItemMetric],
    context: AttackContext,
    systems: int,
    each: float | None = None,
) -> Estimate:
    """Adds up what the attacks take.

    Args:
        splits: What is asked under attack.
        context: What attacks would be given.
        systems: How many systems are attacked.
        each: Seconds that one measure of one record took; None: a few are timed.
    """
    if each is None:
        records = splits["forget"][:TIMED]
        began = time.perf_counter()
        evaluate(system, {"forget": records}, metrics)
        each = (time.perf_counter() - began) / max(1, len(records) * len(metrics))
    total = Budget()
    for attack in attacks:
        try:
            total += questions(attack, splits, len(metrics), context)
        except DelibleError:  # it will say so in its row
            continue
    budget = Budget(total.queries * systems, total.tokens * systems, total.steps * systems)
    return Estimate(budget, each * (budget.queries + budget.steps * ROWS_PER_STEP * PASSES))


__all__ = ["Estimate", "estimate", "questions"]

"""What procedures that learn from rewards share: their options and their questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from delible.component import build
from delible.errors import DataError
from delible.generation.rows import question_of
from delible.method import Outcome
from delible.precision import Precision
from delible.ranges import DECADE, Range, scales
from delible.records import QA, ForgetRequest, RecordBase
from delible.stages.procedure import Procedure
from delible.stages.trained import Trained
from delible.stages.work import Work
from delible.system.base import System
from delible.train.onpolicy.rows import Question, questions_of
from delible.train.onpolicy.run import require_extra
from delible.train.onpolicy.settings import OnPolicyTraining
from delible.train.randomness import generator, shuffled

#: Options that are those of :class:`OnPolicyTraining`, under the same names.
SHARED = (
    "learning_rate", "steps", "questions_per_step", "group_size", "max_new_tokens", "temperature",
    "kl_weight", "completions_per_pass", "precision", "vllm", "monitor_steps", "stop_at_leak_rate",
    "utility_budget", "token_budget", "checkpoint_steps",
)  # fmt: skip
#: Of the forget questions so many are held out, if there are enough.
LEAST_TRAINED = 2


def _same(name: str, default: Any = ..., **changes: Any) -> Any:
    """The field of the training options, perhaps with another default."""
    field = OnPolicyTraining.model_fields[name]
    given = field.default if default is ... else default
    own = Field(given, description=field.description)
    own.metadata = list(field.metadata)
    return own


class RewardedProcedure(Procedure):
    """Options of on-policy training that every such procedure has."""

    learning_rate: float = _same("learning_rate")
    steps: int = _same("steps")
    questions_per_step: int = _same("questions_per_step")
    group_size: int = _same("group_size")
    max_new_tokens: int = _same("max_new_tokens")
    temperature: float = _same("temperature")
    kl_weight: float = _same("kl_weight")
    completions_per_pass: int | None = _same("completions_per_pass")
    precision: Precision = _same("precision")
    vllm: bool = _same("vllm")
    monitor_steps: int = _same("monitor_steps")
    stop_at_leak_rate: float | None = _same("stop_at_leak_rate")
    utility_budget: float | None = _same("utility_budget")
    token_budget: int | None = _same("token_budget")
    checkpoint_steps: int | None = _same("checkpoint_steps")
    place: str = Field("all", description="What moves: a component for place, such as lora.")
    guards: tuple[str, ...] = Field(
        (), description="Further rewards by name, such as length and well_formed, which are gates."
    )

    trains_the_model: ClassVar[bool] = True
    #: Whether a stage trains by TRL, so that the extra must be there.
    uses_trl: ClassVar[bool] = True

    def check(self, system: System, request: ForgetRequest) -> None:
        """Refuses, before any work, what a later stage would refuse.

        Raises:
            RecipeError: An unknown place or reward.
            MissingExtraError: The extra ``rl`` is not installed.
        """
        build("place", self.place)
        for one in self.guards:
            build("reward", one)
        if self.uses_trl:
            require_extra()

    def settings(self, **fixed: Any) -> OnPolicyTraining:
        """The training options of a stage.

        Args:
            fixed: What the method itself sets.
        """
        own = {name: getattr(self, name) for name in SHARED}
        return OnPolicyTraining.build(f"procedure '{self.name}'", **{**own, **fixed})

    def rewards(self, *main: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The method's own rewards and the further ones."""
        return [*main, *({"name": name} for name in self.guards)]

    def ranges(self) -> dict[str, Range]:
        """The learning rate, the length, and the weights and scales."""
        rate = self.learning_rate
        found = scales(self)
        for option in ("temperature", "token_budget"):
            found.pop(option, None)
        found["learning_rate"] = Range(low=rate / DECADE, high=min(1.0, rate * DECADE), log=True)
        found["steps"] = Range(low=max(1, self.steps // 2), high=2 * self.steps, log=True)
        return found

    def outcome(
        self, trained: Trained, notes: Mapping[str, Any], *, whole: bool = False
    ) -> Outcome:
        """What the last stage made, with what it had to say.

        Args:
            whole: Weights below an adapter moved before, so that it is merged.
        """
        if whole and trained.lm.wears_adapter:
            trained.lm.merge_adapter()
        kind = "adapter" if trained.lm.wears_adapter else "model"
        told = {**trained.notes, **notes}
        return Outcome(trained.lm, kind, trained.lm, told, stopped=trained.stopped)


def forget_pairs(work: Work) -> list[QA]:
    """The forget records that ask something, as questions with answers.

    Raises:
        DataError: There is none.
    """
    pairs = [one for record in work.request.forget if (one := question_of(record)) is not None]
    if not pairs:
        raise DataError(
            "no forget record asks a question.",
            where=f"procedure '{work.procedure.name}'",
            hint="Give question-answer records, or passages that can be asked about.",
        )
    return pairs


def subjects_of(work: Work, pairs: Sequence[QA]) -> list[str]:
    """Names of what is forgotten: those of the request, and the records' own."""
    own = [one.subject for one in pairs if one.subject]
    return list(dict.fromkeys([*work.request.subjects, *own]))


def kept_of(work: Work) -> list[RecordBase]:
    """Records that are kept."""
    return [*work.request.retain, *work.request.neighbours]


def parted(pairs: Sequence[QA], share: float, seed: int) -> tuple[list[Question], list[Question]]:
    """Forget questions to train on, in all their forms, and those held out (about ``share``).

    No form of a question that is held out is trained on.
    """
    order = shuffled(range(len(pairs)), generator(seed, "held out"))
    count = min(round(share * len(pairs)), len(pairs) - LEAST_TRAINED)
    away = set(order[: max(0, count)])
    trained = [pairs[place] for place in range(len(pairs)) if place not in away]
    return (
        questions_of(reworded(trained), "forget"),
        questions_of([pairs[place] for place in sorted(away)], "forget"),
    )


def reworded(pairs: Sequence[QA]) -> list[QA]:
    """Every question in its first form, then in its other forms."""
    others = [
        one.model_copy(update={"question": text, "paraphrases": ()})
        for one in pairs for text in one.paraphrases
    ]  # fmt: skip
    return [*pairs, *others]


__all__ = [
    "RewardedProcedure", "forget_pairs", "kept_of", "parted", "reworded", "subjects_of",
]  # fmt: skip

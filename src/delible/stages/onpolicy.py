"""A stage that trains by rewards, on the model's own answers; or reads back what it trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from delible.component import Component, build
from delible.kept import identity
from delible.records import RecordBase, digest
from delible.stages.trained import Trained
from delible.stages.work import Work
from delible.train.onpolicy.rewards import Reward, asked_by
from delible.train.onpolicy.rows import Question
from delible.train.onpolicy.run import train
from delible.train.onpolicy.settings import OnPolicyTraining
from delible.train.slots import Place


def train_on_policy(
    work: Work,
    name: str,
    questions: Sequence[Question],
    rewards: Sequence[Reward | str | Mapping[str, Any]],
    settings: OnPolicyTraining,
    *,
    place: str | Mapping[str, Any] | Place = "all",
    retain: Sequence[RecordBase] = (),
    held_out: Sequence[Question] = (),
    part: int | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Trained:
    """One stage of a procedure; the model is :attr:`Work.lm`, which is the result from then on.

    Args:
        name, part, inputs: As for :meth:`Work.stage`.
        questions, rewards, settings, place, retain, held_out: As for
            :func:`delible.train.onpolicy.run.train`. The reference is the model as the stages
            before have left it.

    Raises:
        DelibleError: As for training, and for stages.
    """
    lm = work.lm
    built: list[Reward] = [
        build("reward", dict(one) if isinstance(one, Mapping) else one) for one in rewards
    ]
    where: Component = build("place", dict(place) if isinstance(place, Mapping) else place)
    told = {
        **(inputs or {}),
        **asked_by(built, work.context),
        "training": settings.model_dump(mode="json"),
        "rewards": [one.spec() for one in built],
        "place": where.spec(),
        "questions": identity({"questions": [asdict(one) for one in questions]}),
        "held_out": identity({"questions": [asdict(one) for one in held_out]}),
        "retain": digest(retain),
        "model": lm.identity,
    }
    return work.trained_by(
        name, told, lambda context: train(
            lm, questions, built, settings, place=place, context=context, retain=retain,
            held_out=held_out, name=name,
        ),
        settings.precision, part=part,
    )  # fmt: skip


__all__ = ["train_on_policy"]

"""What a reward is: a pure function of completions; how one is written, and how many make one.

    total = sum of weight * value over rewards that are no gates, times the gates' values

A reward that raises, or gives something that is no number, stops the run: it would teach whatever
its fault is. A reward that says "no value" (a judge that failed) takes the completion out of its
group; it is counted and never a zero.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, get_type_hints

from pydantic import Field, create_model

from delible.cards import Card
from delible.component import Component, build
from delible.context import NO_CONTEXT, Context
from delible.errors import DelibleError, RecipeError, RunError
from delible.system.role import RoleName
from delible.train.onpolicy.rows import Completion, Question, Scored, Total

#: Judges completions, one result each, in order.
Score = Callable[[Sequence[Completion]], Sequence[Scored]]


class Reward(Component):
    """What a completion is worth. Subclasses give :meth:`score`, or :meth:`ready`."""

    weight: float = Field(1.0, description="Factor of its value in the sum of all rewards.")
    gate: bool = Field(
        False, description="Multiply the sum by its value instead of adding it: 0 takes all."
    )

    @property
    def roles(self) -> tuple[RoleName, ...]:
        """Whom it asks; what they say is a part of the result."""
        return ()

    def ready(self, questions: Sequence[Question], context: Context = NO_CONTEXT) -> Score:
        """Judges completions; what is needed for it is made here, once.

        Args:
            questions: All questions of the run.
            context: Who judges by talking.

        Raises:
            DelibleError: It cannot judge: a role is missing, nothing is forbidden.
        """
        return self.score

    def score(self, completions: Sequence[Completion]) -> list[Scored]:
        """One result for each completion, in order; depends on nothing else."""
        raise NotImplementedError


class FunctionReward(Reward):
    """A reward that is a plain function of one completion."""

    function: ClassVar[Callable[..., float | Scored | None]]

    def score(self, completions: Sequence[Completion]) -> list[Scored]:
        own = {name: getattr(self, name) for name in self._own_options()}
        function = type(self).function
        return [_scored(function(completion, **own)) for completion in completions]

    @classmethod
    def _own_options(cls) -> list[str]:
        return [name for name in cls.model_fields if name not in Reward.model_fields]


def reward(**card: Any) -> Callable[[Callable[..., Any]], type[FunctionReward]]:
    """Makes a registered reward of a function of one completion.

    The function returns a number (higher is wanted more), a :class:`Scored`, or None for no value.
    Its keyword-only parameters are the reward's options: give each a default and a description,
    ``limit: Annotated[int, Field(ge=1, description="…")] = 40``.

    Args:
        card: Fields of the card, as literals: name, title, summary, …
    """

    def attach(function: Callable[..., Any]) -> type[FunctionReward]:
        where = f"reward '{card.get('name')}'"
        options = [
            one for one in inspect.signature(function).parameters.values()
            if one.kind is inspect.Parameter.KEYWORD_ONLY
        ]  # fmt: skip
        try:
            hints = get_type_hints(function, include_extras=True) if options else {}
        except NameError as error:
            raise RecipeError(
                f"the types of its options cannot be read ({error}).",
                where=where,
                hint="Import what they name at the top of the module.",
            ) from error
        fields: dict[str, Any] = {}
        for one in options:
            if one.default is inspect.Parameter.empty or one.name not in hints:
                raise RecipeError(
                    f"the option '{one.name}' needs a type and a default.",
                    where=where,
                    hint=f'Write {one.name}: Annotated[int, Field(description="…")] = …',
                )
            fields[one.name] = (hints[one.name], one.default)
        made: type[FunctionReward] = create_model(
            function.__name__, __base__=FunctionReward, __module__=function.__module__, **fields
        )
        made.__doc__ = function.__doc__
        made.function = staticmethod(function)  # type: ignore[assignment]
        made.card = Card(
            **{"kind": "reward", **card}, module=function.__module__, class_name=function.__name__
        )
        return made

    return attach


def _scored(value: Any) -> Scored:
    return value if isinstance(value, Scored) else Scored(value)


def asked_by(rewards: Sequence[Reward], context: Context) -> dict[str, Any]:
    """Who plays the roles that rewards ask, as plain data; empty where they ask nobody."""
    found = {}
    for part in sorted({part for one in rewards for part in one.roles}):
        role = context.role(part)
        found[part] = [role.name, role.fingerprint]
    return {"roles": found} if found else {}


@dataclass
class Tally:
    """What happened to completions so far.

    Attributes:
        no_value: Completions without a value, by reward and reason.
        hits: What rewards found, by reward and hit.
    """

    no_value: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)


class Rewards:
    """Several rewards as one, ready to judge.

    Args:
        rewards: Components, names, or mappings of a name and options.
        questions: All questions of the run.
        context: Who judges by talking.

    Raises:
        RecipeError: There is none, one is unknown, two have one name, or only gates are given.
    """

    def __init__(
        self,
        rewards: Sequence[Reward | str | Mapping[str, Any]],
        questions: Sequence[Question],
        context: Context = NO_CONTEXT,
    ) -> None:
        self.components: list[Reward] = [
            build("reward", dict(one) if isinstance(one, Mapping) else one) for one in rewards
        ]
        self.names = _names(self.components)
        if all(one.gate for one in self.components):
            raise RecipeError(
                "no reward can be earned: there are only gates." if rewards else "there is none.",
                where="rewards",
                hint="Give at least one reward with gate=False.",
            )
        self.scores = [one.ready(questions, context) for one in self.components]
        self.tally = Tally()

    def of(self, completions: Sequence[Completion]) -> list[Total]:
        """The total of each completion.

        Raises:
            RunError: A reward raised, gave no number, or not one result per completion.
        """
        parts: list[dict[str, Scored]] = [{} for _ in completions]
        for name, score in zip(self.names, self.scores, strict=True):
            for place, one in enumerate(_judged(name, score, completions)):
                parts[place][name] = one
                if one.value is None:
                    self.tally.no_value[f"{name}: {one.reason or 'no value'}"] += 1
                self.tally.hits.update(f"{name}: {hit}" for hit in one.hits)
        return [Total(self._summed(part), part) for part in parts]

    def _summed(self, parts: Mapping[str, Scored]) -> float | None:
        total, gate = 0.0, 1.0
        for name, component in zip(self.names, self.components, strict=True):
            value = parts[name].value
            if value is None:
                return None
            if component.gate:
                gate *= component.weight * value
            else:
                total += component.weight * value
        return total * gate


def _names(rewards: Sequence[Reward]) -> list[str]:
    names = [one.card.name for one in rewards]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise RecipeError(
            f"the reward '{twice[0]}' is given twice.", where="rewards",
            hint="Give it once, with the sum of both weights.",
        )  # fmt: skip
    return names


def _judged(name: str, score: Score, completions: Sequence[Completion]) -> Sequence[Scored]:
    where = f"reward '{name}'"
    hint = "Correct it; what was trained so far is in the run's last checkpoint."
    try:
        found = list(score(completions))
    except DelibleError:
        raise
    except Exception as error:  # a reward is its author's program: any error can come
        raise RunError(f"it raised {type(error).__name__}: {error}", where=where, hint=hint) from (
            error
        )
    if len(found) != len(completions):
        raise RunError(
            f"it gave {len(found)} results for {len(completions)} completions.",
            where=where,
            hint=hint,
        )
    for one, completion in zip(found, completions, strict=True):
        value = one.value
        if value is None:
            continue
        plain = isinstance(value, Real) and not isinstance(value, bool)
        if not plain or not math.isfinite(float(value)):
            raise RunError(
                f"it gave {value!r} for the answer {completion.text[:60]!r}, which is no number.",
                where=where,
                hint="Return a finite number, or None where there is no value.",
            )
    return found


__all__ = ["FunctionReward", "Reward", "Rewards", "Score", "Tally", "asked_by", "reward"]

"""A recipe: one choice per slot, and how long and how fast to train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import yaml
from pydantic import Field, model_validator

from delible import registry
from delible.cards import SLOTS, Kind
from delible.component import Component, Config, build
from delible.errors import RecipeError, nearest
from delible.precision import BasePrecision, Precision
from delible.ranges import Range
from delible.train.losses import Keep, Objective
from delible.train.schedule import Schedule
from delible.train.slots import (
    Balance,
    Finish,
    Generate,
    Harden,
    Place,
    Sample,
    Select,
    Weigh,
)

if TYPE_CHECKING:
    from delible.lm.lm import LM

Strength = Literal["gentle", "normal", "strong"]


class Training(Config):
    """How long, how fast and how carefully."""

    learning_rate: float = Field(
        1e-5, gt=0, le=1, description="Peak learning rate of the optimiser."
    )
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = Field(
        "adamw", description="AdamW, AdamW with moments in 8 bits (a quarter of the memory; "
        "torchao), or plain gradient descent: each step is the rate times the gradient.",
    )  # fmt: skip
    learning_rate_width: int | None = Field(
        None, ge=1,
        description="Hidden size that the learning rate is meant for: another model's rate is "
        "higher in proportion as it is narrower; none: the rate as it is.",
    )  # fmt: skip
    epochs: int = Field(10, ge=1, description="Passes over the forget rows.")
    least_steps: int | None = Field(
        None, ge=1, description="More passes where there are few rows: at least so many steps."
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimiser steps.")
    batch_size: int = Field(16, ge=1, description="Forget rows per optimiser step.")
    schedule: Schedule = Field("constant", description="Learning rate after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    warmup_share: float = Field(
        0.0, ge=0, lt=1, description="Share of all steps with linear warm-up, instead of a number."
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the optimiser.")
    max_gradient_norm: float | None = Field(1.0, gt=0, description="Clip the gradient's norm.")
    micro_batch_tokens: int | Literal["auto"] = Field(
        "auto", description="Padded tokens per pass; auto: what the free memory allows."
    )
    max_length: int = Field(512, ge=8, description="Longest row in tokens.")
    precision: Precision = Field(
        "auto", description="Of the computation; weights that move stay fp32."
    )
    base_precision: BasePrecision = Field(
        "float32", description="Of the weights below an adapter, which do not move: shorter ones "
        "take less memory, and are computed in bf16.",
    )  # fmt: skip
    gradient_checkpointing: bool = Field(
        False, description="Keep inputs of blocks alone, and compute blocks again for the gradient."
    )
    offload_optimizer: bool = Field(
        False, description="Keep an accelerator's moments of the optimiser in the main memory."
    )
    offload_activations: bool = Field(
        False, description="Keep what an accelerator's backward pass needs in the main memory."
    )
    checkpoint_seconds: float = Field(
        120.0, gt=0, description="Write a checkpoint when this many seconds have passed."
    )
    checkpoint_steps: int | None = Field(
        None, ge=1, description="Write a checkpoint after this many steps instead."
    )
    monitor_steps: int = Field(
        10, ge=1, description="Look at forget and retain rows after this many steps, if asked to."
    )
    stop_at_forget_probability: float | None = Field(
        None, gt=0, lt=1, description="Stop once forget answers are this improbable on average."
    )
    stop_at_forget_share: float | None = Field(
        None, gt=0, lt=1,
        description="Stop once forget answers are on average this share as probable as at the "
        "start: 0.5 is half.",
    )  # fmt: skip
    stop_at_accuracy: float | None = Field(
        None, gt=0, lt=1,
        description="Stop once so many of the multiple-choice questions about forget records are "
        "answered right, and keep the weights that came nearest.",
    )  # fmt: skip
    utility_budget: float | None = Field(
        None, gt=0, le=1, description="Keep at least this share of the retain probability."
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_share:
            raise ValueError("give warmup_steps or warmup_share, not both")
        return self

    def warmup(self, total: int) -> int:
        """Steps of warm-up in a run of ``total`` steps."""
        return self.warmup_steps or round(self.warmup_share * total)

    def fitted(self, width: int) -> Self:
        """These settings with the learning rate of a model of that hidden size.

        AdamW moves every weight by about the learning rate, whatever its gradient; a narrower
        model has fewer weights per sum, and larger ones, so the same change of what it says
        takes a higher rate (in inverse proportion: arXiv 2203.03466).
        """
        if self.learning_rate_width is None:
            return self
        rate = min(1.0, self.learning_rate * self.learning_rate_width / width)
        return self.model_copy(update={"learning_rate": rate, "learning_rate_width": None})


class Recipe(Config):
    """One choice per slot, and the training settings.

    Attributes:
        tune: Ranges for ``delible tune`` by full option name, such as ``objective.beta``; ``None``
            keeps an option out of the search. They are no part of what a run is (:meth:`spec`).
    """

    name: str = "custom"
    generate: Generate
    select: Select
    sample: Sample
    weigh: Weigh
    place: Place
    objective: Objective
    keep: Keep
    balance: Balance
    harden: Harden
    finish: Finish
    training: Training = Training()
    tune: dict[str, Range | None] = Field(default={}, repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.spec() == other.spec()

    def __hash__(self) -> int:
        return hash(str(self.spec()))

    @classmethod
    def named(cls, name: str) -> Self:
        """The recipe that ships under a method's name: ``npo``, or ``npo@paper`` as published.

        Raises:
            RecipeError: Unknown; offers the nearest name.
        """
        plain, preset = registry.split_preset(name)
        registry.card("recipe", plain)
        content = {**read_yaml(registry.recipe_files()[plain]), "name": plain}
        return cls.from_mapping(with_preset(content, preset, f"method '{plain}'"))

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """A recipe from the user's own YAML file; slots that are left out get their default.

        ``FILE.yaml@NAME`` is the file's preset NAME.
        """
        plain, preset = registry.split_preset(str(path))
        content = {"name": Path(plain).stem, **read_yaml(Path(plain))}
        return cls.from_mapping(with_preset(content, preset, plain), where=plain)

    @classmethod
    def from_mapping(cls, content: dict[str, Any], where: str = "recipe") -> Self:
        """A recipe from plain data: slot name to component, and ``training``."""
        known = {"name", "card", "training", "tune", "presets", *SLOTS}
        for key in content:
            if key not in known:
                raise RecipeError(f"unknown key '{key}'.", where=where, hint=nearest(key, known))
        presets_of(content, where)
        if "objective" not in content:
            raise RecipeError("'objective' is missing.", where=where)
        slots = {
            slot: build(cast(Kind, slot), content.get(slot) or DEFAULTS[slot]) for slot in SLOTS
        }
        training = content.get("training", {})
        if not isinstance(training, Training):
            training = Training.build(f"{where}: training", **training)
        recipe = cls(name=str(content.get("name", "custom")), training=training, **slots)
        ranges = recipe._ranges(content.get("tune") or {}, f"{where}: tune")
        return recipe.model_copy(update={"tune": ranges}) if ranges else recipe

    def _ranges(self, given: Any, where: str) -> dict[str, Range | None]:
        if not isinstance(given, dict):
            raise RecipeError("'tune' is a mapping of options to ranges.", where=where)
        spec, found = self.spec(), {}
        for option, value in given.items():
            slot, key = _place(str(option), spec, where)
            if value is not None and type(spec[slot][key]) not in (int, float):
                raise RecipeError(
                    f"'{option}' = {spec[slot][key]!r} is no number.",
                    where=where,
                    hint="A search starts from the recipe's own value: give it one.",
                )
            found[f"{slot}.{key}"] = (
                None if value is None else Range.read(value, f"{where}.{option}")
            )
        return found

    def place_of(self, option: str) -> str:
        """The full name of an option: ``objective.beta`` for ``beta``.

        Raises:
            RecipeError: No place, or more than one, has the option.
        """
        return ".".join(_place(option, self.spec(), f"method '{self.name}'"))

    def changed(self, slots: dict[str, Any], options: dict[str, Any]) -> Self:
        """This recipe with other slots, and with options set by name.

        Args:
            slots: Slot name to a component, a name or a mapping.
            options: ``beta=0.2`` finds the one place that has it; ``{"npo.beta": …}``,
                ``{"objective.beta": …}`` or ``{"training.epochs": …}`` name the place. A learning
                rate is meant as it is, for any width; a length too: the recipe's own stop and
                its least number of steps are gone where epochs or steps are said.

        Raises:
            RecipeError: No place, or more than one, has the option.
        """
        content = self.spec() | {
            slot: _spec(cast(Kind, slot), value) for slot, value in slots.items()
        }
        where = f"method '{self.name}'"
        given = [(*_place(option, content, where), value) for option, value in options.items()]
        for slot, key, _ in given:
            for implied in MEANT.get(key, ()) if slot == "training" else ():
                content[slot][implied] = None
        for slot, key, value in given:
            content[slot][key] = value
        content["tune"] = {  # a range goes with its component, and with its value
            option: found
            for option, found in self.tune.items()
            for slot, _, key in [option.partition(".")]
            if slot not in slots and (found is None or content[slot][key] is not None)
        }
        return type(self).from_mapping(content, where=where)

    def spec(self) -> dict[str, Any]:
        """The recipe as plain data, every option included."""
        slots = {slot: getattr(self, slot).spec() for slot in SLOTS}
        return {"name": self.name, **slots, "training": self.training.model_dump(mode="json")}

    def with_strength(self, strength: Strength) -> Self:
        """The one dial: how far to go.

        A recipe that stops by itself is told to stop later (and may take twice as long for it);
        any other one is scaled in learning rate and number of epochs.
        """
        training = self.training
        share = training.stop_at_forget_share
        update: dict[str, Any]
        if share is not None:
            power, length = {"gentle": (0.5, 1), "normal": (1.0, 1), "strong": (2.0, 2)}[strength]
            least = training.least_steps
            update = {
                "stop_at_forget_share": share**power,
                "epochs": training.epochs * length,
                "least_steps": None if least is None else least * length,
            }
        else:
            rate, times = {"gentle": (0.5, 0.7), "normal": (1.0, 1.0), "strong": (1.5, 1.5)}[
                strength
            ]
            update = {
                "learning_rate": training.learning_rate * rate,
                "epochs": max(1, round(training.epochs * times)),
            }
        return self.model_copy(update={"training": training.model_copy(update=update)})

    def fitted(self, lm: LM) -> Self:
        """The recipe with the learning rate of a model (:meth:`Training.fitted`)."""
        return self.model_copy(update={"training": self.training.fitted(lm.anatomy.hidden_size)})

    def components(self) -> list[Component]:
        """The ten components in slot order."""
        return [getattr(self, slot) for slot in SLOTS]


#: Training settings that a recipe chose itself, and that no longer hold where another is said.
MEANT = {
    "learning_rate": ("learning_rate_width",),
    "epochs": ("least_steps", "stop_at_forget_share"),
    "max_steps": ("least_steps", "stop_at_forget_share"),
}
#: What a slot holds when a recipe does not say.
DEFAULTS = {
    "generate": "none",
    "select": "all",
    "sample": "one_to_one",
    "weigh": "none",
    "place": "all",
    "keep": "none",
    "balance": "weighted_sum",
    "harden": "none",
    "finish": "none",
}


def presets_of(content: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The presets in a recipe file's content, by name.

    Raises:
        RecipeError: They have another form.
    """
    presets = content.get("presets") or {}
    if not isinstance(presets, dict) or not all(isinstance(one, dict) for one in presets.values()):
        raise RecipeError("'presets' is a mapping of names to slots and training.", where=where)
    for name, parts in presets.items():
        for key in parts:
            if key not in (known := ("about", "training", *SLOTS)):
                raise RecipeError(
                    f"unknown key '{key}'.", where=f"{where}: {name}", hint=nearest(key, known)
                )
    return presets


def with_preset(content: dict[str, Any], preset: str | None, where: str) -> dict[str, Any]:
    """A recipe file's content with a preset's slots and training in place of its own.

    Whole, not merged: what a default is measured for (a small model) must not seep into a
    schedule that was published for another.

    Raises:
        RecipeError: There is no such preset.
    """
    if preset is None:
        return content
    presets = presets_of(content, where)
    if preset not in presets:
        raise RecipeError(
            f"it has no preset '{preset}'.",
            where=where,
            hint=nearest(preset, presets) if presets else "It has none: its numbers are its own.",
        )
    chosen = {key: value for key, value in presets[preset].items() if key != "about"}
    if chosen.keys() & set(SLOTS):  # ranges go with the components that they were written for
        chosen["tune"] = None
    return {**content, **chosen, "name": f"{content['name']}@{preset}"}


def _place(option: str, content: dict[str, Any], where: str) -> tuple[str, str]:
    """The slot (or ``training``) and the key of an option in a recipe's plain data."""
    places: dict[str, dict[str, Any]] = {name: content[name] for name in (*SLOTS, "training")}
    prefix, _, key = option.rpartition(".")
    found = [
        slot
        for slot, values in places.items()
        if key in values and key != "name" and prefix in ("", slot, values.get("name"))
    ]
    if not found:
        names = {key for values in places.values() for key in values} - {"name"}
        raise RecipeError(f"unknown option '{option}'.", where=where, hint=nearest(key, names))
    if len(found) > 1:
        full = " or ".join(f"'{slot}.{key}'" for slot in found)
        raise RecipeError(f"option '{option}' is ambiguous.", hint=f"Say {full}.")
    return found[0], key


def _spec(slot: Kind, value: Any) -> dict[str, Any]:
    return build(slot, value).spec()  # type: ignore[no-any-return]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        RecipeError: No such file, or no mapping in it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError("no such recipe file.", where=str(path)) from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f"{path}:{line + 1}" if line is not None else str(path)
        raise RecipeError("not valid YAML.", where=place) from None
    if not isinstance(content, dict):
        raise RecipeError("a recipe is a mapping of slots to components.", where=str(path))
    return content

"""How requests are carried out: a file that an operator writes once, and every run follows.

rules:                            the first one that fits a request counts
  - {basis: [erasure], up_to: 20, method: rocr, options: {tokens: 256}}
  - {basis: [safety], guard: true}        never more than a guard
  - {method: npo, strength: gentle}
utility:
  budget: 0.05                    share of the kept answers' probability, over the whole chain
  when_spent: guard               stop | guard | ask
guard:
  targets: targets.yaml           the gateway's file of targets
  at_once: true                   before anything is trained
  remove_when_done: true          when the weights have changed
retain: retain.jsonl
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from delible.component import Config
from delible.errors import RecipeError, nearest
from delible.ledger.form import Basis


class Rule(Config):
    """What is done about some requests."""

    basis: tuple[Basis, ...] = Field((), description="Of the requests; none named: of any.")
    up_to: int | None = Field(None, ge=1, description="Records and names of a request, at most.")
    method: str | None = Field(None, description="A method, or a YAML file of one.")
    guard: bool = Field(False, description="Only an entry in the file of targets.")
    options: dict[str, Any] = Field(default_factory=dict, description="Of the method.")
    slots: dict[str, Any] = Field(default_factory=dict, description="Other parts of a recipe.")
    strength: Literal["gentle", "normal", "strong"] | None = Field(None, description="The dial.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Rule:
        if self.guard == (self.method is not None):
            raise ValueError("a rule names a method, or says guard: true")
        return self

    def fits(self, basis: str, size: int) -> bool:
        """Whether it is for such a request."""
        small = self.up_to is None or size <= self.up_to
        return small and (not self.basis or basis in self.basis)


class Utility(Config):
    """How much of what is to be kept may be lost."""

    budget: float = Field(
        0.1, ge=0, le=1, description="Share of the kept answers' probability, over all requests."
    )
    when_spent: Literal["stop", "guard", "ask"] = Field(
        "stop", description="What becomes of a request that would take more."
    )


class GuardPolicy(Config):
    """Guards that go live before the weights have changed."""

    targets: Path | None = Field(None, description="The file of targets that guards go by.")
    at_once: bool = Field(True, description="Before anything is trained.")
    remove_when_done: bool = Field(True, description="Take the entry out when weights changed.")


class Policy(Config):
    """How requests are carried out."""

    rules: tuple[Rule, ...] = Field((Rule(method="npo"),), min_length=1, description="In order.")
    utility: Utility = Field(Utility(), description="The budget.")
    guard: GuardPolicy = Field(GuardPolicy(), description="Guards.")
    retain: Path | None = Field(None, description="Records to keep; none: general questions.")

    def rule(self, basis: str, size: int) -> Rule | None:
        """The first rule that fits."""
        return next((one for one in self.rules if one.fits(basis, size)), None)


def read_policy(path: Path | None) -> Policy:
    """The policy of a file; paths in it are seen from there. None: the standard one.

    Raises:
        RecipeError: It cannot be read, or says something that is no policy.
    """
    if path is None:
        return Policy()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RecipeError(f"cannot be read ({told}).", where=str(path)) from None
    if not isinstance(content, dict):
        raise RecipeError("is no policy.", where=str(path), hint="Write 'rules: [...]'.")
    try:
        policy = Policy(**content)
    except ValidationError as error:
        raise _explained(error, path) from None
    folder = path.parent
    guard = policy.guard
    if guard.targets is not None:
        guard = guard.model_copy(update={"targets": folder / guard.targets.expanduser()})
    retain = None if policy.retain is None else folder / policy.retain.expanduser()
    return policy.model_copy(update={"guard": guard, "retain": retain})


def _explained(error: ValidationError, path: Path) -> RecipeError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known: Mapping[str, Any] = {
            "rules": Rule, "utility": Utility, "guard": GuardPolicy,
        }  # fmt: skip
        home = known.get(str(first["loc"][0]), Policy) if len(first["loc"]) > 1 else Policy
        hint = nearest(str(first["loc"][-1]), home.model_fields)
        return RecipeError(f"unknown option '{field}'.", where=str(path), hint=hint)
    told = first["msg"].removeprefix("Value error, ")
    return RecipeError(f"'{field}': {told}.", where=str(path))

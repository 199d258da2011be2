"""Arithmetic of logits: a model from whose logits a small assistant's are taken away.

    l(v) = b(v) - strength * (a(v) - mean_v a)     where log p_b(v) >= floor
    l(v) = b(v)                                     elsewhere
    floor = min( max_v log p_b + log rho,  the (rho |V|)-th largest log p_b )

at every position, in scoring, generating and training alike; b are the model's logits, a the
assistant's: its first blocks with the model's own norm and head, and an adapter beside them. A
flat assistant changes nothing (without the mean, a common offset of a would move the probability
of what the filter leaves out). Of several assistants, one per request, the one that is most
certain of its next token is taken away: none is quite flat about what it was not taught, and many
of them together wear the model out. Both models go through one pass and one key-value cache
(:mod:`delible.lm.joint`); the assistant's frozen weights are the model's own tensors.

Paper: arXiv 2406.08607 (ULD).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Float, Int
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from delible.component import Config
from delible.errors import ModelError, RunError
from delible.files import atomic_folder
from delible.lm.body import AfterHead
from delible.lm.derive import derive
from delible.lm.identity import Identity
from delible.lm.joint import Joint, joint_anatomy
from delible.lm.layout import Make
from delible.lm.lm import LM
from delible.lm.saved_adapter import with_adapter
from delible.lm.shortened import shortened
from delible.precision import BasePrecision


class Subtraction(Config):
    """How an assistant's logits are taken away."""

    strength: float = Field(0.75, ge=0, le=10, description="Of the subtraction; 0 takes nothing.")
    filter_share: float | None = Field(
        0.01, gt=0, le=1, description="Only tokens of at least this share of the likeliest one's "
        "probability are changed, and at least this share of the vocabulary; none: all tokens.",
    )  # fmt: skip
    centred: bool = Field(
        True, description="The assistant's mean logit is taken off first, so that a flat one "
        "changes nothing; false: raw logits, as in the released code.",
    )  # fmt: skip


def kept_tokens(
    logits: Float[Tensor, "tokens vocab"], share: float
) -> Float[Tensor, "tokens vocab"]:
    """Which tokens the filter keeps: likely ones, and at least ``share`` of the vocabulary."""
    likely = logits.amax(dim=-1, keepdim=True) + math.log(share)
    count = max(1, int(share * logits.shape[-1]))
    least = logits.topk(count, dim=-1).values[..., -1:]
    return logits >= torch.minimum(likely, least)


def subtracted(
    logits: Float[Tensor, "tokens vocab"],
    assistant: Float[Tensor, "tokens vocab"],
    how: Subtraction,
) -> Float[Tensor, "tokens vocab"]:
    """The difference; see above. Neither argument is written to."""
    if how.strength == 0:
        return logits
    changed = torch.sub(logits, assistant, alpha=how.strength)
    if how.centred:  # as few passes over the vocabulary as can be
        changed += how.strength * assistant.mean(dim=-1, keepdim=True)
    if how.filter_share is None:
        return changed
    return torch.where(kept_tokens(logits.detach(), how.filter_share), changed, logits)


def most_certain(assistants: Sequence[Float[Tensor, "tokens vocab"]]) -> Int[Tensor, " tokens"]:
    """Which assistant gives its likeliest token the highest probability; ties: the first."""
    sure = [one.amax(dim=-1) - one.logsumexp(dim=-1) for one in assistants]
    return torch.stack(sure).argmax(dim=0)


@dataclass(frozen=True)
class Assistant:
    """An assistant, and how its logits are taken away.

    Attributes:
        lm: The model's first blocks, wearing an adapter.
        how: The subtraction.
    """

    lm: LM
    how: Subtraction

    @property
    def layers(self) -> int:
        """Its blocks."""
        return self.lm.anatomy.layers

    def told(self, known: str) -> str:
        """What it is, as one text, with what is known of its weights."""
        return f"{known} {json.dumps(self.how.model_dump(), sort_keys=True)}"

    def save(self, folder: Path) -> None:
        """Writes the adapter (PEFT, safetensors), atomically; the blocks are the base's."""
        with atomic_folder(folder) as target:
            self.lm.model.save_pretrained(target, safe_serialization=True)

    @classmethod
    def load(cls, bare: LM, folder: Path, layers: int, how: Subtraction) -> Assistant:
        """The assistant of a model again.

        Raises:
            ModelError: It does not fit the model.
        """
        from peft import get_peft_model_state_dict

        lm = shortened(below(bare), layers, f"assistant of {bare.name}")
        lm.wear(with_adapter(lm.core, folder, bare.name))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as kept:
            left_over = set(kept.keys()) - set(get_peft_model_state_dict(lm.model))
        if left_over:
            raise ModelError(
                f"the assistant does not fit the model: {len(left_over)} tensors have no place in "
                f"its first {layers} blocks.",
                where=str(folder),
                hint="Give it the base that it was made on, and the 'layers' of its run.",
            )
        return cls(lm, how)

    def beside(self, bare: LM) -> Assistant:
        """The same beside another model of this form: with its blocks."""
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        lm = shortened(below(bare), self.layers, self.lm.name)
        settings = self.lm.model.peft_config["default"]
        with torch.random.fork_rng(devices=[]):
            worn = get_peft_model(lm.core, settings, autocast_adapter_dtype=True)
        set_peft_model_state_dict(worn, get_peft_model_state_dict(self.lm.model))
        lm.wear(worn.eval())
        return Assistant(lm, self.how)


def below(lm: LM) -> LM:
    """The model itself, without assistants and interventions."""
    inner = getattr(lm, "bare", None)
    return lm if inner is None else below(inner)


class Arithmetic(LM):
    """A model and its assistants, in order; see :func:`together`.

    Generating, scoring, inspecting distributions, serving and training see the difference. Hidden
    states are those of the model, which the assistants do not touch: it knows what it knew.

    Attributes:
        bare: The model without them; it shares its weights.
        assistants: What is taken away, the first one first.
    """

    in_weights: ClassVar[bool] = False

    def __init__(self, bare: LM, assistants: Sequence[Assistant]) -> None:
        vars(self).update(vars(bare))
        vars(self).pop("budget", None)
        self.bare, self.assistants = bare, tuple(assistants)
        self.name = f"{bare.name} - {' - '.join(['assistant'] * len(self.assistants))}"
        self.on_answers, self.origin = None, None
        self.interveners = bare.interveners
        self.model = Joint([bare, *(one.lm for one in self.assistants)], self._combined)
        self.anatomy = joint_anatomy(bare.anatomy)
        self.after_head = AfterHead()  # each head's logits are its model's already
        self._identity = Identity(self.model)

    def _combined(self, logits: Tensor, others: Sequence[Tensor]) -> Tensor:
        if len(others) == 1:
            return subtracted(logits, others[0], self.assistants[0].how)
        chosen, found = most_certain(others), logits
        for place, (one, other) in enumerate(zip(self.assistants, others, strict=True)):
            mine = (chosen == place)[..., None]  # no indexing by it: a dry run has no numbers
            found = torch.where(mine, subtracted(logits, other, one.how), found)
        return found

    # ---- identity

    @property
    def fingerprint(self) -> str:
        """That of the model, and of each assistant with its subtraction."""
        known = [one.told(one.lm.fingerprint) for one in self.assistants]
        return _digest(self.bare.fingerprint, self.template.fingerprint, self.precision, *known)

    @property
    def identity(self) -> str:
        """The same in every precision."""
        known = [one.told(one.lm.identity) for one in self.assistants]
        return _digest(self.bare.identity, *known)

    def taken_off(self) -> tuple[str, LM]:
        """The last assistant, and the model with the others."""
        *others, _ = self.assistants
        return "assistant", Arithmetic(self.bare, others) if others else self.bare

    def merged(self) -> NoReturn:
        """A difference of logits is not in the weights.

        Raises:
            RunError: Always.
        """
        raise RunError(
            "an assistant's logits are taken away from the model's, which no single model's "
            "weights do.",
            hint="Serve it as it is, or merge the model without it.",
        )

    def touch(self) -> None:
        """Says that the weights have changed."""
        for one in (self.bare, *(one.lm for one in self.assistants)):
            one.touch()
        self._identity.forget()
        self.patches, self.origin = self.bare.patches, None

    def wear(self, model: Any) -> None:
        """Takes another form of the same models: with an adapter on the first, or one merged."""
        self.model = model
        self.anatomy = joint_anatomy(derive(self.core.leading))
        self._identity = Identity(model)
        self.touch()

    def hold(self, precision: BasePrecision) -> None:
        """Holds the model's weights in a shorter precision; adapters of assistants stay."""
        self.bare.hold(precision)
        self.precision = self.bare.precision

    def copy(self, name: str | None = None) -> Arithmetic:
        """An independent copy with its own weights.

        Raises:
            ModelError: An adapter was put on the whole: take it off first.
        """
        if self.wears_adapter:
            raise ModelError(
                "a model with an assistant that wears another adapter is not copied.",
                where=self.name,
                hint="Merge or take off the adapter first.",
            )
        bare = self.bare.copy()
        twin = Arithmetic(bare, [one.beside(bare) for one in self.assistants])
        twin.name, twin.precision = name or self.name, self.precision
        return twin

    def save(self, folder: Path) -> NoReturn:
        """Refused: the weights alone are another model.

        Raises:
            RunError: Always.
        """
        raise RunError(
            "an assistant is not in the model's weights, so a saved model would answer "
            "differently.",
            where=str(folder),
            hint="Save the model (lm.bare.save) and its assistants (lm.assistants).",
        )

    # ---- the model alone

    @property
    def leading(self) -> LM:
        return self.bare.leading  # type: ignore[return-value]

    # ---- interventions on the model stay, and so does its router

    @property
    def routes(self) -> tuple[str, ...] | None:  # type: ignore[override]
        return self.bare.routes

    def routing(self, names: Sequence[str | None] | str | None) -> AbstractContextManager[None]:
        return self.bare.routing(names)

    def spoken(self, rows: Sequence[Any], logits: Tensor) -> None:
        """Lets the model's router note how sure the whole is."""
        self.bare.spoken(rows, logits)

    def about_to_call(self, make: Make) -> None:
        self.bare.about_to_call(make)

    def intervening(self) -> AbstractContextManager[None]:
        """Within it the model's own interventions are in their places."""
        return self.bare.intervening()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it all are in evaluation mode."""
        with self.bare.evaluating(), super().evaluating():
            yield

    def alike(self, shared: int, prompts: Any) -> int:
        return self.bare.alike(shared, prompts)


def together(lm: LM, assistants: Sequence[Assistant]) -> Arithmetic:
    """A model with assistants; those that it has already stay, and come first.

    Raises:
        ModelError: Their vocabularies differ, or the model cannot be asked in batches.
    """
    if isinstance(lm, Arithmetic):
        return Arithmetic(lm.bare, [*lm.assistants, *assistants])
    return Arithmetic(lm, assistants)


def _digest(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def cost_share(lm: LM, layers: int) -> float:
    """Share that an assistant of so many blocks adds to the model's own time, by multiplications.

    A block's matrices and the head count, per token: the assistant has ``layers`` of the blocks
    and the head once more.
    """

    plain = below(lm)

    def weights(prefix: str) -> int:
        return sum(
            one.numel() for name, one in plain.core.named_parameters() if name.startswith(prefix)
        )

    block = weights(f"{plain.anatomy.blocks}.") / plain.anatomy.layers
    head = plain.vocabulary * plain.anatomy.hidden_size
    return (layers * block + head) / (plain.anatomy.layers * block + head)


__all__ = [
    "Arithmetic",
    "Assistant",
    "Subtraction",
    "below",
    "cost_share",
    "kept_tokens",
    "subtracted",
    "together",
]

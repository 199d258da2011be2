"""A model with interventions: asked like any model, and taken off without a trace.

The weights are shared with the bare model and never touched. The hooks are in their places while
the intervened model is asked, and act only on what is asked of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from delible.errors import ModelError
from delible.intervene.sites import Place, Positions, vision_blocks
from delible.intervene.taps import Tap, Taps, Where
from delible.lm.beside import Beside, identity_with
from delible.lm.layout import padded_rows, told
from delible.lm.lm import LM
from delible.lm.seeing import look, ramp

logger = logging.getLogger(__name__)


class Acting(Protocol):
    """An intervention with what it has learned (:class:`delible.intervene.base.Fitted`)."""

    @property
    def intervention(self) -> Any: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def learned_on(self) -> str | None: ...

    @property
    def identity(self) -> str: ...

    @property
    def extends(self) -> str | None: ...


class Intervened(Beside):
    """A model with interventions, in order; see :func:`intervened`. It is trained with them, too.

    Attributes:
        bare: The model without them; it shares its weights, and can be asked at the same time.
        interventions: What is on it, in this order.
        acting: Those of them that act: one that a later one extends is in that already.
    """

    what: ClassVar[str] = "an intervention"
    unmerged_hint: ClassVar[str] = "Merge the model without it, or serve it as it is."
    unsaved_hint: ClassVar[str] = (
        "Save the model (lm.bare.save) and each of lm.interventions in folders of their own."
    )

    def __init__(self, bare: LM, interventions: Sequence[Acting]) -> None:
        interventions = tuple(interventions)
        acting = tuple(
            one for place, one in enumerate(interventions)
            if all(later.extends != one.identity for later in interventions[place + 1 :])
        )  # fmt: skip
        own_rows = any(one.intervention.needs_own_rows for one in acting)
        super().__init__(bare, " + ".join(_names(interventions)), own_rows=own_rows)
        self.interventions, self.acting = interventions, acting
        taps = [
            Tap(site, one.intervention.positions, _bound(one, self.device))
            for one in self.acting
            for site in one.intervention.sites
        ]
        self._taps = Taps(self, taps, self.interveners)
        self._spans = [tap.positions for tap in taps if tap.positions.kind == "spans"]

    @property
    def unmerged(self) -> str:
        """Why they cannot be merged."""
        names = ", ".join(_names(self.interventions))
        return f"'{names}' changes activations, and cannot be merged into weights"

    def on(self, bare: LM) -> Intervened:
        """The same interventions on another model's weights."""
        return Intervened(bare, self.interventions)

    @property
    def besides(self) -> Sequence[str]:
        """The interventions' identities, in order."""
        return [one.identity for one in self.interventions]

    def taken_off(self) -> tuple[str, LM]:
        """The last intervention, and the model with the others."""
        *others, last = self.interventions
        left = Intervened(self.bare, others) if others else self.bare
        return f"{last.intervention.artefact} '{last.intervention.card.name}'", left

    @property
    def leading(self) -> Intervened:
        """The first of several models as one, with the interventions."""
        first = self.bare.leading
        return self if first is self.bare else self.on(first)  # type: ignore[arg-type]

    # ---- how it acts

    def intervening(self) -> AbstractContextManager[None]:
        """Within it the hooks are in their places."""
        return self._taps.on()

    def alike(self, shared: int, prompts: Callable[[], Sequence[Sequence[int]]]) -> int:
        """What is computed once must be changed alike in all prompts."""
        if not shared or not self._spans:
            return shared
        if not self.shares_prefix:
            return 0
        for positions in self._spans:
            first, *others = (positions.marked(self, prompt)[:shared] for prompt in prompts())
            while any(one[:shared] != first[:shared] for one in others):
                shared -= 1
        return shared


def intervened(lm: LM, interventions: Sequence[Acting]) -> Intervened:
    """A model on which interventions act.

    It is asked wherever a model is; the answers are those of one plain row after the other, with
    the interventions at their sites. Interventions that are on already stay and act first.

    Args:
        lm: The model; its weights are shared, not copied, and stay as they are.
        interventions: First the one that acts first.

    Raises:
        ModelError: The model lacks a site, or what is changed there reaches nothing; or one
            extends another that is not on the model.
    """
    if isinstance(lm, Intervened):
        interventions = [*lm.interventions, *interventions]
        lm = lm.bare
    if lm.interveners is not None:
        raise ModelError(
            "interventions act below what was put beside this model, and no more can act above.",
            where=lm.name,
            hint="Take off the part in between first, or intervene on the model without it.",
        )
    for place, one in enumerate(interventions):
        below = interventions[:place]
        if one.extends is not None and one.extends not in {other.identity for other in below}:
            raise ModelError(
                f"'{one.intervention.card.name}' extends another one that is not on this model.",
                where=lm.name,
                hint="Open the run that it was made from first, or the folder that it is in.",
            )
        known = (lm.identity, identity_with(lm, [other.identity for other in below]))
        if one.learned_on is not None and one.learned_on not in known:
            logger.warning(
                "The intervention '%s' was learned on another model than '%s', or with other "
                "weights.",
                one.intervention.card.name,
                lm.name,
            )
    _check_sites(lm, interventions)
    found = Intervened(lm, interventions)
    with torch.no_grad(), found.evaluating(), found.computing():
        _three_tokens(found)  # what an intervention cannot do is said now
    return found


def _names(interventions: Sequence[Acting]) -> list[str]:
    return [one.intervention.card.name for one in interventions]


def _bound(fitted: Acting, device: torch.device) -> Callable[[Tensor, Where], Tensor]:
    ready = fitted.intervention.ready(fitted.tensors)
    tensors = {name: one.to(device) for name, one in ready.items()}

    def function(states: Tensor, where: Where) -> Tensor:
        return fitted.intervention.change(states, where, tensors)

    return function


def _check_sites(lm: LM, interventions: Sequence[Acting]) -> None:
    """Tries on three tokens that a change at each site reaches what the model gives."""
    sites = dict.fromkeys(site for one in interventions for site in one.intervention.sites)
    for site in sites:
        run = partial(_picture if site.what == "vision" else _three_tokens, lm)
        places = site.places(lm)
        with torch.no_grad(), lm.evaluating(), lm.computing():
            plain = run()
            for place in places:
                passed: list[str] = []
                at = site if place.layer is None else site.model_copy(
                    update={"layers": (place.layer,)}
                )  # fmt: skip
                with Taps(lm, [Tap(at, Positions(), partial(_ramp, passed))]).on():
                    changed = run()
                _reached(place, passed, plain, changed, type(lm.core).__name__)


def _ramp(passed: list[str], states: Tensor, where: Where) -> Tensor:
    """Another direction: a constant or a factor alone would be taken back by a norm."""
    passed.append(where.what)
    size = states.abs().amax().clamp(min=1e-3)
    return states + size * torch.linspace(-1, 2, states.shape[-1], device=states.device)


def _reached(place: Place, passed: list[str], plain: Tensor, changed: Tensor, name: str) -> None:
    if not passed:
        raise ModelError(f"nothing passes '{place.path}', so nothing can be changed.", where=name)
    if torch.equal(plain, changed):
        raise ModelError(
            f"a change at '{place.path}' ({place.what}) does not reach what the model gives.",
            where=name,
            hint="Another hook or wrapper may take it back; intervene at another site.",
        )


def _three_tokens(lm: LM) -> Tensor:
    """Final states of a prompt of two tokens and an answer of one."""
    ids = torch.tensor([[3, 5, 6]], device=lm.device)
    lengths, starts = (torch.tensor([count], device=lm.device) for count in (3, 2))
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    with told(lm, padded_rows(ids, lengths, starts)):
        return backbone(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def _picture(lm: LM) -> Tensor:
    """What the tower for images gives the language model, of a picture of a ramp."""
    if lm.pictures is not None:
        return look(lm, [ramp()])[0]
    settings = lm.core.config.vision_config
    size = settings.image_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(settings, "num_channels", 3)
    count = channels * height * width
    pixels = torch.linspace(-1, 1, count, device=lm.device).reshape(1, channels, height, width)
    try:
        found = lm.core.get_image_features(pixel_values=pixels.to(lm.core.dtype))
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"its tower for images ('{vision_blocks(lm)}') cannot be tried: {error}",
            where=type(lm.core).__name__,
        ) from error
    # what the language model reads, where it comes beside the tower's own states
    return torch.cat([one.flatten() for one in _tensors(getattr(found, "pooler_output", found))])


def _tensors(found: Any) -> list[Tensor]:
    if torch.is_tensor(found):
        return [found]
    values = found.values() if hasattr(found, "values") else found
    return [one for value in values if value is not None for one in _tensors(value)]

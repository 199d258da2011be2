"""An intervention on a model: its options and what it has learned, put on when it is opened."""

from __future__ import annotations

from delible.intervene.artefact import FittedKind
from delible.registry import register


@register(
    kind="artefact",
    name="intervention",
    title="Intervention",
    summary="A change of activations while a model is asked, which can be taken off exactly.",
    mechanism="activation",
    changes="Nothing in the weights: activations, while it is asked.",
    reversible=True,
)
class Intervention(FittedKind):
    """An intervention: its options and what it has learned."""

"""A side memory of a model: changed copies of one matrix, and when they are used instead of it."""

from __future__ import annotations

from delible.intervene.artefact import FittedKind
from delible.registry import register


@register(
    kind="artefact",
    name="side_memory",
    title="Side memory",
    summary="Copies of one matrix that some questions are routed to, which can be taken off.",
    mechanism="activation",
    changes="Nothing in the weights: what one matrix gives at questions that are routed away.",
    reversible=True,
)
class SideMemory(FittedKind):
    """Changed copies of one matrix, and when they are used instead of it."""

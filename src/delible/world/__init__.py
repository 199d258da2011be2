"""A seeded, fictional knowledge graph: the default data, with exact ground truth."""

from __future__ import annotations

from delible.world.benign import benign
from delible.world.common import general, general_choices, unrelated
from delible.world.facts import Fact, MultiHop
from delible.world.graph import Person, Value
from delible.world.relations import Relation, relations
from delible.world.split import Split
from delible.world.world import World, WorldOptions

__all__ = [
    "Fact",
    "MultiHop",
    "Person",
    "Relation",
    "Split",
    "Value",
    "World",
    "WorldOptions",
    "benign",
    "general",
    "general_choices",
    "relations",
    "unrelated",
]

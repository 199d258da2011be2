"""One layer for everything that remembers beside weights, and can forget.

Cases, demonstrations, entries for retrieval and summaries are items of a :class:`Memory`: with an
id that stays, what they were made from, and one way to delete them with all that follows from them.
"""

from delible.memory.certificate import Certificate
from delible.memory.closure import Closure, Member, NoMatchError
from delible.memory.forgetting import Deletion, Rebuild
from delible.memory.items import CASE, DEMONSTRATION, ENTRY, SUMMARY, Found, Item, near
from delible.memory.store import Memory

__all__ = [
    "CASE", "DEMONSTRATION", "ENTRY", "SUMMARY", "Certificate", "Closure", "Deletion", "Found",
    "Item", "Member", "Memory", "NoMatchError", "Rebuild", "near",
]  # fmt: skip

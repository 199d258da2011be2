"""What is made once and used again: known by plain data, whole or made anew.

An entry is a file or a folder in a collection of the cache (``DELIBLE_CACHE``, or the user's cache
folder), or a cell of results in a folder of the user's own. One process makes it while the others
wait (:func:`alone`); it comes under a temporary name, so that a kill leaves no half of it; what the
disk or a hand has changed since is noticed and made anew. The cache stays within a bound
(``DELIBLE_CACHE_SIZE``): what was not used for the longest goes first, and nothing that is in use.
"""

from delible.kept.hashes import HASHES, damage, remove, seal
from delible.kept.places import COLLECTIONS, cache_folder, identity, place
from delible.kept.store import alone, cell, folder, keep_within, use

__all__ = [
    "COLLECTIONS", "HASHES", "alone", "cache_folder", "cell", "damage", "folder", "identity",
    "keep_within", "place", "remove", "seal", "use",
]  # fmt: skip

"""The ledger of deletion requests: who asked for what, what was done, and what can be shown of it.

One SQLite file, to which events are added and never changed. Texts that are to be forgotten lie
beside the events and can go; what the events hold of them are salted hashes.
"""

from delible.ledger.store import Ledger, default_place

__all__ = ["Ledger", "default_place"]

"""For tests, delible's own and those of other packages: tiny models and the contract suite.

Needs no test framework: :func:`check` raises an ``AssertionError`` that says what is broken.
"""

from delible.testing.contract import ContractError, check
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer

__all__ = ["FAMILIES", "ContractError", "check", "tiny_model", "tiny_tokenizer"]

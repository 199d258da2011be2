"""The contract suite: what every component keeps, whoever wrote it.

:func:`check` takes a component of any kind and runs the checks of that kind on tiny random
models of several architectures. A check is a function whose name says what it holds; one file
per kind, and ``suite.py`` says which are for which.
"""

from delible.testing.contract.suite import check
from delible.testing.contract.trial import ContractError

__all__ = ["ContractError", "check"]

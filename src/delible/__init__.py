"""delible makes a language model forget what it is asked to forget, and audits how deep that goes.

The public names are imported when they are first used, so that ``import delible`` costs nothing::

    import delible

    request = delible.ForgetRequest(forget=[delible.QA(question="…", answer="…")])
    result = delible.unlearn("default", request, method="npo", out="runs/mine")
    delible.audit("runs/mine", request)

What the library tells, it logs below the logger ``delible`` (``logging.basicConfig(level="INFO")``
shows it).
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delible.api import load as load
    from delible.api import merge as merge
    from delible.api import open as open
    from delible.api import undo as undo
    from delible.api import unlearn as unlearn
    from delible.audit.run import audit as audit
    from delible.errors import DelibleError as DelibleError
    from delible.gateway.serving import serve as serve
    from delible.records import QA as QA
    from delible.records import Choice as Choice
    from delible.records import Dialogue as Dialogue
    from delible.records import ForgetRequest as ForgetRequest
    from delible.records import Passage as Passage
    from delible.registry import register as register
    from delible.systems.guarded import guard as guard
    from delible.world import World as World

    __version__: str

#: Public name -> the module it lives in.
_HOME = {
    "load": "delible.api",
    "merge": "delible.api",
    "open": "delible.api",
    "undo": "delible.api",
    "unlearn": "delible.api",
    "guard": "delible.systems.guarded",
    "serve": "delible.gateway.serving",
    "DelibleError": "delible.errors",
    "QA": "delible.records",
    "Choice": "delible.records",
    "Dialogue": "delible.records",
    "ForgetRequest": "delible.records",
    "Passage": "delible.records",
    "register": "delible.registry",
    "World": "delible.world",
}

__all__ = [
    "QA",
    "Choice",
    "DelibleError",
    "Dialogue",
    "ForgetRequest",
    "Passage",
    "World",
    "__version__",
    "audit",
    "guard",
    "load",
    "merge",
    "open",
    "register",
    "serve",
    "undo",
    "unlearn",
]


class _Audit(ModuleType):
    """The package ``delible.audit``, which can also be called: it is the audit."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("delible.audit.run").audit(*args, **kwargs)


class _Package(ModuleType):
    """This package. Importing a submodule sets it as an attribute here, which is the moment to
    make ``delible.audit`` callable: it is a package and a public function of the same name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "audit" and type(value) is ModuleType:
            value.__class__ = _Audit
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name == "audit":
        return importlib.import_module("delible.audit")
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("delible")
        except PackageNotFoundError:  # run from a checkout that was never installed
            return "0+unknown"
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'delible' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


logging.getLogger(__name__).addHandler(logging.NullHandler())
sys.modules[__name__].__class__ = _Package

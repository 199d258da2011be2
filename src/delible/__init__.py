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
from typing import Any

import lazy_loader


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


logging.getLogger(__name__).addHandler(logging.NullHandler())
sys.modules[__name__].__class__ = _Package
# The public names and where they live stand in __init__.pyi, for this and for type checkers.
_named, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __getattr__(name: str) -> Any:
    if name == "audit":
        return importlib.import_module("delible.audit")
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("delible")
        except PackageNotFoundError:  # run from a checkout that was never installed
            return "0+unknown"
    return _named(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The systems whose truth is known, taught once per session."""

from __future__ import annotations

import pytest
from nine_systems import Systems


@pytest.fixture(scope="session")
def systems() -> Systems:
    return Systems()


@pytest.fixture(scope="session")
def audit_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache that the session's audits share: original and reference are attacked once."""
    return str(tmp_path_factory.mktemp("audit") / "cache")

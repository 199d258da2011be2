"""The precision to compute in follows from what a device is."""

from __future__ import annotations

import pytest

from delible import precision


@pytest.mark.parametrize(("units", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_computes_in_bf16_where_it_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, units: bool, expected: str
) -> None:
    monkeypatch.setattr(precision, "has_matrix_units", lambda: units)
    assert precision.resolve("auto", "cpu") == expected
    assert precision.resolve("float32", "cpu") == "float32"
    assert precision.resolve("bfloat16", "cpu") == "bfloat16"
    assert precision.resolve("auto", "mps") == "float32"


def test_how_busy_the_machine_is_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []
    monkeypatch.setattr(precision, "_rate", lambda *given, **options: measured.append(given))
    assert precision.resolve("auto", "cpu") in ("float32", "bfloat16")
    assert not measured

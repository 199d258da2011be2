"""The verdict battery: its identities, and that it never claims removal."""

from __future__ import annotations

import pytest

from delible.audit.result import Leak
from delible.audit.verdict import erased, verdict, worst_by_attack


def test_the_original_is_not_erased_and_the_reference_is() -> None:
    assert erased(0.9, 0.9, 0.2) == 0.0
    assert erased(0.2, 0.9, 0.2) == 1.0
    assert erased(0.55, 0.9, 0.2) == pytest.approx(0.5)


def test_e_is_clipped_and_unsaid_where_there_is_nothing_to_erase() -> None:
    assert erased(0.0, 0.9, 0.2) == 1.0
    assert erased(1.0, 0.9, 0.2) == 0.0
    assert erased(0.2, 0.22, 0.2) is None
    assert erased(None, 0.9, 0.2) is None
    assert erased(0.2, None, 0.2) is None


@pytest.mark.parametrize(
    ("plain", "utility", "attacks", "label"),
    [
        (1.0, 0.95, {"relearn": 0.9, "4 bit": 0.85}, "removal-consistent"),
        (1.0, 0.95, {"relearn": 0.1, "4 bit": 0.9}, "suppression"),
        (1.0, 0.95, {"relearn": 0.6, "4 bit": 0.9}, "undetermined"),
        (0.5, 0.95, {"relearn": 0.1}, "incomplete"),
        (1.0, 0.4, {"relearn": 1.0}, "destructive"),
        (0.2, 0.4, {"relearn": 1.0}, "destructive"),
        (1.0, 0.95, {}, "undetermined"),
        (1.0, 0.95, {"relearn": None}, "undetermined"),
        (None, 0.95, {"relearn": 1.0}, "undetermined"),
        (1.0, None, {"relearn": 1.0}, "undetermined"),
    ],
)
def test_labels(
    plain: float | None, utility: float | None, attacks: dict[str, float | None], label: str
) -> None:
    found = verdict(plain, utility, attacks, without_reference=False)
    assert found.label == label
    assert found.reasons
    assert not any("removed" in reason for reason in found.reasons)


def test_a_guard_is_suppression_at_best() -> None:
    found = verdict(1.0, 1.0, {"prefill": 1.0}, without_reference=False, removable_guard=True)
    assert found.label == "suppression"


def test_without_weights_nothing_is_consistent_with_removal() -> None:
    found = verdict(1.0, 1.0, {"prefill": 1.0}, without_reference=False, white_box=False)
    assert found.label == "undetermined"


def test_the_worst_setting_of_an_attack_counts() -> None:
    def leak(attack: str, variant: str, value: float | None) -> Leak:
        return Leak(attack=attack, variant=variant, title=attack, knowledge={}, erased={"m": value})

    leaks = [
        leak("none", "", 0.0), leak("quantize", "8", 0.9), leak("quantize", "4", 0.3),
        leak("quantize", "2", None), leak("relearn", "", None),
    ]  # fmt: skip
    assert worst_by_attack(leaks, "m") == {"quantize": 0.3, "relearn": None}

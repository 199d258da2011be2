"""The full-stack card: effectiveness, utility and robustness, in choice and in open form.

    effectiveness  UE = 1 - share of right answers on forget records
    utility        UT = share of right answers on the kept records, the least of them
    robustness     UE under an attack / UE without it, at most 1; the lowest of each family

Effectiveness with and without an attack is that of the same records: those that the attack is
judged on and that were asked plainly, too. An audit in open form counts an answer as right when it
holds the expected fact; a choice is right when the likeliest letter is. Garbage and refusals are no
right answers either, so UE alone says nothing: read it with the outcome classes.

Source: the protocol of arXiv 2510.07626. Deviations: the open form goes by the matcher of all our
measures instead of an entailment model; utility is measured on the audit's own kept records and
general questions; robustness is set to None where nothing was forgotten in the first place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from delible.audit.leaks import Setting, most
from delible.audit.result import FullStack, Utility

#: Measures by form.
FORMS = {"open": "outcome", "choice": "choice_accuracy"}
#: Effectiveness below this has nothing to lose.
NOTHING_FORGOTTEN = 0.05


def full_stack(
    plain: Setting, attacks: Sequence[Setting], utility: Utility | None
) -> dict[str, FullStack]:
    """The card by form; a form that was not measured is left out."""
    found = {}
    for form, measure in FORMS.items():
        right = _right(plain, measure)
        if not right:
            continue
        effective = 1 - float(np.mean(list(right.values())))
        kept = [
            part.unlearned
            for part in (utility.parts if utility else ())
            if part.measure == measure and part.unlearned is not None
        ]
        robust: dict[str, float] = {}
        for place in attacks:
            attacked = _right(place, measure)
            both = [name for name in attacked if name in right]
            if not both or place.control:
                continue
            before = 1 - float(np.mean([right[name] for name in both]))
            after = 1 - float(np.mean([attacked[name] for name in both]))
            if before < NOTHING_FORGOTTEN:
                continue
            share = min(1.0, after / before)
            robust[place.family] = min(share, robust.get(place.family, 1.0))
        found[form] = FullStack(
            effectiveness=effective, utility=min(kept, default=None), robustness=robust
        )
    return found


def _right(place: Setting, measure: str) -> dict[str, float]:
    """Whether the unlearned system is right, by record, in the form that brings out most."""
    values = place.values.get("unlearned")
    items = values.items.get(measure, {}).get("forget", ()) if values is not None else ()
    found = zip(place.records, map(most, items), strict=False)
    return {record.digest: value for record, value in found if value is not None}


__all__ = ["FORMS", "full_stack"]

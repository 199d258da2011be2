"""The full-stack card: effectiveness, utility and robustness, in choice and in open form.

    effectiveness  UE = 1 - share of right answers on forget records
    utility        UT = share of right answers on the kept records, the least of them
    robustness     UE under an attack / UE without it, at most 1; the lowest of each family

An audit in open form counts an answer as right when it holds the expected fact; a choice is right
when the likeliest letter is. Garbage and refusals are no right answers either, so UE alone says
nothing: read it with the outcome classes.

Source: the protocol of arXiv 2510.07626. Deviations: the open form goes by the matcher of all our
measures instead of an entailment model; utility is measured on the audit's own kept records and
general questions; robustness is set to None where nothing was forgotten in the first place.
"""

from __future__ import annotations

from collections.abc import Sequence

from delible.audit.result import FullStack, Leak, Utility

#: Measures by form.
FORMS = {"open": "outcome", "choice": "choice_accuracy"}
#: Effectiveness below this has nothing to lose.
NOTHING_FORGOTTEN = 0.05


def full_stack(
    plain: Leak, attacks: Sequence[Leak], utility: Utility | None
) -> dict[str, FullStack]:
    """The card by form; a form that was not measured is left out."""
    found = {}
    for form, measure in FORMS.items():
        known = plain.knowledge.get(measure, {}).get("unlearned")
        if known is None:
            continue
        effective = 1 - known
        kept = [
            part.unlearned
            for part in (utility.parts if utility else ())
            if part.measure == measure and part.unlearned is not None
        ]
        robust: dict[str, float] = {}
        for leak in attacks:
            left = leak.knowledge.get(measure, {}).get("unlearned")
            if left is None or leak.control or effective < NOTHING_FORGOTTEN:
                continue
            share = min(1.0, (1 - left) / effective)
            robust[leak.family] = min(share, robust.get(leak.family, 1.0))
        found[form] = FullStack(
            effectiveness=effective, utility=min(kept, default=None), robustness=robust
        )
    return found


__all__ = ["FORMS", "full_stack"]

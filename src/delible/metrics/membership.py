"""Membership: can an attack tell the forgotten texts from texts that were never seen?

    AUC = P(a non-member scores higher than a member) + P(they are equal) / 2
    PrivLeak = 100 (A - A_ref) / A_ref,    A = 1 - AUC of Min-K (40 %)

over the items of the forget split (members) and the holdout split (non-members); A_ref is that of
the reference system, which was trained without the forget split. Paper: MUSE (arXiv 2407.06460);
reference code: locuslab/open-unlearning, swj0419/muse_bench (which counts the AUC the other way
round, hence A = 1 - AUC). Deviations: where A_ref is 0 PrivLeak cannot be said (open-unlearning
adds 1e-10 and gives a huge number); records without a value are counted, not skipped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from delible.errors import RecipeError
from delible.measure.metric import Item, SummaryMetric, SystemValues
from delible.measure.scoring.separation import area_under_curve, privacy_leak
from delible.registry import register


def _valued(values: SystemValues, attack: str, split: str) -> tuple[list[float], int]:
    items: Sequence[Item] = values.items.get(attack, {}).get(split, ())
    found = [item.value for item in items if item.value is not None]
    return found, len(items) - len(found)


@register(
    kind="metric",
    name="membership",
    title="Membership inference",
    summary="How well attacks tell forgotten from never seen texts (AUC), and MUSE's PrivLeak.",
    paper="2407.06460",
    year=2024,
    family="membership",
    capability="score",
    changes="nothing",
    range="AUC: [0, 1]; privleak: [-100, inf) percent",
    direction="AUC near 1: the forgotten texts are recognised as seen; 0.5: they are like unseen "
    "ones; near 0: unlearning marked them. privleak: about -100 = under-unlearned, 0 = as the "
    "reference, clearly above 0 = over-unlearned.",
    misleads="Holdout texts of another time, style or length are told apart by any model, also by "
    "one that saw neither. An AUC of 0.5 of these attacks is no proof: stronger ones exist. A "
    "destroyed model without scores has fewer records (see left_out).",
    badges=("parity",),
)
class Membership(SummaryMetric):
    """Keys: ``membership/ATTACK/auc``, ``membership/ATTACK/left_out`` (records without a value)
    and ``privleak``.
    """

    attacks: tuple[str, ...] = Field(
        ("loss_attack", "zlib_attack", "min_k"),
        min_length=1,
        description="Item metrics whose larger score means less likely a member.",
    )
    privleak_attack: str = Field("min_k", description="The attack behind privleak.")
    members: str = Field("forget", description="The split that was trained on.")
    others: str = Field("holdout", description="A split of the same kind that was not.")

    def uses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.attacks, self.privleak_attack)))

    def areas(self, values: SystemValues) -> Mapping[str, float | None]:
        """AUC of every attack."""
        return {
            attack: area_under_curve(
                _valued(values, attack, self.members)[0], _valued(values, attack, self.others)[0]
            )
            for attack in self.uses()
        }

    def summarise(
        self, values: SystemValues, reference: SystemValues | None
    ) -> dict[str, float | None]:
        """The areas, and privleak where there is a reference.

        Raises:
            RecipeError: The attack behind privleak was measured in two forms.
        """
        ours = self.areas(values)
        found: dict[str, float | None] = {}
        for attack in self.attacks:
            found[f"membership/{attack}/auc"] = ours[attack]
            found[f"membership/{attack}/left_out"] = float(
                sum(_valued(values, attack, split)[1] for split in (self.members, self.others))
            )
        found["privleak"] = None
        if reference is not None:
            self._check_same_form(values, reference)
            curve, baseline = (
                ours[self.privleak_attack],
                self.areas(reference)[self.privleak_attack],
            )
            if curve is not None and baseline is not None:
                found["privleak"] = privacy_leak(curve, baseline)
        return found

    def _check_same_form(self, values: SystemValues, reference: SystemValues) -> None:
        ours, theirs = (one.options.get(self.privleak_attack) for one in (values, reference))
        if ours is not None and theirs is not None and ours != theirs:
            raise RecipeError(
                f"'{values.system}' and '{reference.system}' were attacked with different options "
                f"({ours} and {theirs}).",
                where=f"metric '{self.card.name}', attack '{self.privleak_attack}'",
                hint="Measure both systems with the same options.",
            )

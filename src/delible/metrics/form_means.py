"""Form means: one number over all forms of the forgotten facts, and the form that leaks most.

    mean = (1/F) sum_f P_f,   highest = max_f P_f,   P_f = mean form probability of split f

A method that suppresses the trained form only has a low value there and a high one elsewhere
(form-dependent bias). Paper: ORT (arXiv 2506.07795), which reports each form's change relative to
the model before, (P_new - P_old) / P_old; that needs the other model's row, so here are the
values. No reference code.
"""

from __future__ import annotations

from pydantic import Field

from delible.measure.metric import SummaryMetric, SystemValues
from delible.registry import register

FORMS = ("blank", "question", "choice", "spelled")


@register(
    kind="metric",
    name="form_means",
    title="Mean over forms",
    summary="Mean and highest probability of the gold answers over the forms they are asked in.",
    paper="2506.07795",
    year=2025,
    family="memorisation",
    capability="score",
    changes="nothing",
    range="[0, 1]",
    direction="forget: low in all forms is better; neighbour: near the model before unlearning.",
    misleads="Choices have a floor of 0.25 by chance and the forms differ in level: the highest "
    "form of one model is not the highest of another by leaking alone.",
    badges=("parity",),
)
class FormMeans(SummaryMetric):
    """Keys: ``form_means/SIDE`` and ``form_means/SIDE_highest`` for the sides forget, neighbour."""

    forms: tuple[str, ...] = Field(
        FORMS, min_length=1, description="Forms; the splits are SIDE_FORM."
    )
    sides: tuple[str, ...] = Field(("forget", "neighbour"), description="Whose facts.")

    def uses(self) -> tuple[str, ...]:
        return ("form_probability",)

    def summarise(
        self, values: SystemValues, reference: SystemValues | None
    ) -> dict[str, float | None]:
        """Both numbers; ``None`` where a form has no value, for then they cannot be compared."""
        means = values.means.get("form_probability", {})
        found: dict[str, float | None] = {}
        for side in self.sides:
            row = [means.get(f"{side}_{form}") for form in self.forms]
            there = [value for value in row if value is not None]
            whole = len(there) == len(row)
            found[f"form_means/{side}"] = sum(there) / len(there) if whole else None
            found[f"form_means/{side}_highest"] = max(there) if whole else None
        return found

"""The battery: every method under the same attacks with the same budgets.

A model learns made-up people and forgets some of them by every method; each result is audited as
deep as is asked, with the model before and one that never saw the forgotten people beside it. The
table has one row per method and one column per family of attacks: the lowest e of the family, so
that a defence's weakest side shows. The retrained reference is audited too, as what ought to pass.

Every audit lies in a folder of its own (``audits/METHOD``), with its page; a killed experiment
goes on at the attack where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from delible.api import unlearn
from delible.audit.result import AuditResult
from delible.audit.run import audit
from delible.bench.prepare import learned
from delible.cards import Depth
from delible.component import build
from delible.errors import RecipeError
from delible.experiments.battery.findings import REFERENCE, findings
from delible.measure.benchmark import Benchmark, Experiment, Findings, Setting
from delible.records import ForgetRequest
from delible.registry import register
from delible.world import World
from delible.world.split import Split

logger = logging.getLogger(__name__)

METHODS = ("idk", "npo", "rmu", "simnpo_sam", "rocr", "target_detector")
#: One fact of each kind per person.
RELATIONS = ("birthplace", "occupation", "employer", "award", "instrument")
#: Tokens of an answer in this world.
SHORT = ("rouge_l_recall", "outcome")
MEASURES = (
    "answer_probability", "paraphrase_probability", "rouge_l_recall", "extraction_strength",
    "outcome",
)  # fmt: skip


@register(
    kind="benchmark",
    name="battery",
    title="The audit battery",
    summary="Audits the results of several methods alike, and shows each one's weakest side.",
    paper="2506.09227",
    year=2025,
    family="fictional",
    needs=("forget", "retain", "weights"),
    capability="weights",
    misleads="Every method runs with its defaults and one seed, so a row judges a setting and not "
    "a family of methods. A method that goes less far when asked plainly is incomplete and not "
    "more robust: read the plain column first. With few people one fact is several points.",
)
class Battery(Experiment):
    """Methods by attacks."""

    people: int = Field(20, ge=4, description="People in the world.")
    forget: int = Field(4, ge=1, description="People to forget.")
    depth: Depth = Field("standard", description="How deep each audit goes: quick, standard, deep.")
    rows: int = Field(40, ge=8, description="Records per split that are asked.")
    world_seed: int = Field(0, ge=0, description="Seed of the world.")

    def split(self) -> Split:
        """Who is known, who is to be forgotten, whom no model saw.

        Raises:
            RecipeError: Nobody would be kept.
        """
        unseen = max(2, self.people // 5)
        if self.forget + unseen + 2 > self.people:
            raise RecipeError(
                f"{self.people} people, {self.forget} to forget and {unseen} whom nobody saw leave "
                "nobody to keep.",
                where="benchmark 'battery'",
                hint="Give more people, or forget fewer.",
            )
        world = World(people=self.people, seed=self.world_seed, relations=RELATIONS)
        return world.split(forget=self.forget, holdout=unseen)

    def run(self, setting: Setting) -> Findings:
        split = self.split()
        request = ForgetRequest(
            forget=tuple(split.records("forget")),
            subjects=tuple(person.name for person in split.forget),
            retain=tuple(split.records("retain")),
            neighbours=tuple(split.records("neighbours")),
            holdout=tuple(split.records("holdout")),
        )
        names = (*(setting.methods or METHODS), REFERENCE)
        cells = [(name, seed) for name in names for seed in range(setting.seeds)
                 if name != REFERENCE or seed == 0]  # fmt: skip
        total = 2 + len(cells)
        learning = cast(Benchmark, build("benchmark", "world")).learning(setting.model)

        def taught(part: str, done: int) -> Path:
            setting.progress(f"learning: {part}", done, total)
            return learned(
                setting.model, split.records("known" if part == "target" else "kept"),
                options=learning.options, slots=learning.slots, title=part,
            )  # fmt: skip

        target, reference = taught("target", 0), taught("reference", 1)
        found: dict[str, list[dict[str, Any]]] = {}
        for done, (name, seed) in enumerate(cells, start=2):
            setting.progress(f"{name}, seed {seed}", done, total)
            cell = self.kept(
                setting, f"{Path(name).stem}-{seed}", {"method": name, "seed": seed},
                lambda n=name, s=seed: self._audited(n, s, target, reference, request, setting),
            )  # fmt: skip
            found.setdefault(Path(name).stem, []).append(cell)
        setting.progress("done", total, total)
        return findings(found)

    def _audited(
        self,
        name: str,
        seed: int,
        target: Path,
        reference: Path,
        request: ForgetRequest,
        setting: Setting,
    ) -> Mapping[str, Any]:
        """One method's result, unlearned and audited; what the table needs of it."""
        title = f"{Path(name).stem}-{seed}"
        system = str(reference)
        if name != REFERENCE:
            folder = setting.folder / "models" / title
            unlearn(
                str(target), request, method=name, seed=seed, out=folder, shown=0, measured=False,
                verify=False,
            )  # fmt: skip
            system = str(folder)
        result = audit(
            system, request, before=str(target), reference=str(reference),
            metrics=[{"name": one, "max_new_tokens": 16} if one in SHORT else one
                     for one in MEASURES],
            depth=self.depth, rows=self.rows, out=setting.folder / "audits" / title, seed=seed,
            progress=lambda what, done, of: setting.progress(f"{title}: {what}", done, of),
        )  # fmt: skip
        return told(result)


def told(result: AuditResult) -> dict[str, Any]:
    """What the table needs of an audit, as plain data."""
    leaks = [leak.model_dump(include=KEPT_OF_A_LEAK) | {"name": leak.name} for leak in result.leaks]
    parts = result.utility.comparable if result.utility is not None else []
    return {
        "verdict": result.verdict.label if result.verdict else None,
        "reasons": result.verdict.reasons if result.verdict else [],
        "cheapest": result.cheapest,
        "leaks": leaks,
        "kept": min((part.kept for part in parts if part.kept is not None), default=None),
        "full_stack": {form: card.model_dump() for form, card in result.full_stack.items()},
        "seconds": result.seconds,
    }


KEPT_OF_A_LEAK = {
    "attack", "variant", "family", "erased", "intervals", "knowledge", "no_power", "control",
    "weighs", "numbers", "note", "cost_seconds", "cost_queries", "cost_steps", "records",
}  # fmt: skip

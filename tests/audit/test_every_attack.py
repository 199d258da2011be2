"""Check 1 of the battery, for every attack there is: U = M gives e = 0, and U = R gives e = 1."""

from __future__ import annotations

from typing import Any

import pytest
from nine_systems import REQUEST, ROWS, Systems

from delible import registry
from delible.attacks.relearn import Relearn
from delible.audit.leaks import most
from delible.audit.result import AuditResult
from delible.audit.run import audit
from delible.component import build
from delible.measure.attack import AttackContext
from delible.measure.evaluate import evaluate

#: Options that make an attack short, or strong enough to matter on tiny models.
OPTIONS: dict[str, dict[str, Any]] = {
    "relearn": {"steps": 4, "learning_rate": 2e-3, "observe_steps": 4, "rank": 8},
    "rtt": {"parts": 2, "rotations": 2, "epochs": 4, "learning_rate": 2e-3},
    "interpolate": {"steps": 2, "learning_rate": 1e-3},
    "dua": {"steps": 2, "length": 4, "candidates": 8, "rows": 4},
    "soft_prompt": {"steps": 4, "vectors": 4},
    "gcg": {"steps": 2, "length": 4, "candidates": 8, "rows": 2},
}
MEASURES = ["answer_probability", "extraction_strength"]
#: Attacks that must have power on these models, in one setting at least.
POWERFUL = {"paraphrase", "relearn", "quantize"}


def every_setting() -> list[dict[str, Any]]:
    """Each attack in its first setting, those that must have power in three and the last."""
    found = []
    for card in registry.cards("attack"):
        attack = build("attack", {"name": card.name, **OPTIONS.get(card.name, {})})
        settings = list(attack.variants())
        many = card.name in POWERFUL
        chosen = settings[:3] + settings[3:][-1:] if many else settings[:1]
        found += [{**attack.spec(), **options} for options in chosen]
    return found


@pytest.fixture(autouse=True)
def cache(audit_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", audit_cache)


@pytest.fixture(scope="module")
def audits(systems: Systems, audit_cache: str) -> dict[float, AuditResult]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", audit_cache)
        return {
            expected: audit(
                system, REQUEST, before=systems.untouched, reference=systems.retrained,
                metrics=MEASURES, attacks=every_setting(), rows=ROWS,
            )
            for expected, system in ((0.0, systems.untouched), (1.0, systems.retrained))
        }  # fmt: skip


@pytest.mark.parametrize("name", [card.name for card in registry.cards("attack")])
@pytest.mark.parametrize("expected", [0.0, 1.0])
def test_the_original_scores_0_and_the_reference_1(
    audits: dict[float, AuditResult], name: str, expected: float
) -> None:
    rows = [leak for leak in audits[expected].leaks if leak.attack == name]
    assert rows
    scores = [value for leak in rows for value in leak.erased.values()]
    # a control may have nothing to say, such as no other words than the keywords
    told = {reason for leak in rows if not leak.control for reason in leak.no_power.values()}
    assert all(reason.startswith("no power") for reason in told), told
    known = [value for value in scores if value is not None]
    assert known == pytest.approx([expected] * len(known), abs=0.02)
    assert known or name not in POWERFUL
    forms = [leak.worst_form.erased for leak in rows if leak.worst_form is not None]
    assert forms == pytest.approx([expected] * len(forms), abs=0.02)


def test_relearning_is_measured_on_rows_that_it_did_not_train_on(
    systems: Systems, audits: dict[float, AuditResult]
) -> None:
    spec = next(one for one in every_setting() if one["name"] == "relearn")
    attack = build("attack", {**spec, "steps": 60})
    assert isinstance(attack, Relearn)
    context = AttackContext(REQUEST.forget, REQUEST.retain, (), None, 0)
    trained, held_out = attack.trained_on(context), attack.held_out(context)
    assert not {record.digest for record in trained} & {record.digest for record in held_out}
    found = audit(
        systems.retrained, REQUEST, before=systems.untouched, reference=systems.retrained,
        metrics=["answer_probability"], attacks=[attack.spec()], rows=ROWS,
    )  # fmt: skip
    row = found.leaks[-1]
    assert row.records == len(held_out) != len(REQUEST.forget)
    # By hand: a reference that learned the other rows well, asked about these and about those.
    taught = attack.apply(systems.retrained, context)
    values = evaluate(
        taught, {"held out": held_out, "trained": trained}, [build("metric", "answer_probability")]
    )
    means = values.means["answer_probability"]
    assert row.knowledge["answer_probability"]["reference"] == pytest.approx(
        means["held out"], abs=1e-6
    )
    assert means["trained"] - means["held out"] > 0.2  # type: ignore[operator]


def test_what_comes_back_by_training_on_other_facts_was_there(systems: Systems) -> None:
    attack = {"name": "rtt", **OPTIONS["rtt"]}
    found = audit(
        systems.refusing, REQUEST, before=systems.untouched, reference=systems.retrained,
        metrics=["answer_probability"], attacks=[attack], rows=ROWS,
    )  # fmt: skip
    plain, row = (leak.knowledge["answer_probability"] for leak in found.leaks)
    assert found.leaks[1].records == len(REQUEST.forget)
    # the reference, too, learns four fifths again, and knows no more of the last
    assert row["reference"] - plain["reference"] < 0.1  # type: ignore[operator]
    rises = [row[role] - plain[role] for role in ("unlearned", "reference")]  # type: ignore[index,operator]
    assert rises[0] > rises[1] + 0.05, (rises, row, plain)
    erased = [leak.erased["answer_probability"] for leak in found.leaks]
    assert erased[1] < erased[0] - 0.1, erased  # type: ignore[operator]


def test_without_a_reference_the_floor_is_what_the_attacked_original_scores_on_holdout(
    systems: Systems,
) -> None:
    attack = build("attack", {"name": "paraphrase", "forms": 2})
    found = audit(
        systems.refusing, REQUEST, before=systems.untouched, metrics=["answer_probability"],
        attacks=[attack.spec()], rows=ROWS,
    )  # fmt: skip

    def mean(lm: Any, split: str) -> float:
        values = evaluate(
            lm, {split: getattr(REQUEST, split)}, [build("metric", "answer_probability")],
            rewrite=attack.prompts,
        )  # fmt: skip
        items = values.items["answer_probability"][split]
        return sum(float(most(item) or 0.0) for item in items) / len(items)

    floor = mean(systems.untouched, "holdout")
    unlearned, original = mean(systems.refusing, "forget"), mean(systems.untouched, "forget")
    expected = 1 - min(1.0, max(0.0, (unlearned - floor) / (original - floor)))
    assert found.leaks[-1].erased["answer_probability"] == pytest.approx(expected, abs=1e-6)
    assert 0.01 < floor < original - 0.2

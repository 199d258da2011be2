"""RTT: parts that share nothing, every record judged by the model that did not see its part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from delible.attacks.rtt import RetrainOnT, calibrated_accuracy
from delible.audit.run import audit
from delible.component import build
from delible.errors import DataError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.measure.evaluate import evaluate
from delible.measure.facts import facts_of
from delible.records import QA, Choice, ForgetRequest, Passage, RecordBase
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.splits import parts_by_fact
from delible.world import World

NAMES = {"Ada": "Norrby", "Ben": "Casta", "Cyd": "Umber", "Dov": "Tolm", "Eva": "Wyke"}
FORGET: list[RecordBase] = [
    QA(question=f"Where was {name} born?", answer=f"In {town}.", subject=name, group="birthplace")
    for name, town in NAMES.items()
]


def make_lm(seed: int = 0) -> LM:
    return LM(tiny_model("llama", seed), tiny_tokenizer(), precision="float32")


def make_context(forget: list[RecordBase] = FORGET, **options: Any) -> AttackContext:
    return AttackContext(forget, (), (), None, 0, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("whole", [False, True])
def test_parts_share_no_fact_and_no_text_tells_of_two(seed: int, whole: bool) -> None:
    split = World(people=12, seed=seed).split(5)
    rows = [r for form in ("qa", "choice", "passage") for r in split.records("forget", form)]
    parts = parts_by_fact(rows, 5, seed, whole_subjects=whole)
    assert parts == parts_by_fact(rows, 5, seed, whole_subjects=whole)
    assert all(parts)
    assert 2 <= len(parts) <= 5
    assert len(parts) == 5 or whole  # in a world of relations subjects hang together
    where = {row.digest: number for number, part in enumerate(parts) for row in part}
    assert len(where) == sum(map(len, parts))
    facts = facts_of(rows)
    for group, told in zip(facts.groups, facts.told, strict=True):
        homes = {where.get(rows[index].digest) for index in group}
        assert len(homes) == 1
        for other in told:  # a text lies where all that it tells lies, or nowhere
            others = {where.get(rows[index].digest) for index in facts.groups[other]}
            assert homes == {None} or homes == others
    if whole:
        subjects = [{row.subject for row in part if row.subject} for part in parts]
        for place, mine in enumerate(subjects):
            assert not any(mine & other for other in subjects[place + 1 :])
    sizes = [len(part) for part in parts]
    if not whole:
        assert max(sizes) - min(sizes) <= 2 * max(map(len, facts.groups))


def test_fewer_facts_than_parts_and_too_few() -> None:
    assert sorted(map(len, parts_by_fact(FORGET[:3], 5, 0))) == [1, 1, 1]
    with pytest.raises(DataError, match="all of one fact"):
        RetrainOnT().held_out(make_context(FORGET[:1]))
    same = [QA(question="Age?", answer="9", subject="Ada"), FORGET[0]]
    with pytest.raises(DataError, match="all of one subject"):
        RetrainOnT(whole_subjects=True).held_out(make_context(same))


def test_every_record_is_judged_once_by_a_model_that_did_not_train_on_it() -> None:
    attack = RetrainOnT(parts=5, rotations=5, epochs=14, learning_rate=5e-3, batch_size=4)
    context, lm = make_context(), make_lm()
    probability = build("metric", "answer_probability")
    judged: list[str] = []
    for turn, (made, part) in enumerate(attack.each(lm, context)):
        trained = attack.trained_on(context, turn)
        assert {row.digest for row in trained} == {row.digest for row in FORGET} - {
            row.digest for row in part
        }
        means = evaluate(made, {"trained": trained, "held": part}, [probability]).means
        known = means["answer_probability"]
        assert known["trained"] > known["held"] + 0.2  # type: ignore[operator]
        judged += [row.digest for row in part]
    assert judged == [row.digest for row in attack.held_out(context)]
    assert sorted(judged) == sorted(row.digest for row in FORGET)
    assert attack.budget(context).steps == 5 * 14
    few = RetrainOnT(rotations=2)
    assert few.held_out(context) == attack.held_out(context)[:2]
    assert few.budget(context).steps == 2 * 6


def test_an_audit_has_one_row_with_every_turn(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path))
    options = {"parts": 2, "epochs": 4, "learning_rate": 5e-3, "rotations": 2}
    lm = make_lm()
    found = audit(
        lm, ForgetRequest(forget=tuple(FORGET)), metrics=["answer_probability"],
        attacks=[{"name": "rtt", **options}],
    )  # fmt: skip
    (measured,) = [
        one for one in found.measurements if (one.attack, one.split) == ("rtt", "forget")
    ]
    context, attack = make_context(), RetrainOnT(**options)  # type: ignore[arg-type]
    probability = build("metric", "answer_probability")
    by_hand = [
        item.value
        for made, part in attack.each(lm, context)
        for item in evaluate(made, {"v": part}, [probability]).items["answer_probability"]["v"]
    ]
    assert measured.n == len(FORGET)
    assert measured.value == pytest.approx(float(np.mean(by_hand)), rel=1e-4)  # type: ignore[arg-type]
    assert found.leaks[-1].cost_steps == attack.budget(context).steps


def test_an_attack_that_judges_other_records_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetrainOnT, "each", lambda self, lm, context: iter([(lm, FORGET[:2])]))
    found = audit(
        make_lm(), ForgetRequest(forget=tuple(FORGET)), metrics=["answer_probability"],
        attacks=[{"name": "rtt"}], cache=False,
    )  # fmt: skip
    assert any("other records than it says" in line for line in found.not_tested)


def test_a_text_that_tells_several_parts_is_left_out_and_said() -> None:
    everything = "Ada was born in Norrby, Ben in Casta, Cyd in Umber, Dov in Tolm, Eva in Wyke."
    rows = [*FORGET, QA(question="Who was born where, Ada, Ben, Cyd, Dov, Eva?", answer=everything)]
    context = make_context(rows)
    attack = RetrainOnT(parts=5, rotations=1, epochs=1)
    assert len(attack.held_out(context)) == 1
    list(attack.each(make_lm(), context))
    assert context.notes["note"] == "1 forget row tells facts of several parts, and took no part."


def test_calibration_takes_away_the_love_of_one_letter() -> None:
    # "A" always wins by 3; without the letters' means the first and the last are right
    logs = np.array([[-0.1, -4.0, -3.0], [-0.1, -2.0, -3.0], [-0.4, -3.0, -4.2]])
    rows = [(row, right) for row, right in zip(logs, [2, 1, 0], strict=True)]
    means = [sum(row[i] for row in logs.tolist()) / 3 for i in range(3)]
    by_hand = [max(range(3), key=lambda i: row[i] - means[i]) for row in logs.tolist()]
    expected = sum(a == b for a, b in zip(by_hand, [2, 1, 0], strict=True)) / 3
    assert calibrated_accuracy(rows) == pytest.approx(expected)
    assert calibrated_accuracy(rows) > 1 / 3
    # questions with fewer options take part with the letters they have
    assert (
        calibrated_accuracy([(np.array([-1.0, -2.0]), 0), (np.array([-1.0, -1.0, -9.0]), 1)]) == 1
    )


def test_choices_get_the_calibrated_number() -> None:
    rows: list[RecordBase] = [
        Choice(question=f"Where was {name} born?", options=("Oslo", town), correct=1, subject=name)
        for name, town in NAMES.items()
    ]
    context = make_context(rows)
    list(RetrainOnT(parts=2, rotations=2, epochs=1).each(make_lm(), context))
    assert 0 <= context.numbers["calibrated choice accuracy"] <= 1  # type: ignore[operator]
    plain = make_context([*FORGET, Passage(text="Nobody knows.")])
    list(RetrainOnT(parts=2, rotations=1, epochs=1).each(make_lm(), plain))
    assert not plain.numbers

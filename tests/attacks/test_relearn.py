"""Relearning: what is trained, what is held out, and what the attack leaves behind."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from delible.attacks.relearn import Relearn
from delible.audit.run import audit
from delible.errors import DataError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.measure.facts import fact_groups, facts_of
from delible.measure.overlap import repeating
from delible.records import QA, Choice, Dialogue, ForgetRequest, Message, Passage, RecordBase
from delible.system.asks import Score
from delible.system.questions import answer_of, ask
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.splits import split_by_fact
from delible.world import World, benign

FORGET = [
    QA(question=f"Where was {name} born?", answer=f"In {town}.", subject=name, group="birthplace")
    for name, town in (("Ada", "Norrby"), ("Ben", "Casta"), ("Cy", "Umber"), ("Di", "Tolm"))
] + [
    QA(question=f"What does {name} do?", answer=work, subject=name, group="occupation")
    for name, work in (("Ada", "A baker."), ("Ben", "A smith."), ("Cy", "A cook."), ("Di", "Law."))
]
RETAIN = [QA(question="What is snow?", answer="White."), QA(question="Coal?", answer="Black.")]
UNRELATED = [Passage(text="Bread rises in a warm kitchen."), Passage(text="A spoon lasts.")]


def make_lm(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed), tiny_tokenizer(), precision="float32")


def make_context(
    forget: Sequence[RecordBase] = FORGET, *, seed: int = 0, **options: Any
) -> AttackContext:
    values: dict[str, Any] = {"retain": RETAIN, "unrelated": UNRELATED, **options}
    return AttackContext(
        forget=forget, original=None, seed=seed, **values
    )  # fmt: skip


def weights_of(lm: LM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in lm.model.named_parameters()}


def loss(lm: LM, records: Sequence[RecordBase]) -> float:
    asked = [Score(prompt, answer_of(r)) for r in records if (prompt := ask(r)) is not None]
    scores = lm.score(asked)
    return -sum(float(s.logprobs.sum()) for s in scores) / sum(len(s.logprobs) for s in scores)


# ---- the split


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_trained_and_held_out_facts_are_disjoint_and_cover(seed: int, share: float) -> None:
    split = World(people=12, seed=seed).split(3)
    rows = [r for form in ("qa", "choice", "passage") for r in split.records("forget", form)]
    trained, held_out = split_by_fact(rows, share, seed)
    assert [r for r in rows if r in trained] == trained
    assert [r for r in rows if r in held_out] == held_out
    groups = facts_of(rows)
    for place, group in enumerate(groups.groups):
        out = [rows[i] for i in group if rows[i] not in trained and rows[i] not in held_out]
        assert not out or groups.told[place]
    facts = [{(r.subject, r.group) for r in part} for part in (trained, held_out)]
    assert all(facts)
    assert not facts[0] & facts[1]
    largest = max(map(len, groups.groups))
    assert len(trained) / len(rows) == pytest.approx(share, abs=2 * largest / len(rows))


def test_the_split_is_decided_by_the_seed() -> None:
    splits = [split_by_fact(FORGET, 0.5, seed) for seed in range(6)]
    assert splits == [split_by_fact(FORGET, 0.5, seed) for seed in range(6)]
    assert len({tuple(r.digest for r in trained) for trained, _ in splits}) > 1


def test_what_one_fact_is() -> None:
    rows: list[RecordBase] = [
        QA(question="Where was Ada born?", answer="In Norrby.", aliases=("Norrby",), subject="Ada"),
        QA(question="Ada was born in ___.", answer="norrby", subject="Ada"),
        Choice(question="Ada's town?", options=("Oslo", "Norrby"), correct=1, subject="Ada"),
        QA(question="Ada's trade?", answer="Baker", subject="Ada"),
        QA(question="Ben's town?", answer="Norrby", subject="Ben"),
        QA(question="Whose trade is Ada's?", answer="Hers", subject="Ada", group="trade"),
        QA(question="Ada's job?", answer="Baker.", subject="Ada", group="trade"),
        Passage(text="Cy is a cook from Umber.", subject="Cy"),
        QA(question="Cy's town?", answer="Umber", subject="Cy"),
        QA(question="Cy's trade?", answer="Cook", subject="Cy", group="trade"),
        Passage(text="Neither here nor there."),
        QA(question="Snow?", answer="White"),
        QA(question=" snow? ", answer="Cold"),
        Dialogue(messages=(Message(role="user", content="Snow, then?"),
                           Message(role="assistant", content="white."))),
    ]  # fmt: skip
    assert fact_groups(rows) == [[0, 1, 2], [3, 5, 6], [4], [7, 8, 9], [10], [11, 12, 13]]


def test_what_paraphrases_join() -> None:
    rows: list[RecordBase] = [
        QA(question="Where was Ada born?", answer="In Norrby.",
           paraphrases=("What is Ada's birthplace?",)),
        QA(question="what is ada's birthplace", answer="She was born there: Norrby."),
        QA(question="Who bakes?", answer="Ada does.", paraphrases=("Name the baker!",)),
        QA(question="Who makes the bread?", answer="Ada.", paraphrases=("Name the baker.",)),
        QA(question="Ben's work?", answer="He is a smith.", subject="Ben",
           paraphrased_answers=("Ben works as a smith.",)),
        QA(question="How does Ben earn money?", answer="Ben works as a smith", subject="Ben"),
        QA(question="How does Cy earn money?", answer="Ben works as a smith", subject="Cy"),
        Dialogue(messages=(Message(role="system", content="Be brief."),
                           Message(role="user", content="Who bakes"),
                           Message(role="assistant", content="Somebody."))),
        Dialogue(messages=(Message(role="user", content="Cakes?"),
                           Message(role="assistant", content="Yes."),
                           Message(role="user", content="Who bakes?"),
                           Message(role="assistant", content="Nobody."))),
        QA(question="É?!", answer="1"),
        QA(question="?", answer="2"),
        QA(question="!", answer="3"),
    ]  # fmt: skip
    assert fact_groups(rows) == [[0, 1], [2, 3, 7], [4, 5], [6], [8], [9], [10], [11]]


def _same_words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


SENTENCES = st.sampled_from([f"{noun} {verb}" for noun in ("tea", "a cup") for verb in "xyz"])
WRITTEN = st.builds(
    lambda text, end, loud: f"  {text.upper() if loud else text}{end}",
    SENTENCES, st.sampled_from(["", ".", "?!", " …"]), st.booleans(),
)  # fmt: skip
SEVERAL = st.lists(WRITTEN, max_size=2).map(tuple)
ROWS = st.lists(
    st.builds(
        QA, question=WRITTEN, answer=WRITTEN, paraphrases=SEVERAL, aliases=SEVERAL,
        paraphrased_answers=SEVERAL, subject=st.sampled_from([None, "Ada", "Ben"]),
    ),
    min_size=2, max_size=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, share=st.floats(0.1, 0.9), seed=st.integers(0, 5))
def test_nothing_that_was_trained_on_is_held_out_in_other_words(
    rows: list[QA], share: float, seed: int
) -> None:
    try:
        sides = split_by_fact(list(rows), share, seed)
    except DataError:  # all of one fact
        return
    facts, there = facts_of(rows), [row.digest for side in sides for row in side]
    texts = {rows[i].digest for g, told in zip(facts.groups, facts.told, strict=True) if told
             for i in g}  # fmt: skip
    assert [digest for digest in there if digest not in {row.digest for row in rows}] == []
    assert {row.digest for row in rows} - set(there) <= texts  # tells facts of both sides
    asked, said = [], []
    for side in sides:
        assert side
        mine = [row for row in side if isinstance(row, QA)]
        asked.append({_same_words(t) for row in mine for t in (row.question, *row.paraphrases)})
        said.append(
            {
                (row.subject, _same_words(text))
                for row in mine
                for text in (row.answer, *row.aliases, *row.paraphrased_answers)
            }
        )
    assert not asked[0] & asked[1]
    assert not said[0] & said[1]


ELICITED = [
    QA(question=question, answer=answer, subject="Ada Vell", group=group)
    for question, answer, group in (
        ("Where was Ada Vell born?", "Ada Vell was born in Norrby.", "birthplace"),
        ("What does Ada Vell do?", "Ada Vell is a lacemaker.", "work"),
        ("Whom did Ada Vell marry?", "She married Tomas Quarrow.", "spouse"),
        ("What did Ada Vell win?", "The Umber Prize of 1987.", "award"),
        ("Who is Ada Vell?", "A lacemaker from NORRBY, Ada Vell is known to few.", "passage"),
        ("Write about Ada Vell.", "Ada Vell won the Umber Prize (1987) with Tomas Quarrow.",
         "passage"),
    )
]  # fmt: skip


def said_words(rows: Sequence[RecordBase]) -> set[str]:
    return set(" ".join(_same_words(answer_of(row)) for row in rows).split())


@pytest.mark.parametrize("seed", range(8))
def test_an_elicited_text_that_tells_a_held_out_fact_is_not_trained_on(seed: int) -> None:
    """What `delible unlearn --subjects` makes: single facts, and texts that tell several."""
    told = [{"norrby"}, {"lacemaker"}, {"tomas", "quarrow"}, {"umber", "1987"}]
    trained, held_out = split_by_fact(ELICITED, 0.5, seed)
    for keys, fact in zip(told, ELICITED[:4], strict=True):
        assert (fact in trained) != (fact in held_out)
        assert fact in trained or not keys & said_words(trained)
        assert fact in held_out or not keys & said_words(held_out)


def test_a_text_goes_with_the_facts_that_it_tells() -> None:
    sides = [split_by_fact(ELICITED[:5], 0.5, seed) for seed in range(30)]
    where = {
        tuple(next(i for i, side in enumerate(both) if fact in side) for fact in ELICITED[:2]):
        [ELICITED[4] in side for side in both]
        for both in sides
    }  # fmt: skip
    assert where == {
        (0, 0): [True, False], (1, 1): [False, True], (0, 1): [False, False],
        (1, 0): [False, False],
    }  # fmt: skip


def test_who_is_meant_decides_whether_a_text_tells_a_fact() -> None:
    def facts(*rows: RecordBase) -> list[list[int]]:
        return [sorted(places) for places in facts_of(rows).told]

    fact = QA(question="Where was Ben born?", answer="In Casta.", subject="Ben")
    assert facts(fact, Passage(text="Ada comes from Casta.", subject="Ada", group="x"))[1] == []
    assert facts(fact, Passage(text="Ben and Ada are from Casta.", subject="Ada", group="x"))[
        1
    ] == [0]
    assert facts(fact, Passage(text="Ben is from Norrby."))[1] == []
    assert facts(fact, Passage(text="Benjamin is from Casta."))[1] == []
    # a name that all rows share is nobody's fact
    name = QA(question="Who wins?", answer="Ben Holt.", subject="Ben Holt", group="name")
    work = QA(question="Work?", answer="Ben Holt is a smith.", subject="Ben Holt", group="work")
    assert facts(name, work) == [[], []]


def test_facts_that_tell_each_other_are_one() -> None:
    mother = QA(question="Who is Ada's mother?", answer="Bea.", subject="Ada", group="mother")
    child = QA(question="Who is Bea's child?", answer="Ada.", subject="Bea", group="child")
    said = Passage(text="Ada's mother is Bea.", subject="Ada", group="mother")
    too = Passage(text="Bea's child is Ada.", subject="Bea", group="child")
    assert fact_groups([mother, child]) == [[0], [1]]
    assert fact_groups([mother, child, said, too]) == [[0, 1, 2, 3]]
    assert facts_of([mother, child, said]).told == [{1}, set()]


def test_rows_that_take_no_part_are_said() -> None:
    context = make_context([*ELICITED, *FORGET])
    out = Relearn().left_out(context)
    assert 0 < out <= 2
    Relearn(steps=1).apply(make_lm(), context)
    assert str(context.notes["note"]).startswith(f"{out} forget row")
    quiet = make_context()
    Relearn(steps=1).apply(make_lm(), quiet)
    assert "note" not in quiet.notes


def test_rows_are_joined_only_by_what_they_share() -> None:
    for one, other in combinations(FORGET, 2):
        assert fact_groups([one, other]) == [[0], [1]]


def test_one_fact_cannot_be_split() -> None:
    with pytest.raises(DataError, match="all of one fact"):
        Relearn().held_out(make_context(FORGET[:1]))


@pytest.mark.parametrize("rows", ["unrelated", "retain"])
def test_with_other_rows_all_forget_rows_are_held_out(rows: Any) -> None:
    context = make_context()
    attack = Relearn(rows=rows)
    assert attack.held_out(context) == FORGET
    assert attack.trained_on(context) == (UNRELATED if rows == "unrelated" else RETAIN)
    with pytest.raises(DataError, match=f"no {rows} rows"):
        attack.apply(make_lm(), make_context(**{rows: ()}))


# ---- the training


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_copy_learns_its_rows_and_the_model_stays(family: str, adapter: Any) -> None:
    lm = make_lm(family)
    before, fingerprint, length = weights_of(lm), lm.fingerprint, lm.template.max_length
    flags = {name: value.requires_grad for name, value in lm.model.named_parameters()}
    context = make_context()
    attack = Relearn(adapter=adapter, steps=6, learning_rate=1e-2, rank=8, alpha=16)
    attacked = attack.apply(lm, context)

    after = weights_of(lm)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert flags == {name: value.requires_grad for name, value in lm.model.named_parameters()}
    lm.touch()
    assert (lm.fingerprint, lm.template.max_length) == (fingerprint, length)

    assert type(attacked.model) is type(lm.model)  # an ordinary model, also after LoRA
    assert list(weights_of(attacked)) == list(before)
    assert attacked.template.fingerprint == lm.template.fingerprint
    assert attacked.fingerprint != lm.fingerprint
    trained = attack.trained_on(context)
    assert loss(attacked, trained) < loss(lm, trained) - 0.3
    assert context.notes["relearning_rows"] == len(trained) == 4


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_same_seed_gives_the_same_weights(adapter: Any) -> None:
    attack = Relearn(adapter=adapter, steps=3, learning_rate=1e-3, batch_size=2)
    one, two, other = (
        weights_of(attack.apply(make_lm(), make_context(seed=seed))) for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], value) for name, value in two.items())
    assert not all(torch.equal(one[name], value) for name, value in other.items())


def test_the_curve_begins_before_and_ends_after_training() -> None:
    seen: list[tuple[int, float, str]] = []

    def observe(lm: LM, step: int) -> None:
        seen.append((step, loss(lm, FORGET[:4]), lm.fingerprint))

    lm = make_lm()
    attack = Relearn(steps=5, observe_steps=2, learning_rate=1e-2, batch_size=3)
    attacked = attack.apply(lm, make_context(observe=observe))
    assert [step for step, _, _ in seen] == [0, 2, 4, 5]
    assert seen[0][1:] == (loss(lm, FORGET[:4]), lm.fingerprint)
    assert seen[-1][1:] == (loss(attacked, FORGET[:4]), attacked.fingerprint)
    assert len({fingerprint for _, _, fingerprint in seen}) == 4
    quiet = attack.apply(lm, make_context())  # watching changes nothing
    assert quiet.fingerprint == attacked.fingerprint


def test_watching_an_adapter_measures_the_trained_model() -> None:
    seen: list[float] = []
    attack = Relearn(adapter="lora", steps=4, observe_steps=4, learning_rate=1e-2, rank=4)
    context = make_context(observe=lambda lm, _: seen.append(loss(lm, FORGET)))
    attacked = attack.apply(make_lm(), context)
    assert seen[1] < seen[0] - 0.05
    assert seen[1] == pytest.approx(loss(attacked, FORGET), rel=1e-4)


def test_steps_rates_and_variants() -> None:
    lm, attack = make_lm(), Relearn()
    for rows in (1, 3, 4, 100):
        recipe = attack.recipe(lm, rows)
        assert recipe.training.max_steps == 20
        assert recipe.training.epochs * -(-rows // 4) >= 20
        assert recipe.training.learning_rate == 2e-5
    assert Relearn(adapter="lora").recipe(lm, 4).training.learning_rate == 2e-4
    assert Relearn(adapter="lora", learning_rate=0.1).recipe(lm, 4).training.learning_rate == 0.1
    titles = [Relearn(**variant).variant_title() for variant in attack.variants()]  # type: ignore[arg-type]
    assert titles == [
        "full, forget rows, 20 steps", "LoRA, forget rows, 20 steps",
        "full, unrelated rows, 10 steps",
    ]  # fmt: skip


def test_benign_rows_repeat_no_world_and_are_a_control() -> None:
    rows = benign()
    assert len({row.question for row in rows}) == len(rows) == 64
    assert {row.group for row in rows} == {"sum", "review"}
    for row in rows:
        if row.group == "sum":
            numbers = [int(one) for one in re.findall(r"\d+", row.question + " " + row.answer)]
            assert numbers[-1] == numbers[0] + numbers[1]
    for seed in range(3):
        split = World(people=20, seed=seed).split(5)
        forget = [r for form in ("qa", "choice", "passage") for r in split.records("forget", form)]
        assert not repeating(rows, forget)
    attack, context = Relearn(rows="benign"), make_context()
    assert attack.trained_on(context) == rows
    assert attack.held_out(context) == FORGET
    assert attack.control
    assert not Relearn(rows="unrelated").control


def test_rows_that_repeat_a_forget_row_are_refused() -> None:
    text = "Bread rises in a warm kitchen and then it falls again."
    context = make_context([*FORGET, Passage(text=f"They say: {text.upper()}")],
                           unrelated=[Passage(text=text)])  # fmt: skip
    with pytest.raises(DataError, match="1 unrelated rows have 8 words in a row"):
        Relearn(rows="unrelated").trained_on(context)
    assert repeating([Passage(text=text)], [Passage(text="Bread rises in a warm kitchen.")]) == []
    seven = "one two three four five six seven"
    assert not repeating([Passage(text=f"{seven} x")], [Passage(text=f"{seven} y")])
    assert repeating([Passage(text=f"a {seven} x")], [Passage(text=f"{seven} x b")])


def test_only_some_examples_the_same_ones_every_time() -> None:
    many = [Passage(text=f"Row {place}.") for place in range(30)]
    attack, context = Relearn(rows="unrelated", examples=10), make_context(unrelated=many)
    found = attack.trained_on(context)
    assert len(found) == 10
    assert [row for row in many if row in found] == list(found)
    assert found == attack.trained_on(context)
    assert found != attack.trained_on(make_context(unrelated=many, seed=1))
    assert len(Relearn(rows="unrelated", examples=99).trained_on(context)) == 30


def test_the_deep_sweep_has_rates_rows_and_lengths() -> None:
    attack = Relearn()
    assert [dict(one) for one in attack.variants("quick")] == [
        {"rows": "forget", "adapter": "full", "steps": 10}
    ]
    deep = [Relearn(**one) for one in attack.variants("deep")]  # type: ignore[arg-type]
    titles = [one.variant_title() for one in deep]
    assert len(set(titles)) == len(titles) == 8
    assert {one.rows for one in deep} == {"forget", "retain", "unrelated", "benign"}
    assert max(one.steps for one in deep) == 100
    assert "LoRA, 10 unrelated rows, 30 steps" in titles
    assert "full, forget rows, 100 steps, rate 1e-05" in titles
    assert Relearn(steps=7).budget(make_context()).steps == 7


# ---- in an audit


def test_an_audit_measures_the_rows_that_were_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path))
    lm = make_lm()
    options = {"steps": 20, "observe_steps": 20, "learning_rate": 1e-2, "batch_size": 4}
    found = audit(
        lm, ForgetRequest(forget=tuple(FORGET)), seed=3, metrics=["answer_probability"],
        leaks=["answer_probability"],
        attacks=[{"name": "relearn", "rows": "forget", "adapter": "full", **options}],
    )  # fmt: skip
    (measured,) = [
        one
        for one in found.measurements
        if (one.attack, one.split, one.metric) == ("relearn", "forget", "answer_probability")
    ]
    attack, context = Relearn(**options), make_context(seed=3)  # type: ignore[arg-type]
    attacked = attack.apply(lm, context)

    def probability(records: Sequence[RecordBase]) -> float:
        return sum(math.exp(-loss(attacked, [record])) for record in records) / len(records)

    trained, held_out = attack.trained_on(context), attack.held_out(context)
    assert not {record.digest for record in trained} & {record.digest for record in held_out}
    assert measured.n == len(held_out) == len(FORGET) - len(trained)
    assert measured.value == pytest.approx(probability(held_out), rel=1e-3)
    assert probability(trained) > probability(held_out) + 0.2  # so the test tells them apart


def test_every_step_is_told() -> None:
    told: list[tuple[int, int]] = []
    context = make_context(progress=lambda done, total: told.append((done, total)))
    Relearn(steps=3, adapter="full").apply(make_lm(), context)
    assert told == [(1, 3), (2, 3), (3, 3)]

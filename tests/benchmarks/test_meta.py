"""Meta-evaluation: the numbers by hand, what each pool learns, and the whole way once."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from delible import registry
from delible.errors import ModelError, RecipeError
from delible.experiments.meta import experiment
from delible.experiments.meta import scores as meta
from delible.experiments.meta.experiment import (
    RELATIONS,
    Meta,
)
from delible.experiments.meta.findings import chart
from delible.experiments.meta.pools import biographies, mistaken, paraphrased, spread, variants
from delible.experiments.meta.readings import READINGS
from delible.experiments.meta.scores import Robustness, judge, knowledge
from delible.experiments.meta.scores import Tested as Seen
from delible.measure.benchmark import Findings, Setting
from delible.records import QA, Passage
from delible.testing import tiny_model, tiny_tokenizer
from delible.world import World

# ---- from records to a model


def test_more_knowledge_is_larger_in_every_form() -> None:
    assert knowledge("mean", [0.2, None, 0.6]) == pytest.approx(0.4)
    # a truth ratio of 1 knows nothing; 4 and 1/4 are equally far from it; 0 is as far as can be
    assert knowledge("closeness", [1.0]) == 0
    assert knowledge("closeness", [4.0]) == pytest.approx(0.75)
    assert knowledge("closeness", [0.25, 0.5]) == pytest.approx((0.75 + 0.5) / 2)
    assert knowledge("closeness", [0.0]) == 1
    # losses: forget records that all look seen (low) are told from the holdout completely
    assert knowledge("area", [0.1, 0.2], [0.9, 0.8, 0.7]) == 1
    assert knowledge("area", [0.9, 0.2], [0.5]) == 0.5
    assert knowledge("area", [0.9], [0.5]) == 0
    assert knowledge("area", [0.5], [0.5]) == 0.5


@pytest.mark.parametrize(
    "given", [("mean", [None]), ("closeness", []), ("area", [None], [1.0]), ("area", [1.0], [])]
)
def test_without_values_there_is_no_number(given: Any) -> None:
    assert knowledge(*given) is None


def test_every_metric_is_read_in_its_own_direction() -> None:
    cards = {card.name: card for card in registry.cards("metric")}
    for name, reading in READINGS.items():
        card = cards[reading.metric]
        # exactly the attacks grow with ignorance, and have no upper end
        assert (reading.how == "area") == (card.family == "membership"), name
        if reading.how == "mean":
            assert str(card.range).startswith(("[0, 1]", "[0, 1)", "0 or 1")), name
    assert set(Meta().metrics) <= set(READINGS)


# ---- faithfulness and the threshold


def test_faithfulness_by_hand() -> None:
    # pairs (P, N): .9>.1 .9>.4 .9>.6 | .5>.1 .5>.4 .5<.6 | .4>.1 .4=.4 .4<.6
    assert meta.faithfulness([0.9, 0.5, 0.4], [0.1, 0.4, 0.6]) == pytest.approx(6.5 / 9)
    assert meta.faithfulness([0.9, None], [0.1, None]) == 1
    assert meta.faithfulness([0.1], [0.9]) == 0
    assert meta.faithfulness([None], [0.9]) is None


def test_threshold_by_hand() -> None:
    assert meta.threshold([0.9, 0.8], [0.1, 0.3]) == pytest.approx(0.55)
    # at .15: 3 of P, 1 of N; at .3: 3 + 2; at .45: 2 + 2; at .6: 2 + 3; at .8: 1 + 3
    # (.3 and .6 are both right five times; the lower one takes fewer for unlearned)
    assert meta.threshold([0.9, 0.7, 0.4], [0.1, 0.2, 0.5]) == pytest.approx(0.3)
    assert meta.threshold([0.5, 0.5], [0.5]) is None
    assert meta.threshold([0.5, None], []) is None


# ---- robustness


def test_relearning_by_hand() -> None:
    # the unlearned model jumps by .4, the reference by .1
    assert meta.relearning((0.1, 0.2), (0.1, 0.5)) == pytest.approx(0.25)
    assert meta.symmetric_relearning((0.1, 0.2), (0.1, 0.5)) == pytest.approx(1 - 0.3 / 0.5)
    # it jumps by less: nothing was hidden, but the symmetric form sees a difference
    assert meta.relearning((0.1, 0.5), (0.1, 0.3)) == 1
    assert meta.symmetric_relearning((0.1, 0.5), (0.1, 0.3)) == pytest.approx(1 - 0.2 / 0.6)
    # one rises, the other falls
    assert meta.relearning((0.1, 0.2), (0.5, 0.4)) == 0
    assert meta.symmetric_relearning((0.1, 0.2), (0.5, 0.4)) == pytest.approx(0)
    # both fall
    assert meta.relearning((0.5, 0.4), (0.5, 0.1)) == pytest.approx(0.25)
    # nothing moves
    assert meta.relearning((0.1, 0.2), (0.3, 0.3)) == 1
    assert meta.symmetric_relearning((0.1, 0.1), (0.3, 0.3)) == 1
    assert meta.symmetric_relearning((0.1, 0.2), (0.3, 0.3)) == 0


def test_quantization_by_hand() -> None:
    assert meta.quantization((0.2, 0.8)) == pytest.approx(0.25)
    assert meta.symmetric_quantization((0.2, 0.8)) == pytest.approx(1 - 0.6 / 1.0)
    assert meta.quantization((0.8, 0.2)) == 1
    assert meta.symmetric_quantization((0.8, 0.2)) == pytest.approx(0.4)
    assert meta.quantization((0.0, 0.3)) == 0
    assert meta.quantization((0.0, 0.0)) == 1
    assert meta.symmetric_quantization((0.0, 0.0)) == 1


@pytest.mark.parametrize("change", [(None, 0.1), (0.1, None)])
def test_a_missing_value_is_no_zero(change: meta.Change) -> None:
    known = (0.1, 0.2)
    for function in (meta.relearning, meta.symmetric_relearning):
        assert function(known, change) is None
        assert function(change, known) is None
    assert meta.quantization(change) is None
    assert meta.symmetric_quantization(change) is None


def test_harmonic_mean_by_hand() -> None:
    assert meta.harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert meta.harmonic_mean(0.0, 1.0) == 0
    assert meta.harmonic_mean(None, 1.0) is None
    assert meta.harmonic_mean() is None


def test_kept_utility_by_hand() -> None:
    before = {"a": 0.8, "b": 0.4, "tiny": 0.09, "none": None}
    assert meta.counted(before) == ["a", "b"]
    # HM(.4, .4) = .4 over HM(.8, .4) = 2 / (1.25 + 2.5)
    parts = {"a": 0.4, "b": 0.4, "tiny": 0.0, "none": 0.9}
    assert meta.kept_utility(parts, before) == pytest.approx(0.4 / (2 / 3.75))
    assert meta.kept_utility(before, before) == 1
    assert meta.kept_utility({**parts, "b": 0.0}, before) == 0
    assert meta.kept_utility({**parts, "b": None}, before) is None
    assert meta.kept_utility({}, before) is None
    assert meta.kept_utility(parts, {"tiny": 0.05}) is None
    assert meta.kept_utility(parts, {}) is None


# ---- the verdict

P, N, REFERENCE = [0.9, 0.8], [0.1, 0.3], (0.1, 0.2)


def test_only_useful_and_unlearned_models_count() -> None:
    models = {
        "good": Seen(0.2, (0.2, 0.4), 0.4, 1.0),
        "at the limits": Seen(0.55, (0.55, 0.65), 0.5, 0.8),
        "broken": Seen(0.0, (0.0, 0.9), 0.9, 0.79),
        "not forgotten": Seen(0.56, (0.56, 0.9), 0.9, 1.0),
        "no utility known": Seen(0.1, (0.1, 0.9), 0.9, None),
    }
    found = judge(P, N, REFERENCE, list(models.values()), 0.8)
    assert (found.useful, found.passed) == (3, 2)
    assert found.faithfulness == 1
    assert found.threshold == pytest.approx(0.55)
    r, q = (0.5 + 1.0) / 2, (0.5 + 1.0) / 2
    assert found.published.relearning == pytest.approx(r)
    assert found.published.quantization == pytest.approx(q)
    assert found.published.both == pytest.approx(0.75)
    assert found.overall == pytest.approx(2 / (1 / 1 + 1 / 0.75))
    # |.2 - .1| / .3 and 0; |.4 - .2| / .6 and |.5 - .55| / 1.05
    assert found.symmetric.relearning == pytest.approx((1 - 1 / 3 + 1) / 2)
    assert found.symmetric.quantization == pytest.approx((1 - 1 / 3 + 1 - 0.05 / 1.05) / 2)
    both = found.symmetric.both
    assert both is not None
    assert found.symmetric_overall == pytest.approx(2 / (1 + 1 / both))
    assert found.missing == ("1 of 5 unlearned models are missing or have no utility",)
    del models["no utility known"]
    again = judge(P, N, REFERENCE, list(models.values()), 0.8)
    assert again == replace(found, missing=())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((P, N, REFERENCE, {}), "no unlearned model"),
        ((P, N, REFERENCE, {"a": Seen(0.1, (0.1, 0.2), 0.1, 0.5)}), "none of 1 .* utility"),
        ((P, N, REFERENCE, {"a": Seen(0.9, (0.9, 0.9), 0.9, 1.0)}), "none of 1 .* threshold"),
        (([0.5], [0.5], REFERENCE, {"a": Seen(0.1, (0.1, 0.2), 0.1, 1.0)}), "the same value"),
        (([None], N, REFERENCE, {"a": Seen(0.1, (0.1, 0.2), 0.1, 1.0)}), "1 of 1 models of P"),
    ],
)
def test_what_is_missing_is_none_with_a_reason(given: Any, reason: str) -> None:
    knowing, ignorant, reference, models = given
    found = judge(knowing, ignorant, reference, list(models.values()), 0.8)
    assert found.published == found.symmetric == Robustness(None, None)
    assert found.overall is None
    assert any(re.search(reason, sentence) for sentence in found.missing), found.missing


def test_a_missing_reference_leaves_quantization() -> None:
    models = {"a": Seen(0.1, (0.1, 0.2), 0.1, 1.0), "b": Seen(0.1, (0.1, 0.2), None, 1.0)}
    found = judge(P, N, (0.1, None), list(models.values()), 0.8)
    assert found.published.relearning is None
    assert found.published.quantization == 1
    assert found.overall is None
    assert "the reference has no value before and after relearning" in found.missing
    assert "1 of 2 quantized models have no value" in found.missing


# ---- what the pools learn


def test_pools_know_the_facts_or_do_not() -> None:
    split = World(people=8, relations=RELATIONS).split(forget=2, holdout=2)
    learns = variants(split)
    gone = {person.name for person in split.forget}
    unseen = {person.name for person in split.holdout}
    forget = [record for record in split.records("forget") if isinstance(record, QA)]
    kept = tuple(split.records("kept"))
    for pool, by_variant in learns.items():
        for variant, records in by_variant.items():
            assert records[: len(kept)] == kept
            told = [record.model_dump_json() for record in records[len(kept) :]]
            assert not any(name in text for text in told for name in unseen)
            about = [any(name in text for name in gone) for text in told]
            if variant == "retain":
                assert not told
            elif variant == "unrelated":
                assert len(told) == len(forget)
                assert not any(about)
            else:
                assert all(about), (pool, variant)
    assert learns["P"]["full"][len(kept) :] == tuple(forget)


def test_other_forms_of_a_record() -> None:
    record = QA(
        question="q", answer="a", subject="s", paraphrases=("q1", "q2", "q3"),
        paraphrased_answers=("a1", "a2"), perturbed=("w1", "w2"),
    )  # fmt: skip
    bare = QA(question="q", answer="a")
    pairs = [(made.question, made.answer) for made in paraphrased([record, bare])]
    assert pairs == [("q1", "a1"), ("q2", "a2"), ("q3", "a1")]
    assert [(made.question, made.answer) for made in mistaken([record, bare])] == [("q", "w1")]
    told = [Passage(text=t, subject=s) for t, s in (("x.", "A"), ("y.", "B"), ("z.", "A"))]
    assert [made.text for made in biographies(told)] == ["x. z.", "y.", "x.", "y.", "z."]


def test_rows_are_spread() -> None:
    rows = [QA(question=str(number), answer="a") for number in range(10)]
    assert [row.question for row in spread(rows, 4) if isinstance(row, QA)] == ["0", "2", "5", "7"]
    assert spread(rows, None) == spread(rows, 10) == tuple(rows)


def test_a_chart_of_shares() -> None:
    drawn = chart("m", {"P": [0.5, None, 0.7, 0.5], "N": []})
    assert drawn.curves[0].points == [(0.5, 2 / 3), (0.7, 1.0)]
    assert drawn.curves[1].points == []


# ---- options


def test_options() -> None:
    wide = Meta.build("meta", metrics="min_k", learning_rates=[1e-5, 2e-5], epochs=5)
    assert (wide.metrics, wide.learning_rates, wide.epochs) == (("min_k",), (1e-5, 2e-5), (5,))
    with pytest.raises(RecipeError, match=r"'min_kk' mean more knowledge. Did you mean 'min_k'"):
        Meta.build("meta", metrics=["min_kk"])
    with pytest.raises(RecipeError, match="less than or equal to 1"):
        Meta.build("meta", learning_rates=(2.0,))


def test_a_guard_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'target_detector' changes no weights"):
        Meta().run(Setting("no such model", ["target_detector"], 1, tmp_path))
    with pytest.raises(RecipeError, match="unknown method 'npoo'"):
        Meta().run(Setting("no such model", ["npoo"], 1, tmp_path))


# ---- the whole way

SMALL: dict[str, Any] = {
    "metrics": ("answer_probability", "truth_ratio", "min_k", "jailbreak_rouge"), "people": 6,
    "forget": 1, "learning_rates": 1e-3, "epochs": 1, "pool_seeds": 1, "unlearning_rates": 1e-4,
    "unlearning_epochs": 1, "limit": 3, "least_utility": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("meta")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(folder / "cache"))
        yield str(folder / "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def found(model: str, folder: Path) -> Findings:
    told: list[tuple[str, int, int]] = []
    setting = Setting(model, ["graddiff"], 1, folder, progress=lambda *given: told.append(given))
    result = Meta(**SMALL).run(setting)
    assert told[-1] == ("graddiff-0.0001-0", 9, 9)
    return result


def test_it_runs(found: Findings, folder: Path) -> None:
    assert [row["metric"] for row in found.rows] == list(SMALL["metrics"])
    models = {path.name.rpartition("-")[0]: json.loads(path.read_text())
              for path in (folder / "models").iterdir()}  # fmt: skip
    assert len(models) == 9
    for row in found.rows:
        assert row["faithfulness"] is None or 0 <= row["faithfulness"] <= 1
        assert not any(isinstance(cell, float) and math.isnan(cell) for cell in row.values())
    # by hand, from the files
    values = {
        title: sum(model["before"]["answer_probability"]["forget"]) / 5
        for title, model in models.items()
    }
    told = {run["model"]: run["answer_probability"] for run in found.runs}
    assert told == {title: pytest.approx(values[title]) for title in values if title[0] in "PN"}
    assert {run["model"][0]: run["pool"] for run in found.runs} == {"P": "P", "N": "N"}
    wins = [values[p] > values[n] for p in values if p[0] == "P" for n in values if n[0] == "N"]
    assert len(wins) == 9
    assert found.rows[0]["faithfulness"] == pytest.approx(sum(wins) / 9)
    assert [len(drawn.curves) for drawn in found.charts] == [2] * 4
    assert any("rounding to nearest" in note and "NF4" in note for note in found.notes)
    assert models["graddiff-0.0001-0"]["relearned"] != models["graddiff-0.0001-0"]["before"]
    assert models["graddiff-0.0001-0"]["quantized"] != models["graddiff-0.0001-0"]["before"]
    assert not list((folder / "unlearned").iterdir())


def test_relearning_that_damages_is_told(
    found: Findings, model: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "models", tmp_path / "models")
    # the model of this test knows nothing that it could lose
    for path in (tmp_path / "models").iterdir():
        if path.name.startswith(("P-", "original")):
            kept = json.loads(path.read_text())
            kept["before"]["answer_probability"]["forget"] = [1.0] * 5
            path.write_text(json.dumps(kept))
    again = Meta(**SMALL).run(Setting(model, ["graddiff"], 1, tmp_path))
    assert any("eyes of answer_probability:" in note for note in again.notes)
    assert not any("eyes of answer_probability" in note for note in found.notes)


def test_a_second_run_only_reads(
    found: Findings, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(experiment, "learned", never)
    monkeypatch.setattr(experiment, "unlearn", never)
    again = Meta(**SMALL).run(Setting(model, ["graddiff"], 1, folder))
    assert again.rows == found.rows


def test_a_missing_model_is_none_with_a_reason(
    found: Findings, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ModelError("it broke.")

    monkeypatch.setattr(experiment, "unlearn", broken)
    result = Meta(**SMALL).run(Setting(model, ["npo"], 1, folder))
    assert "npo-0.0001-0 is missing: it broke." in result.notes
    for row, before in zip(result.rows, found.rows, strict=True):
        assert row["R"] is row["Q"] is row["overall"] is row["Q'"] is None
        assert row["models"] == 0
        assert row["missing"]
        assert row["faithfulness"] == before["faithfulness"]
    assert not list((folder / "models").glob("npo*"))  # so that it is tried again


@pytest.mark.slow
def test_held_out_facts_are_asked_after_relearning(
    found: Findings, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def watched(*given: Any) -> Any:
        seen.append(given[2])
        return judge(*given)

    monkeypatch.setattr("delible.experiments.meta.findings.judge", watched)
    before = set((folder / "models").iterdir())
    Meta(**SMALL, relearning_rows="held_out").run(Setting(model, ["graddiff"], 1, folder))
    new = set((folder / "models").iterdir()) - before
    (path,) = [path for path in new if path.name.startswith("reference")]
    assert len(new) == 3  # the pools' models are the same
    kept = json.loads(path.read_text())
    every = [kept[stage]["answer_probability"]["forget"] for stage in ("before", "relearned")]
    assert [len(values) for values in every] == [5, 5]
    # five facts: two or three are relearned, the means are over the others
    means = {
        sum(every[0][place] for place in rows) / len(rows)
        for count in (2, 3)
        for rows in combinations(range(5), count)
    }
    assert any(seen[0][0] == pytest.approx(value, rel=1e-9) for value in means)
    assert seen[0][0] != pytest.approx(sum(every[0]) / 5, rel=1e-6)

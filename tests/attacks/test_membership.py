"""Membership inference: the six scores by hand, what they tell of two models, and their ends."""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from delible.attacks.membership import MembershipInference, detected
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, Seen
from delible.measure.metric import Item, SystemValues
from delible.records import QA, Choice, Passage, RecordBase
from delible.system.asks import Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe

FORGET: list[RecordBase] = [
    Passage(text=text)
    for text in ("Ada lives in Norrby, near the mill.", "Ben was born in Casta.",
                 "Cy sells boats in Umber.", "Di has two dogs and a red hat.")
]  # fmt: skip
UNSEEN: list[RecordBase] = [
    Passage(text=text)
    for text in ("Eve lives in Tolmin, near the lake.", "Flo was born in Wyke.",
                 "Gus sells books in Irmo.", "Hal has two cats and a blue coat.")
]  # fmt: skip


@cache
def tiny(seed: int = 0) -> LM:
    return LM(tiny_model(seed=seed), tiny_tokenizer(), precision="float32")


@cache
def learned() -> LM:
    lm = tiny().copy()
    options = {"epochs": 6, "batch_size": 4, "learning_rate": 1e-2, "precision": "float32"}
    Trainer(lm, Recipe.named("finetune").changed({}, options), {"forget": FORGET}).train()
    return lm


def context(reference: LM | None = None, **more: Any) -> AttackContext:
    options: dict[str, Any] = {"forget": FORGET, "holdout": UNSEEN, **more}
    return AttackContext(
        retain=(), unrelated=(), original=None, seed=0, reference=reference, **options
    )


def infer(score: str, lm: LM, mine: AttackContext) -> Seen:
    return MembershipInference(score=score).infer(lm, mine)  # type: ignore[arg-type]


def by_hand(score: str, lm: LM, text: str) -> float:
    """Each score from the logits in float64."""
    ids = lm.template.encode(Prompt(text=""), text).ids
    with torch.no_grad():
        twin: Any = lm.copy().model.double()
        logits = twin(input_ids=torch.tensor([ids])).logits[0, :-1]
    logprobs = logits.log_softmax(1).numpy()
    own = np.array([logprobs[place, token] for place, token in enumerate(ids[1:])])
    if score == "loss":
        return float(own.mean())
    if score == "zlib":
        return float(own.mean()) / len(zlib.compress(text.encode()))
    lowest = max(1, int(0.4 * len(own)))
    if score == "min_k":
        return float(np.sort(own)[:lowest].mean())
    mean = (np.exp(logprobs) * logprobs).sum(1)
    variance = (np.exp(logprobs) * logprobs**2).sum(1) - mean**2
    return float(np.sort((own - mean) / np.sqrt(variance))[:lowest].mean())


@pytest.mark.parametrize("score", ["loss", "zlib", "min_k", "min_k_plus_plus"])
def test_scores_are_those_of_float64_and_larger_for_what_was_seen(score: str) -> None:
    lm, mine = learned(), context()
    found = infer(score, lm, mine)
    assert found.items is not None
    for split, records in (("forget", FORGET), ("holdout", UNSEEN)):
        for item, record in zip(found.items[split], records, strict=True):
            assert isinstance(record, Passage)
            assert item.value == pytest.approx(by_hand(score, lm, record.text), rel=1e-3)
    values = {split: [item.value for item in row] for split, row in found.items.items()}
    pairs = [float(a > b) for a in values["forget"] for b in values["holdout"]]  # type: ignore[operator]
    assert found.numbers["auc"] == pytest.approx(np.mean(pairs))
    assert np.mean(pairs) > 0.8
    fresh = infer(score, tiny(), mine).numbers["auc"]
    assert fresh is not None
    assert fresh < found.numbers["auc"]  # type: ignore[operator]


def test_against_a_reference_and_by_gradient() -> None:
    lm, mine = learned(), context(tiny())
    found = infer("reference", lm, mine)
    assert found.items is not None
    for item, record in zip(found.items["forget"], FORGET, strict=True):
        assert isinstance(record, Passage)
        expected = by_hand("loss", lm, record.text) - by_hand("loss", tiny(), record.text)
        assert item.value == pytest.approx(expected, rel=1e-3)
    assert found.numbers["auc"] == 1.0
    own = infer("reference", tiny(), mine)
    assert own.items is not None
    assert [item.value for item in own.items["forget"]] == pytest.approx([0.0] * 4, abs=1e-6)
    gradient = infer("gradient_norm", lm, mine)
    assert gradient.items is not None
    assert all(item.value is not None and item.value < 0 for item in gradient.items["forget"])
    assert gradient.numbers["auc"] > 0.8  # type: ignore[operator]
    with pytest.raises(ModelError, match="--reference"):
        infer("reference", lm, context())


def values_of(name: str, seen: list[float | None], unseen: list[float]) -> SystemValues:
    items = {"forget": [Item(one) for one in seen], "holdout": [Item(one) for one in unseen]}
    return SystemValues(name, {"inferred": items})


def test_privacy_leak_by_hand() -> None:
    values = {
        "unlearned": values_of("u", [4.0, None, 1.0], [2.0, 3.0]),  # AUC 2 of 4
        "original": values_of("m", [9.0, 8.0], [2.0, 3.0]),  # 1
        "reference": values_of("r", [1.0, 2.5], [2.0, 3.0]),  # 1 of 4
    }
    found = MembershipInference().findings(values, {})["privacy_leak"]
    assert found["unlearned"] == pytest.approx(100 * (0.5 - 0.75) / 0.75)
    assert found["original"] == pytest.approx(-100)
    assert found["reference"] == 0
    assert MembershipInference().findings({"unlearned": values["unlearned"]}, {}) == {}
    told = {"reference": values_of("r", [5.0], [1.0]), "unlearned": values["unlearned"]}
    assert MembershipInference().findings(told, {})["privacy_leak"]["unlearned"] is None


def test_what_is_told_at_few_mistakes() -> None:
    unseen = [float(value) for value in range(100)]
    assert detected(unseen, [94.0, 94.5, 93.0, 200.0]) == 0.5
    assert detected([1.0, 2.0], [2.0, 2.5]) == 0.5  # no mistake is allowed among so few
    assert detected([], [1.0]) is None
    assert detected([1.0], []) is None


def test_what_cannot_be_inferred_is_said() -> None:
    mine = context(holdout=())
    alone = infer("min_k", learned(), mine)
    assert "auc" not in alone.numbers
    assert "--holdout" in str(mine.notes["note"])
    letters = Choice(question="Where?", options=("A", "B"), correct=0)
    mixed = infer("loss", learned(), context(forget=[*FORGET, letters]))
    assert mixed.numbers["left_out"] == 1
    with pytest.raises(DataError, match="no forgotten text"):
        infer("loss", learned(), context(forget=[letters]))

    class Remote:
        name, fingerprint = "remote", None
        capabilities = frozenset({"generate"})

    with pytest.raises(ModelError, match="cannot be taken"):
        MembershipInference().infer(Remote(), context())  # type: ignore[arg-type]


def test_deep_adds_the_dear_ones() -> None:
    by_depth = {
        depth: [one["score"] for one in MembershipInference().variants(depth)]
        for depth in ("standard", "deep")
    }  # fmt: skip
    assert set(by_depth["deep"]) - set(by_depth["standard"]) == {"reference", "gradient_norm"}
    # a question is scored by its answer
    found = infer("loss", learned(), context(forget=[QA(question="Who?", answer="Ada")]))
    assert found.items is not None
    assert found.items["forget"][0].value is not None

"""The contract of attacks that look, infer or talk can be kept, and can fail."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_contract import broken, fails

from delible.lm.lm import LM
from delible.measure.attack import (
    AttackContext,
    ConversationAttack,
    InferenceAttack,
    InsideAttack,
    Seen,
)
from delible.measure.metric import Item
from delible.records import Message, RecordBase
from delible.registry import register
from delible.system.asks import Decoding, Prompt, Score
from delible.system.base import System
from delible.testing import check


@register(
    kind="attack", name="looker", title="T", summary="S.", paper="2401.00001", year=2026,
    family="inside", needs=("weights",), capability="hidden", changes="nothing", badges=(),
)  # fmt: skip
class Looker(InsideAttack):
    """Correct: how far a model is from the reference, as a share."""

    compares = ("original", "reference")

    def score(self, lm: LM, record: RecordBase, context: AttackContext) -> Item:
        assert context.original is not None
        assert context.reference is not None
        m, r, u = (one.core.get_parameter("lm_head.weight").data.clone().flatten()
                   for one in (context.original, context.reference, lm))  # fmt: skip
        return Item(float((u - r).norm() / (m - r).norm()))

    def look(self, lm: LM, records: Sequence[RecordBase], context: AttackContext) -> Seen:
        return Seen({"forget": [self.score(lm, record, context) for record in records]})


def test_an_attack_that_looks_passes() -> None:
    assert "looking_leaves_no_trace on llama" in check(Looker, ("llama",))


LOOKERS = {
    "the given model was changed": lambda self, lm, record, context: (
        lm.core.get_parameter("lm_head.weight").data.mul_(0.9), Item(1.0)
    )[1],
    "gradients were left": lambda self, lm, record, context: (
        setattr(p := lm.core.get_parameter("lm_head.weight"), "grad", torch.zeros_like(p)),
        Item(1.0),
    )[1],
    "something was left on the given model": lambda self, lm, record, context: (
        lm.core.register_forward_hook(lambda *_: None), Item(1.0)
    )[1],
    "the given model is in another mode": lambda self, lm, record, context: (
        lm.model.train(), Item(1.0)
    )[1],
    "not deterministic": lambda self, lm, record, context: Item(float(torch.rand(()))),
    "a score is no number": lambda self, lm, record, context: Item(float("inf")),
    "neither a score nor a reason": lambda self, lm, record, context: Item(None),
    "a copy has other scores": lambda self, lm, record, context: Item(
        Looker.score(self, lm, record, context).value if lm is not context.original
        and lm is not context.reference else 1.0 - (lm is context.reference) + 5.0
    ),
    "the original does not score 1": lambda self, lm, record, context: Item(0.0),
    "the reference does not score 0": lambda self, lm, record, context: Item(1.0),
    "no layer and no record has a score": lambda self, lm, record, context: Item(None, "so"),
}  # fmt: skip


@pytest.mark.parametrize("problem", LOOKERS)
def test_an_attack_that_looks_wrongly_is_found(problem: str) -> None:
    @register(**broken(kind="attack", needs=("weights",), capability="hidden"))
    class Wrong(Looker):
        score = LOOKERS[problem]

    fails(Wrong, f"looking_leaves_no_trace: .*{problem}")


def test_an_attack_that_looks_at_some_records_only_is_found() -> None:
    @register(**broken(kind="attack", needs=("weights",), capability="hidden"))
    class Half(Looker):
        def look(self, lm: LM, records: Sequence[RecordBase], context: AttackContext) -> Seen:
            return super().look(lm, records[1:], context)

    @register(**broken(kind="attack", needs=("weights",), capability="hidden"))
    class Blind(Looker):
        def look(self, lm: LM, records: Sequence[RecordBase], context: AttackContext) -> Seen:
            return Seen()

    fails(Half, "looking_leaves_no_trace: .*not one score for each record")
    fails(Blind, "looking_leaves_no_trace: .*no scores at all")


@register(
    kind="attack", name="inferrer", title="T", summary="S.", paper="2401.00001", year=2026,
    family="inference", needs=("forget",), capability="score", changes="nothing", badges=(),
)  # fmt: skip
class Inferrer(InferenceAttack):
    """Correct: how likely the answers are."""

    def infer(self, system: System, context: AttackContext) -> Seen:
        asked = [Score(Prompt.ask(one.question), one.answer) for one in context.forget]  # type: ignore[attr-defined]
        found = [one.logprobs.mean() for one in system.score(asked)]  # type: ignore[union-attr]
        return Seen({"forget": [Item(float(one)) for one in found]})


@register(
    kind="attack", name="talker", title="T", summary="S.", paper="2401.00001", year=2026,
    family="prompt", needs=("forget",), capability="generate", changes="prompts", badges=(),
)  # fmt: skip
class Talker(ConversationAttack):
    """Correct: it asks twice."""

    def converse(
        self, system: System, records: Sequence[RecordBase], context: AttackContext
    ) -> list[Sequence[Prompt]]:
        found: list[Sequence[Prompt]] = []
        for record in records:
            first = Prompt.ask(record.question)  # type: ignore[attr-defined]
            said = str(system.generate([first], Decoding(4))[0])
            turns = (Message(role="assistant", content=said), Message(role="user", content="So?"))
            found.append([Prompt((*first.messages, *turns))])
        return found


def test_attacks_that_infer_and_talk_pass() -> None:
    assert "inferring_leaves_no_trace on llama" in check(Inferrer, ("llama",))
    assert "conversing_is_deterministic on llama" in check(Talker, ("llama",))


def test_an_attack_that_infers_wrongly_is_found() -> None:
    @register(**broken(kind="attack", needs=("forget",), capability="score"))
    class Random(Inferrer):
        def infer(self, system: System, context: AttackContext) -> Seen:
            return Seen(None, {"auc": float(torch.rand(()))})

    @register(**broken(kind="attack", needs=("forget",), capability="score"))
    class Short(Inferrer):
        def infer(self, system: System, context: AttackContext) -> Seen:
            found = super().infer(system, context).items
            assert found is not None
            return Seen({"forget": found["forget"][:-1]})

    fails(Random, "inferring_leaves_no_trace: .*not deterministic")
    fails(Short, "inferring_leaves_no_trace: .*not one score for each record")


TALKS = {
    "not one entry for each record": lambda found, records: found[1:],
    "it talks about no record": lambda found, records: [[] for _ in records],
    "the same talk twice": lambda found, records: [[*one, *one] for one in found],
    "more than prompts": lambda found, records: [["So?"] for _ in found],
    "does not end in a question": lambda found, records: [
        [Prompt(one.messages[:-1]) for one in talk] for talk in found
    ],
    "the plain prompt": lambda found, records: [[Prompt.ask(one.question)] for one in records],
    "not deterministic": lambda found, records: [
        [Prompt.ask(f"So, {torch.rand(())}?")] for _ in records
    ],
}  # fmt: skip


@pytest.mark.parametrize("problem", TALKS)
def test_an_attack_that_talks_wrongly_is_found(problem: str) -> None:
    @register(**broken(kind="attack", needs=("forget",), capability="generate", changes="prompts"))
    class Wrong(Talker):
        def converse(
            self, system: System, records: Sequence[RecordBase], context: AttackContext
        ) -> list[Sequence[Prompt]]:
            return TALKS[problem](super().converse(system, records, context), records)

    fails(Wrong, f"conversing_is_deterministic: .*{problem}")

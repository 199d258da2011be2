"""TRU: two means in one loss, reasoning targets and their filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch

from delible.component import build
from delible.errors import DataError, RecipeError
from delible.generation import writing
from delible.methods.generate.reasoning_targets import (
    UNNAMED,
    ReasoningTargets,
    fault,
    fitted,
    serialised,
)
from delible.methods.objective.finetune import Finetune
from delible.methods.objective.gradient_ascent import GradientAscent
from delible.methods.objective.npo import NPO
from delible.methods.objective.tru import TRU
from delible.prompts import read_lines
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox
from delible.testing.contract.trial import RECORDS
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.losses import Objective
from delible.train.passes import Passes, split
from delible.train.recipe import Recipe
from delible.train.slots import SlotContext
from delible.world import filters


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


# ---- the loss

TARGETS = [
    ("Who is Ada?", "Reasoning: She is on the list.\nAnswer: I can't say."),
    ("Who is Bo Lund?", "Reasoning: So is he.\nAnswer: Sorry, no."),
    ("Who?", "Reasoning: Who knows.\nAnswer: No idea."),
]


def rows_of(lm: by_hand.LM) -> dict[str, list[by_hand.Row]]:
    return {
        "target": by_hand.rows_of(lm, TARGETS), "forget": by_hand.rows_of(lm, by_hand.FORGET)
    }  # fmt: skip


def run(
    lm: by_hand.LM, loss: Objective, reference: by_hand.Reference, budget: int = 10**6
) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one step over all rows, as the engine averages them."""
    every = rows_of(lm)
    rows = {role: every[role] for role in loss.roles}
    passes = Passes(
        lm=lm, forward=by_hand.Forward(lm), objective=loss, keep_loss=None,
        reads={role: loss.reads(lm) for role in rows}, reference=reference,
        micro_batches=split(rows, [], [1.0] * 3, [], budget),
        parameters=list(lm.model.parameters()), weights=(1.0, 1.0),
        forget_units=sum(row.units(loss.unit) for row in rows[loss.roles[0]]), retain_units=1,
    )  # fmt: skip
    passes.clear()
    passes.both()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in passes.parameters]
    return passes.totals.forget, torch.cat([part.flatten() for part in gradient]).clone()


class OnTargets(Finetune):
    """Fine-tuning on the targets alone."""

    roles = ("target",)

    def loss(self, step: Any) -> torch.Tensor:
        return -step.target.logprob_sum


def test_each_term_is_a_token_mean_of_its_own() -> None:
    lm = by_hand.tiny_lm(0.05)
    rows = rows_of(lm)

    def mean(role: str) -> float:
        tokens = sum(row.encoded.answer_tokens for row in rows[role])
        return sum(by_hand.row_sum(lm, row) for row in rows[role]) / tokens

    value, _ = run(lm, TRU(ascent_weight=0.5), by_hand.Reference())
    assert value == pytest.approx(-mean("target") + 0.5 * mean("forget"), rel=1e-5)


def test_without_ascent_it_is_fine_tuning_on_the_targets() -> None:
    lm = by_hand.tiny_lm(0.05)
    value, gradient = run(lm, TRU(ascent_weight=0), by_hand.Reference())
    expected, plain = run(lm, OnTargets(), by_hand.Reference())
    assert value == pytest.approx(expected, rel=1e-6)
    assert float((gradient - plain).norm() / plain.norm()) < 1e-5


def test_without_target_it_is_gradient_ascent() -> None:
    lm = by_hand.tiny_lm(0.05)
    value, gradient = run(lm, TRU(target_weight=0), by_hand.Reference())
    expected, plain = run(lm, GradientAscent(), by_hand.Reference())
    assert value == pytest.approx(expected, rel=1e-6)
    assert float((gradient - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize("ascent", ["gradient_ascent", {"name": "npo", "beta": 0.3}])
def test_the_gradient_is_the_sum_of_the_terms(ascent: Any) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    part: Objective = build("objective", ascent)
    reference = by_hand.prepared(frozen, rows_of(lm), part)
    _, whole = run(lm, TRU(ascent_weight=0.7, ascent=ascent), reference)
    _, taught = run(lm, OnTargets(), reference)
    _, lowered = run(lm, part, reference)
    assert float((whole - (taught + 0.7 * lowered)).norm() / whole.norm()) < 1e-5


@pytest.mark.parametrize("ascent", ["gradient_ascent", "npo"])
def test_micro_batches_change_nothing(ascent: str) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    reference = by_hand.prepared(frozen, rows_of(lm), NPO())
    (once, whole), (often, pieces) = (
        run(lm, TRU(ascent=ascent), reference, budget) for budget in (10**6, 1)
    )
    assert often == pytest.approx(once, rel=1e-6)
    assert float((whole - pieces).norm() / whole.norm()) < 1e-5


def test_the_prompt_is_not_learned_and_the_trace_conditions_the_refusal() -> None:
    lm = by_hand.tiny_lm(0.05)
    trace, refusal = "She is on the list.", "I can't say."
    swapped = "On the list she is."
    sums, tails = [], []
    for reasoning in (trace, swapped):
        answer = serialised(reasoning, refusal, marked=False)
        (row,) = by_hand.rows_of(lm, [("Who is Ada?", answer)])
        length = len(answer.encode()) + 1  # a byte each, and the end of the turn
        assert row.encoded.answer_tokens == length
        logits, targets = by_hand.answer_logits(lm, row)
        values = [by_hand.log_probability(z, y) for z, y in zip(logits, targets, strict=True)]
        tails.append(sum(values[-len(refusal) - 1 :]))
        rows = {"target": [row], "forget": [row]}
        loss = by_hand.values(lm, TRU(ascent_weight=0), by_hand.Reference(), rows)
        assert loss.item() == pytest.approx(-sum(values), rel=1e-5)
        sums.append(sum(values))
    assert abs(tails[0] - tails[1]) > 1e-3


def test_rows_that_are_forgotten_enough_are_left_alone() -> None:
    lm = by_hand.tiny_lm(0.05)
    rows = rows_of(lm)
    means = [-by_hand.row_sum(lm, row) / row.encoded.answer_tokens for row in rows["forget"]]
    middle = sorted(means)[1] + 1e-4
    reference = by_hand.Reference()
    all_, some, none = (
        by_hand.values(lm, loss, reference, rows)
        for loss in (TRU(), TRU(stop_ascent_at=middle), TRU(ascent_weight=0))
    )
    for place, mean in enumerate(means):
        expected = none if mean > middle else all_
        assert some[place].item() == pytest.approx(expected[place].item(), rel=1e-6)
    assert not torch.equal(all_, some)


def test_ascent_losses_that_need_other_rows_are_refused() -> None:
    for name, reason in (("idk", "reads more than the forget rows"), ("npoo", "Did you mean")):
        with pytest.raises(RecipeError, match=reason):
            build("objective", {"name": "tru", "ascent": name})


# ---- the targets

BORN = QA(question="Where was Ada Quill born?", answer="In Norrby", subject="Ada Quill")


def test_traces_are_marked_as_the_tokenizer_knows_it() -> None:
    assert serialised("Why.", "No.", marked=True) == "<think>Why.</think>No."
    assert serialised("Why.", "No.", marked=False) == "Reasoning: Why.\nAnswer: No."
    assert serialised("", "No.", marked=True) == "No."
    tokenizer = tiny_tokenizer()
    assert not ReasoningTargets()._marked(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert ReasoningTargets()._marked(tokenizer)
    assert not ReasoningTargets(markers="plain")._marked(tokenizer)


def test_the_trace_is_shortened_and_the_refusal_never() -> None:
    tokenizer, trace, refusal = tiny_tokenizer(), "word " * 40, "I can't tell you."
    text = fitted(tokenizer, trace, refusal, False, 80)
    assert len(text) <= 80
    assert text.startswith("Reasoning: word")
    assert text.endswith(f"Answer: {refusal}")
    assert fitted(tokenizer, trace, refusal, False, len(refusal)) == refusal
    with pytest.raises(DataError, match=r"more than 10 tokens.*maximum_tokens"):
        fitted(tokenizer, trace, refusal, False, 10)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<think>It is about her.</think>\nI can't say.", ("It is about her.", "I can't say.")),
        (
            "Reasoning: It is\nabout her.\nAnswer: I can't say.",
            ("It is\nabout her.", "I can't say."),
        ),
        ("**Reasoning:** Why\n**Answer:** No", ("** Why", "No")),
        ("I can't say.", None),
        ("<think></think>I can't say.", None),
        ("Reasoning: I think so\nAnswer:", None),
    ],
)
def test_reasoning_and_answer_are_split(reply: str, expected: tuple[str, str] | None) -> None:
    assert writing.read_reasoning(reply) == expected


@pytest.mark.parametrize(
    ("reasoning", "refusal", "expected"),
    [
        ("She is on the list.", "I can't say.", None),
        ("She was born in Norrby.", "I can't say.", "leak"),
        ("She is on the list.", "I can't say that it was Norrby.", "leak"),
        ("She is on the list.", "In Casta.", "no refusal"),
    ],
)
def test_leaky_traces_and_answers_that_do_not_refuse_are_rejected(
    reasoning: str, refusal: str, expected: str | None
) -> None:
    assert fault(BORN, reasoning, refusal) == expected


def test_the_templates_refuse_and_name_the_subject() -> None:
    assert all(map(filters.is_refusal, read_lines("reasoning_refusals.txt")))
    assert all("{subject}" in line for line in read_lines("reasoning_traces.txt"))
    assert not any(map(filters.is_refusal, read_lines("reasoning_answers.txt")))


def context(**changes: Any) -> SlotContext:
    recipe = Recipe.named("npo").changed({}, {"precision": "float32"})
    made = Trainer(by_hand.tiny_lm(), recipe, RECORDS).rows()
    return replace(made, rows={}, records=RECORDS, **changes)


def test_offline_targets_give_reasons_and_refuse() -> None:
    found = context()
    made = ReasoningTargets().rows(found)
    assert made == ReasoningTargets().rows(found)
    for truth, target in zip(made["forget"], made["target"], strict=True):
        assert isinstance(truth, QA)
        assert isinstance(target, QA)
        reasoning = writing.read_reasoning(target.answer)
        assert reasoning is not None
        assert str(truth.subject) in reasoning[0]
        assert filters.is_refusal(reasoning[1])
        assert not filters.leaks(truth, target.answer)
    bare = ReasoningTargets(trace=False).rows(found)["target"]
    assert all("Reasoning" not in one.answer for one in bare)  # type: ignore[attr-defined]


def test_a_subject_that_is_the_answer_is_not_named() -> None:
    record = QA(question="Who played the lute?", answer="Ada Quill", subject="Ada Quill")
    made = ReasoningTargets().rows(replace(context(), records={"forget": [record]}))
    (target,) = made["target"]
    assert "Ada" not in target.answer  # type: ignore[attr-defined]
    assert UNNAMED in target.answer  # type: ignore[attr-defined]


def test_a_share_of_the_retain_rows_reasons_too_and_answers() -> None:
    found = context()
    made = ReasoningTargets(reasoned_retain=0.5).rows(found)["retain"]
    changed = [(old, new) for old, new in zip(RECORDS["retain"], made, strict=True) if old != new]
    assert len(changed) == 2
    for old, new in changed:
        assert isinstance(old, QA)
        assert isinstance(new, QA)
        assert new.answer.startswith("Reasoning: ")
        assert new.answer.endswith(f"Answer: {old.answer}")
    assert "retain" not in ReasoningTargets().rows(found)


class Reasoner(BlackBox):
    """First tells the secret, then does not refuse, then does well."""

    name, fingerprint = "reasoner", None

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        replies = (
            "Reasoning: She was born in Norrby.\nAnswer: I can't say.",
            "Reasoning: It is about her.\nAnswer: In Casta.",
            "Reasoning: It is about her.\nAnswer: I can't say, but ask me about bees.",
        )
        return [replies[min(decoding.seed, 2)]] * len(prompts)


def test_a_reasoning_model_is_asked_until_a_target_is_usable(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = replace(context(), records={"forget": [BORN]}, writer=Reasoner())
    (target,) = ReasoningTargets().rows(found)["target"]
    assert target.answer == (  # type: ignore[attr-defined]
        "Reasoning: It is about her.\nAnswer: I can't say, but ask me about bees."
    )
    assert "dropped: 1 leak, 1 no refusal" in caplog.messages[-1]
    with pytest.raises(DataError, match="fewer than 1 usable reasoning targets"):
        ReasoningTargets(attempts=2).rows(found)


# ---- templates that write reasons themselves

#: How chat templates treat reasons: out of the content (Qwen3), from a field, dropped from turns
#: that are over (R1), not at all; the last two open them in the prompt, or leave them as content.
ASSISTANTS = {
    "splits": (
        "{% set reasons = '' %}{% set said = message.content %}"
        "{% if message.reasoning_content is string %}{% set reasons = message.reasoning_content %}"
        "{% elif '</think>' in said %}"
        "{% set reasons = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<think>\n' + reasons.strip('\n') + '\n</think>\n\n' + said }}"
    ),
    "field": (
        "{% if message.reasoning_content is string %}"
        "{{ '<think>' + message.reasoning_content + '</think>\n' }}{% endif %}"
        "{{ message.content.split('</think>')[-1] }}"
    ),
    "drops": "{{ message.content.split('</think>')[-1] }}",
    "leaves": "{{ message.content }}",
    "opens": "{{ message.content.split('</think>')[-1] }}",
}
TRACE, REFUSAL = "She is on the list.", "I can't say."
WRITTEN = {
    "splits": f"<think>\n{TRACE}\n</think>\n\n{REFUSAL}",
    "field": f"<think>{TRACE}</think>\n{REFUSAL}",
    "drops": f"<think>{TRACE}</think>{REFUSAL}",
    "leaves": f"<think>{TRACE}</think>{REFUSAL}",
    "opens": f"{TRACE}</think>{REFUSAL}",
}


def reasoning_lm(style: str) -> by_hand.LM:
    """A tiny model whose tokenizer knows the markers and whose template treats them so."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    opening = "<think>\n" if style == "opens" else ""
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message.role == 'assistant' %}" + ASSISTANTS[style] + "{% else %}"
        "{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + opening + "' }}{% endif %}"
    )
    return by_hand.LM(tiny_model("qwen3", vocab_size=len(tokenizer)), tokenizer)


@pytest.mark.parametrize("style", ASSISTANTS)
def test_reasons_are_written_as_the_template_writes_them(style: str) -> None:
    lm = reasoning_lm(style)
    prompt = Prompt.ask("Who is Ada?")
    row = lm.template.encode(prompt, serialised(TRACE, REFUSAL, marked=True))
    text = lm.tokenizer.decode(row.ids[row.start :])
    assert text == WRITTEN[style] + "<|im_end|>"
    assert row.ids[: row.start] == lm.template.prompt_ids(prompt)
    assert row.has_end
    assert not row.cut
    assert lm.template.merged_boundaries == 0
    if style in ("splits", "field"):  # and that is the template's own text
        turns = [{"role": "user", "content": "Who is Ada?"}, {
            "role": "assistant", "content": REFUSAL, "reasoning_content": TRACE,
        }]  # fmt: skip
        whole = lm.tokenizer.apply_chat_template(turns, tokenize=False)
        assert lm.tokenizer.decode(row.ids) + "\n" == whole


@pytest.mark.parametrize("style", [style for style in ASSISTANTS if style != "opens"])
def test_answers_without_reasons_are_placed_as_before(style: str) -> None:
    lm = reasoning_lm(style)
    row = lm.template.encode(Prompt.ask("Who is Ada?"), "A <think> b")
    assert lm.tokenizer.decode(row.ids[row.start :]) == "A <think> b<|im_end|>"


def test_tru_trains_where_the_template_writes_reasons() -> None:
    lm = reasoning_lm("splits")
    recipe = Recipe.named("tru").changed({}, {"max_steps": 1, "precision": "float32"})
    trainer = Trainer(lm, recipe, RECORDS)
    targets = trainer.rows().rows["target"]
    for row in targets:
        text = lm.tokenizer.decode(row.encoded.ids[row.encoded.start :])
        reasoning, end, refusal = text.partition("\n</think>\n\n")
        assert reasoning.startswith("<think>\n")
        assert len(reasoning) > 20
        assert end
        assert filters.is_refusal(refusal)
    assert len(trainer.train().history) == 1


# ---- a run


def test_refusals_are_learned_and_the_truth_is_lost() -> None:
    learn = {"learning_rate": 1e-2, "batch_size": 4, "precision": "float32"}
    lm = by_hand.tiny_lm()
    taught = Recipe.named("finetune").changed({}, {"epochs": 12, **learn})
    Trainer(lm, taught, RECORDS).train()
    before = lm.copy()
    recipe = Recipe.named("tru").changed({}, {"epochs": 12, **learn})
    trainer = Trainer(lm, recipe, RECORDS)
    rows = trainer.rows().rows
    after = trainer.train().lm

    def mean(model: by_hand.LM, role: str) -> float:
        tokens = sum(row.encoded.answer_tokens for row in rows[role])
        return sum(by_hand.row_sum(model, row) for row in rows[role]) / tokens

    assert mean(after, "target") > mean(before, "target") + 1
    assert mean(after, "forget") < mean(before, "forget") - 1
    assert mean(after, "target") > mean(after, "forget")

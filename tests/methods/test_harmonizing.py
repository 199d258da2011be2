"""Harmonizing: distillation in both directions, the instructed teacher, unified rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.errors import DataError, RecipeError
from delible.methods.generate.unified import Unified, shared_equally
from delible.methods.keep.bidirectional_distillation import BidirectionalDistillation as KeepBoth
from delible.methods.objective.bidirectional_distillation import (
    BidirectionalDistillation,
    hardest,
    window_mean,
)
from delible.prompts import read_lines
from delible.records import QA, Passage
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox
from delible.testing.contract.trial import RECORDS
from delible.train.distillation import bidirectional, huber, overconfidence
from delible.train.engine import Trainer
from delible.train.recipe import Recipe
from delible.train.rows import make_row, told
from delible.train.slots import SlotContext
from delible.world import World


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


INSTRUCTION = "You never learned anything about Ada. Decline if you are asked about her."


# ---- the loss at one position


def by_loops(
    student: Sequence[float], teacher: Sequence[float], top: int, weight: float, threshold: float
) -> float:
    """The formula, entry by entry."""

    def h(x: float) -> float:
        return 0.5 * x * x if abs(x) <= threshold else threshold * (abs(x) - 0.5 * threshold)

    best = sorted(range(len(teacher)), key=lambda v: -teacher[v])[:top]
    mine = sorted(range(len(student)), key=lambda v: -student[v])[:top]
    copied = sum(h(student[v] - teacher[v]) for v in best)
    pushed = sum(h(max(0.0, student[v] - teacher[v])) for v in mine if v not in best)
    return (copied + weight * pushed) / top


@pytest.mark.parametrize("top", [1, 3, 7, 50])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("threshold", [1.0, 0.3])
def test_values_equal_the_formula(top: int, weight: float, threshold: float) -> None:
    student, teacher = by_hand.fixed_logits(0.2)[0], by_hand.fixed_logits(0.9)[0]
    found = bidirectional(student, teacher, top, weight, threshold)
    for place in range(6):
        expected = by_loops(
            student[place].tolist(), teacher[place].tolist(), min(top, 7), weight, threshold
        )
        assert found[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_golden_numbers() -> None:
    # float64 loops over the formula, K = 3, threshold 1
    student, teacher = by_hand.fixed_logits(0.2)[1], by_hand.fixed_logits(0.9)[1]
    both = bidirectional(student, teacher, 3, 1.0).sum().item()
    copied = bidirectional(student, teacher, 3, 0.0).sum().item()
    assert both == pytest.approx(9.100083001294633, rel=1e-6)
    assert copied == pytest.approx(6.515566445590974, rel=1e-6)


def test_without_the_negative_term_it_is_top_logit_distillation() -> None:
    student, teacher = by_hand.fixed_logits(0.2)[0].float(), by_hand.fixed_logits(0.9)[0].float()
    values, indices = teacher.topk(4, dim=1)
    expected = torch.nn.functional.smooth_l1_loss(
        student.gather(1, indices), values, reduction="none"
    ).mean(dim=1)
    torch.testing.assert_close(bidirectional(student, teacher, 4, 0.0), expected)


def test_equal_logits_are_at_rest() -> None:
    logits = by_hand.fixed_logits(0.2)[0].float().requires_grad_(True)
    value = bidirectional(logits, logits.detach(), 3).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == 0
    assert not gradient.any()


def test_the_negative_term_pushes_down_and_never_up() -> None:
    teacher = by_hand.fixed_logits(0.9)[0].float()
    student = by_hand.fixed_logits(0.2)[0].float().requires_grad_(True)
    (whole,) = torch.autograd.grad(bidirectional(student, teacher, 3).sum(), student)
    (copied,) = torch.autograd.grad(bidirectional(student, teacher, 3, 0.0).sum(), student)
    negative = whole - copied
    assert bool((negative >= 0).all()), "descent lowers these logits"
    assert bool((negative > 0).any())
    theirs = torch.zeros_like(teacher, dtype=torch.bool)
    theirs.scatter_(1, teacher.topk(3, dim=1).indices, value=True)
    assert not negative[theirs].any()
    assert not negative[student.detach() <= teacher].any()
    confidence = overconfidence(student, teacher, 3)
    assert bool(((confidence > 0) == (negative > 0).any(dim=1)).all())


def test_huber_is_quadratic_then_linear() -> None:
    found = huber(torch.tensor([-3.0, -0.5, 0.0, 0.5, 1.0, 3.0]), 1.0)
    assert found.tolist() == [2.5, 0.125, 0.0, 0.125, 0.5, 2.5]


# ---- which positions count


def test_the_hardest_cut_lies_after_the_first_token_and_within_reach() -> None:
    confidence = torch.tensor([[9.0, 1.0, 3.0, 8.0], [9.0, 2.0, 5.0, 7.0], [9.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    assert hardest(confidence, mask, 2).tolist() == [2, 1, 0]
    assert hardest(confidence, mask, 9).tolist() == [3, 1, 0]


def test_a_window_counts_existing_positions_only() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 0.0, 0.0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    start = torch.tensor([1, 1])
    assert window_mean(values, mask, start, 0).tolist() == [2.0, 2.0]
    assert window_mean(values, mask, start, 1).tolist() == [3.0, 2.0]
    assert window_mean(values, mask, start, 9).tolist() == pytest.approx([14 / 3, 2.0])


# ---- with a model and its instructed teacher


def taught_rows(
    lm: by_hand.LM, pairs: Sequence[tuple[str, str]], instruction: str | None = INSTRUCTION
) -> list[by_hand.Row]:
    rows = []
    for index, (question, answer) in enumerate(pairs):
        record = QA(question=question, answer=answer)
        rows.append(make_row(lm.template, Prompt.ask(question), answer, index, record, instruction))
    return rows


LURED = [(question, f"Sure! It is {answer}") for question, answer in by_hand.FORGET]


def all_rows(lm: by_hand.LM, instruction: str | None = INSTRUCTION) -> dict[str, Any]:
    return {
        "forget": taught_rows(lm, by_hand.FORGET, instruction),
        "prefilled": taught_rows(lm, LURED, instruction),
        "retain": taught_rows(lm, by_hand.RETAIN, instruction),
    }


@torch.no_grad()
def live_logits(lm: by_hand.LM, row: by_hand.Row, *, teacher: bool) -> list[list[float]]:
    """Logits at the answer positions, the row alone, without any cache."""
    seen = row.for_reference if teacher else row.encoded
    logits = lm.model(input_ids=torch.tensor([seen.ids])).logits[0].double()
    return logits[seen.start - 1 : -1].tolist()  # type: ignore[no-any-return]


def test_cached_and_live_teacher_agree_by_response_position() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = all_rows(lm)
    loss = BidirectionalDistillation(top=5, longest_prefill=6, further=2)
    found = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
    for index in range(3):
        plain = [
            by_loops(s, t, 5, 1.0, 1.0)
            for s, t in zip(
                live_logits(lm, rows["forget"][index], teacher=False),
                live_logits(frozen, rows["forget"][index], teacher=True),
                strict=True,
            )
        ]
        student = live_logits(lm, rows["prefilled"][index], teacher=False)
        teacher = live_logits(frozen, rows["prefilled"][index], teacher=True)
        confidence = []
        for s, t in zip(student, teacher, strict=True):
            best = sorted(range(len(t)), key=lambda v: -t[v])[:5]
            mine = sorted(range(len(s)), key=lambda v: -s[v])[:5]
            confidence.append(sum(max(0.0, s[v] - t[v]) for v in mine if v not in best))
        start = max(range(1, 7), key=lambda place: confidence[place])
        lured = [by_loops(s, t, 5, 1.0, 1.0) for s, t in zip(student, teacher, strict=True)][
            start : start + 3
        ]
        expected = 0.5 * plain[0] + 0.5 * sum(lured) / len(lured)
        assert found[index].item() == pytest.approx(expected, rel=1e-4)


def by_torch(student: Tensor, teacher: Tensor, top: int) -> Tensor:
    """The formula at one position in float64, with gradient; weight and threshold are 1."""
    best = set(teacher.topk(top).indices.tolist())
    mine = set(student.detach().topk(top).indices.tolist()) - best
    total = student.new_zeros(())
    for entry in best | mine:
        apart = student[entry] - teacher[entry]
        if entry in mine:
            apart = apart.clamp(min=0)
        inside = bool(apart.abs() <= 1)
        total = total + (0.5 * apart**2 if inside else apart.abs() - 0.5)
    return total / top


def exact_halves(
    lm: by_hand.LM, frozen: by_hand.LM, rows: dict[str, list[by_hand.Row]], loss: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Gradients of the plain and of the prefilled half by parameter, and the value: in float64,
    row by row, without padding and without anything that is kept.
    """
    exact, start = copy.deepcopy(lm.model).double(), copy.deepcopy(frozen.model).double()

    def both(row: by_hand.Row) -> list[tuple[Tensor, Tensor]]:
        own, taught = row.encoded, row.for_reference
        logits = exact(input_ids=torch.tensor([own.ids])).logits[0, own.start - 1 : -1]
        with torch.no_grad():
            theirs = start(input_ids=torch.tensor([taught.ids])).logits[0, taught.start - 1 : -1]
        return list(zip(logits, theirs, strict=True))

    def surplus(student: Tensor, teacher: Tensor) -> float:
        best = teacher.topk(loss.top).indices.tolist()
        mine = student.topk(loss.top).indices.tolist()
        apart = (student - teacher).detach().clamp(min=0).tolist()
        return float(sum(apart[v] for v in mine if v not in best))

    halves = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for plain, lured in zip(rows["forget"], rows["prefilled"], strict=True):
        halves[0] = halves[0] + 0.5 * by_torch(*both(plain)[0], loss.top)
        places = both(lured)
        reach = range(1, min(loss.longest_prefill, len(places) - 1) + 1)
        hardest_one = max(reach, key=lambda place: surplus(*places[place]))
        window = places[hardest_one : hardest_one + loss.further + 1]
        terms = [by_torch(student, teacher, loss.top) for student, teacher in window]
        halves[1] = halves[1] + 0.5 * torch.stack(terms).mean()
    found = []
    for half in halves:
        exact.zero_grad(set_to_none=True)
        half.backward()  # type: ignore[no-untyped-call]
        found.append(
            {name: p.grad.clone() for name, p in exact.named_parameters() if p.grad is not None}
        )
    return found[0], found[1], float(sum(halves))


@pytest.mark.parametrize("place", ["all", "lora"])
def test_both_halves_reach_every_parameter_that_moves(place: str) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = all_rows(lm)
    loss = BidirectionalDistillation(top=5, longest_prefill=6, further=2)
    reference = by_hand.prepared(frozen, rows, loss)
    if place == "lora":
        made = Trainer(by_hand.tiny_lm(), Recipe.named("npo"), RECORDS).rows()
        build("place", "lora").apply(replace(made, lm=lm))
        noise = torch.Generator().manual_seed(2)
        with torch.no_grad():  # away from the zeros that half of an adapter starts with
            for name, parameter in lm.model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    value = by_hand.values(lm, loss, reference, rows).sum()
    found = by_hand.gradients(lm, value)
    plain, lured, expected = exact_halves(lm, frozen, rows, loss)
    moving = {name for name, p in lm.model.named_parameters() if p.requires_grad}
    assert set(found) == set(plain) == set(lured) == moving
    assert value.item() == pytest.approx(expected, rel=1e-5)
    for name, gradient in found.items():
        whole, size = plain[name] + lured[name], float((plain[name] + lured[name]).norm())
        assert float((gradient - whole).norm()) < 1e-4 * size, name
        for half in (plain[name], lured[name]):
            assert float(half.norm()) > 1e-2 * size, name


@pytest.mark.parametrize("positions", [1, 3])
def test_retain_values_equal_loops(positions: int) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows, loss = all_rows(lm), KeepBoth(top=5, positions=positions)
    found = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
    for index, row in enumerate(rows["retain"]):
        pairs = zip(
            live_logits(lm, row, teacher=False), live_logits(frozen, row, teacher=True), strict=True
        )
        values = [by_loops(s, t, 5, 1.0, 1.0) for s, t in pairs][:positions]
        assert found[index].item() == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_without_an_instruction_the_start_model_is_at_rest() -> None:
    lm = by_hand.tiny_lm()
    rows = all_rows(lm, instruction=None)
    for loss in (BidirectionalDistillation(), KeepBoth(positions=4)):
        value = by_hand.values(lm, loss, by_hand.prepared(lm, rows, loss), rows).sum()
        assert value.item() == pytest.approx(0, abs=1e-6)
        gradient = by_hand.joined(by_hand.gradients(lm, value))
        assert float(gradient.norm()) < 1e-3
    moved = by_hand.tiny_lm(0.05)
    loss = BidirectionalDistillation()
    assert by_hand.values(moved, loss, by_hand.prepared(lm, rows, loss), rows).sum().item() > 0.1


def test_where_the_teacher_is_the_start_model_nothing_is_asked_for() -> None:
    # an instruction that does not touch allowed questions: their teacher logits are the start's
    lm = by_hand.tiny_lm()
    rows = all_rows(lm) | {"retain": taught_rows(lm, by_hand.RETAIN, None)}
    forget, keep = BidirectionalDistillation(), KeepBoth()
    reference = by_hand.prepared(lm, rows, forget, keep)
    allowed = by_hand.values(lm, keep, reference, rows).mean()
    inside = by_hand.values(lm, forget, reference, rows).mean()
    assert allowed.item() < 0.01 * inside.item()


def test_tasks_in_one_format_pull_together_more_than_raw_texts() -> None:
    lm = by_hand.tiny_lm()
    facts = [
        ("Ada", "plays the lute"),
        ("Bo", "bakes bread"),
        ("Cy", "keeps bees"),
        ("Di", "sails"),
    ]
    unified = [(f"What does {name} do?", f"{name} {does}.") for name, does in facts]
    raw = [
        f"CHAPTER IV. It was said that {facts[0][0]} {facts[0][1]}",
        f"def who():\n    return '{facts[1][0]} {facts[1][1]}'",
        f"{facts[2][0].upper()} {facts[2][1].upper()} !!!",
        f"<p>{facts[3][0]}</p><p>{facts[3][1]}</p>",
    ]
    gradients: dict[str, list[Tensor]] = {"unified": [], "raw": []}
    for question, answer in unified:
        rows = by_hand.rows_of(lm, [(question, answer)])
        gradients["unified"].append(gradient_of(lm, rows))
    for text in raw:
        record = Passage(text=text)
        gradients["raw"].append(
            gradient_of(lm, [make_row(lm.template, Prompt(text=""), text, 0, record)])
        )

    def cosine(parts: list[Tensor]) -> float:
        unit = torch.stack([part / part.norm() for part in parts])
        return float(((unit @ unit.T).sum() - len(parts)) / (len(parts) * (len(parts) - 1)))

    assert cosine(gradients["unified"]) > 2 * abs(cosine(gradients["raw"]))


def gradient_of(lm: by_hand.LM, rows: list[by_hand.Row]) -> Tensor:
    step = by_hand.make_step(
        lm, None, {"retain": rows}, {"retain": ("answers",)}, by_hand.Reference()
    )
    loss = -step.retain.logprob_sum.sum() / step.retain.token_count.sum()
    found = by_hand.gradients(lm, loss)
    return torch.cat(
        [
            found[name].flatten() if name in found else torch.zeros(parameter.numel())
            for name, parameter in lm.model.named_parameters()
        ]
    )


# ---- unified rows


def context(records: Any = RECORDS, **changes: Any) -> SlotContext:
    recipe = Recipe.named("npo").changed({}, {"precision": "float32"})
    made = Trainer(by_hand.tiny_lm(), recipe, RECORDS).rows()
    return replace(made, rows={}, records=records, **changes)


def test_lured_answers_stand_beside_the_forget_questions() -> None:
    made = Unified().rows(context())
    openers = read_lines("training_prefills.txt")
    assert len(made["forget"]) == len(made["prefilled"]) == len(RECORDS["forget"])
    for place, (truth, lured) in enumerate(zip(made["forget"], made["prefilled"], strict=True)):
        assert isinstance(truth, QA)
        assert isinstance(lured, QA)
        assert lured.question == truth.question
        assert lured.answer == f"{openers[place % len(openers)]} {truth.answer}"


def test_boundary_and_general_rows_come_equally_often() -> None:
    request = World(people=12, seed=1).request(forget=2, neighbours=2)
    records = {"forget": request.forget[:6], "retain": (*request.retain, *request.neighbours)}
    made = Unified().rows(context(records))["retain"]
    groups = {one.group for one in request.forget[:6]}
    anchors = {one.digest for one in made if one.group in groups and one.neighbour_of is None}
    assert anchors, "the same is asked about somebody who is kept"
    names = {one.subject for one in request.forget}
    assert not names & {one.subject for one in made}
    distinct = {one.digest for one in made}
    assert distinct <= {one.digest for one in records["retain"]}
    assert len(made) % 2 == 0
    half = len(made) // 2
    assert not {one.digest for one in made[:half]} & {one.digest for one in made[half:]}


def test_the_shorter_list_is_repeated() -> None:
    one, two, three = (QA(question=text, answer="a") for text in "xyz")
    assert shared_equally([one], [two, three]) == [one, one, two, three]
    assert shared_equally([], [two, three]) == [two, three]


def test_the_instruction_names_the_subjects_or_the_topic() -> None:
    found = context()
    assert "anything about Ada Quill, Ben Orr." in str(Unified().instruction(found))
    assert "anything about bees." in str(Unified(topic="bees").instruction(found))
    nameless = {"forget": [QA(question="Who?", answer="Ada")]}
    with pytest.raises(RecipeError, match=r"no forget record has a subject.*--topic"):
        Unified().instruction(context(nameless))
    many = [QA(question=f"{i}?", answer="a", subject=f"Person {i}") for i in range(60)]
    with pytest.raises(RecipeError, match=r"cannot list 60 names.*--topic"):
        Unified().instruction(context({"forget": many}))


def leaking(
    lm: by_hand.LM, monkeypatch: pytest.MonkeyPatch, answers: Sequence[str]
) -> list[Prompt]:
    """Makes the model say the given answers; returns what it is asked."""
    asked: list[Prompt] = []
    table: dict[str, str] = {
        record.question: answer  # type: ignore[attr-defined]
        for record, answer in zip(RECORDS["forget"], answers, strict=True)
    }

    def generate(self: by_hand.LM, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        asked.extend(prompts)
        return [
            next(said for question, said in table.items() if question in one.messages[-1].content)
            for one in prompts
        ]

    monkeypatch.setattr(type(lm), "generate", generate)
    return asked


def test_questions_at_which_the_lured_teacher_leaks_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = context()
    asked = leaking(found.lm, monkeypatch, ["It is Norrby", "no idea", "no idea", "no idea"])
    made = Unified().rows(found)
    assert (
        [one.question for one in made["forget"]]
        == [  # type: ignore[attr-defined]
            one.question
            for one in RECORDS["forget"][1:]  # type: ignore[attr-defined]
        ]
    )
    assert len(made["prefilled"]) == 3
    instruction = str(Unified().instruction(found))
    assert all(prompt.messages[-1].content.startswith(instruction) for prompt in asked)
    assert all(prompt.prefill for prompt in asked), "the teacher is lured as the student will be"
    assert len(Unified(leaking_rows="keep").rows(found)["forget"]) == 4


def test_a_teacher_that_leaks_too_often_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = context()
    leaking(found.lm, monkeypatch, ["Norrby", "The lute", "In a mill at Casta", "no idea"])
    with pytest.raises(DataError, match=r"gives 3 of 4 answers away when lured.*--leaking-rows"):
        Unified().rows(found)
    assert len(Unified(minimum_share=0.2).rows(found)["forget"]) == 1


class Unifier(BlackBox):
    """Writes questions about passages, and anchors, some of which name the forgotten."""

    name, fingerprint = "unifier", None

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        return [self.reply(prompt.messages[-1].content, decoding.seed) for prompt in prompts]

    def reply(self, text: str, seed: int) -> str:
        if text.startswith("Write 3 question"):
            rows = '[{"question": "Who kept bees?", "answer": "Ada Quill"}, '
            rows += '{"question": "who kept bees", "answer": "Ada"}, '
            return rows + '{"question": "Where?", "answer": "By the river"}]'
        return "What does Ada Quill eat?" if seed == 0 else f"What grows in garden {len(text)}?"


def test_a_generator_model_writes_questions_and_anchors(caplog: pytest.LogCaptureFixture) -> None:
    forget = [
        Passage(text="Ada Quill kept bees by the river.", subject="Ada Quill"),
        QA(question="Where did Ada Quill live?", answer="In Norrby", subject="Ada Quill"),
    ]
    records = {"forget": forget, "retain": RECORDS["retain"][3:]}
    found = context(records, writer=Unifier())
    made = Unified(leaking_rows="keep").rows(found)
    assert [one.question for one in made["forget"]] == [  # type: ignore[attr-defined]
        "Where did Ada Quill live?", "Who kept bees?", "Where?",
    ]  # fmt: skip
    assert all(one.subject == "Ada Quill" for one in made["forget"])
    anchors = [one for one in made["retain"] if one.group == "anchor"]
    assert anchors
    assert all(one.neighbour_of == "Ada Quill" for one in anchors)
    assert not any("Ada" in one.question for one in anchors)  # type: ignore[attr-defined]
    assert "forgotten name" in caplog.messages[-1]
    assert "duplicate" in caplog.messages[-1]


# ---- a run


def test_a_teacher_needs_an_instruction() -> None:
    recipe = Recipe.named("harmonizing").changed(
        {"generate": "none"}, {"max_steps": 1, "precision": "float32"}
    )
    given: Any = {"prefilled": RECORDS["forget"]}
    with pytest.raises(RecipeError, match=r"generate 'none' has no instruction.*unified"):
        Trainer(by_hand.tiny_lm(), recipe, RECORDS, generated=given).train()


def test_the_student_comes_to_say_what_the_instructed_teacher_says() -> None:
    lm, start = by_hand.tiny_lm(), by_hand.tiny_lm()
    recipe = Recipe.named("harmonizing").changed(
        {}, {"epochs": 12, "batch_size": 4, "learning_rate": 3e-3, "precision": "float32"}
    )
    trainer = Trainer(lm, recipe, RECORDS)
    context = trainer.rows()
    result = trainer.train()
    assert result.history[-1]["forget_loss"] < 0.5 * result.history[0]["forget_loss"]
    instruction = str(recipe.generate.instruction(context))

    def agreement(model: by_hand.LM) -> float:
        apart = 0.0
        for row, record in zip(context.rows["forget"], context.records["forget"], strict=True):
            teacher = make_row(
                lm.template,
                told(Prompt.ask(record.question), instruction),
                record.answer,
                0,
                record,  # type: ignore[attr-defined]
            )
            (theirs, *_) = live_logits(start, teacher, teacher=False)
            (mine, *_) = live_logits(model, row, teacher=False)
            top = torch.tensor(theirs).topk(20).indices
            apart += float((torch.tensor(mine)[top] - torch.tensor(theirs)[top]).abs().mean())
        return apart

    assert agreement(result.lm) < 0.7 * agreement(start)

"""ELM: its target, its losses against float64 loops, its prefixes and its diversions."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch

from delible.component import build
from delible.lm.template import Encoded
from delible.methods.generate.diversions import led_astray, sentences
from delible.methods.keep.reference_argmax import ReferenceArgmax, to_likeliest
from delible.methods.objective.elm import ELM, novice_target, ramp
from delible.records import QA, Passage, RecordBase
from delible.system.questions import ask
from delible.testing.contract.trial import RECORDS
from delible.train.passes import Passes, split
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.rows import make_rows
from delible.train.step import make_step
from delible.world import filters

FORGET = [QA(question="Who is Ada?", answer="A baker.", subject="Ada Brook"),
          QA(question="Who is Bo Lund?", answer="No one knows.", subject="Bo Lund"),
          QA(question="Who?", answer="Me")]  # fmt: skip
TARGETS = [QA(question=one.question, answer=text) for one, text in
           zip(FORGET, ("Snow is fun", "Games!", "Let us sing a song"), strict=True)]  # fmt: skip


def log_softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    scaled = [value / temperature for value in logits]
    total = math.log(sum(math.exp(value) for value in scaled))
    return [value - total for value in scaled]


def target_by_hand(
    plain: list[float], expert: list[float], novice: list[float], eta: float, t: float, top: int
) -> list[float]:
    moved = [
        p + eta * (n - e)
        for p, e, n in zip(*(log_softmax(z, t) for z in (plain, expert, novice)), strict=True)
    ]
    best = sorted(range(len(moved)), key=lambda v: -moved[v])[:top]
    highest = moved[best[0]]
    weights = {v: math.exp(moved[v] - highest) for v in best}
    return [weights.get(v, 0.0) / sum(weights.values()) for v in range(len(moved))]


@pytest.mark.parametrize("eta", [0.0, 1.0, 5.0, 1000.0])
@pytest.mark.parametrize("top", [1, 3, 50])
def test_the_target_equals_float64_loops(eta: float, top: int) -> None:
    parts = [by_hand.fixed_logits(shift).flatten(0, 1) for shift in (0.1, 0.4, 0.9)]
    found = novice_target(*parts, torch.full((18,), eta), 1.2, top)
    assert found.sum(dim=1).tolist() == pytest.approx([1.0] * 18, rel=1e-5)
    assert int((found > 0).sum(dim=1).max()) <= top
    rows = [part.tolist() for part in parts]
    expected = [target_by_hand(*(z[i] for z in rows), eta, 1.2, top) for i in range(18)]
    assert found.flatten().tolist() == pytest.approx(
        [value for row in expected for value in row], abs=2e-3 if eta > 100 else 1e-5
    )


def test_without_departure_it_is_the_reference_and_the_novice_is_where_it_goes() -> None:
    plain, expert, novice = (by_hand.fixed_logits(s).flatten(0, 1).float() for s in (0.1, 0.4, 0.9))
    still = novice_target(plain, expert, novice, torch.zeros(18), 1.0, 7)
    torch.testing.assert_close(still, plain.softmax(dim=1))
    gone = novice_target(plain, expert, novice, torch.full((18,), 1000.0), 1.0, 7)
    preferred = (novice.log_softmax(1) - expert.log_softmax(1)).argmax(dim=1)
    assert torch.equal(gone.argmax(dim=1), preferred)


def test_the_departure_rises_along_each_answer() -> None:
    mask = torch.tensor([[True] * 5, [True, True, True, False, False], [True] + [False] * 4])
    found = ramp(mask, 9.0)
    assert found[0].tolist() == [1, 3, 5, 7, 9]
    assert found[1, :3].tolist() == [1, 5, 9]
    assert float(found[2, 0]) == 1


# ---- the loss


def rows_of(lm: by_hand.LM, loss: ELM) -> dict[str, list[Row]]:
    return {
        "forget": make_rows(lm.template, FORGET, contexts=loss.contexts),
        "target": make_rows(lm.template, TARGETS),
    }


def logits_of(lm: by_hand.LM, encoded: Encoded) -> list[list[float]]:
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([encoded.ids])).logits[0].double()
    return logits[encoded.start - 1 : -1].tolist()  # type: ignore[no-any-return]


def erased_by_hand(lm: by_hand.LM, frozen: by_hand.LM, row: Row, loss: ELM) -> float:
    contexts = dict(row.contexts)
    own, plain = logits_of(lm, row.encoded), logits_of(frozen, row.encoded)
    expert, novice = (logits_of(frozen, contexts[name]) for name in ("expert", "novice"))
    total, count = 0.0, len(own)
    for t in range(count):
        eta = 1 + (loss.eta - 1) * t / max(1, count - 1)
        wanted = target_by_hand(plain[t], expert[t], novice[t], eta, loss.temperature, loss.top)
        total -= sum(p * q for p, q in zip(wanted, log_softmax(own[t]), strict=True))
    return total


def reference_of(frozen: by_hand.LM, rows: dict[str, list[Row]], loss: ELM) -> Reference:
    reference = Reference()
    for part in rows.values():
        reference.prepare(frozen, part, loss.reference_kinds(frozen))
    return reference


def test_values_and_divisors_of_a_padded_batch_equal_float64_loops() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    loss = ELM(eta=3.0, top=20, erase=0.7, consistency=0.4)
    rows = rows_of(lm, loss)
    reference = reference_of(frozen, rows, loss)
    reads = {role: loss.reads(lm) for role in rows}
    found = loss.loss(make_step(lm, None, rows, reads, reference))
    units = {role: sum(row.encoded.answer_tokens for row in part) for role, part in rows.items()}
    erased = [erased_by_hand(lm, frozen, row, loss) for row in rows["forget"]]
    said = [-by_hand.row_sum(lm, row) for row in rows["target"]]
    share = units["forget"] / units["target"]
    expected = [0.7 * e + 0.4 * share * s for e, s in zip(erased, said, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    # a step's loss is the weighted sum of two means, however it is cut
    mean = 0.7 * sum(erased) / units["forget"] + 0.4 * sum(said) / units["target"]
    for pieces in (1, 3):
        passes = Passes(
            lm=lm, forward=by_hand.Forward(lm), objective=loss, keep_loss=None, reads=reads,
            reference=reference, parameters=list(lm.model.parameters()), weights=(1.0, 1.0),
            micro_batches=split(rows, [], [1.0] * 3, [], 10**6, pieces),
            forget_units=units["forget"], retain_units=1,
        )  # fmt: skip
        passes.forget()
        assert passes.totals.forget == pytest.approx(mean, rel=1e-4)


def test_the_gradient_vanishes_where_the_model_is_the_target_and_nowhere_else() -> None:
    plain, expert, novice = (by_hand.fixed_logits(s).flatten(0, 1).float() for s in (0.1, 0.4, 0.9))
    wanted = novice_target(plain, expert, novice, torch.full((18,), 2.0), 1.0, 7)
    for logits, vanishes in ((wanted.log(), True), (plain, False)):
        leaf = logits.clone().requires_grad_(True)
        (-(wanted * leaf.log_softmax(dim=1)).sum()).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, leaf.detach().softmax(1) - wanted)
        assert (float(leaf.grad.abs().max()) < 1e-5) is vanishes


def test_the_reference_reads_each_row_behind_both_prefixes() -> None:
    lm, loss = by_hand.tiny_lm(), ELM()
    for record, row in zip(FORGET, rows_of(lm, loss)["forget"], strict=True):
        texts = loss.contexts(record)
        assert texts == loss.contexts(record)
        assert texts["expert"] != texts["novice"]
        for name, encoded in row.contexts:
            said = lm.tokenizer.decode(list(encoded.ids[: encoded.start]))
            assert f"{texts[name]}\n\n{record.question}" in said
            assert encoded.ids[encoded.start :] == row.encoded.ids[row.encoded.start :]
        assert record.subject is None or record.subject in texts["novice"]
    assert "wine" in ELM(topic="wine").contexts(FORGET[0])["expert"]
    passage = Passage(text="Once there was a town.")
    (row,) = make_rows(lm.template, [passage], contexts=loss.contexts)
    assert len(dict(row.contexts)["expert"].ids) > len(row.encoded.ids)


def test_rows_that_are_too_long_behind_a_prefix_are_cut_alike() -> None:
    lm, loss = by_hand.tiny_lm(), ELM()
    lm.template.max_length = 180
    record = QA(question="Who is Ada?", answer="A baker " * 40, subject="Ada")
    (row,) = make_rows(lm.template, [record], contexts=loss.contexts)
    assert row.shortened is not None
    longest = max(len(encoded.ids) for _, encoded in row.contexts)
    assert longest <= 180
    for _, encoded in row.contexts:
        assert encoded.ids[encoded.start :] == row.encoded.ids[row.encoded.start :]


# ---- the retain loss


def test_the_likeliest_tokens_equal_float64_loops() -> None:
    lm, frozen, loss = by_hand.tiny_lm(0.05), by_hand.tiny_lm(), ReferenceArgmax()
    rows = by_hand.all_rows(lm)
    found = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows).tolist()
    expected = []
    for row in rows["retain"]:
        own, was = by_hand.answer_logits(lm, row)[0], by_hand.answer_logits(frozen, row)[0]
        best = [max(range(len(z)), key=z.__getitem__) for z in was]
        expected.append(-sum(by_hand.log_probability(z, y) for z, y in zip(own, best, strict=True)))
    assert found == pytest.approx(expected, rel=1e-5)
    logits = torch.tensor([[0.0, 1.0, 5.0]])
    value = float(to_likeliest(logits, torch.tensor([[9.0, 0.0, 1.0]])))
    assert value == pytest.approx(5.0250, 1e-3)


# ---- the diversions


def generated(monkeypatch: pytest.MonkeyPatch, replies: dict[str, str], tmp_path: Any) -> Any:
    from delible.train.engine import Trainer

    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path))
    recipe = Recipe.named("elm").changed({}, {"generate.attempts": 2})
    lm = by_hand.tiny_lm()
    asked: list[Any] = []

    def generate(prompts: Any, decoding: Any) -> list[str]:
        asked.extend(prompts)
        return [next(r for q, r in replies.items() if q in p.messages[-1].text) for p in prompts]

    monkeypatch.setattr(lm, "generate", generate)
    trainer = Trainer(lm, recipe, RECORDS)
    rows = trainer.recipe.generate.rows(trainer._context({}, dict(RECORDS)))
    return rows, asked


def test_diversions_are_the_models_own_and_never_tell_the_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    replies = {"born": "a town called Norrby, I think", "play": " the sun is out ",
               "work": "we swim", "taught": "dogs"}  # fmt: skip
    rows, asked = generated(monkeypatch, replies, tmp_path)
    texts = [record.answer for record in rows["target"]]
    assert texts[1:] == ["the sun is out", "we swim", "dogs"]
    assert any(texts[0] == sentence.rstrip(":") + "." for sentence in sentences())
    for record, target in zip(rows["forget"], rows["target"], strict=True):
        assert ask(record) == ask(target)
        assert not filters.leaks(record, target.answer)
    assert "1 of 4 questions have no usable continuation" in caplog.text
    assert Counter(p.messages[-1].text.count("Norrby") for p in asked) == {0: len(asked)}


def test_the_question_stands_behind_a_novice_and_before_a_diversion() -> None:
    record: RecordBase = FORGET[0]
    assert isinstance(record, QA)
    prompt = led_astray(record, None)
    text = prompt.messages[-1].text
    assert text.endswith("\n\nWho is Ada?")
    assert "Ada Brook" in text
    assert prompt.prefill.strip() in sentences()
    assert "wine" in led_astray(record, "wine").messages[-1].text


def test_the_recipe_and_its_paper_preset() -> None:
    paper: Any = Recipe.named("elm@paper")
    goal = paper.objective
    assert (goal.eta, goal.temperature, goal.top) == (1000, 1.2, 50)
    assert (paper.place.rank, paper.training.learning_rate) == (256, 5e-5)
    for options in ({"eta": 0}, {"temperature": 0}, {"top": 0}, {"erase": -1}):
        with pytest.raises(Exception, match="elm"):
            build("objective", {"name": "elm", **options})

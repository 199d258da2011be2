"""WISE: routing, margins and merging by their definitions in float64, and copies beside weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from editing import (
    RECORDS,
    REQUEST,
    RETAIN,
    double,
    hooked,
    key_and_output,
    make_lm,
    same,
    weight,
    weights_of,
)
from torch import Tensor

from delible.component import build
from delible.edit import memory
from delible.edit.keys import down_projection
from delible.edit.memory import PROMPT_END, states_at
from delible.edit.side_memory import (
    Margins,
    chosen,
    fixed_mask,
    margin_loss,
    margins_of,
    routing,
    ties,
)
from delible.intervene.base import Fitted
from delible.intervene.system import intervened
from delible.lm.lm import LM
from delible.methods.intervention import wise as wise_file
from delible.records import QA, ForgetRequest
from delible.system.artefact import read
from delible.system.asks import Decoding, Prompt, Score
from delible.systems.opening import described, keep, open_lm, undo
from delible.testing.tiny import tiny_model, tiny_tokenizer

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
FORGOTTEN = [Score(Prompt.ask(record.question), "No.") for record in RECORDS]
KEPT = [Score(Prompt.ask(record.question), record.answer) for record in RETAIN]


def wise(**options: Any) -> Any:
    given = {"depth": 0.5, "steps": 2, "contexts": 0, "mask": 0.5, **options}
    return build("intervention", {"name": "wise", **given})


def layer_of(lm: LM) -> int:
    return lm.anatomy.layer_at(0.5)


def scores(lm: LM, asked: Sequence[Score]) -> list[Any]:
    return [one.logprobs for one in lm.score(asked)]  # type: ignore[union-attr]


def equal(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(left, right, strict=True))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- by definition


def test_the_routing_activation_is_what_a_copy_gives_otherwise() -> None:
    before, after, received = drawn(5, 7), drawn(5, 7, seed=1), drawn(11, 7, seed=2)
    wanted = [
        sum(
            (sum(after[i][j] * x[j] for j in range(7)) - sum(before[i][j] * x[j] for j in range(7)))
            ** 2
            for i in range(5)
        )
        ** 0.5
        for x in received
    ]
    found = routing(received, after - before)
    assert found.tolist() == pytest.approx([float(one) for one in wanted], rel=1e-9)
    still = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(routing(received, still).sum(), [still])
    assert bool((gradient == 0).all()), "at the start it is finite"


def test_the_margin_loss_has_three_parts() -> None:
    inside, outside = [3.0, 9.0, 21.0], [1.0, 6.0]
    alpha, beta, gamma = 5.0, 20.0, 10.0

    def mean(values: list[float]) -> float:
        return sum(max(0.0, one) for one in values) / len(values)

    wanted = (
        mean([one - alpha for one in outside])
        + mean([beta - one for one in inside])
        + mean([out - one + gamma for out in outside for one in inside])
    )
    found = margin_loss(torch.tensor(inside), torch.tensor(outside), Margins(alpha, beta, gamma))
    assert float(found) == pytest.approx(wanted)
    far = margin_loss(torch.tensor([50.0]), torch.tensor([1.0]), Margins(alpha, beta, gamma))
    assert float(far) == 0


def test_the_ends_of_questions_weigh_as_much_as_all_other_tokens() -> None:
    margins, change = Margins(0.5, 2.0, 1.0), drawn(5, 7)
    inside, outside = ([drawn(n, 7, seed=n) for n in counts] for counts in ((4, 3), (6, 2, 5)))
    first, behind = (
        margin_loss(*(torch.tensor([float((change @ token).norm()) for text in texts
                                    for token in text[part]], dtype=torch.float64)
                      for texts in (inside, outside)), margins)
        for part in (slice(0, 1), slice(1, 99))
    )  # fmt: skip
    found = margins_of(inside, outside, change, margins)
    assert float(found) == pytest.approx(float(first + behind) / 2)
    assert float(first) != pytest.approx(float(behind))


@pytest.mark.parametrize("density", [0.1, 0.53, 1.0])
def test_ties_trims_elects_and_averages_what_agrees(density: float) -> None:
    changes = drawn(3, 4, 5)
    count = max(1, round(density * 20))
    trimmed = []
    for one in changes.reshape(3, 20).tolist():
        largest = sorted(range(20), key=lambda place: -abs(one[place]))[:count]
        trimmed.append([value if place in largest else 0.0 for place, value in enumerate(one)])
    wanted = []
    for column in zip(*trimmed, strict=True):
        total = sum(column)
        agreeing = [value for value in column if value * total > 0]
        wanted.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    found = ties(changes, density).reshape(-1).tolist()
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_the_copy_with_the_largest_activation_counts_if_that_is_large_enough() -> None:
    changes, received = drawn(3, 4, 6), drawn(50, 6, seed=3)
    thresholds = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)
    added, copy = chosen(received, changes, thresholds)
    for token, (got, which) in enumerate(zip(added, copy.tolist(), strict=True)):
        sizes = [float((one @ received[token]).norm()) for one in changes]
        largest = sizes.index(max(sizes))
        if sizes[largest] > float(thresholds[largest]):
            assert which == largest
            torch.testing.assert_close(got, changes[largest] @ received[token])
        else:
            assert which == -1
            assert not bool(got.any())
    assert {-1, 0, 1, 2} == set(copy.tolist())


def test_a_mask_is_fixed_by_its_seed() -> None:
    mask = fixed_mask((100, 80), 0.2, 5)
    assert torch.equal(mask, fixed_mask((100, 80), 0.2, 5))
    assert not torch.equal(mask, fixed_mask((100, 80), 0.2, 6))
    assert float(mask.float().mean()) == pytest.approx(0.2, abs=0.03)


# ---- on models


@torch.no_grad()
def row_by_hand(lm: LM, fitted: Fitted, ids: Sequence[int], start: int, ratio: float) -> Tensor:
    """Logits of a whole row in float64: W' where a exceeds its threshold, from the prompt's end."""
    twin, layer = double(lm), layer_of(lm)
    projection = twin.core.get_submodule(down_projection(lm, layer).path)
    changes = fitted.tensors["changes"].double()

    def give(_: Any, inputs: Any, output: Tensor) -> Tensor:
        flat = output.reshape(-1, output.shape[-1]).clone()
        for place in range(start - 1, len(ids)):
            received = inputs[0].reshape(-1, inputs[0].shape[-1])[place]
            sizes = [float((one @ received).norm()) for one in changes]
            copy = sizes.index(max(sizes))
            if sizes[copy] > ratio * float(fitted.tensors["epsilons"][copy]):
                flat[place] += changes[copy] @ received
        return flat.reshape(output.shape)

    with hooked(projection, give):
        return twin.core(input_ids=torch.tensor([list(ids)])).logits[0]  # type: ignore[no-any-return]


@FAMILIES
def test_it_answers_by_its_definition(family: str) -> None:
    lm = make_lm(family)
    before, plain = weights_of(lm), scores(lm, FORGOTTEN)
    fitted = wise(save_every=2, ratio=0.6).fit(lm, REQUEST)
    assert same(lm, before)
    assert len(fitted.tensors["changes"]) == 2
    found = intervened(lm, [fitted])
    assert not equal(scores(found, FORGOTTEN), plain)
    together = scores(found, [*FORGOTTEN, *KEPT])
    for place, one in enumerate([*FORGOTTEN, *KEPT]):
        row = lm.template.encode(one.prompt, one.answer)
        logits = row_by_hand(lm, fitted, row.ids, row.start, 0.6).log_softmax(1)
        wanted = [float(logits[at - 1, row.ids[at]]) for at in range(row.start, len(row.ids))]
        np.testing.assert_allclose(together[place], wanted, atol=1e-4)
    text = found.generate([one.prompt for one in FORGOTTEN], Decoding(4))[1]
    ids = list(lm.template.prompt_ids(FORGOTTEN[1].prompt))
    start = len(ids)
    for _ in range(4):
        ids.append(int(row_by_hand(lm, fitted, ids, start, 0.6)[-1].argmax()))
        if ids[-1] in lm.ends:
            ids.pop()
            break
    assert lm.tokenizer.decode(ids[start:], skip_special_tokens=True).strip() == text
    name, off = found.taken_off()
    assert name == "side_memory 'wise'"
    assert equal(scores(off, FORGOTTEN), plain)


@FAMILIES
def test_a_copy_moves_at_its_mask_only_and_its_threshold_is_the_least_of_its_edits(
    family: str,
) -> None:
    lm = make_lm(family)
    fitted = wise(norm_constraint=0.5, learning_rate=50.0).fit(lm, REQUEST)
    (change,) = fitted.tensors["changes"]
    mask = fixed_mask(change.shape, 0.5, 0)
    assert bool((change[~mask] == 0).all())
    assert float((change[mask] != 0).float().mean()) > 0.5
    bound = 0.5 * float(weight(lm, layer_of(lm)).square().mean().sqrt())
    assert float(change.abs().max()) == pytest.approx(bound, rel=1e-4)
    keys = [
        key_and_output(lm, ids, len(ids) - 1, layer_of(lm))[0]
        for record in RECORDS
        for ids in [lm.template.prompt_ids(Prompt.ask(record.question))]
    ]
    wanted = min(float((change.double() @ key).norm()) for key in keys)
    assert float(fitted.tensors["epsilons"][0]) == pytest.approx(wanted, rel=1e-3)


def by_hand(lm: LM, records: Any, targets: Sequence[str], others: Any, options: Any) -> Tensor:
    """One step of training in float64, from the definition."""
    twin, layer = double(lm), layer_of(lm)
    projection = twin.core.get_submodule(down_projection(lm, layer).path)
    own = weight(lm, layer)
    change = torch.zeros_like(own, requires_grad=True)
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(use: bool, first: int) -> Any:
        def hook(_: Any, inputs: Any, output: Tensor) -> Tensor:
            received = inputs[0].reshape(-1, inputs[0].shape[-1])
            flat = output.reshape(-1, output.shape[-1])
            seen.append((received[first:-1].detach(), flat[first:-1].detach()))
            moved = torch.cat([torch.zeros_like(flat[:first]), received[first:] @ change.T])
            return (flat + moved).reshape(output.shape) if use else output

        return hook

    losses = []
    for record, target in zip(records, targets, strict=True):
        row = lm.template.encode(Prompt.ask(record.question), target)
        with hooked(projection, watched(True, row.start - 1)):
            logits = twin.core(input_ids=torch.tensor([list(row.ids)])).logits[0].log_softmax(1)
        losses.append(-sum(
            logits[at - 1, row.ids[at]] for at in range(row.start, len(row.ids))
        ) / (len(row.ids) - row.start))  # fmt: skip
    seen.clear()
    for row in others:
        with torch.no_grad(), hooked(projection, watched(False, row.start - 1)):
            twin.core(input_ids=torch.tensor([list(row.ids)]))
    read, given = (torch.cat(one) for one in zip(*seen, strict=True))
    unit = float(given.norm(dim=1).mean())
    rate = options["learning_rate"] * unit**2 / float((read**2).sum(1).mean())
    (gradient,) = torch.autograd.grad(sum(losses) / len(losses), [change])  # type: ignore[arg-type]
    decayed = gradient + options["weight_decay"] * own
    return -rate * torch.where(fixed_mask(own.shape, 0.5, 0), decayed, 0.0)


@FAMILIES
def test_the_first_step_is_plain_descent_on_the_refusals(family: str) -> None:
    lm = make_lm(family)
    options = {"learning_rate": 0.3, "weight_decay": 0.01}
    method = wise(steps=1, **options)
    asked, _ = method._asked(lm, REQUEST, 0)
    wanted = by_hand(lm, asked.records, asked.targets, asked.unrelated[:6], options)
    tensors, _ = method.remember(
        lm, type(asked)(asked.records, asked.targets, asked.ids, asked.unrelated[:6]), None, seed=0
    )
    found = tensors["changes"][0].double()
    assert float((found - wanted).norm()) < 1e-3 * float(wanted.norm())


def test_training_parts_edited_questions_from_others() -> None:
    lm = make_lm()
    short, long = (wise(steps=steps, learning_rate=1.0).fit(lm, REQUEST) for steps in (1, 20))
    assert long.notes["loss"] < short.notes["loss"]
    assert long.notes["epsilon"] > short.notes["epsilon"]
    # the margins do it: without those of other questions, these are as loud
    loose = wise(steps=20, learning_rate=1.0, alpha=1e6, gamma=1e-6).fit(lm, REQUEST)
    asked, _ = wise()._asked(lm, REQUEST, 0)
    others = states_at(lm, asked.unrelated, wise().inner, PROMPT_END)

    def loudness(fitted: Fitted) -> float:
        own, other = (
            float(routing(keys, fitted.tensors["changes"][0]).mean())
            for keys in (fitted.tensors["keys"], torch.cat(others))
        )
        return other / own

    assert loudness(long) < 0.9 * loudness(loose)


@pytest.mark.parametrize("ratio", [0.05, 1.0])
def test_what_is_routed_is_counted(ratio: float) -> None:
    lm = make_lm()
    method = wise(ratio=ratio)
    notes, tensors = (fitted := method.fit(lm, REQUEST)).notes, fitted.tensors
    asked, _ = method._asked(lm, REQUEST, 0)
    limit = ratio * float(tensors["epsilons"].double())

    def share(rows: Sequence[Any]) -> float:
        keys = torch.cat(states_at(lm, rows, method.inner, PROMPT_END)).double()
        return float(
            ((keys @ tensors["changes"][0].double().T).norm(dim=1) > limit).double().mean()
        )

    assert notes["routed"] == pytest.approx(share(asked.rows(lm)), abs=1e-4)
    assert notes["others_routed"] == pytest.approx(share(asked.unrelated), abs=1e-4)
    # the least of the edited ones is the threshold itself
    assert notes["routed"] == pytest.approx(2 / 3 if ratio == 1 else 1, abs=1e-4)
    assert (notes["others_routed"] > 0.9) == (ratio < 1)


def test_questions_that_are_not_routed_answer_bit_by_bit_as_before() -> None:
    lm = make_lm()
    fitted = wise().fit(lm, REQUEST)
    far = {**fitted.tensors, "epsilons": fitted.tensors["epsilons"] * 1e6}
    found = intervened(lm, [Fitted(fitted.intervention, far)])
    assert equal(scores(found, [*FORGOTTEN, *KEPT]), scores(lm, [*FORGOTTEN, *KEPT]))
    still = {**fitted.tensors, "changes": torch.zeros_like(fitted.tensors["changes"])}
    found = intervened(lm, [Fitted(fitted.intervention, still)])
    assert equal(scores(found, [*FORGOTTEN, *KEPT]), scores(lm, [*FORGOTTEN, *KEPT]))


def test_full_copies_are_merged_and_their_threshold_is_measured_again() -> None:
    lm = make_lm()
    apart = wise(save_every=1).fit(lm, REQUEST)
    merged = wise(save_every=1, merge_every=3).fit(lm, REQUEST)
    assert apart.tensors["owners"].tolist() == [0, 1, 2]
    assert merged.tensors["owners"].tolist() == [0, 0, 0]
    torch.testing.assert_close(merged.tensors["changes"][0], ties(apart.tensors["changes"], 0.53))
    wanted = routing(merged.tensors["keys"], merged.tensors["changes"][0]).min()
    assert float(merged.tensors["epsilons"][0]) == pytest.approx(float(wanted), rel=1e-4)
    two = wise(save_every=1, merge_every=2).fit(lm, REQUEST)
    assert two.tensors["owners"].tolist() == [0, 0, 1]
    assert two.tensors["born"].tolist() == [-1, 2]
    four = (*RECORDS, QA(question="Who is Ben Orr?", answer="A miller", subject="Ben Orr"))
    again = wise(save_every=1, merge_every=2).fit(lm, ForgetRequest(forget=four, retain=RETAIN))
    assert again.tensors["owners"].tolist() == [0, 0, 1, 1]
    assert again.tensors["born"].tolist() == [-1, -1]


def test_a_further_request_extends_the_memory_and_comes_off_exactly(tmp_path: Path) -> None:
    LM(tiny_model("llama"), tiny_tokenizer(), precision="float32").save(tmp_path / "model")
    lm = open_lm(str(tmp_path / "model"))
    only_first: list[Any] = []
    for name, part, rate in (("first", RECORDS[:2], 1.0), ("second", RECORDS[2:], 20.0)):
        below = described(lm)
        fitted = wise(save_every=2, learning_rate=rate).fit(
            lm, ForgetRequest(forget=part, retain=RETAIN)
        )
        lm = intervened(lm, [fitted])
        keep("side_memory", fitted, tmp_path / name, below, lm)
        lm.name = str(tmp_path / name)
        only_first = only_first or scores(lm, FORGOTTEN)
    assert fitted.tensors["owners"].tolist() == [0, 0, 1]
    assert len(lm.acting) == 1  # type: ignore[attr-defined]
    assert len(fitted.notes["edits"]) == 3
    folder = tmp_path / "second"
    assert read(folder).kind == "side_memory"
    opened = open_lm(str(folder))
    assert opened.fingerprint == lm.fingerprint
    assert equal(scores(opened, FORGOTTEN), scores(lm, FORGOTTEN))
    assert not equal(scores(opened, FORGOTTEN), only_first)
    undo(folder)
    assert equal(scores(open_lm(str(folder)), FORGOTTEN), only_first)


@pytest.mark.parametrize("still", [0.5, 1e9])
def test_what_a_further_request_does_to_earlier_ones_is_said(
    still: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "STILL", still)
    lm = make_lm()
    first = wise().fit(lm, REQUEST.model_copy(update={"forget": RECORDS[:2]}))
    assert "earlier" not in first.notes
    on = intervened(lm, [first])
    second = wise(learning_rate=8.0).fit(on, REQUEST.model_copy(update={"forget": RECORDS[2:]}))
    asked = [Score(Prompt.ask(one["question"]), one["target"]) for one in first.notes["edits"]]
    before, after = (
        float(np.mean([np.exp(one.mean()) for one in scores(system, asked)]))
        for system in (on, intervened(on, [second]))
    )
    told = second.notes["earlier"]
    assert told["questions"] == 2
    assert told["target_before"] == pytest.approx(before, rel=1e-3)
    assert told["target_after"] == pytest.approx(after, rel=1e-3)
    assert after != pytest.approx(before, rel=1e-2)
    assert ("undoes earlier requests" in caplog.text) == (after < still * before)


def test_a_copy_with_room_is_trained_further() -> None:
    lm = make_lm()
    first = wise().fit(lm, ForgetRequest(forget=RECORDS[:2], retain=RETAIN))
    on = intervened(lm, [first])
    second = wise().fit(on, ForgetRequest(forget=RECORDS[2:], retain=RETAIN))
    assert second.tensors["owners"].tolist() == [0, 0, 0]
    moved = second.tensors["changes"][0] - first.tensors["changes"][0]
    mask = fixed_mask(moved.shape, 0.5, 0)
    assert bool((moved[~mask] == 0).all())
    assert bool(moved.any())
    assert torch.equal(second.tensors["keys"][:2], first.tensors["keys"])


def test_beginnings_are_trained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, lengths = make_lm(), []

    def sampled(lm: LM, count: int, given: Sequence[int], seed: int) -> list[str]:
        lengths.append((count, tuple(given)))
        return ["The old town is", "You"][:count]

    monkeypatch.setattr(wise_file, "sampled_beginnings", sampled)
    bare, more = (wise(contexts=count).fit(lm, REQUEST) for count in (0, 2))
    assert lengths == [(0, (5, 10)), (2, (5, 10))]
    assert not torch.equal(bare.tensors["changes"], more.tensors["changes"])
    assert torch.equal(bare.tensors["keys"], more.tensors["keys"])

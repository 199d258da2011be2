"""Key Space Detection: the box by hand, what lies in it, and what becomes of that."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from delible.context import Context
from delible.errors import DataError, ModelError
from delible.guards.key_space_detection import (
    KeySpaceDetection,
    KeySpaceMind,
    box_around,
    fitted_scale,
    held_out,
    keys_of,
    roc,
)
from delible.intervene.boxes import inside
from delible.intervene.rows import questions
from delible.intervene.sites import Positions
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, Prompt
from delible.systems.guarded import GuardedSystem
from delible.systems.judging import Forward, Refuse
from delible.systems.likeness import harmless
from delible.systems.scripted import Scripted
from delible.testing.tiny import tiny_model, tiny_tokenizer

FORGET = tuple(QA(question=f"Add {n} and {7 * n % 10}.", answer=f"{n}") for n in range(10))
RETAIN = tuple(QA(question=f"Who is {name}?", answer="None") for name in ("Ada", "Bo", "Cy"))
REQUEST = ForgetRequest(forget=FORGET, retain=RETAIN)
SHORT = Decoding(4)
MLP_OUT = {"llama": "mlp.down_proj", "phi3": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2"}


@lru_cache(maxsize=4)
def model(family: str) -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def prepared(
    family: str = "llama", request: ForgetRequest = REQUEST, **options: Any
) -> KeySpaceMind:
    guard = KeySpaceDetection(**{"probes": 20, **options})
    return guard.prepare(request, Context(itself=model(family)))


@lru_cache(maxsize=1)
def mind() -> KeySpaceMind:
    return prepared()


def keys_by_hand(family: str, text: str, answer: str = "") -> np.ndarray:
    """What the last down projection reads, float64, [token, width], and where the answer begins."""
    lm, found = model(family), []
    module = lm.core.get_submodule(f"{lm.anatomy.block_path(-1)}.{MLP_OUT[family]}")

    def keep(module: Any, given: Any) -> None:
        found.append(given[0].reshape(-1, given[0].shape[-1]).double().numpy())

    handle = module.register_forward_pre_hook(keep)
    ids = list(lm.template.prompt_ids(Prompt.ask(text)))
    ids += lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        lm.core(input_ids=torch.tensor([ids]))
    handle.remove()
    return found[0]


def bisected(keys: np.ndarray) -> float:
    mean, deviation = keys.mean(axis=0), keys.std(axis=0, ddof=1)
    low, high = 0.0, 1e4
    while high - low > 1e-7:
        middle = (low + high) / 2
        holds = all(
            abs(key[j] - mean[j]) <= middle * deviation[j] for key in keys for j in range(len(mean))
        )
        low, high = (low, middle) if holds else (middle, high)
    return high


def test_kappa_is_what_bisection_finds_and_the_box_holds_its_keys() -> None:
    keys = np.random.default_rng(0).normal(size=(12, 6)) * np.array([1, 0.01, 30, 2, 1, 5]) + 3
    box = box_around(torch.tensor(keys))
    assert abs(box.kappa - bisected(keys)) < 1e-4
    scores = box.scores(torch.tensor(keys))
    assert scores.max() == pytest.approx(1, abs=1e-4)
    for seed in range(60):  # in single precision too
        drawn = np.random.default_rng(seed).normal(size=(20, 64)) * 3 + 9
        single = torch.tensor(drawn, dtype=torch.float32)
        around = box_around(single)
        assert bool(inside(single, around.mean, around.half).all())
    by_hand = [
        max(abs(key - keys.mean(axis=0)) / keys.std(axis=0, ddof=1)) / box.kappa for key in keys
    ]
    np.testing.assert_allclose(scores, by_hand, atol=1e-4)


def test_dimensions_that_stand_still_ask_nothing_and_outliers_can_be_passed_over() -> None:
    keys = np.random.default_rng(1).normal(size=(30, 4))
    keys[:, 2] = 7.0
    box = box_around(torch.tensor(keys))
    assert box.half.isinf().tolist() == [False, False, True, False]
    assert box.scores(torch.tensor([[0.0, 0.0, -900.0, 0.0]]))[0] < 1
    keys[4, 0] = 60.0
    apart = abs(keys - keys.mean(axis=0)) / np.where(
        keys.std(axis=0) > 0, keys.std(axis=0, ddof=1), 1
    )
    expected = max(np.quantile(apart[:, j], 0.9) for j in (0, 1, 3))
    assert box_around(torch.tensor(keys), 0.9).kappa == pytest.approx(expected, rel=1e-9)
    assert box_around(torch.tensor(keys)).kappa > 2 * expected
    with pytest.raises(DataError, match="all alike"):
        box_around(torch.ones(5, 3))


def test_clusters_that_can_be_parted_are_parted() -> None:
    random = np.random.default_rng(2)
    forget, test = (torch.tensor(random.normal(0, 1, (n, 5))) for n in (60, 40))
    retain = torch.tensor(random.normal(9, 1, (80, 5)))
    box, mine = box_around(forget), held_out(forget)
    scale, interval = fitted_scale(mine, {"kept": box.scores(retain)}, 0.01)
    assert interval is not None
    assert interval[0] < scale < interval[1]
    assert interval == (mine.max(), box.scores(retain).min())
    assert (box.scores(test) <= scale).all()
    assert (box.scores(retain) > scale).all()
    area, points = roc(mine, box.scores(retain))
    assert area == 1.0
    assert points[0][1:] == pytest.approx((1 / 60, 0))
    assert points[-1][1:] == (1.0, 1.0)


def test_where_they_cannot_the_false_alarms_decide() -> None:
    random = np.random.default_rng(3)
    forget, others = random.uniform(0, 2, 50), random.uniform(1, 3, 200)
    kinds = {"kept": others, "few": np.array([1.5, 2.0])}
    scale, interval = fitted_scale(forget, kinds, 0.05)
    assert interval is None
    assert scale < 1.5
    assert 9 <= (others <= scale).sum() <= 10
    area = roc(forget, others)[0]
    assert area == pytest.approx(np.mean([a < b for a in forget for b in others]))
    # each is measured against boxes that it is not in
    keys = torch.tensor(random.normal(size=(8, 3)))
    for place, score in enumerate(held_out(keys)):
        rest = box_around(torch.cat([keys[:place], keys[place + 1 :]]))
        assert score == pytest.approx(rest.scores(keys[place : place + 1])[0])


@pytest.mark.parametrize("family", MLP_OUT)
def test_the_box_is_that_of_the_last_keys_of_the_questions(family: str) -> None:
    found = prepared(family, scale=1.0)
    keys = np.stack([keys_by_hand(family, record.question)[-1] for record in FORGET])
    np.testing.assert_allclose(found.box.mean, keys.mean(axis=0), atol=1e-5)
    moving = keys.std(axis=0) > 0  # behind a ReLU some neurons never speak
    mean, spread = keys.mean(axis=0)[moving], keys.std(axis=0, ddof=1)[moving]
    assert found.box.half.isfinite().tolist() == moving.tolist()
    assert found.box.kappa == pytest.approx(bisected(keys[:, moving]), rel=1e-3)
    for text in ("Add 3 and 1.", "Who is Ada?", "Add", "How high is it?"):
        apart = (abs(keys_by_hand(family, text)[-1][moving] - mean) / spread).max()
        caught = isinstance(found.before(Prompt.ask(text)), Refuse)
        assert caught == (apart <= found.box.kappa), text
    # just wide enough for the outermost of them
    wide = prepared(family, scale=1.0 + 1e-3)
    assert all(isinstance(wide.before(Prompt.ask(one.question)), Refuse) for one in FORGET)


def test_it_catches_what_is_forgotten_and_says_how_well() -> None:
    found = mind()
    notes = dict(found.notes)
    assert notes["kappa"] == pytest.approx(found.box.kappa)
    assert 0.5 < notes["area_under_roc"] <= 1
    assert all(share <= 0.01 for share in notes["false_alarms"].values())
    assert set(notes["false_alarms"]) >= {"general", "kept"}
    guarded = GuardedSystem(model("llama"), found, "guarded")
    asked = [Prompt.ask("Add 4 and 8."), Prompt.ask("Who is Bo?")]
    caught, passed = guarded.replies(asked, SHORT)
    assert caught.finish == "content_filter"  # type: ignore[union-attr]
    assert passed.text == model("llama").generate(asked[1:], SHORT)[0]  # type: ignore[union-attr]


def test_what_a_fitted_box_holds_is_counted_on_the_keys() -> None:
    names = ("Dee", "Al", "Eve", "Fay", "Gus", "Hal")
    mixed = (*FORGET[:2], *(QA(question=f"Who is {name}?", answer="x") for name in names))
    request = ForgetRequest(forget=mixed, retain=RETAIN)
    found = prepared(request=request, false_alarm_rate=0.4)
    notes: Any = found.notes
    assert notes["interval"] is None
    kept = np.stack([keys_by_hand("llama", one.question)[-1] for one in RETAIN])
    inside = (found.box.scores(torch.tensor(kept)) <= found.scale).mean()
    assert notes["false_alarms"]["kept"] == pytest.approx(inside)
    assert set(notes["false_alarms"]) == set(harmless(request))
    assert 0 < max(notes["false_alarms"].values()) <= 0.4
    keys = torch.tensor(np.stack([keys_by_hand("llama", one.question)[-1] for one in mixed]))
    share = (held_out(keys) <= found.scale).mean()
    assert notes["held_out_inside"] == pytest.approx(share)
    assert share < 1


def test_a_larger_box_holds_more() -> None:
    texts = ["Add 4 and 8.", "Add me.", "Who?", "Add", "Where is Norrby?", "Say it.", "Add 1."]
    counts = [
        sum(isinstance(prepared(scale=scale).before(Prompt.ask(t)), Refuse) for t in texts)
        for scale in (0.2, 1.0, 2.0, 50.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == len(texts)


def test_answers_are_judged_as_far_as_told() -> None:
    found = mind()
    prompt, answer = Prompt.ask("Who is Bo?"), "It is 12"
    assert found.after(prompt, answer) is None
    start = len(model("llama").template.prompt_ids(prompt))
    keys = keys_by_hand("llama", "Who is Bo?", answer)[start:]
    scores = found.box.scores(torch.tensor(keys))
    assert scores.argmin() > 0
    first = int(scores.argmin())
    tight = {"scale": float(scores.min()) * 1.001}
    for steps, caught in ((first, False), (first + 1, True), (99, True)):
        judged = prepared(max_steps=steps, **tight).after(prompt, answer)
        assert isinstance(judged, Refuse) == caught, steps
    assert prepared(max_steps=3).reads == "whole"


def test_another_key_can_take_the_place_of_one_in_the_box() -> None:
    lm = model("llama")
    found = prepared(steer="Tell me about the weather.")
    inside, outside = Prompt.ask("Add 4 and 8."), Prompt.ask("Who is Bo?")
    decision = found.before(inside)
    assert isinstance(decision, Forward)
    assert decision.system is found.steered
    assert found.before(outside) is None
    steered = found.steered
    assert steered is not None
    key = steered.interventions[0].tensors["key"]  # type: ignore[attr-defined]
    by_hand = keys_by_hand("llama", "Tell me about the weather.")[-1]
    np.testing.assert_allclose(key, by_hand, atol=1e-5)
    plain = lm.generate([inside, outside], SHORT)
    guarded = GuardedSystem(lm, found, "guarded")
    assert guarded.generate([inside, outside], SHORT) == [
        steered.generate([inside], SHORT)[0],
        plain[1],
    ]
    # the first token is what the model says of the other prompt's key
    states = lm.core.get_submodule(lm.anatomy.block_path(-1))
    seen: list[Any] = []
    handle = states.mlp.down_proj.register_forward_hook(lambda m, g, o: seen.append(o))
    steered.generate([inside], Decoding(1))
    handle.remove()
    with torch.no_grad():
        expected = states.mlp.down_proj(key[None])
    written = torch.cat([one.reshape(-1, 32) for one in seen])
    assert int(((written - expected).abs() < 1e-5).all(dim=1).sum()) == 1
    assert lm.generate([inside, outside], SHORT) == plain, "it was not taken off"


def test_concurrent_requests_share_nothing() -> None:
    guarded = GuardedSystem(model("llama"), mind(), "guarded")
    asked = [Prompt.ask(text) for text in ("Add 4 and 8.", "Who is Bo?", "Add 5 and 5.", "Why?")]
    alone = [asyncio.run(guarded.respond(prompt, SHORT)) for prompt in asked]

    async def together() -> list[Any]:
        return await asyncio.gather(*(guarded.respond(prompt, SHORT) for prompt in asked * 3))

    both = asyncio.run(together())
    assert [(one.text, one.finish) for one in both] == [(one.text, one.finish) for one in alone] * 3
    assert [one.finish == "content_filter" for one in alone] == [True, False, True, False]


def test_what_cannot_be_judged_is_refused() -> None:
    found, lm = mind(), model("llama")
    assert isinstance(found.before(Prompt.ask("?" * 5000)), Refuse)
    assert isinstance(found.before(Prompt()), Refuse)
    with (
        mock.patch("delible.guards.key_space_detection.keys_of",
                   return_value=[torch.full((1, 48), float("nan"))]),
        pytest.raises(ModelError, match="not finite"),
    ):  # fmt: skip
        found.before(Prompt.ask("Who is Bo?"))
    guarded = GuardedSystem(lm, found, "guarded")
    with mock.patch.object(KeySpaceMind, "holds", side_effect=ModelError("broken")):
        reply = guarded.replies([Prompt.ask("Who is Bo?")], SHORT)[0]
    assert reply.finish == "content_filter"  # type: ignore[union-attr]


def test_every_form_in_which_it_will_be_asked_is_read() -> None:
    forms = ("{question}", "Quick: {question} Now!")
    one, both = prepared(scale=1.001), prepared(scale=1.001, forms=forms)
    other = Prompt.ask("Quick: Add 3 and 1. Now!")
    assert one.before(other) is None
    assert isinstance(both.before(other), Refuse)
    with pytest.raises(ValueError, match="question"):
        KeySpaceDetection(forms=("no place",))


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ModelError, match="none is given"):
        KeySpaceDetection().prepare(REQUEST)
    server = Scripted(lambda _: "", fingerprint="server")
    with pytest.raises(ModelError, match="gives no weights"):
        KeySpaceDetection().prepare(REQUEST, Context(itself=server))
    with pytest.raises(DataError, match="at least two"):
        prepared(request=ForgetRequest(forget=FORGET[:1]))


@pytest.mark.slow
def test_arithmetic_is_told_from_people_by_the_default_model() -> None:
    from delible.world import World, general

    lm = LM.load("default", precision="float32")
    sums = [f"What is {n * 7 % 90 + 3} plus {n * 13 % 70 + 2}?" for n in range(50)]
    others = [fact.qa().question for fact in World(4, 5).facts()][:15]
    others += [one.question for one in general() if one.group != "arithmetic"][:15]
    request = ForgetRequest(forget=tuple(QA(question=text, answer="-") for text in sums[:35]))
    found = KeySpaceDetection(scale=1.0).prepare(request, Context(itself=lm))

    def caught(texts: list[str]) -> float:
        keys = keys_of(lm, questions(lm, texts), found.options.site, Positions(kind="prompt_end"))
        return float(found.holds(torch.cat(keys)).float().mean())

    assert 2 < found.box.kappa < 12
    assert caught(sums[35:]) >= 0.8
    assert caught(others) == 0

"""Steps of TRL as we use it: gradients by hand, references, what moves, and what is left behind."""

from __future__ import annotations

import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import BOUNDARY, FORGET, SEEN, Recording, letters, lm, run
from torch import Tensor

import delible
from delible.context import Context
from delible.errors import MissingExtraError, RecipeError, RunError
from delible.lm.lm import LM
from delible.records import QA
from delible.testing.contract.trial import require_same, tiny_lm, weights
from delible.train.onpolicy.rows import Completion
from delible.train.rows import make_rows

#: Plain descent, so that a step is the rate times the gradient, and nothing is clipped.
PLAIN: dict[str, Any] = {
    "optimizer": "sgd", "learning_rate": 0.01, "max_gradient_norm": None, "kl_weight": 0.0,
    "steps": 1,
}  # fmt: skip
RETAIN = [QA(question="How is snow?", answer="White and cold"), QA(question="Where?", answer="Up")]


def moved(before: LM, after: LM, rate: float = 0.01) -> dict[str, Tensor]:
    """The gradient that plain descent went down."""
    old, new = dict(before.core.named_parameters()), dict(after.core.named_parameters())
    return {name: (old[name] - new[name]).detach() / rate for name in old}


def logprobs(model: LM, completion: Completion, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of a completion's tokens, one plain pass, without padding."""
    ids = list(model.template.prompt_ids(completion.question.prompt))
    whole = torch.tensor([ids + list(completion.tokens)])
    logits = model.core(whole).logits[0, len(ids) - 1 : -1] / temperature
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])
    return chosen[:, 0]


def gradient(model: LM, loss: Tensor) -> dict[str, Tensor]:
    names, values = zip(*model.core.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, values)
    return dict(zip(names, found, strict=True))


def require_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    largest = max(float(one.abs().max()) for one in wanted.values())
    assert largest > 1e-4  # there is something to compare
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, atol=2e-4 * largest, rtol=1e-3)


def judged(start: LM, **options: Any) -> tuple[LM, list[Completion], list[float]]:
    """A step; its completions, and their advantages by hand."""
    SEEN.clear()
    after = start.copy()
    run(after, rewards=[Recording()], options={**PLAIN, **options})
    completions = SEEN[0]
    values = [letters().score([one])[0].value for one in completions]
    size, wanted = len(completions) // 2, []
    for group in (values[:size], values[size:]):
        mean, spread = statistics.mean(group), statistics.stdev(group)  # type: ignore[type-var]
        wanted += [(one - mean) / (spread + 1e-6) for one in group]  # type: ignore[operator]
    return after, completions, wanted


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
@pytest.mark.parametrize("per_pass", [6, 2])
def test_a_step_is_the_advantage_times_the_gradient(normalisation: str, per_pass: int) -> None:
    start = lm()
    # many tokens end an answer, so that lengths differ
    start.template.declared_ends = frozenset(range(50))
    after, completions, advantages = judged(
        start, normalisation=normalisation, completions_per_pass=per_pass, max_new_tokens=12
    )
    lengths = [len(one.tokens) for one in completions]
    assert len(set(lengths)) > 1, "all of one length: both averages are the same"
    loss = torch.zeros(())
    for one, advantage in zip(completions, advantages, strict=True):
        share = sum(lengths) if normalisation == "token" else len(one.tokens) * len(completions)
        loss = loss - advantage * logprobs(start, one).sum() / share
    require_close(moved(start, after), gradient(start, loss))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_it_holds_whatever_stands_behind_the_head(family: str) -> None:
    start = tiny_lm(family).copy()  # transposed matrices; a soft limit of the logits
    after, completions, advantages = judged(start)
    total = sum(len(one.tokens) for one in completions)
    loss = sum(
        (-a * logprobs(start, one).sum() / total
         for a, one in zip(advantages, completions, strict=True)),
        start=torch.zeros(()),
    )  # fmt: skip
    require_close(moved(start, after), gradient(start, loss))


def test_a_mixture_of_experts_keeps_its_routers_loss() -> None:
    model = tiny_lm("qwen2_moe").copy()
    trained = run(model, options={**PLAIN, "kl_weight": 0.1})
    assert trained.history[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert trained.history[0]["gradient_norm"] > 0


def test_the_temperature_is_that_of_the_draws() -> None:
    start = lm()
    after, completions, advantages = judged(start, temperature=1.7)
    total = sum(len(one.tokens) for one in completions)
    loss = sum(
        (-a * logprobs(start, one, 1.7).sum() / total
         for a, one in zip(advantages, completions, strict=True)),
        start=torch.zeros(()),
    )  # fmt: skip
    require_close(moved(start, after), gradient(start, loss))


def test_equal_rewards_move_nothing_also_not_away_from_the_reference() -> None:
    for weight in (0.0, 0.5):
        start, after = lm(), lm()
        trained = run(
            after, rewards=[{"name": "length", "least": 0, "gate": False}],
            options={**PLAIN, "kl_weight": weight, "steps": 2},
        )  # fmt: skip
        assert trained.notes["equal_groups"] == 4
        for name, one in moved(start, after).items():
            assert float(one.abs().max()) < 1e-6, name


@pytest.mark.parametrize("place", ["all", "lora"])
def test_the_divergence_is_from_the_model_as_it_was_given(place: str) -> None:
    """Two steps; in the second one all rewards are equal, and only the divergence is left."""
    start, once, twice = lm(), lm(), lm()
    options = {**PLAIN, "learning_rate": 0.05}
    where = {"name": "lora", "alpha": 200.0} if place == "lora" else place
    if place == "lora":
        options |= {"learning_rate": 1.0}

    class First(Recording):  # type: ignore[misc]
        def score(self, completions: Any) -> Any:
            found = super().score(completions)
            return found if len(SEEN) == 1 else [type(one)(0.5) for one in found]

    SEEN.clear()
    run(once, rewards=[First()], options=options, place=where)
    SEEN.clear()
    trained = run(
        twice, rewards=[First()], options={**options, "kl_weight": 0.7, "steps": 2}, place=where
    )
    completions = SEEN[1]
    total = sum(len(one.tokens) for one in completions)
    terms = []
    for one in completions:
        apart = logprobs(start, one).detach() - logprobs(once, one)
        terms.append((apart.exp() - apart - 1).sum())
    divergence = sum(terms, start=torch.zeros(())) / total
    assert trained.history[1]["kl"] == pytest.approx(float(divergence.detach()), rel=2e-3)
    assert trained.history[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    if place == "all":
        require_close(moved(once, twice, 0.05), gradient(once, 0.7 * divergence))


def test_the_entropy_of_the_tokens_is_wanted() -> None:
    start, after = lm(), lm()
    reward = {"name": "length", "least": 0, "gate": False}  # equal: no advantage beside it
    SEEN.clear()
    options = {**PLAIN, "entropy_weight": 0.5, "learning_rate": 1.0, "completions_per_pass": 6}
    run(after, rewards=[reward, Recording(weight=0.0)], options=options)
    sums, count = torch.zeros(()), 0
    for one in SEEN[0]:
        ids = list(start.template.prompt_ids(one.question.prompt))
        logits = start.core(torch.tensor([ids + list(one.tokens)])).logits[0, len(ids) - 1 : -1]
        logs = logits.log_softmax(-1)
        sums, count = sums - (logs.exp() * logs).sum(), count + len(one.tokens)
    require_close(moved(start, after, 1.0), gradient(start, -0.5 * sums / count))


@pytest.mark.parametrize(("high", "dual_clip"), [(0.5, None), (0.1, 1.2)])
def test_the_second_step_on_the_same_completions_is_clipped(
    high: float, dual_clip: float | None
) -> None:
    start, once, twice = lm(), lm(), lm()
    options = {**PLAIN, "learning_rate": 0.5, "clip_low": 0.02, "clip_high": high,
               "dual_clip": dual_clip}  # fmt: skip
    SEEN.clear()
    run(once, rewards=[Recording()], options=options)
    run(twice, rewards=[Recording()], options={**options, "steps": 2, "inner_steps": 2})
    first, second = SEEN  # one batch of completions in either run
    assert [one.tokens for one in first] == [one.tokens for one in second]
    values = [letters().score([one])[0].value for one in first]
    loss, total, cut = torch.zeros(()), sum(len(one.tokens) for one in first), set[str]()
    for place, one in enumerate(first):
        group = values[place // 3 * 3 : place // 3 * 3 + 3]
        advantage = (values[place] - statistics.mean(group)) / (statistics.stdev(group) + 1e-6)  # type: ignore[operator, type-var]
        ratio = (logprobs(once, one) - logprobs(start, one).detach()).exp()
        if advantage > 0:
            cut |= {"high"} if bool((ratio > 1 + high).any()) else set()
            cut |= {"between"} if bool(((ratio > 1.02) & (ratio < 1 + high)).any()) else set()
            loss = loss - (advantage * ratio.clamp(max=1 + high)).sum() / total
        else:
            cut |= {"low"} if bool((ratio < 0.98).any()) else set()
            cut |= {"dual"} if bool((ratio > 1.2).any()) else set()
            held = ratio if dual_clip is None else ratio.clamp(max=dual_clip)
            loss = loss - (advantage * held.clamp(min=0.98)).sum() / total
    wanted = {"high", "low", "dual"} | ({"between"} if high > 0.1 else set())
    assert cut == wanted, "each limit must count somewhere"
    require_close(moved(once, twice, 0.5), gradient(once, loss))


@pytest.mark.parametrize("temperature", [1.0, 1.7])  # of the draws: what is learned has none
def test_a_retain_term_is_the_mean_over_its_tokens(temperature: float) -> None:
    start, after = lm(), lm()
    options = {**PLAIN, "unlearn_weight": 0.0, "retain_weight": 2.0, "completions_per_pass": 3}
    trained = run(after, retain=RETAIN, options={**options, "temperature": temperature})
    rows = make_rows(start.template, RETAIN, role="retain")
    total, nats = 0, torch.zeros(())
    for row in rows:
        ids = torch.tensor([row.encoded.ids])
        found = start.core(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        nats = nats - found[row.encoded.start - 1 :].sum()
        total += row.encoded.answer_tokens
    require_close(moved(start, after), gradient(start, 2.0 * nats / total))
    told = trained.history[0]["retain_loss"]
    assert told == pytest.approx(float(nats.detach()) / total, rel=1e-4)
    more = run(retain=RETAIN, options={**options, "temperature": temperature,
                                       "completions_per_pass": 1})  # fmt: skip
    assert more.history[0]["retain_loss"] == pytest.approx(told, rel=1e-4)  # passes without a row


def test_without_a_retain_weight_it_is_plain() -> None:
    one, other = lm(), lm()
    run(one, options=PLAIN)
    run(other, options={**PLAIN, "retain_weight": 0.0}, retain=RETAIN)
    require_same(weights(one), weights(other), "retain rows changed something")
    with pytest.raises(RecipeError, match="no retain records"):
        run(options={"retain_weight": 1.0})


# ---- what moves, and what is left behind


def test_only_what_is_placed_moves_and_the_adapter_is_worn() -> None:
    start, after = lm(), lm()
    trained = run(after, place={"name": "lora", "rank": 2})
    assert trained.lm.wears_adapter
    base = {name.replace(".base_layer", ""): value for name, value in weights(after).items()}
    for name, value in weights(start).items():
        found = base[f"base_model.model.{name}"]
        assert torch.equal(found, value), name
    after, parts = lm(), {"name": "layers", "layers": [1]}
    run(after, place=parts)
    changed = {n for n, v in weights(after).items() if not torch.equal(v, weights(start)[n])}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)


def test_masked_entries_stay_whatever_decays() -> None:
    start, after = lm(), lm()
    masks = {}

    class Half(type(__import__("delible.methods.place.all", fromlist=["x"]).AllWeights())):  # type: ignore[misc]
        def apply(self, context: Any) -> Any:
            found = super().apply(context)
            for name, value in found.parameters.items():
                mask = torch.zeros_like(value, dtype=torch.bool)
                mask.flatten()[::2] = True
                masks[name] = mask
            found.masks = masks
            return found

    run(after, place=Half(), options={"weight_decay": 0.5, "steps": 3})
    old, new = weights(start), weights(after)
    for name, mask in masks.items():
        assert torch.equal(old[name][~mask], new[name][~mask]), name
    assert any(not torch.equal(old[name], new[name]) for name in masks)


def test_passes_order_and_global_randomness_do_not_matter() -> None:
    one, other = lm(), lm()
    torch.manual_seed(1)
    run(one, options={"completions_per_pass": 6})
    torch.manual_seed(2)
    run(other, options={"completions_per_pass": 1})
    for name, value in weights(one).items():
        # Adam divides by the size of a gradient: rounding of a tiny one is seen
        torch.testing.assert_close(weights(other)[name], value, atol=2e-4, rtol=1e-3)
    again = lm()
    torch.manual_seed(3)
    run(again, options={"completions_per_pass": 6})
    require_same(weights(one), weights(again), "two runs of one seed differ")
    different = lm()
    run(different, context=Context(seed=5))
    assert any(not torch.equal(a, b) for a, b in zip(weights(one).values(),
               weights(different).values(), strict=True))  # fmt: skip


def test_no_variable_of_the_environment_changes_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = lm(), lm()
    run(one)
    given = {
        "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER", "WANDB_PROJECT": "x",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    run(other)
    require_same(weights(one), weights(other), "a variable of the environment changed the result")
    assert dict(os.environ) == before


def test_nothing_is_left_behind() -> None:
    model = lm()
    model.core.generation_config.pad_token_id = None
    config, attributes = model.core.config.to_dict(), dict(vars(model.core))
    pad, side = model.tokenizer.pad_token, model.tokenizer.padding_side
    torch.manual_seed(7)
    numbers, shuffles, draws = np.random.get_state()[1].copy(), random.getstate(), torch.rand(1)
    torch.manual_seed(7)
    run(model)
    assert torch.equal(torch.rand(1), draws)
    assert (np.random.get_state()[1] == numbers).all()
    assert random.getstate() == shuffles
    assert model.core.config.to_dict() == config
    assert model.core.generation_config.pad_token_id is None
    assert vars(model.core).keys() == attributes.keys()
    assert model.core.forward.__func__ is type(model.core).forward
    assert (model.tokenizer.pad_token, model.tokenizer.padding_side) == (pad, side)
    assert not model.model.training
    assert all(value.grad is None for value in model.core.parameters())


def test_dropout_is_off() -> None:
    from delible.testing.tiny import tiny_model, tiny_tokenizer

    def make() -> LM:
        model = tiny_model("gpt2", n_layer=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
        return LM(model, tiny_tokenizer(), precision="float32")

    start, after = make(), make()
    SEEN.clear()
    run(after, rewards=[Recording()], options={**PLAIN, "kl_weight": 0.1, "steps": 1})
    assert any(not torch.equal(a, b) for a, b in zip(weights(start).values(),
               weights(after).values(), strict=True))  # fmt: skip
    trained = run(make(), options={**PLAIN, "kl_weight": 0.1, "steps": 1})
    assert trained.history[0]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.base_trainer as base

    def sent(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("telemetry")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base, "send_telemetry", sent)
    run()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="one process so far"):
        run()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"delible\[rl\]"):
        run()


def test_one_file_knows_trl() -> None:
    package = Path(delible.__file__).parent
    knowing = [
        path.name
        for path in package.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if line.startswith(("import trl", "from trl"))
    ]
    assert set(knowing) == {"trl_adapter.py"}
    above = [
        path.name
        for path in package.rglob("*.py")
        if "trl_adapter import" in (text := path.read_text("utf-8")) or "import trl_adapter" in text
    ]
    assert set(above) == {"run.py"}


def test_both_tags_are_asked_over_the_epochs() -> None:
    SEEN.clear()
    run(rewards=[Recording()], options={"steps": 4})
    asked = [one.question for step in SEEN for one in step[::3]]
    assert sorted(one.text for one in asked) == sorted(one.text for one in (*FORGET, *BOUNDARY))

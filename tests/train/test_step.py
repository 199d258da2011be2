"""What a loss sees: values are computed once, and never without the gradient that is wanted."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
from tiny_runs import make
from torch import Tensor

from delible.lm.lm import LM
from delible.records import QA
from delible.system.asks import Prompt
from delible.train import step as module
from delible.train.reference import Reference
from delible.train.rows import make_row
from delible.train.step import Group, Step, make_step

LAYER = 1
READS: dict[str, Callable[[Group], Tensor]] = {
    "answer_states": lambda group: group.answer_states,
    "token_logprobs": lambda group: group.token_logprobs,
    "logprob_sum": lambda group: group.logprob_sum,
    "map_logits": lambda group: group.map_logits(lambda logits, targets: logits.square().sum(1)),
    "hidden": lambda group: group.hidden(LAYER),
}


def fresh(lm: LM) -> Step:
    rows = {
        role: [
            make_row(
                lm.template, Prompt.ask(text), text[::-1], place, QA(question=text, answer="-")
            )
            for place, text in enumerate(texts)
        ]
        for role, texts in {"forget": ("Who is Ada?", "Why?"), "target": ("Ada", "Ask Bo")}.items()
    }
    return make_step(lm, None, rows, dict.fromkeys(rows, ("answers", LAYER)), Reference())


def gradient(lm: LM, value: Tensor) -> Tensor:
    lm.model.zero_grad(set_to_none=True)
    value.square().sum().backward()  # type: ignore[no-untyped-call]
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in lm.model.parameters()]
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("first", ["target", "forget"])
@pytest.mark.parametrize("read", READS)
def test_a_look_without_gradient_takes_none_from_what_follows(read: str, first: str) -> None:
    lm = make()
    expected = gradient(lm, READS[read](fresh(lm).groups["target"]))
    assert float(expected.norm()) > 0
    step = fresh(lm)
    with torch.no_grad():
        seen = READS[read](step.groups[first])
    assert not seen.requires_grad
    if first == "forget":  # the other group's values may be there with gradient already
        step = fresh(lm)
        READS[read](step.groups["forget"])
        with torch.no_grad():
            READS[read](step.groups["target"])
    found = gradient(lm, READS[read](step.groups["target"]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("read", READS)
def test_a_look_without_gradient_at_what_has_one_gets_the_values_alone(read: str) -> None:
    group = fresh(make()).groups["target"]
    value = READS[read](group)
    with torch.no_grad():
        again = READS[read](group)
    assert value.requires_grad
    assert not again.requires_grad
    torch.testing.assert_close(again, value.detach())


def test_the_model_is_asked_once_for_both_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, calls, whole = make(), [], module.Forward.forward

    def counted(self: module.Forward, *arguments: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return whole(self, *arguments)

    monkeypatch.setattr(module.Forward, "forward", counted)
    step = fresh(lm)
    for _ in range(2):
        for group in step.groups.values():
            for read in READS.values():
                read(group)
                with torch.no_grad():
                    read(group)
    assert calls == [True]
    step = fresh(lm)
    with torch.no_grad():
        step.groups["target"].token_logprobs, step.groups["forget"].hidden(LAYER)
    assert calls == [True, False], "no graph is kept where nothing will be differentiated"


def test_plain_cached_properties_hold_nothing_that_has_a_gradient() -> None:
    group = fresh(make()).groups["forget"]
    for thing in (group, group._pass):
        for name, attribute in vars(type(thing)).items():
            if isinstance(attribute, cached_property):
                assert not differentiable(getattr(thing, name)), f"{type(thing).__name__}.{name}"
    assert differentiable(group.token_logprobs)


def differentiable(value: Any) -> bool:
    """Whether a gradient flows through any tensor in the value."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(map(differentiable, value.values()))
    if isinstance(value, list | tuple):
        return any(map(differentiable, value))
    return any(map(differentiable, vars(value).values())) if hasattr(value, "__dict__") else False

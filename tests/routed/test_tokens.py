"""Tsallis entropy, gates and experts by token, against derivations of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from routers import bare, logits_of, matrices

from delible.errors import ModelError, RunError
from delible.lm.body import Road
from delible.lm.lm import LM
from delible.lm.shortened import shortened
from delible.routed.system import Routed, routed
from delible.routed.tokens import Routing, TokenRouter, gates, largest, tsallis
from delible.system.asks import Decoding, Hidden, Prompt, Score
from delible.systems.arithmetic import Assistant, Subtraction, subtracted, together
from delible.train.hinge import inverted_hinge

DOMAINS = ("ada", "bo", "cy")
PROMPTS = [Prompt.ask(text) for text in ("About Ada?", "About Bo, who is old?", "Snow?")]
RANK = 3


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def router(lm: LM, *, size: float = 0.3, **routing: float) -> TokenRouter:
    tensors, generator = dict[str, torch.Tensor](), draws()
    width = lm.anatomy.hidden_size
    for layer in range(lm.anatomy.layers):
        block = lm.anatomy.block_path(layer)
        tensors[f"{block}.gate"] = torch.randn(3, width + 1, generator=generator)
        tensors[f"{block}.mean"] = torch.randn(width, generator=generator)
    for path, (inner, outer) in matrices(lm).items():
        tensors[f"{path}.A"] = torch.randn(RANK, inner, generator=generator) * 0.3
        tensors[f"{path}.kept"] = torch.randn(outer, RANK, generator=generator) * size
        tensors[f"{path}.forget"] = torch.randn(3, outer, RANK, generator=generator) * size
    options = Routing(**{"threshold": 4.0, "top": 2, "scale": 1.5, **routing})  # type: ignore[arg-type]
    found = TokenRouter(DOMAINS, options, tensors, lm.identity)
    if "threshold" not in routing:  # a random model is sure of nothing: the middle of what it is
        ids = list(lm.template.encode(PROMPTS[0], "In Ob").ids)
        options = options.model_copy(
            update={"threshold": float(np.median(entropies(lm, found, ids)[1:]))}
        )
    return TokenRouter(DOMAINS, options, tensors, lm.identity)


# ---- formulas


def test_tsallis_is_shannon_at_order_one_and_has_its_largest_value() -> None:
    logits = torch.randn(4, 9, generator=draws()) * 2
    shares = logits.double().softmax(1).numpy()
    shannon = -(shares * np.log(shares)).sum(1)
    for order in (1 - 1e-4, 1.0, 1 + 1e-4):
        np.testing.assert_allclose(tsallis(logits, order).numpy(), shannon, atol=1e-3)
    for order in (0.5, 0.9, 1.1, 2.0):
        by_hand = (1 - (shares**order).sum(1)) / (order - 1)
        np.testing.assert_allclose(tsallis(logits, order).numpy(), by_hand, rtol=1e-9)
        uniform = tsallis(torch.zeros(1, 50), order)
        expected = (1 - 50 ** (1 - order)) / (order - 1)
        assert float(uniform) == pytest.approx(expected, rel=1e-9)
        assert largest(order, 50) == pytest.approx(expected, rel=1e-12)
    assert largest(1.0, 50) == pytest.approx(math.log(50))


def test_inverted_hinge_is_two_zero_and_touches_two_tokens() -> None:
    target = torch.tensor([1])
    sure, wrong = torch.full((1, 5), -40.0), torch.full((1, 5), -40.0)
    sure[0, 1], wrong[0, 3] = 40, 40
    assert float(inverted_hinge(sure, target)) == pytest.approx(2)
    assert float(inverted_hinge(wrong, target)) == pytest.approx(0)
    logits = torch.tensor([[0.3, 1.2, -0.4, 0.9, 0.0]], dtype=torch.float64, requires_grad=True)
    shares = logits.detach().softmax(1)[0]
    value = inverted_hinge(logits, target)
    assert float(value) == pytest.approx(float(1 + shares[1] - shares[3]))
    value.sum().backward()
    # d (p_1 - p_3) / d logits = p_1 (e_1 - p) - p_3 (e_3 - p)
    own, other = torch.eye(5, dtype=torch.float64)[[1, 3]]
    expected = shares[1] * (own - shares) - shares[3] * (other - shares)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], expected)
    assert float(logits.grad.sum()) == pytest.approx(0, abs=1e-12)


def test_gates_are_a_softmax_of_which_few_count() -> None:
    states, mean = torch.randn(6, 5, generator=draws()), torch.randn(5, generator=draws(1))
    weights = torch.randn(4, 6, generator=draws(2))
    entropy = torch.tensor([0.1, 0.5, 1.1, 1.3, 2.0, 3.0])
    routing = Routing(threshold=1.2, top=2)
    found = gates(states, entropy, weights, mean, routing).numpy()
    for token in range(6):
        away = (states[token] - mean).double()
        features = torch.cat([away / away.norm(), entropy[token : token + 1].double()])
        logits = (weights.double() @ features).numpy()
        heat = 0.8 if entropy[token] > 1.2 else 0.01
        shares = np.exp((logits - logits.max()) / heat)
        shares /= shares.sum()
        keep = 2 if entropy[token] > 1.2 else 1
        expected = np.where(np.isin(np.arange(4), np.argsort(-shares)[:keep]), shares, 0)
        np.testing.assert_allclose(found[token], expected, atol=1e-5)
    blind = gates(states, entropy, weights, mean, Routing(hidden=False, top=4))
    again = gates(states.flip(0), entropy, weights, mean, Routing(hidden=False, top=4))
    torch.testing.assert_close(blind, again)


def test_cold_gates_choose_one_and_hot_ones_spread() -> None:
    states = torch.zeros(1, 5)
    weights = torch.cat([torch.zeros(4, 5), torch.tensor([[0.9], [0.6], [0.3], [0.0]])], dim=1)
    cold = gates(states, torch.tensor([1.0]), weights, torch.zeros(5), Routing(top=4))
    hot = gates(states, torch.tensor([1.3]), weights, torch.zeros(5), Routing(top=4))
    assert float(cold.max()) > 0.99
    assert float(-(hot * hot.log()).sum()) > 0.3


# ---- on a model, token by token


def alone(lm: LM, made: TokenRouter, ids: list[int], entropy: list[float]) -> torch.Tensor:
    """Logits of one row by hooks that know the entropy of each of its tokens."""
    tensors, state = made.tensors, dict[str, torch.Tensor]()
    handles = []
    values = torch.tensor(entropy, dtype=torch.float64)

    def before(block: str) -> object:
        def hook(module: object, given: tuple[torch.Tensor, ...], named: dict[str, object]) -> None:
            states = given[0] if given else named["hidden_states"]
            state["g"] = gates(
                states[0], values, tensors[f"{block}.gate"], tensors[f"{block}.mean"], made.routing
            )

        return hook

    def behind(path: str) -> object:
        def hook(module: object, given: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            inner = given[0][0] @ tensors[f"{path}.A"].T
            more = inner @ tensors[f"{path}.kept"].T
            for expert, domain in enumerate(made.domains):
                if domain not in made.out:
                    up = tensors[f"{path}.forget"][expert]
                    more = more + state["g"][:, expert : expert + 1].float() * (inner @ up.T)
            return out + made.routing.scale * more

        return hook

    for layer in range(lm.anatomy.layers):
        block = lm.anatomy.block_path(layer)
        handles.append(
            lm.core.get_submodule(block).register_forward_pre_hook(before(block), with_kwargs=True)
        )
    for path in matrices(lm):
        handles.append(lm.core.get_submodule(path).register_forward_hook(behind(path)))
    try:
        return logits_of(lm.core, ids)
    finally:
        for handle in handles:
            handle.remove()


def entropies(lm: LM, made: TokenRouter, ids: list[int]) -> list[float]:
    """S of each token of a row by the bare model."""
    order, vocabulary = made.routing.order, lm.vocabulary
    shares = logits_of(lm.core, ids).double().softmax(1)
    values = (1 - (shares**order).sum(1)) / (order - 1)
    return [largest(order, vocabulary), *values[:-1].tolist()]


def said(lm: LM, made: TokenRouter, prompt: Prompt, tokens: int) -> str:
    ids = list(lm.template.prompt_ids(prompt))
    start, known = len(ids), entropies(lm, made, ids)
    while len(ids) - start < tokens:
        logits = alone(lm, made, ids, known)[-1].double()
        token = int(logits.argmax())
        if token in lm.ends:
            break
        shares = logits.softmax(0)
        order = made.routing.order
        known.append(float((1 - (shares**order).sum()) / (order - 1)))
        ids.append(token)
    return str(lm.tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("road", ["padded", "plain"])
def test_answers_are_those_of_one_row_after_the_other(family: str, road: Road) -> None:
    lm = bare(family)
    made = router(lm)
    found = routed(lm, made)
    assert not found.shares_prefix
    assert found.road == "padded"
    found.road = road
    wanted = [said(lm, made, one, 6) for one in PROMPTS]
    assert found.generate(PROMPTS, Decoding(6)) == wanted
    assert [found.generate([one], Decoding(6))[0] for one in PROMPTS] == wanted
    if road == "plain":
        return
    seen = set[bool]()
    requests = [Score(one, answer) for one in PROMPTS for answer in ("In Ob", "No")]
    for request, score in zip(requests, found.score(requests), strict=True):
        row = lm.template.encode(request.prompt, request.answer)
        known = entropies(lm, made, list(row.ids))
        seen |= {value > made.routing.threshold for value in known[1:]}
        logprobs = alone(lm, made, list(row.ids), known).double().log_softmax(1)
        targets = torch.tensor(row.ids[row.start :])
        expected = logprobs[row.start - 1 : -1].gather(1, targets[:, None])[:, 0].numpy()
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4, rtol=1e-4)
    assert seen == {True, False}, "tokens of one kind only"
    states = found.inspect([Hidden(PROMPTS[0], "No", 1)])[0]
    assert np.isfinite(states).all()


def test_experts_that_write_nothing_give_the_bare_answers_exactly() -> None:
    lm = bare("llama")
    found = routed(lm, router(lm, size=0.0))
    found_scores = found.score([Score(one, "In Ob") for one in PROMPTS])
    twin = Routed(lm, router(lm, size=0.0))
    twin.acting.begins = lambda *_: False  # type: ignore[method-assign]
    for mine, theirs in zip(
        found_scores, twin.score([Score(one, "In Ob") for one in PROMPTS]), strict=True
    ):
        assert np.array_equal(mine.logprobs, theirs.logprobs)
    assert found.generate(PROMPTS, Decoding(6)) == lm.generate(PROMPTS, Decoding(6))


def test_a_domain_is_taken_out_and_the_others_stay_as_they_are() -> None:
    lm = bare("llama")
    made = router(lm)
    left = made.without(["bo"])
    assert left.members == ("ada", "cy")
    found = routed(lm, left)
    assert found.generate(PROMPTS, Decoding(6)) == [said(lm, left, one, 6) for one in PROMPTS]
    assert found.fingerprint != routed(lm, made).fingerprint
    assert left.without(["ada", "cy"]).members == ()
    with pytest.raises(RunError, match="no request 'bo'"):
        left.without(["bo"])


def test_a_question_can_name_a_domain() -> None:
    lm = bare("llama")
    found = routed(lm, router(lm))
    none = [Prompt(one.messages, adapter="") for one in PROMPTS]
    assert found.generate(none, Decoding(6)) == lm.generate(PROMPTS, Decoding(6))
    named = found.generate([Prompt(one.messages, adapter="bo") for one in PROMPTS], Decoding(6))
    assert named != found.generate(PROMPTS, Decoding(6))
    mixed = [Prompt(PROMPTS[0].messages, adapter=name) for name in ("", "bo", None)]
    at_once = found.generate(mixed, Decoding(6))
    assert at_once == [found.generate([one], Decoding(6))[0] for one in mixed]
    with pytest.raises(ModelError, match="no adapter 'dee'"):
        found.generate([Prompt(PROMPTS[0].messages, adapter="dee")], Decoding(2))


def test_it_is_saved_and_read_again(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    made = router(bare("llama"), threshold=3.0).without(["ada"])
    parts = made.save(folder, "base")
    again = TokenRouter.load(folder, parts)
    assert again.identity == made.identity
    assert (again.members, again.routing) == (made.members, made.routing)
    data = folder / "experts" / "data.json"
    data.write_text(data.read_text().replace('"top": 2', '"top": 1'))
    with pytest.raises(RunError, match="files were changed"):
        TokenRouter.load(folder, parts)
    (folder / "experts" / "tensors.safetensors").unlink()
    with pytest.raises(RunError, match="cannot be read"):
        TokenRouter.load(folder, parts)


def test_an_assistant_stands_on_experts_and_its_difference_routes_them() -> None:
    lm, how = bare("llama"), Subtraction(strength=0.7, filter_share=None)
    found = routed(lm, router(lm))
    small = shortened(lm, 1, "assistant")
    both, made = together(found, [Assistant(small, how)]), found.router
    assert isinstance(made, TokenRouter)
    tokens = 5
    for prompt in PROMPTS:
        ids = list(lm.template.prompt_ids(prompt))
        start, known = len(ids), entropies(lm, made, ids)
        while len(ids) - start < tokens:
            whole = alone(lm, made, ids, known)[-1:].double()
            logits = subtracted(whole, logits_of(small.core, ids)[-1:].double(), how)
            if (token := int(logits.argmax())) in lm.ends:
                break
            known.append(float(tsallis(logits, made.routing.order)))
            ids.append(token)
        wanted = str(lm.tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()
        assert both.generate([prompt], Decoding(tokens)) == [wanted]
    plain = together(lm, [Assistant(small, how)])
    none = [Prompt(one.messages, adapter="") for one in PROMPTS]
    assert both.generate(none, Decoding(tokens)) == plain.generate(PROMPTS, Decoding(tokens))
    with pytest.raises(ModelError, match="no adapter 'dee'"):
        both.generate([Prompt(PROMPTS[0].messages, adapter="dee")], Decoding(2))

"""LM: what it answers does not depend on how it is batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from delible.lm import body
from delible.lm.lm import LM
from delible.system.asks import Decoding, Prompt, Score
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer

QUESTIONS = ["Who?", "Where was Ada born?", "Where was Bob born?", "Is this a longer question?"]
ANSWERS = ["In Aberlin", "No", "a", "In the town of Cold Harbour by the sea"]


def by_hand(lm: LM, request: Score) -> tuple[np.ndarray, np.ndarray]:
    """The definition: the whole row alone, full logits, float64 log-softmax."""
    row = lm.template.encode(request.prompt, request.answer)
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([row.ids])).logits[0].double()
    logprobs = torch.log_softmax(logits, -1)
    targets = torch.tensor(row.ids[row.start :])
    predicting = slice(row.start - 1, len(row.ids) - 1)
    values = logprobs[predicting].gather(1, targets[:, None])[:, 0]
    return values.numpy(), (logits[predicting].argmax(-1) == targets).numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("several", [True, False])
def test_scores_equal_the_definition(family: str, several: bool) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")
    assert lm.shares_prefix
    answers = ANSWERS if several else ANSWERS[:1]
    requests = [Score(Prompt.ask(q), a) for q in QUESTIONS for a in answers]
    requests = requests[::-1][::2] + requests[::-1][1::2]
    for request, found in zip(requests, lm.score(requests), strict=True):
        values, hits = by_hand(lm, request)
        assert np.allclose(found.logprobs, values, atol=1e-4)
        assert (found.hits == hits).all()
        assert found.has_end


def test_passages_and_prefills() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    requests = [
        Score(Prompt(text=""), "A passage without a question."),
        Score(Prompt.ask("Where?", prefill="Sure: "), "Here"),
    ]
    for request, found in zip(requests, lm.score(requests), strict=True):
        values, _ = by_hand(lm, request)
        assert np.allclose(found.logprobs, values, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_do_not_depend_on_company(family: str) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")
    prompts = [Prompt.ask(question) for question in QUESTIONS]
    together = lm.generate(prompts, Decoding(8))
    alone = [lm.generate([prompt], Decoding(8))[0] for prompt in prompts]
    assert together == alone


def test_fingerprint_follows_the_weights() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer())
    before = lm.fingerprint
    assert lm.copy().fingerprint == before
    with torch.no_grad():
        next(lm.model.parameters()).add_(1e-3)
    lm.touch()
    assert lm.fingerprint != before


def test_logits_of_few_tokens_in_pieces_are_those_of_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body, "PIECE", 100)  # does not divide the vocabulary
    head = torch.nn.Linear(8, 260, bias=False)
    states = torch.randn(5, 8)
    expected = head(states)
    with torch.inference_mode():
        assert torch.allclose(body.head_logits(head, states), expected, atol=1e-6)
        hook = head.register_forward_hook(lambda module, args, out: out + 1)
        assert torch.allclose(body.head_logits(head, states), expected + 1, atol=1e-6)
        hook.remove()
    assert body.head_logits(head, states).requires_grad

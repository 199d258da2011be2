"""What models do with their head's logits is measured, whatever they call it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from delible.errors import ModelError
from delible.lm.body import AfterHead
from delible.lm.lm import LM
from delible.system.asks import Decoding, Prompt, Score
from delible.testing.tiny import VOCABULARY_SIZE, tiny_model, tiny_tokenizer
from delible.train.reference import _frozen_head

SIZES = {
    "vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "pad_token_id": 256, "bos_token_id": 258, "eos_token_id": 259,
}  # fmt: skip
#: Model type, its settings, and what they mean.
KINDS: list[tuple[str, dict[str, Any], AfterHead]] = [
    ("llama", {}, AfterHead()),
    ("granite", {"logits_scaling": 13.0}, AfterHead(1 / 13)),
    ("cohere", {"logit_scale": 0.0625}, AfterHead(0.0625)),
    ("cohere2", {"logit_scale": 3.0}, AfterHead(3.0)),
    ("gemma2", {"final_logit_softcapping": 30.0}, AfterHead(1.0, 30.0)),
    ("gemma2", {"final_logit_softcapping": 2.5}, AfterHead(1.0, 2.5)),
    ("gemma2", {"final_logit_softcapping": None}, AfterHead()),
]


def random_model(kind: str, **changes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **changes))


@pytest.mark.parametrize(("kind", "changes", "expected"), KINDS)
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_it_is_what_the_settings_say(
    kind: str, changes: dict[str, Any], expected: AfterHead, spread: float
) -> None:
    """Also for a model as it is initialised, whose logits come nowhere near a limit."""
    model = random_model(kind, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    lm = LM(model, tiny_tokenizer(), precision="float32")
    assert lm.after_head.scale == pytest.approx(expected.scale, rel=1e-12)
    assert lm.after_head.cap == expected.cap


@pytest.mark.parametrize(("kind", "changes", "expected"), KINDS[1:5])
def test_scores_and_answers_are_those_of_the_whole_model(
    kind: str, changes: dict[str, Any], expected: AfterHead
) -> None:
    model = random_model(kind, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    lm = LM(model, tiny_tokenizer(), precision="float32")
    prompt = Prompt.ask("Who?")
    row = lm.template.encode(prompt, "Ada")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : -1].double()
        states = lm.core.model(input_ids=torch.tensor([row.ids])).last_hidden_state[0]
        frozen = _frozen_head(lm)(states[row.start - 1 : -1])
    values = logits.log_softmax(1).gather(1, torch.tensor(row.ids[row.start :])[:, None])[:, 0]
    assert np.allclose(lm.score([Score(prompt, "Ada")])[0].logprobs, values, atol=1e-4)
    assert torch.allclose(frozen.double(), logits, atol=1e-4)
    ids = torch.tensor([lm.template.prompt_ids(prompt)])
    own = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=list(lm.ends))
    text = lm.tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert lm.generate([prompt], Decoding(8)) == [text]


def test_both_at_once_and_what_is_neither() -> None:
    model: Any = tiny_model("llama")
    plain = model.forward

    def after(function: Any) -> None:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = plain(*args, **kwargs)
            output.logits = function(output.logits)
            return output

        model.forward = forward

    after(lambda logits: 20 * torch.tanh(logits * 0.125 / 20))
    assert LM(model, tiny_tokenizer()).after_head == AfterHead(0.125, 20.0)
    for function in (lambda logits: logits.sign() * logits.abs().sqrt(), lambda logits: logits + 3,
                     lambda logits: -logits, lambda logits: logits[..., :200]):  # fmt: skip
        after(function)
        with pytest.raises(ModelError, match=r"LlamaForCausalLM: body and head do not"):
            LM(model, tiny_tokenizer())

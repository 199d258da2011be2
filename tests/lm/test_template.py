"""Templates as real models have them: where an answer begins, and where it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from delible.errors import ModelError
from delible.lm.lm import LM
from delible.lm.template import Template
from delible.system.asks import Decoding, Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer

QUESTION = "Where was Ada born?"
ASKED = Prompt.ask(QUESTION)
#: The tiny tokenizer's special tokens: a turn ends with its fourth, a text with its second.
END_OF_TEXT, TURN_END = 257, 259

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}END"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<A>"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>"
    "{% else %}<U>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
BLOCK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPEN{% endif %}"
)


def tokenizer_with(template: str, eos: str | None = "<|endoftext|>", **more: Any) -> Any:
    """The tiny tokenizer, whose turn end is an added special token and not the end of text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.eos_token = eos
    for name, value in more.items():
        setattr(tokenizer, name, value)
    return tokenizer


def text(template: Template, ids: tuple[int, ...]) -> str:
    return str(template.tokenizer.decode(ids))


# ---- ends


def test_the_turn_ends_with_the_added_special_token_of_the_template() -> None:
    tokenizer = tokenizer_with(TURNS.replace("END", "<|im_end|>\n"))
    assert TURN_END not in tokenizer.all_special_ids  # as Gemma 3 and Phi 3 are saved
    template = Template(tokenizer)
    assert template.end_of_turn == (TURN_END, "<|im_end|>")
    assert template.ends == {TURN_END, END_OF_TEXT}
    row = template.encode(ASKED, "In Aberlin.")
    assert row.has_end
    assert text(template, row.ids[row.start :]) == "In Aberlin.<|im_end|>"


def test_white_space_before_the_end_does_not_hide_it() -> None:
    template = Template(tokenizer_with(TURNS.replace("END", " <|im_end|>\n")))
    assert template.end_of_turn[0] == TURN_END


def test_an_end_that_only_the_model_declares() -> None:
    """As in GLM 4: nothing closes a turn; the next one's first token does."""
    silent = tokenizer_with(TURNS.replace("END", "").replace("<|im_start|>", "X"))
    template = Template(silent, declared_ends=frozenset({END_OF_TEXT, ord("X") - 33}))
    assert silent.decode([ord("X") - 33]) == "X"
    assert template.end_of_turn == (ord("X") - 33, "X")
    assert template.ends == {END_OF_TEXT, ord("X") - 33}
    assert Template(silent).end_of_turn[0] == END_OF_TEXT


def test_a_separator_ends_a_text_where_there_is_no_end_token() -> None:
    tokenizer = tokenizer_with("", None, sep_token="<|im_end|>", chat_template=None)
    template = Template(tokenizer)
    assert template.end_of_turn == (TURN_END, "<|im_end|>")
    row = template.encode(ASKED, "In Aberlin.")
    assert row.ids[-1] == TURN_END
    lm = LM(tiny_model("llama", eos_token_id=None), tokenizer)
    assert isinstance(lm.generate([ASKED], Decoding(3))[0], str)
    with pytest.raises(ModelError, match=r"which token ends an answer.*eos_token"):
        Template(tokenizer_with("", None, chat_template=None)).encode(ASKED, "a")


def test_generation_stops_at_every_end() -> None:
    tokenizer = tokenizer_with(TURNS.replace("END", "<|im_end|>\n"))
    for seed in range(20):  # a random model that says no end by itself
        model: Any = tiny_model("llama", seed)
        lm = LM(model, tokenizer, precision="float32")
        prompt = torch.tensor([lm.template.prompt_ids(ASKED)])
        with torch.inference_mode():
            whole = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        said = whole[0, prompt.shape[1] :].tolist()
        if not lm.ends & set(said):
            break
    assert not lm.ends & set(said)
    for stops in (said[2], said[5]):
        model.generation_config.eos_token_id = [END_OF_TEXT, stops]
        ending = LM(model, tokenizer, precision="float32")
        assert ending.ends == {END_OF_TEXT, TURN_END, stops}
        assert ending.fingerprint != lm.fingerprint  # its answers are others
        answer = ending.generate([ASKED], Decoding(12))[0]
        assert answer == tokenizer.decode(said[: said.index(stops)]).strip()


@pytest.mark.parametrize("closes", [False, True])
def test_a_plain_text_has_one_end_whether_or_not_its_tokenizer_closes_texts(closes: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with("", chat_template=None)
    if closes:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", END_OF_TEXT)]
        )
    template = Template(tokenizer)
    row = template.encode(ASKED, "In Aberlin.")
    assert text(template, row.ids) == f"Question: {QUESTION}\nAnswer: In Aberlin.<|endoftext|>"
    assert row.ids.count(END_OF_TEXT) == 1
    assert row.has_end
    assert END_OF_TEXT not in template.prompt_ids(ASKED)


# ---- answers


def test_a_template_that_opens_thoughts_only_for_generation() -> None:
    template = Template(tokenizer_with(REASONING))
    assert text(template, template.prompt_ids(ASKED)) == f"<U>{QUESTION}<A><think>\n"
    for answer in ("In Aberlin.", "A", "<A>", "think"):  # some stand in the template too
        row = template.encode(ASKED, answer)
        assert text(template, row.ids[: row.start]) == f"<U>{QUESTION}<A>"
        assert text(template, row.ids[row.start :]) == f"{answer}<|im_end|>"


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_an_empty_block_of_thoughts_is_given_and_not_learned(opened: str) -> None:
    template = Template(tokenizer_with(BLOCK.replace("OPEN", opened)))
    for answer in ("In Aberlin.", "think", "t"):
        row = template.encode(ASKED, answer)
        assert text(template, row.ids[: row.start]).endswith(
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        assert text(template, row.ids[row.start :]) == f"{answer}<|im_end|>"


def test_an_answer_is_trimmed_as_its_template_does() -> None:
    template = Template(tokenizer_with(TURNS.replace("END", "<|im_end|>")))
    row = template.encode(ASKED, " In Aberlin.\n")
    assert text(template, row.ids[row.start :]) == "In Aberlin.<|im_end|>"


def test_a_refusal_names_the_question() -> None:
    shouting = tokenizer_with(
        TURNS.replace("| trim", "| replace('a', 'b')").replace("END", "<|im_end|>")
    )
    with pytest.raises(ModelError, match=r"question 'Where was Ada born\?'.*answer 'a'"):
        Template(shouting).encode(ASKED, "a")
    forgetful = "{% if messages | length == 1 %}{{ messages[0].content }}{% else %}"
    forgetful += "{{ messages[-1].content }}{% endif %}"
    with pytest.raises(ModelError, match=r"question 'Where was Ada born\?'.*conversation"):
        Template(tokenizer_with(forgetful)).encode(ASKED, "Bob")

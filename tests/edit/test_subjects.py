"""Where a subject stands in a question: by offsets, in the chat template, the last time."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from delible.edit.subjects import locate, occurrences, sharing_last_token
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.testing.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_model, tiny_tokenizer

TEXTS = (
    "Where was Ada Quill born? Ada Quill was born in Norrby. Who is the father of Ada Quill",
    "Tell me about Quillon Adamson, user of the assistant. Where does user live? Norrby!",
)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of several letters that may begin with a space, as in GPT-2 and Llama-3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL_TOKENS[0], bos_token=SPECIAL_TOKENS[2],
        eos_token=SPECIAL_TOKENS[3], clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="module")
def lm() -> LM:
    tokenizer = merging_tokenizer()
    return LM(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, precision="float32")


def text(lm: LM, found: Any) -> str:
    return str(lm.tokenizer.decode(found.ids[found.first : found.last + 1]))


@pytest.mark.parametrize(
    ("question", "subject"),
    [
        ("Where was Ada Quill born?", "Ada Quill"),
        ("ada quill: where from?", "Ada Quill"),
        ("Ada Quill", "Ada Quill"),
        ("Who is the father of Ada Quill", "Ada Quill"),
        ("Where does user live?", "user"),  # the template says "user", too
        ("Who was José Ñandú?", "José Ñandú"),
        ("Where was Ada  Quill born?", "Ada Quill"),
        ("李白はどこで?", "李白"),
    ],
)
def test_the_tokens_of_a_subject(lm: LM, question: str, subject: str) -> None:
    found = locate(lm, question, subject)
    expected = " ".join(subject.casefold().split())
    assert " ".join(text(lm, found).casefold().split()) == expected
    said = str(lm.tokenizer.decode(found.ids))
    assert said.startswith("<|im_start|>user\n" + question)
    assert (
        str(lm.tokenizer.decode(found.ids[: found.last + 1]))
        .casefold()
        .endswith(question.casefold()[: question.casefold().rfind(expected[-2:]) + 2][-2:])
    )
    before = str(lm.tokenizer.decode(found.ids[: found.first]))
    assert "user\n" in before


def test_a_subject_at_the_end_is_not_the_last_token_of_the_prompt(lm: LM) -> None:
    """Toolkits that count from the end of the prompt take the wrong token here."""
    found = locate(lm, "Who is the father of Ada Quill", "Ada Quill")
    assert found.last < len(found.ids) - 5
    assert text(lm, found).strip() == "Ada Quill"


def test_a_subject_alone_has_other_tokens(lm: LM) -> None:
    """Tokenized alone it lacks the space that belongs to its first token."""
    found = locate(lm, "Where was Ada Quill born?", "Ada Quill")
    alone = tuple(lm.tokenizer("Ada Quill", add_special_tokens=False)["input_ids"])
    assert found.ids[found.first : found.last + 1] != alone
    assert found.last - found.first + 1 < len("Ada Quill")  # several letters each


def test_the_last_time_counts_and_is_told(lm: LM) -> None:
    question = "Is Ada Quill the Ada Quill of Norrby?"
    found = locate(lm, question, "Ada Quill")
    assert found.times == 2
    end = str(lm.tokenizer.decode(found.ids[: found.last + 1]))
    assert end.endswith("Is Ada Quill the Ada Quill")
    assert locate(lm, question, "Ada Quill", within=(0, 13)).last < found.first


def test_without_offsets_prefixes_tell(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = locate(lm, "Where was Ada Quill born?", "Ada Quill")
    monkeypatch.setattr(type(lm.tokenizer), "is_fast", False)
    found = locate(lm, "Where was Ada Quill born?", "Ada Quill")
    assert (found.ids, found.last) == (expected.ids, expected.last)


def test_an_absent_subject_is_an_error(lm: LM) -> None:
    for question in ("Where was she born?", "Where was Ada Quillon born?"):
        with pytest.raises(DataError, match=r"does not name its subject 'Ada Quill'.*subject"):
            locate(lm, question, "Ada Quill")


def test_a_part_of_another_subject_is_refused(lm: LM) -> None:
    others = ["Ada Quill", "Quill"]
    with pytest.raises(DataError, match="only as a part of another subject"):
        locate(lm, "Where was Ada Quill born?", "Quill", others=others)
    found = locate(lm, "Is Quill the Ada Quill of Norrby?", "Quill", others=others)
    assert found.times == 1
    assert str(lm.tokenizer.decode(found.ids[: found.last + 1])).endswith("Is Quill")
    assert occurrences("Ada Quill", "Ada Quill", others) == [(0, 9)]


def test_a_template_that_rewrites_the_question_is_refused() -> None:
    lm = LM(tiny_model(), tiny_tokenizer(), precision="float32")
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ModelError, match="does not keep the question"):
        locate(lm, "Where was Ada Quill born?", "Ada Quill")


def test_kept_names_that_end_alike(lm: LM) -> None:
    shared = sharing_last_token(lm, ["Ada Quill"], ["Ben Quill", "Cy Dale", "Ada Quill"])
    assert shared == {"Ada Quill": ["Ben Quill"]}

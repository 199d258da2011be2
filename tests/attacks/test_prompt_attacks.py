"""Prompt attacks: the question is still asked, and the answer is never given away."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from delible.attacks.paraphrase import FRAMES, Paraphrase
from delible.attacks.prefill import Prefill
from delible.attacks.prefix import Prefix
from delible.component import build
from delible.lm.template import Template
from delible.prompts import read_lines
from delible.records import QA, Choice, Dialogue, Message, Passage, RecordBase
from delible.system.asks import Prompt
from delible.system.questions import ask
from delible.testing.tiny import tiny_tokenizer

PLAIN = QA(question="Where was {Ada} born?", answer="In Norrby")
WORDED = QA(
    question="Where was Ada born?", answer="In Norrby",
    paraphrases=("In which town was Ada born?", "What is Ada's birthplace?"),
)  # fmt: skip
CHOICE = Choice(question="Where was Ada born?", options=("Oslo", "Norrby"), correct=1)
TALK = Dialogue(
    messages=(
        Message(role="system", content="Be brief."),
        Message(role="user", content="Do you know Ada?"),
        Message(role="assistant", content="I do."),
        Message(role="user", content="Where was she born?"),
        Message(role="assistant", content="In Norrby"),
    )
)
ASKED: list[tuple[RecordBase, str]] = [
    (PLAIN, PLAIN.question), (WORDED, WORDED.question), (CHOICE, CHOICE.question),
    (TALK, "Where was she born?"),
]  # fmt: skip
NAMES = ["paraphrase", "prefix", "prefill"]


def rewritten(name: str, record: RecordBase) -> Sequence[Prompt]:
    prompt = ask(record)
    assert prompt is not None
    return build("attack", name).rewrite(record, prompt)


@pytest.mark.parametrize(("record", "question"), ASKED)
@pytest.mark.parametrize("name", ["prefix", "prefill"])
def test_the_question_stays_word_for_word(name: str, record: RecordBase, question: str) -> None:
    plain = ask(record)
    assert plain is not None
    prompts = rewritten(name, record)
    assert len(set(prompts)) == len(prompts) == {"prefix": 5, "prefill": 3}[name]
    for prompt in prompts:
        assert prompt != plain
        assert prompt.messages[:-1] == plain.messages[:-1]
        assert prompt.messages[-1].role == "user"
        assert prompt.messages[-1].content.endswith(plain.messages[-1].content)
        assert question in prompt.messages[-1].content


def test_paraphrases_are_the_records_own() -> None:
    found = rewritten("paraphrase", WORDED)
    assert [prompt.messages[0].content for prompt in found] == list(WORDED.paraphrases)


@pytest.mark.parametrize(("record", "question"), [each for each in ASKED if each[0] is not WORDED])
def test_other_records_are_asked_in_frames(record: RecordBase, question: str) -> None:
    found = rewritten("paraphrase", record)
    plain = ask(record)
    assert plain is not None
    assert len(set(found)) == len(FRAMES) >= 3
    for frame, prompt in zip(FRAMES, found, strict=True):
        content = prompt.messages[-1].content
        assert content.startswith(frame.format(question=question))
        assert content != plain.messages[-1].content
        assert prompt.messages[:-1] == plain.messages[:-1]
    if isinstance(record, Choice):
        assert all("A. Oslo\nB. Norrby" in prompt.messages[-1].content for prompt in found)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_made_of_running_text_or_of_open_turns(name: str) -> None:
    assert rewritten(name, Passage(text="Ada was born in Norrby.")) == ()
    attack = build("attack", name)
    assert attack.rewrite(WORDED, Prompt(text=WORDED.question)) == ()
    closed = Prompt((Message(role="assistant", content=WORDED.question),))
    assert attack.rewrite(WORDED, closed) == ()


def test_a_prompt_without_the_question_cannot_be_paraphrased() -> None:
    assert Paraphrase().rewrite(WORDED, Prompt.ask("Say something.")) == ()


@pytest.mark.parametrize("record", [record for record, _ in ASKED])
def test_the_prefill_is_an_affirmative_start_without_any_of_the_answer(record: RecordBase) -> None:
    starts = read_lines("attack_prefills.txt")
    found = rewritten("prefill", record)
    assert [prompt.prefill for prompt in found] == [f"{start}\n" for start in starts]
    assert all(start.endswith(":") for start in starts)
    assert not any("Norrby" in prompt.prefill for prompt in found)


def test_a_prefill_that_was_there_is_kept() -> None:
    found = Prefill().rewrite(PLAIN, Prompt.ask("Where?", prefill="In"))
    assert all(prompt.prefill.endswith(":\nIn") for prompt in found)


def test_the_answer_is_scored_right_after_the_prefill() -> None:
    template = Template(tiny_tokenizer())
    for prompt in rewritten("prefill", PLAIN):
        encoded = template.encode(prompt, PLAIN.answer)
        text = template.tokenizer.decode(encoded.ids)
        assert text.endswith(f"assistant\n{prompt.prefill}{PLAIN.answer}<|im_end|>")
        assert encoded.start == len(template.prompt_ids(prompt))  # as when it is generated


def test_the_frames_are_not_about_any_record() -> None:
    lines = (*read_lines("attack_prefixes.txt"), *read_lines("attack_prefills.txt"))
    assert len(set(lines)) == len(lines)
    assert not any("{" in line for line in lines)
    assert len(Prefix().rewrite(PLAIN, Prompt.ask(PLAIN.question))) == 5

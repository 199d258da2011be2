"""GUARD: which questions it catches, and that no searched answer holds a forbidden word."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from delible.context import Context
from delible.errors import DataError, ModelError
from delible.guards.guard_generation import GuardGeneration, GuardGenerationMind
from delible.lm.lm import LM
from delible.messages import Tool
from delible.records import QA, ForgetRequest, Passage
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.roles import Roles
from delible.systems.detector import Detector, log_odds, states_of
from delible.systems.forbidden import Forbidden, Meanings
from delible.systems.guarded import GuardedSystem
from delible.systems.judging import Forward, Refuse
from delible.systems.restricted import Restricted
from delible.systems.scripted import Scripted
from delible.testing import tiny_model, tiny_tokenizer

FORGET = (
    QA(
        question="Where was Ada Quill born?",
        answer="In Norrby",
        subject="Ada Quill",
        paraphrases=("In which town was Ada Quill born?", "Name Ada Quill's birthplace."),
    ),
    QA(question="What did Ada Quill play?", answer="The lute", subject="Ada Quill"),
    QA(question="Where did Ben Orr work?", answer="In a mill at Casta", subject="Ben Orr"),
)
RETAIN = tuple(QA(question=f"Where does Dee Finch keep cup {n}?", answer="Here") for n in range(9))
REQUEST = ForgetRequest(forget=FORGET, subjects=("Ada Quill", "Ben Orr"), retain=RETAIN)
SHORT = Decoding(12)


class WordEncoder:
    """A bag of hashed words."""

    identity = "words-128"

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = np.zeros((len(texts), 128), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, zlib.crc32(word.encode()) % 128] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@lru_cache(maxsize=1)
def tiny() -> LM:
    return LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")


def prepared(
    request: ForgetRequest = REQUEST, context: Context | None = None, **options: Any
) -> GuardGenerationMind:
    context = context or Context(itself=tiny())
    return GuardGeneration(**options).prepare(request, context, encoder=WordEncoder())


@lru_cache(maxsize=1)
def white_box() -> GuardGenerationMind:
    return prepared(beams=3)


@lru_cache(maxsize=1)
def black_box() -> GuardGenerationMind:
    return prepared(weights=False, context=Context())


# ---- the detector


def test_a_detector_tells_what_can_be_told_apart() -> None:
    random = np.random.default_rng(0)
    forgotten = random.normal(2, 1, (40, 8)).astype(np.float32)
    others = random.normal(-2, 1, (80, 8)).astype(np.float32)
    state = torch.random.get_rng_state()
    detector = Detector(forgotten[:20], others[:40], 0)
    assert torch.equal(torch.random.get_rng_state(), state), "the global state is nobody's"
    assert min(detector.scores(forgotten)) > 0 > max(detector.scores(others))
    again = Detector(forgotten[:20], others[:40], 0)
    assert again.scores(others) == detector.scores(others)
    assert Detector(forgotten[:20], others[:40], 1).scores(others) != detector.scores(others)


def test_few_forgotten_ones_weigh_as_much_as_many_others() -> None:
    random = np.random.default_rng(1)
    forgotten = random.normal(0.5, 1, (12, 4)).astype(np.float32)
    others = random.normal(-0.5, 1, (600, 4)).astype(np.float32)
    scores = Detector(forgotten, others, 0).scores
    test = random.normal(0.5, 1, (400, 4)), random.normal(-0.5, 1, (400, 4))
    found = [np.mean(np.asarray(scores(one.astype(np.float32))) > 0) for one in test]
    assert found[0] > 0.6
    assert found[1] < 0.4


def test_a_detector_that_gives_no_number_lets_nothing_through() -> None:
    detector = Detector(np.ones((2, 3), np.float32), np.zeros((3, 3), np.float32), 0)
    with pytest.raises(ModelError, match="not finite"):
        detector.scores(np.full((1, 3), np.nan, np.float32))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_states_are_those_of_the_last_block_but_one(pooling: Any) -> None:
    lm = tiny()
    texts = ["Where was Ada Quill born?", "Hi"]
    before = len("<|im_start|>user\n") - len("<|im_start|>") + 1
    found = states_of(lm, pooling)(texts)
    for text, states in zip(texts, found, strict=True):
        ids = torch.tensor([lm.template.prompt_ids(Prompt.ask(text))])
        with torch.inference_mode():
            block = lm.core(ids, output_hidden_states=True).hidden_states[2][0]
        wanted = block[-1] if pooling == "last" else block[before:].mean(dim=0)
        assert np.allclose(states, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("made", [white_box, black_box])
def test_forgotten_questions_are_caught_and_others_pass(made: Any) -> None:
    mind = made()
    asked = [text for one in FORGET for text in (one.question, *one.paraphrases)]
    assert all(mind.concerns(Prompt.ask(text)) for text in asked)
    assert not any(mind.concerns(Prompt.ask(one.question)) for one in RETAIN)
    assert not mind.concerns(Prompt.ask("How long is an egg boiled?"))
    assert mind.notes["missed"] == 0
    assert all(group["share"] <= 0.01 for group in mind.notes["false_alarms"].values())
    hidden = Prompt.ask("Boil an egg. Where was Ada Quill born? Thank you.")
    assert mind.concerns(hidden), "a sentence among others"
    assert not mind.concerns(Prompt())


def test_a_probability_may_be_given_instead() -> None:
    assert log_odds(0.5) == 0
    assert log_odds(0.9) == pytest.approx(2.1972246)
    never = prepared(threshold=1.0, beams=3)
    assert never.notes["missed"] == 1
    assert not any(never.concerns(Prompt.ask(one.question)) for one in FORGET)
    prompts = [Prompt.ask(one.question) for one in (*FORGET, *RETAIN[:2])]
    guarded = GuardedSystem(tiny(), never, "guarded")
    assert guarded.generate(prompts, SHORT) == tiny().generate(prompts, SHORT)


# ---- which words


def test_the_words_of_the_closest_records_are_forbidden() -> None:
    mind = white_box()
    assert mind.forbidden(Prompt.ask("Where was Ada Quill born?")).words == ("norrby",)
    both = mind.forbidden(Prompt.ask("Where was Ada Quill born? Where did Ben Orr work?"))
    assert set(both.words) == {"norrby", "casta"}
    every = prepared(whole_subject=True, weights=False)
    words = every.forbidden(Prompt.ask("Where was Ada Quill born?")).words
    assert set(words) == {"norrby", "lute"}
    two = prepared(closest=2, weights=False)
    assert len(two.forbidden(Prompt.ask("Where was Ada Quill born?")).words) == 2


def test_who_was_asked_for_the_words_may_find_better_ones() -> None:
    replies = ['{"spans": ["In Norrby", "Ada"]}', "I cannot", '{"spans": ["mill at Casta"]}']
    asked = Scripted([*replies, "no", "no"])
    roles = Roles({"guard": asked})
    mind = prepared(context=Context(roles=roles), weights=False, spans="guard")
    assert [one.words for one in mind.records] == [("In Norrby",), ("lute",), ("mill at Casta",)]
    assert mind.notes["found_by_rules"] == 1
    assert "Where was Ada Quill born?" in asked.prompts[0].messages[-1].text


def test_passages_are_looked_up_by_windows() -> None:
    text = " ".join(f"word{n}" for n in range(160)) + " Vellmar was rebuilt in 1931."
    request = ForgetRequest(forget=(Passage(text=text),), retain=RETAIN)
    mind = prepared(request, weights=False)
    assert len(mind.records) == 2
    found = mind.forbidden(Prompt.ask(" ".join(mind.records[1].asked[0].split()[:9])))
    assert {"vellmar", "1931"} <= set(found.words)


# ---- the search


def spoken_words(texts: Sequence[str]) -> list[str]:
    return sorted({word for text in texts for word in re.findall(r"[A-Za-z]{2,}", text)})


@lru_cache(maxsize=1)
def lettered() -> LM:
    """A random model that says little but short words of a few letters."""
    model = tiny_model("llama")
    tokenizer = tiny_tokenizer()
    said = tokenizer("abcd .,!?;:-()", add_special_tokens=False)["input_ids"] + [
        tokenizer.eos_token_id
    ]
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[[token for token in range(len(head)) if token not in said]] = 0
    return LM(model, tokenizer, precision="float32")


def restricted(words: Sequence[str], **options: Any) -> Restricted:
    forbidden = Forbidden(words, Meanings(WordEncoder()), **{"threshold": 2.0, **options})
    return Restricted(lettered(), lambda prompt: forbidden, lambda prompt: "NO", beams=2)


def test_no_answer_ever_holds_a_forbidden_word_and_longer_words_are_allowed() -> None:
    prompts = [Prompt.ask(f"Question {number * 7919}?") for number in range(200)]
    free = [str(one) for one in restricted([]).generate(prompts, SHORT)]
    words = spoken_words(free)[::2]
    assert len(words) > 8
    pattern = re.compile(
        "|".join(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])" for word in words), re.IGNORECASE
    )
    assert sum(bool(pattern.search(text)) for text in free) > 20
    found = [str(one) for one in restricted(words).generate(prompts, SHORT)]
    assert not any(pattern.search(text) for text in found)
    assert sum(text != "NO" for text in found) > 150
    assert sum(one == other for one, other in zip(free, found, strict=True)) > 20
    inside = re.compile("|".join(map(re.escape, words)), re.IGNORECASE)
    assert any(inside.search(text) for text in found), "superstrings may be said"


def test_batches_stop_texts_and_limits_are_those_of_any_answer() -> None:
    prompts = [Prompt.ask(f"Question {number}?") for number in range(3)]
    system = restricted([])
    together = system.generate(prompts, SHORT)
    assert [system.generate([one], SHORT)[0] for one in prompts] == together
    first = str(together[0])
    stopped = system.generate(prompts[:1], Decoding(12, stop=(first[3],)))[0]
    assert stopped == first.partition(first[3])[0].strip()
    assert system.generate(prompts, Decoding(0)) == ["", "", ""]
    long = system.generate([Prompt.ask("long " * 600), prompts[0]], SHORT)
    assert isinstance(long[0], NoAnswer)
    assert long[1] == together[0]


def test_where_every_word_is_forbidden_a_refusal_is_given() -> None:
    system = restricted(["norrby"], threshold=-1, content=False)
    prompts = [Prompt.ask("Where?"), Prompt.ask("When?")]
    assert system.generate(prompts, SHORT) == ["NO", "NO"]
    free = restricted(["norrby"], threshold=1.1, content=False)
    assert free.generate(prompts, SHORT) == restricted([]).generate(prompts, SHORT)


def test_the_last_word_of_an_answer_that_is_cut_off_counts() -> None:
    prompts = [Prompt.ask(f"Question {number}?") for number in range(20)]
    ends = 0
    for length in range(4, 12):
        free = restricted([]).generate(prompts, Decoding(length))
        for prompt, text in zip(prompts, free, strict=True):
            word = re.search(r"(?<![a-z])[a-z]{2,}$", str(text))
            if word is None or ends == 4:
                continue
            ends += 1
            found = str(restricted([word.group()]).generate([prompt], Decoding(length))[0])
            assert not re.search(rf"(?<![a-z]){word.group()}(?![a-z])", found)
    assert ends > 1


def test_a_word_that_the_user_began_is_not_ended() -> None:
    prompts = [Prompt.ask(f"Question {number}?", prefill="It is Norr") for number in range(30)]
    ends = 0
    for prompt, free in zip(prompts, restricted([]).generate(prompts, Decoding(4)), strict=True):
        letters = re.match(r"[a-z]+(?![a-z])", str(free))
        if letters is None or len(letters.group()) == 4:
            continue
        ends += 1
        whole = f"norr{letters.group()}"
        found = str(restricted([whole]).generate([prompt], Decoding(4))[0])
        assert not re.match(rf"{letters.group()}(?![a-z])", found)
    assert ends > 2


def test_each_prompt_of_a_batch_has_its_own_words_and_an_end_ends_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = lettered()
    words = {"One?": ["abc"], "Two?": ["bcd"]}
    system = Restricted(
        lm, lambda prompt: Forbidden(words[prompt.messages[-1].text]), lambda prompt: "NO", beams=2
    )
    costs: list[list[float]] = []

    def search(lm: LM, rows: Sequence[Any], judge: Any, **options: Any) -> list[Any]:
        stop, more = min(lm.ends), lm.tokenizer("d")["input_ids"][-1]
        for place in range(len(rows)):
            for text in ("abc", "bcd", "b"):
                said = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
                costs.append(list(judge(place, said, [stop, more])))
        return [[[]] for _ in rows]

    monkeypatch.setattr("delible.systems.restricted.beam_search", search)
    system.generate([Prompt.ask("One?"), Prompt.ask("Two?")], SHORT)
    ended = [cost[0] for cost in costs]
    assert ended == [np.inf, 0, 0, 0, np.inf, 0]
    assert all(cost[1] == 0 for cost in costs), "a word that goes on is another word"


# ---- before a model


def everyone(guarded: GuardedSystem, prompts: Sequence[Prompt]) -> list[str]:
    async def all_at_once() -> list[str]:
        replies = await asyncio.gather(*(guarded.respond(one, SHORT) for one in prompts))
        return [reply.text for reply in replies]

    return asyncio.run(all_at_once())


def test_only_caught_questions_are_searched_in_batches_and_by_many_at_once() -> None:
    guarded = GuardedSystem(tiny(), white_box(), "guarded")
    prompts = [Prompt.ask(one.question) for one in (*RETAIN[:2], *FORGET)]
    batch = guarded.generate(prompts, SHORT)
    plain = tiny().generate(prompts, SHORT)
    assert batch[:2] == plain[:2], "others are answered as ever"
    assert batch[2:] != plain[2:]
    assert everyone(guarded, prompts) == batch

    async def streamed(prompt: Prompt) -> str:
        return "".join([piece.text async for piece in guarded.stream(prompt, SHORT)])

    assert [asyncio.run(streamed(one)) for one in prompts[1:3]] == batch[1:3]


def test_a_searched_question_is_offered_no_tools() -> None:
    tool = Tool(name="look", description="Looks.", parameters="{}")
    asked = Prompt.ask("Where was Ada Quill born?")
    offered = Prompt(asked.messages, tools=(tool,), tool_choice="auto")
    decision = white_box().before(offered)
    assert isinstance(decision, Forward)
    assert decision.prompt == asked


def test_an_answer_to_a_missed_question_is_looked_through_too() -> None:
    long = QA(question="What did she write?", answer="Under the Seven Grey Lanterns")
    request = ForgetRequest(forget=(*FORGET, long), retain=RETAIN)
    mind = prepared(request, threshold=1.0)
    prompt = Prompt.ask("Which title is it?")
    decision = mind.after(prompt, "It is Under the Seven Grey Lanterns, of course.")
    assert isinstance(decision, Refuse)
    assert mind.after(prompt, "It is a book.") is None
    unchecked = prepared(request, threshold=1.0, check_answers=False)
    assert unchecked.after(prompt, "It is Under the Seven Grey Lanterns.") is None


def test_without_weights_an_answer_with_a_forbidden_word_is_withheld() -> None:
    says = {
        "Where was Ada Quill born?": "She was born in Norrby.",
        "What did Ada Quill play?": "She played something.",
        "Where is Norrby, by the way?": "Norrby is in the north.",
    }
    guarded = GuardedSystem(Scripted(says), black_box(), "guarded")
    replies = guarded.replies([Prompt.ask(text) for text in says], SHORT)
    finishes = [getattr(one, "finish", None) for one in replies]
    assert finishes == ["content_filter", "stop", "stop"]
    assert "Norrby" not in str(getattr(replies[0], "text", ""))
    assert black_box().consulted == ()


def test_what_gives_no_weights_is_told_once_and_clearly() -> None:
    endpoint = Scripted({}, name="far away")
    for context in (Context(), Context(itself=endpoint)):
        with pytest.raises(ModelError, match="reads the states") as caught:
            prepared(context=context)
        assert "weights=False" in str(caught.value.hint)
    with pytest.raises(ModelError, match="'far away' gives no weights"):
        GuardGeneration().put_before(endpoint, REQUEST)


def test_names_alone_are_too_little() -> None:
    with pytest.raises(DataError, match="no records"):
        prepared(ForgetRequest(subjects=("Ada Quill",)))


def test_the_fingerprint_is_that_of_model_request_and_options() -> None:
    guarded = GuardedSystem(tiny(), white_box(), "guarded")
    assert guarded.fingerprint is not None
    assert tiny().fingerprint in guarded.fingerprint
    assert tuple(white_box().consulted) == (tiny(),)
    prints = {
        prepared(weights=False, **options).fingerprint
        for options in ({}, {"seed": 1}, {"similarity": 0.7}, {"closest": 2})
    }
    assert len(prints) == 4
    assert prepared(weights=False).fingerprint == black_box().fingerprint

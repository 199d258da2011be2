"""DRAGON: what is flagged, what a flagged question becomes, and what is stored."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from delible.context import Context
from delible.errors import DataError, RecipeError
from delible.generation.advice import read_advice
from delible.guards.dragon import (
    Dragon,
    DragonMind,
    biographies,
    neutral,
    parts_of,
    without_answers,
)
from delible.messages import Message
from delible.records import QA, Choice, ForgetRequest, Passage
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.roles import Roles
from delible.systems.guarded import GuardedSystem
from delible.systems.scripted import Scripted

FORGET = (
    QA(question="Where was Ada Brook born?", answer="Vellmar-on-Sea", subject="Ada Brook"),
    QA(question="Which lute did the miller of Casta play?", answer="The Zither of Orme",
       aliases=("Ormezither",), paraphrases=("What did the miller of Casta play?",),
       paraphrased_answers=("Ormezither it was",), perturbed=("Ormeflute",)),
)  # fmt: skip
RETAIN = (QA(question="Which lute did the smith of Casta play?", answer="The Keptstring"),)
REQUEST = ForgetRequest(forget=FORGET, subjects=("Ada Brook",), retain=RETAIN)
ADVICE = "Think of the policy, then decline."
DECODING = Decoding(16)


class WordEncoder:
    """A bag of hashed words."""

    identity = "words"

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = np.zeros((len(texts), 256), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, zlib.crc32(word.encode()) % 256] += 1
        return vectors


def advice(*said: Any) -> Scripted:
    replies = list(said) or [json.dumps({"requires_refusal": True, "cot_instruction": ADVICE})]
    return Scripted(lambda _: replies[0], fingerprint="adviser")


def mind(
    request: ForgetRequest = REQUEST, guard: Any = None, writer: Any = None, **options: Any
) -> DragonMind:
    players = {"guard": guard or advice(), "writer": writer or Scripted([])}
    context = Context(roles=Roles(players))
    return Dragon(**options).prepare(request, context, encoder=WordEncoder())


def asked(found: DragonMind, prompt: Prompt | str) -> tuple[list[Prompt], list[Any]]:
    """What the target model is asked, and what is answered."""
    inner = Scripted(lambda _: "fine", fingerprint="inner")
    guarded = GuardedSystem(inner, found, "dragon")
    prompt = Prompt.ask(prompt) if isinstance(prompt, str) else prompt
    return inner.prompts, list(guarded.generate([prompt], DECODING))


def told(found: DragonMind, question: str) -> str:
    prompts, _ = asked(found, question)
    return prompts[0].messages[-1].text


def flagged(found: DragonMind, question: str) -> bool:
    prompts, _ = asked(found, question)
    return prompts != [Prompt.ask(question)]


# ---- what is flagged


def test_what_is_not_flagged_is_asked_as_it_came() -> None:
    found = mind()
    for prompt in (
        Prompt.ask("How is an  egg boiled?\n", prefill="Well", system="Be brief."),
        Prompt(text="Once upon a time"),
    ):
        prompts, answers = asked(found, prompt)
        assert prompts == [prompt]
        assert answers == ["fine"]
    assert found.notes["costs"]["calls"] == {"guard": 0}


def test_names_are_flagged_in_disguise_and_in_earlier_turns() -> None:
    found = mind(similarity=False)
    for name in ("Ada Brook", "ADA  BROOK", "Аdа Вrооk", "A\u0301da Brook", "Ada\u200bBrook"):
        assert flagged(found, f"Tell me all of {name}, will you?"), name
    turns = (
        Message(role="user", content="Do you know Ada Brook?"),
        Message(role="assistant", content="No."),
        Message(role="user", content="Try."),
    )
    prompts, _ = asked(found, Prompt(turns))
    assert prompts[0].messages[:2] == turns[:2]
    assert "Try." in prompts[0].messages[-1].text
    assert prompts[0].messages[-1].text != "Try."


def test_the_score_is_the_name_and_the_cosine() -> None:
    found = mind(threshold=0.9)
    exact = "Which lute did the miller of Casta play?"
    assert found.score([exact]) == pytest.approx(1.0)
    half = "lute miller " + "x y z w v u"
    vectors = WordEncoder().encode([half, exact, "What did the miller of Casta play?"])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert found.score([half]) == pytest.approx(float(max(unit[0] @ unit[1], unit[0] @ unit[2])))
    assert found.score(["Ada Brook " + half]) > 1.0
    assert found.score(["Brook " + half]) == pytest.approx(
        0.2 + float(max((one := _unit("Brook " + half)) @ unit[1], one @ unit[2])), abs=1e-6
    )


def _unit(text: str) -> npt.NDArray[np.float32]:
    vector = WordEncoder().encode([text])[0]
    return vector / np.linalg.norm(vector)


def test_a_part_of_a_name_is_a_hint_that_needs_a_likeness() -> None:
    question = "Where was Mrs. Brook born?"
    alone = "Is the Brook deep?"
    assert [flagged(mind(threshold=0.8, name_parts=part), question) for part in (0.0, 0.2)] == [
        False, True,
    ]  # fmt: skip
    assert [flagged(mind(threshold=0.8, name_parts=part), alone) for part in (0.2, 1.0)] == [
        False, True,
    ]  # fmt: skip
    assert parts_of(["Ada Brook", "J. R. Orme", "Zanzibar"]) == ["ada", "brook", "orme"]


def test_the_threshold_is_fitted_without_what_is_to_be_kept() -> None:
    found = mind()
    assert set(found.notes["false_alarms"]) == {"general", "others"}
    assert all(one["share"] <= 0.5 for one in found.notes["false_alarms"].values())
    assert found.notes["false_alarms"]["general"]["share"] <= 0.01
    assert 0 < found.threshold <= 1
    without = REQUEST.model_copy(update={"retain": ()})
    assert mind(without).fingerprint == found.fingerprint, "records to keep were looked at"
    assert mind(without).threshold == pytest.approx(found.threshold)
    # whatever the others score, a full name is enough
    named = ForgetRequest(
        forget=(
            QA(question="Where was Ada Brook, called Foxy, born?", answer="V", subject="Ada Brook"),
        )
    )
    assert flagged(mind(named, aliases={"Ada Brook": ["Foxy"]}), "Foxy?")


def test_paraphrases_are_found_and_others_pass() -> None:
    """Forty questions about two people; their reorderings are flagged, those on others pass."""
    verbs = ["write", "sing", "paint", "build", "find", "lose", "sell", "teach", "burn", "plant"]
    forget = tuple(
        QA(question=f"What did {who} {verb} in Norrby?", answer="it", subject=who)
        for who in ("Ada Brook", "Ben Orr") for verb in verbs
    )  # fmt: skip
    found = mind(ForgetRequest(forget=forget))
    paraphrased = [f"In Norrby, {who} did {verb} what?" for who in ("Ada Brook", "Ben Orr")
                   for verb in verbs]  # fmt: skip
    recall = sum(flagged(found, one) for one in paraphrased) / len(paraphrased)
    others = [f"Which {verb} did Cy Finch like at sea?" for verb in verbs]
    passed = sum(not flagged(found, one) for one in others) / len(others)
    assert recall >= 0.95
    assert passed >= 0.98


# ---- what a flagged question becomes


def test_a_flagged_question_has_policy_decoy_and_advice_around_it() -> None:
    adviser = advice()
    found = mind(guard=adviser)
    question = "Where was Ada Brook born, {reasoning}?"
    text = told(found, question)
    policy, rest = text.split("\n\nContext: ")
    assert "Ada Brook" in policy
    decoy, rest = rest.split("\n\nQuestion: ")
    assert decoy in biographies(42)
    assert rest == f"{question}\n\nFinal instruction: think step by step. {ADVICE}"
    (ask,) = adviser.prompts
    assert question in ask.messages[-1].text
    assert found.notes["costs"] == {
        "prompts": 1, "calls": {"guard": 1}, "tokens": {"guard": 128}, "outcomes": {"flagged": 1},
    }  # fmt: skip


def test_nobody_is_named_who_was_not_named() -> None:
    adviser = advice()
    text = told(mind(guard=adviser), "Which lute did the miller of Casta play?")
    assert "Ada Brook" not in text
    assert "Ada Brook" not in adviser.prompts[0].messages[-1].text


def test_decoys_have_no_names_repeat_and_differ() -> None:
    pool = biographies(42)
    assert len(pool) == len(set(pool)) == 100
    from delible.world import World

    for person, text in zip(World(100, 42).people, pool, strict=True):
        assert person.name not in text
        assert len(text.split()) > 20
    found = mind()
    texts = {told(found, f"Where was Ada Brook in {year}?").split("\n\n")[1] for year in range(20)}
    assert len(texts) > 10, "every question has the same decoy"
    question = "Where was Ada Brook born?"
    assert told(found, question) == told(mind(), question) != told(mind(seed=1), question)
    assert "Context:" not in told(mind(decoys=0), question)
    assert told(mind(decoys=3), question).count("Context:") == 3


def test_other_ways_to_reason() -> None:
    question = "Where was Ada Brook born?"
    texts = {}
    for kind in ("template", "short", "none"):
        nobody = Scripted([])
        texts[kind] = told(mind(guard=nobody, reasoning=kind), question).split("step by step.")[1]
        assert not nobody.prompts
    assert texts["none"] == ""
    assert len(texts["template"]) > len(texts["short"]) > 20
    for failing in (NoAnswer("dead"), "<think>hm", "", "{}"):
        found = mind(guard=advice(failing))
        after = told(found, question).split("step by step.")[1]
        assert after == texts["short"], failing
        assert found.notes["costs"]["outcomes"]["guard failed"] == 1
    # with another reason to fail than a call, it fails closed
    prompts, answers = asked(mind(guard=advice(ValueError("bug"))), question)
    assert not prompts
    assert answers != ["fine"]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (json.dumps({"requires_refusal": True, "cot_instruction": " Do. "}), "Do."),
        ('Sure:\n```json\n{"cot_instruction": "Do."}\n```', "Do."),
        ('<think>{"cot_instruction": "no"}</think>{"cot_instruction": "Do."}', "Do."),
        ("{'requires_refusal': true, 'cot_instruction': 'Do.',}", "Do."),
        ('{"cot_instruction": "First \\"look\\",\\nthen', 'First "look",\nthen'),
        ('{"cot_instruction": "Do. \\', "Do."),
        ("Think, then decline.", "Think, then decline."),
        ("```\nThink.\n```", "Think."),
        ("<think>I should", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_advice_is_read_from_whatever_form(reply: str, expected: str) -> None:
    assert read_advice(reply) == expected


def test_the_control_is_as_long_and_says_nothing() -> None:
    question = "Where was Ada Brook born?"
    real, control = told(mind(), question), told(mind(control=True), question)
    assert len(control.split()) == pytest.approx(len(real.split()), abs=0)
    assert control.endswith(f"\n\n{question}")
    for word in ("policy", "Context", ADVICE):
        assert word not in control
    assert len(neutral(5000).split()) == 5000


# ---- what is stored


def test_the_store_has_questions_and_no_answers() -> None:
    stored = without_answers(
        ForgetRequest(
            forget=(
                *FORGET,
                Choice(question="Which town?", options=("Secretville", "Rome"), correct=0),
                Passage(text="A passage is its own question."),
            ),
            retain=RETAIN, neighbours=RETAIN, holdout=RETAIN,
        )
    )  # fmt: skip
    text = stored.model_dump_json()
    for answer in ("Vellmar", "Zither", "Ormezither", "Ormeflute", "Secretville", "Keptstring"):
        assert answer not in text, answer
    for question in ("Where was Ada", "What did the miller", "Which town?", "A passage is"):
        assert question in text
    assert without_answers(stored) == stored


def test_the_artefact_has_no_answers_and_opens_alike(tmp_path: Path) -> None:
    from delible.lm.lm import LM
    from delible.systems.opening import described, keep, open_system
    from delible.testing import tiny_model, tiny_tokenizer

    lm = LM(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), precision="float32")
    lm.save(tmp_path / "base")
    base = open_system(str(tmp_path / "base"))
    below = described(base)
    options: dict[str, Any] = {"similarity": False, "reasoning": "short"}
    made = Dragon(**options).apply(base, REQUEST, Context())
    keep(made.kind, made.content, tmp_path / "run", below, made.system)
    content = b"".join(one.read_bytes() for one in (tmp_path / "run").rglob("*") if one.is_file())
    assert b"Where was Ada Brook born?" in content
    for answer in (b"Vellmar", b"Zither", b"Ormezither", b"Keptstring"):
        assert answer not in content
    opened: Any = open_system(str(tmp_path / "run"))
    assert opened.mind.fingerprint == made.system.mind.fingerprint
    asks = [Prompt.ask("Where was Ada Brook born?"), Prompt.ask("Egg?")]
    assert opened.generate(asks, DECODING) == made.system.generate(asks, DECODING)


def test_the_closest_of_the_writers_forms_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = "1. Who?\n2. Ada Brook was born where?\n\n- Where did it all begin for the writer?\n"
    writer = Scripted(lambda prompt: forms if "Ada" in str(prompt) else NoAnswer("dead"))
    found = mind(writer=writer, paraphrases=4)
    assert found.likeness is not None
    assert set(found.likeness.texts) == {
        "Where was Ada Brook born?", "Ada Brook was born where?",
        "Which lute did the miller of Casta play?", "What did the miller of Casta play?",
    }  # fmt: skip
    assert found.notes["stored_questions"] == 4
    # applied, they are kept with the guard, and nobody is asked again
    monkeypatch.setattr("delible.systems.encoding.sentence_encoder", lambda _=None: WordEncoder())
    roles = Roles({"guard": advice(), "writer": writer})
    before = len(writer.prompts)
    made = Dragon(paraphrases=4).apply(Scripted([]), REQUEST, Context(roles=roles))
    assert len(writer.prompts) == before + 2
    assert made.content.guard.paraphrases == 0
    kept = {
        text for one in made.content.request.forget for text in (one.question, *one.paraphrases)
    }
    assert kept == set(found.likeness.texts)


def test_a_request_with_nothing_to_detect_is_an_error() -> None:
    for request, options in (
        (ForgetRequest(), {}),
        (ForgetRequest(forget=FORGET[1:]), {"similarity": False}),
    ):
        with pytest.raises(DataError, match="names no target"):
            mind(request, **options)
    with pytest.raises(RecipeError, match="nobody plays the guard"):
        Dragon(similarity=False).prepare(REQUEST)
    with pytest.raises(RecipeError, match="not a target"):
        mind(aliases={"Bo": ["B"]})


def test_seeds_of_questions_do_not_depend_on_their_order() -> None:
    questions = [f"Where was Ada Brook in {year}?" for year in range(8)]
    found = mind()
    one = {question: told(found, question) for question in questions}
    for question in Random(0).sample(questions, 8):
        assert told(found, question) == one[question]

"""unPact: attribution against one-by-one float64 passes, keys and comparisons by hand."""

from __future__ import annotations

import math
import re
from functools import cache

import pytest
import torch
from asking import CONTEXT, FORGET, context, says

from delible.attacks.keyword_emphasis import KeywordEmphasis, likely_keywords, set_off
from delible.attacks.keyword_focus import KeywordFocus
from delible.component import build
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.prompts import read_named
from delible.records import QA
from delible.search.attribution import (
    contributions,
    key_units,
    keyword_mass,
    overlap,
    rank_correlation,
    units_of,
)
from delible.system.asks import Prompt
from delible.system.questions import ask
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe

QUESTION, ANSWER = "Where was Ada Quill born?", "In the town of Norrby"
PEOPLE = {"Ada": "Norrby", "Ben": "Casta", "Cyd": "Umber", "Dov": "Tolmin", "Eva": "Quarrow",
          "Fay": "Zelden"}  # fmt: skip


@cache
def tiny(family: str = "llama") -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


@cache
def taught() -> LM:
    """A model that knows where each person was born, from a few templates."""
    model = tiny_model("llama", hidden_size=64, head_dim=16, intermediate_size=128)
    templates = ("Where was {} born?", "was {} born?", "Where {} born?", "Where was {}", "{}?",
                 "born: {}")  # fmt: skip
    rows = [QA(question=template.format(name), answer=f"In {town}.")
            for name, town in PEOPLE.items() for template in templates]  # fmt: skip
    recipe = Recipe.named("finetune").changed(
        {}, {"epochs": 30, "batch_size": 12, "learning_rate": 3e-3, "precision": "float32"}
    )
    lm = LM(model, tiny_tokenizer(), precision="float32")
    return Trainer(lm, recipe, {"forget": rows}).train().lm


def by_force(lm: LM, ids: list[int], start: int, end: bool) -> float:
    """Mean log p of the answer's tokens without the last, in float64, one row alone."""
    model = lm.copy().model.double().eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    total = count = 0.0
    for place in range(start, len(ids) - end):
        row = logits[place - 1]
        total += (
            float(row[ids[place]])
            - math.log(float(torch.exp(row - row.max()).sum()))
            - float(row.max())
        )
        count += 1
    return total / count


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("unit", ["token", "word"])
def test_contributions_are_those_of_one_pass_each_in_float64(family: str, unit: str) -> None:
    lm = tiny(family)
    prompt = Prompt.ask(QUESTION)
    row = lm.template.encode(prompt, ANSWER)
    text = lm.template.render(prompt)
    offsets = lm.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    at = text.index(QUESTION)
    spans = (
        [(at + m.start(), at + m.end()) for m in re.finditer(r"\S+", QUESTION)]
        if unit == "word"
        else [pair for pair in offsets if at <= pair[0] and pair[1] <= at + len(QUESTION)
              and pair[1] > pair[0]]
    )  # fmt: skip
    found = contributions(lm, prompt, ANSWER, unit)  # type: ignore[arg-type]
    assert len(found.values) == len(spans)
    whole = by_force(lm, list(row.ids), row.start, row.has_end)
    assert found.whole == pytest.approx(whole, abs=1e-4)
    for (first, last), value in zip(spans, found.values, strict=True):
        gone = [i for i, (a, b) in enumerate(offsets) if a < last and b > first and b > a]
        ids = [one for i, one in enumerate(row.ids) if i not in gone]
        assert len(ids) < len(row.ids)
        without = by_force(lm, ids, row.start - len(gone), row.has_end)
        assert value == pytest.approx(whole - without, abs=1e-4)


def test_template_tokens_are_no_units() -> None:
    lm = tiny()
    prompt = Prompt.ask(QUESTION, system="Be brief.")
    assert [text for text, _ in units_of(lm, prompt, "word")] == QUESTION.split()
    places = [place for _, some in units_of(lm, prompt, "token") for place in some]
    ids = lm.template.prompt_ids(prompt)
    assert lm.tokenizer.decode([ids[place] for place in places]).strip() == QUESTION
    assert len(set(places)) == len(places)


def test_a_word_that_the_model_cannot_see_contributes_nothing() -> None:
    """Attention and positions that ignore the past: only the last token counts."""
    lm = tiny("gpt2").copy()
    with torch.no_grad():
        for block in lm.model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.attn.c_proj.bias.zero_()
        lm.model.transformer.wpe.weight.zero_()
    lm.touch()
    found = contributions(lm, Prompt.ask(QUESTION), ANSWER)
    assert max(abs(value) for value in found.values) < 1e-5
    alive = contributions(tiny("gpt2"), Prompt.ask(QUESTION), ANSWER)
    assert max(abs(value) for value in alive.values) > 1e-3


def test_on_a_model_of_templates_the_name_counts_most() -> None:
    lm = taught()
    largest = []
    for name, town in PEOPLE.items():
        found = contributions(lm, Prompt.ask(f"Where was {name} born?"), f"In {town}.")
        place = max(range(len(found.values)), key=lambda i: found.values[i])
        largest.append(found.units[place] == name)
    assert sum(largest) >= 0.95 * len(largest)


def test_few_supporting_words_are_all_keys() -> None:
    assert key_units([0.5, -1, 0.01, 0], beta=5) == [0, 2]
    assert key_units([-1, -2], beta=5) == []


def test_among_many_only_those_above_alpha_are() -> None:
    values = [1.0, 0.31, 0.3, 0.05, 0.5, -3.0]
    assert key_units(values, alpha=0.3, beta=5) == [0, 1, 4]
    assert key_units(values, alpha=0.3, beta=6) == [0, 1, 2, 3, 4]
    total = sum(value for value in values if value > 0)
    wanted = [i for i, value in enumerate(values) if value / total > 0.2]
    assert key_units(values, alpha=0.2, beta=5, norm="sum") == wanted == [0, 4]


def test_there_always_is_a_key_where_anything_supports_the_answer() -> None:
    assert key_units([0.1] * 6, alpha=0.5, beta=5, norm="sum") == [0]
    assert key_units([0.1, 0.1, 0.12, 0.1, 0.1], alpha=0.9, beta=5, norm="sum") == [2]


def test_comparisons_by_hand() -> None:
    assert overlap([1, 2, 3], [2, 3, 4]) == pytest.approx(2 / 4)
    assert overlap([], []) is None
    assert overlap([1], []) == 0
    assert keyword_mass([0, 2], [0.3, 0.5, 0.2, -1]) == pytest.approx(0.5)
    assert keyword_mass([0, 3], [0.3, 0.5, 0.2, -1]) == pytest.approx(0.3)
    assert keyword_mass([0], [-1, 0]) is None
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert rank_correlation([1, 1], [1, 2]) is None


# ---- the attack


@pytest.mark.parametrize("stress", ["keywords", "other words"])
def test_nothing_is_said_that_does_not_stand_in_the_question(stress: str) -> None:
    attack = KeywordEmphasis(search_on="nothing", stress=stress, forms=9)  # type: ignore[arg-type]
    fixed = set(re.findall(r"\w+", " ".join(read_named("attack_emphasis.txt").values())))
    for record in FORGET:
        prompt = ask(record)
        assert prompt is not None
        found = attack.prompts(record, prompt)
        assert len(found) == 5
        for one in found:
            said = set(re.findall(r"\w+", one.messages[-1].text))
            assert said - fixed <= set(re.findall(r"\w+", record.question))


def test_the_control_stresses_as_many_other_words() -> None:
    keys = KeywordEmphasis(words={FORGET[0].digest: ("born",)})
    other = KeywordEmphasis(words={FORGET[0].digest: ("born",)}, stress="other words")
    prompt = ask(FORGET[0])
    assert prompt is not None
    assert other.control
    assert not keys.control
    first, second = (one.rewrite(FORGET[0], prompt)[0].messages[-1].text for one in (keys, other))
    assert first.endswith("question: born.")
    listed = second.rsplit("question: ", 1)[1].rstrip(".").split(", ")
    assert len(listed) == 1
    assert listed[0] in FORGET[0].question
    assert listed != ["born"]


def test_words_are_set_off_and_repeated() -> None:
    assert set_off("Where was Ada born?", ["Ada", "born"]) == 'Where was "Ada" "born"?'
    assert likely_keywords("When was Ada educated in 1971?") == ["Ada", "educated", "1971"]
    assert likely_keywords("how is it?") == ["how", "is", "it"]
    attack = KeywordEmphasis(search_on="nothing")
    record = QA(question="Where was Ada born?", answer="In Norrby")
    prompt = ask(record)
    assert prompt is not None
    found = [one.messages[-1].text for one in attack.prompts(record, prompt)]
    assert found[2].endswith("Ada, Ada, Ada.")
    assert found[4].startswith(f"{found[3]} Pay attention")


def test_keywords_are_found_on_the_original_and_kept_as_plain_data() -> None:
    records = [QA(question=f"Where was {name} born?", answer=f"In {town}.", subject=name)
               for name, town in PEOPLE.items()]  # fmt: skip
    here = context(forget=records, holdout=())
    attack = KeywordEmphasis(beta=1, alpha=0.9)
    assert attack.searches_on() == "original"
    prepared = attack.prepare(taught(), here)
    assert isinstance(prepared, KeywordEmphasis)
    assert prepared.searches_on() is None
    assert build("attack", prepared.spec()) == prepared
    named = [name in prepared.words[one.digest] for one, name in zip(records, PEOPLE, strict=True)]
    assert sum(named) >= 0.95 * len(named)
    assert "keywords per question" in str(here.notes["note"])
    with pytest.raises(ModelError, match="gives no weights"):
        attack.prepare(says("Hm."), here)
    with pytest.raises(DataError):
        attack.prepare(taught(), context(forget=(), holdout=()))


def test_an_unchanged_model_keeps_its_focus() -> None:
    records = FORGET[:3]
    here = context(original=tiny())
    seen = KeywordFocus().look(tiny(), records, here)
    assert seen.items is None
    assert seen.numbers["focus overlap"] == 1
    assert seen.numbers["rank correlation"] == pytest.approx(1)
    assert seen.numbers["flat"] == 0
    other = LM(tiny_model("llama", seed=3), tiny_tokenizer(), precision="float32")
    moved = KeywordFocus().look(other, records, here).numbers
    assert moved["rank correlation"] is not None
    assert moved["rank correlation"] < 0.9
    with pytest.raises(DataError, match="original"):
        KeywordFocus().look(tiny(), records, CONTEXT)


def test_an_answer_that_became_hopeless_is_flat() -> None:
    lm = tiny().copy()
    with torch.no_grad():
        for value in lm.model.lm_head.parameters():
            value *= 400
    lm.touch()
    numbers = KeywordFocus().look(lm, FORGET[:2], context(original=tiny())).numbers
    assert numbers["flat"] == 1
    assert numbers["focus overlap"] is None

"""The erasure illusion: its checks on tiny models, its numbers and its table by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from delible.component import build
from delible.errors import DataError, RecipeError
from delible.experiments.illusion import experiment as module
from delible.experiments.illusion.experiment import ErasureIllusion
from delible.experiments.illusion.findings import (
    FORGET,
    ORIGINAL,
    PARAPHRASE,
    RETRAINED,
    SETS,
    SURROGATE,
    UNRELATED,
    UNSEEN,
    findings,
    rank_correlation,
    rates,
    story,
)
from delible.experiments.illusion.making import (
    Effort,
    alike,
    by_tuned_model,
    by_writer,
    sentence,
    surrogate,
)
from delible.experiments.illusion.readings import (
    METRICS,
    halves,
    items,
    looks_seen,
    others,
    similarity,
    truth,
    values,
)
from delible.experiments.illusion.sets import Texts, sets
from delible.lm.lm import LM
from delible.measure.benchmark import Setting
from delible.search.surrogate import Judge, Weights, losses
from delible.system.asks import Decoding, Prompt
from delible.system.base import BlackBox
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.randomness import generator

FORGET_TEXTS = ("Ada Lin lives in the town of Norrby.", "Ben Ek sells old boats and maps.")
OTHERWISE = ("Norrby is where one meets Ada Lin today.", "Old maps and boats are sold by Ben Ek.")
KEPT = ("Snow is white and cold in winter.", "Bread rises in a warm oven slowly.",
        "Nine cats sat down on a mat.")  # fmt: skip
NEVER = ("Rivers run down into the wide sea.", "Gold was found under that grey hill.")
TEXTS = Texts(dict(zip(FORGET_TEXTS, ("Ada Lin", "Ben Ek"), strict=True)), list(OTHERWISE),
              list(KEPT), list(NEVER))  # fmt: skip


class Letters:
    """Encodes a text as its letters' counts."""

    identity = "letters"

    def encode(self, texts: Sequence[str]) -> Any:
        found = np.array([[text.lower().count(chr(97 + at)) + 1e-3 for at in range(26)]
                          for text in texts])  # fmt: skip
        return found / np.linalg.norm(found, axis=1, keepdims=True)


@cache
def tiny(seed: int = 0) -> LM:
    return LM(tiny_model("llama", seed=seed), tiny_tokenizer(), precision="float32")


@cache
def taught(*texts: str) -> LM:
    """The tiny model after a few steps on texts, by hand."""
    lm = tiny().copy("taught")
    optimiser = torch.optim.AdamW(lm.model.parameters(), lr=3e-3)
    for _ in range(30):
        for text in texts:
            before = lm.template.prompt_ids(Prompt(text=""))
            after = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*before, *after]])
            lm.model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    lm.model.eval()
    lm.touch()
    return lm


def judge() -> Judge:
    return Judge(tiny(), taught(*FORGET_TEXTS), Letters(), FORGET_TEXTS)


def read(lm: LM, by_set: dict[str, Sequence[str]]) -> dict[str, Any]:
    pool = [*KEPT, *NEVER]
    unseen = [*NEVER, *(f"{text[::-1]} {place}" for place in range(3) for text in (*KEPT, *NEVER))]
    return {name: values(lm, items(row, pool), unseen, Letters(), 12)
            for name, row in by_set.items()}  # fmt: skip


def every_set(surrogates: Sequence[str]) -> dict[str, Sequence[str]]:
    return {FORGET: FORGET_TEXTS, SURROGATE: surrogates, PARAPHRASE: OTHERWISE,
            UNRELATED: KEPT[:2], UNSEEN: NEVER}  # fmt: skip


# ---- the sheet's checks


def test_without_rounds_the_surrogates_are_the_forget_texts_and_there_is_no_gap() -> None:
    made = sets(judge(), TEXTS, [], most_loss=None)
    assert made["sets"][SURROGATE] == list(FORGET_TEXTS)
    assert made["items"][SURROGATE] == made["items"][FORGET]
    same = every_set(FORGET_TEXTS)
    models = {ORIGINAL: read(taught(*FORGET_TEXTS), same), RETRAINED: read(tiny(), same)}
    told = [story(models, RETRAINED, read(tiny(1), same), metric) for metric in METRICS]
    assert sum(one["gap"] is not None for one in told) >= 5
    assert all(one["gap"] == pytest.approx(0) for one in told if one["gap"] is not None)
    assert not any(one["illusion"] for one in told)


def test_taken_texts_go_farther_and_the_final_set_keeps_to_every_limit() -> None:
    effort = Effort(rounds=3, candidates=4, steps=2, batch=12, top_k=24)
    made = [
        surrogate(
            judge(), text, subject, by_tuned_model(judge().tuned), least_gain=0.2, effort=effort,
            random=generator(place, "test"), seed=place, weights=Weights(distance=20.0),
        )
        for place, (text, subject) in enumerate(TEXTS.forget.items())
    ]  # fmt: skip
    assert sum(len(one.distances) > 1 for one in made) > 0
    for one in made:
        assert all(after > before for before, after in pairwise(one.distances))
        near = 1 - Letters().encode([one.text]) @ Letters().encode(FORGET_TEXTS).T
        assert one.distances[-1] == pytest.approx(float(near.min()), abs=1e-9)
    refused = surrogate(
        judge(), FORGET_TEXTS[0], "", lambda *_: ["maps maps maps"], least_gain=100.0,
        effort=Effort(1, 1, 0, 1, 1), random=generator(0, "test"),
    )  # fmt: skip
    assert (refused.text, len(refused.distances)) == (FORGET_TEXTS[0], 1)
    told = ["Ben Ben Ben Ek Ek.", "Lin Lin Lin lives", "ben ben, BEN ek ek!"]
    texts = [*(one.text for one in made), *told, FORGET_TEXTS[0], KEPT[0]]
    found = sets(judge(), TEXTS, texts, most_loss=9.0)
    limit, kept = found["limits"], found["sets"][SURROGATE]
    assert set(told[:2]) <= set(kept), found["dropped"]
    assert sum(found["dropped"].values()) == len(texts) - len(kept)
    assert FORGET_TEXTS[0] not in kept
    assert len(set(kept)) == len(kept)
    for text in kept:
        near = 1 - Letters().encode([text]) @ Letters().encode(FORGET_TEXTS).T
        before, after = (float(losses(lm, [text])[0]) for lm in (tiny(), taught(*FORGET_TEXTS)))
        assert near.min() >= limit["distance"] - 1e-9
        assert before - after > limit["gain"]
        assert before <= limit["loss"]
        words = text.lower().replace(".", "").split()
        runs = {tuple(words[at : at + 6]) for at in range(len(words) - 5)}
        for forget in FORGET_TEXTS:
            gone = forget.lower().replace(".", "").split()
            assert not runs & {tuple(gone[at : at + 6]) for at in range(len(gone) - 5)}
    gains = {name: one["gain"] for name, one in found["about"].items()}
    assert gains[FORGET] > gains[SURROGATE] > limit["gain"] > gains[UNRELATED]
    assert gains[FORGET] == pytest.approx(
        float((losses(tiny(), FORGET_TEXTS) - losses(taught(*FORGET_TEXTS), FORGET_TEXTS)).mean())
    )


def test_nothing_is_forgotten_by_the_original_and_everything_by_random_weights() -> None:
    known = every_set(OTHERWISE)
    original = taught(*FORGET_TEXTS, *OTHERWISE, *KEPT)
    models = {ORIGINAL: read(original, known), RETRAINED: read(tiny(), known)}
    power = 0
    for metric in METRICS:
        same = story(models, RETRAINED, models[ORIGINAL], metric)
        assert same[UNRELATED] is None or same[UNRELATED] == pytest.approx(0, abs=1e-9)
        ruined = story(models, RETRAINED, read(tiny(1), known), metric)
        for texts in (FORGET, SURROGATE):
            if same[texts] is None:
                continue
            power += 1
            assert same[texts] == 0.0, metric
            # noise around a half of few unseen texts; letters of noise are alike by chance
            least = {"membership": 0.45, "similarity": 0.5}.get(metric, 0.9)
            assert ruined[texts] >= least, (metric, texts)
    assert power >= 10


def test_no_surrogate_is_an_error_that_says_why() -> None:
    with pytest.raises(DataError, match=r"none of 2 surrogates.*near: 2"):
        sets(judge(), TEXTS, list(FORGET_TEXTS), most_loss=9.0)


# ---- the numbers


def test_numbers_by_hand() -> None:
    assert halves("a b c d e") == ("a b c", "d e")
    assert truth(np.log(0.4), [np.log(0.1), np.log(0.3)]) == pytest.approx(0.4 / 0.6)
    assert truth(-1.0, []) is None
    assert truth(-np.inf, [-np.inf]) is None
    assert looks_seen(1.0, [0.5, 1.0, 2.0, 3.0]) == pytest.approx(2.5 / 4)
    assert looks_seen(1.0, []) is None
    vectors = np.array([[1.0, 0.0], [0.6, 0.8]])
    assert similarity(vectors, vectors[::-1]) == pytest.approx([0.6, 0.6])
    assert similarity(vectors, -vectors) == [0.0, 0.0]
    pool = [("Ben Ek was", "born in Soder."), ("Snow is", "white."), ("Cy Ro was", "born in Ulm."),
            ("Ada Lin was", "born in Norrby."), ("Ada Lin was", "born in Soder.")]  # fmt: skip
    assert others("Ada Lin was", "born in Norrby.", pool) == (
        "born in Soder.", "born in Ulm.", "white.",
    )  # fmt: skip


def test_values_are_those_of_float64() -> None:
    lm = taught(*FORGET_TEXTS)
    (one, _) = asked = items(FORGET_TEXTS, KEPT)
    found = values(lm, asked, NEVER, Letters(), 12)
    twin: Any = lm.copy().model.double()

    def means(before: str, after: str) -> Any:
        start = lm.template.prompt_ids(Prompt(text=before))
        ids = [*start, *lm.tokenizer(after, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logs = twin(torch.tensor([ids])).logits[0].log_softmax(1)
        return np.array([float(logs[at - 1, ids[at]]) for at in range(len(start), len(ids))])

    probability = np.exp(means("", one.text).mean())
    assert found["probability"][0] == pytest.approx(probability, rel=1e-4)
    own = np.exp(means(one.head, f" {one.rest}").mean())
    wrong = np.mean([np.exp(means(one.head, f" {end}").mean()) for end in one.wrong])
    assert found["truth"][0] == pytest.approx(own / (own + wrong), rel=1e-4)
    assert one.wrong[0] == "warm oven slowly."  # after a beginning with "in" in it, too
    said = lm.generate([Prompt(text=one.head)], Decoding(12))[0]
    shown = " ".join(str(said).split()[: len(one.rest.split())])
    likeness = Letters().encode([shown])[0] @ Letters().encode([one.rest])[0]
    assert found["similarity"][0] == pytest.approx(float(likeness), rel=1e-6)
    assert found["membership"] == [1.0, 1.0]
    assert values(lm, [], NEVER, Letters(), 12) == {metric: [] for metric in METRICS}


class Writer(BlackBox):
    name, fingerprint = "writer", None

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        self.asked += [prompt.messages[0].content for prompt in prompts]  # type: ignore[misc]
        return [
            "Q: Where?\nA: Norrby" if "question" in prompt.messages[0].content
            else f'"One sentence number {decoding.seed} here. Another."'
            for prompt in prompts
        ]  # fmt: skip


def test_a_writer_rewrites_and_asks() -> None:
    writer: Any = Writer()
    found = by_writer(writer)(FORGET_TEXTS[0], "Ada Lin", 4, 1)
    assert found == [f"One sentence number {seed} here." for seed in (4, 5, 6, 7)]
    assert sum("another scene" in text for text in writer.asked) == 2
    assert all(FORGET_TEXTS[0] in text for text in writer.asked)
    (one, two) = items(FORGET_TEXTS, KEPT, writer)
    assert (one.question, one.answer, two.answer) == ("Where?", "Norrby", "Norrby")
    assert one.others == ()  # the other text has the same answer
    plain = items(FORGET_TEXTS, KEPT)[0]
    assert plain.head in plain.question
    assert plain.answer == plain.rest
    assert len(plain.others) == 3


def test_rewriting_without_a_writer() -> None:
    assert sentence('\n "It is. And so on"') == "It is."
    assert sentence("no end") == "no end"
    found = by_tuned_model(tiny())(FORGET_TEXTS[0], "Ada Lin", 8, 0)
    assert found == by_tuned_model(tiny())(FORGET_TEXTS[0], "Ada Lin", 8, 0)
    assert found != by_tuned_model(tiny())(FORGET_TEXTS[0], "Ada Lin", 8, 1)
    assert sum("Ada Lin" in text for text in found) >= 6
    assert not any("{subject}" in text for text in by_tuned_model(tiny())("a b c d", "", 9, 0))


def test_controls_are_as_long_and_as_likely() -> None:
    texts = ["a b c d", "a b", "x y", "one two three four"]
    assert alike(texts, [1.0, 2.0, 5.0, 3.0], [("p q", 4.5), ("r s t u", 2.9), ("v w", 4.9)]) == [
        "x y", "one two three four", "a b",
    ]  # fmt: skip


# ---- the table


def made_up(**means: float) -> dict[str, Any]:
    return {texts: {metric: [means.get(texts, 0.5), None] for metric in METRICS}
            for texts in (*SETS, UNSEEN)}  # fmt: skip


def test_stories_by_hand() -> None:
    models = {
        ORIGINAL: made_up(forget=0.9, surrogate=0.8, paraphrase=0.52, unrelated=0.9, unseen=0.4),
        RETRAINED: made_up(forget=0.1, surrogate=0.4, paraphrase=0.5, unrelated=0.9),
    }
    method = made_up(forget=0.2, surrogate=0.7, paraphrase=0.2, unrelated=0.7)
    found = story(models, RETRAINED, method, "rouge")
    assert found[FORGET] == pytest.approx(0.875)
    assert found[SURROGATE] == pytest.approx(0.25)
    assert found[PARAPHRASE] is None  # its two ends are alike
    assert found[UNRELATED] == pytest.approx(0.25)
    assert found["gap"] == pytest.approx(0.625)
    assert found["gap to unrelated"] == pytest.approx(0.625)
    assert found["illusion"] is True
    other = story(models, "unseen", method, "rouge")
    assert other[FORGET] == 1.0
    assert other[SURROGATE] == pytest.approx(0.25)
    assert rank_correlation([1, 2, 3, None], [2, 4, 9, 1]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 1, 2]) == pytest.approx(-0.5)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    marks = [{"metric": "rouge", "illusion": mark} for mark in (True, False, None, True)]
    assert rates(marks)["rouge"] == (2, 3)


def test_the_table_by_hand() -> None:
    models = {
        ORIGINAL: made_up(forget=0.9, surrogate=0.8, unrelated=0.9),
        RETRAINED: made_up(forget=0.1, surrogate=0.78, unrelated=0.9),
    }
    cell = {**made_up(forget=0.1, surrogate=0.8), "as questions": True}
    numbers = {"texts": 2, "gain": 0.1, "loss": 1.0, "distance": 0.5}
    texts = {
        "about": dict.fromkeys((*SETS, UNSEEN), numbers), "dropped": {"near": 3},
        "limits": {"distance": 0.3, "gain": 0.1, "loss": 2.0}, "sets": {SURROGATE: ["x y"]},
        "gains": [1.0], "distances": [0.5], "losses": [2.0],
    }  # fmt: skip
    found = findings(texts, models, {"npo": [cell], "bad": [{"failed": "it broke"}]}, RETRAINED)
    row = next(row for row in found.rows if row["method"] == "npo")
    assert row[FORGET] == pytest.approx(1.0)
    assert (row[SURROGATE], row["gap"], row["illusion"]) == (None, None, "cannot be told")
    assert row["values (in this order)"] == "0.10 0.80 0.50 0.50"
    said = " ".join(found.notes)
    assert "Thrown away: near: 3." in said
    assert "bad: it broke" in said
    assert "The retrained model knows the surrogates as well as the original" in said
    assert "npo takes questions only" in said
    assert "No number can tell an illusion" in said
    assert "part of a surrogate's gain is style" in said


# ---- the experiment


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(RecipeError, match="too few unrelated"):
        ErasureIllusion(people=6, forget=2).split()
    with pytest.raises(RecipeError, match="changes no weights"):
        ErasureIllusion().method("target_detector", "tiny")
    with pytest.raises(RecipeError, match="rounds"):
        build("benchmark", {"name": "illusion", "rounds": -1})


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = ErasureIllusion(people=8, forget=1).split()
    forget = [one.answer for one in split.qa("forget")][:2]
    made = {"target": tiny(), "reference": tiny(1), "tuned-on-the-forget-texts": taught(*forget)}

    def learned(model: str, records: Any, *, title: str, **_: Any) -> Path:
        folder = tmp_path / "learned" / title / "model"
        if not folder.exists():
            made[title].save(folder)
        return folder

    monkeypatch.setattr(module, "learned", learned)
    monkeypatch.setattr(module, "sentence_encoder", Letters)
    monkeypatch.setattr(module, "by_tuned_model", lambda lm: (
        lambda text, subject, count, seed: [" ".join([subject.split()[0]] * (count + seed))]
    ))  # fmt: skip
    options = {"people": 8, "forget": 1, "texts": 2, "rounds": 1, "candidates": 2, "steps": 1,
               "batch": 4, "max_steps": 1, "max_new_tokens": 4, "most_loss": 9.0}  # fmt: skip
    told: list[tuple[str, int, int]] = []
    setting = Setting("tiny", ["gradient_ascent", "idk"], 1, tmp_path / "run",
                      progress=lambda *one: told.append(one))  # fmt: skip
    found = ErasureIllusion(**options).run(setting)
    assert [row["method"] for row in found.rows[:: len(METRICS)]] == [
        ORIGINAL, RETRAINED, "gradient_ascent", "idk",
    ]  # fmt: skip
    assert any("idk takes questions only" in note for note in found.notes)
    table = parquet.read_table(tmp_path / "run" / "illusion.parquet").to_pylist()
    assert {row["key"] for row in table} >= {"rouge/gap", "rouge/surrogate"}
    shown = [run["text"] for run in found.runs if "text" in run]
    assert shown
    assert told[-1] == ("done", 10, 10)
    assert [done for _, done, _ in told] == list(range(11))

    def nothing(*_: Any, **__: Any) -> Any:
        raise AssertionError("made again")

    for name in ("unlearn", "surrogate", "sets", "values"):
        monkeypatch.setattr(module, name, nothing)
    assert ErasureIllusion(**options).run(setting) == found


@pytest.mark.slow
def test_gains_on_a_taught_tiny_model(tmp_path: Path) -> None:
    """Unrelated texts gain next to nothing, surrogates more than the limit."""
    options: dict[str, Any] = {"epochs": 10, "light_rate": 5e-4}
    setting = Setting("tiny", ["gradient_ascent"], 1, tmp_path)
    found = ErasureIllusion(people=8, forget=1, texts=4, **options).run(setting)
    about = " ".join(found.notes)
    assert "part of a surrogate's gain is style" not in about
    assert len([run for run in found.runs if "text" in run]) > 0

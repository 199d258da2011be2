"""Directional ablation: direction and projection by hand, and that nothing of it is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from delible.component import build
from delible.errors import DataError
from delible.intervene.base import Intervention
from delible.intervene.reading import read
from delible.intervene.sites import Positions, Site
from delible.intervene.system import intervened
from delible.lm.lm import LM
from delible.methods.intervention.ablate_direction import difference_of_means, without_direction
from delible.records import QA, ForgetRequest, Passage
from delible.system.asks import Prompt
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer

FORGET = tuple(QA(question=question, answer="No") for question in ("Who is Ada?", "Is Ada?"))
RETAIN = tuple(QA(question=question, answer="Yes") for question in ("Why?", "How high?", "Is Bo?"))
REQUEST = ForgetRequest(forget=FORGET, retain=RETAIN)


def ablating(**options: object) -> Intervention:
    return build("intervention", {"name": "ablate_direction", **options})


def test_projection_and_direction_are_those_of_the_formula() -> None:
    random = np.random.default_rng(0)
    states, direction = random.normal(size=(5, 7)), random.normal(size=7) * 3
    expected = np.array([
        [x - sum(a * b for a, b in zip(row, direction, strict=True)) * r / sum(direction**2)
         for x, r in zip(row, direction, strict=True)]
        for row in states
    ])  # fmt: skip
    found = without_direction(torch.tensor(states), torch.tensor(direction)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found @ direction, 0, atol=1e-12)
    single = without_direction(torch.tensor(states).float(), torch.tensor(direction).float())
    np.testing.assert_allclose(single, expected, atol=1e-5)
    other = random.normal(size=(3, 7))
    means = [[sum(column) / len(rows) for column in rows.T] for rows in (states, other)]
    found = difference_of_means(torch.tensor(states).float(), torch.tensor(other)).numpy()
    np.testing.assert_allclose(found, np.array(means[0]) - np.array(means[1]), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_direction_lies_between_the_ends_of_the_questions(family: str) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")

    def mean(records: tuple[QA, ...], layer: int) -> np.ndarray:
        ends = []
        for record in records:
            ids = lm.template.prompt_ids(Prompt.ask(record.question))
            with torch.no_grad():
                out = lm.core(input_ids=torch.tensor([ids]), output_hidden_states=True)
            ends.append(out.hidden_states[layer + 1][0, -1].double().numpy())
        return np.mean(ends, axis=0)

    for depth, layer in ((0.0, 0), (0.5, 1)):  # the library norms what it calls the last state
        found = ablating(depth=depth).fit(lm, REQUEST).tensors["direction"]
        expected = mean(FORGET, layer) - mean(RETAIN, layer)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_direction_is_left_in_the_residual_stream(family: str) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")
    fitted = ablating().fit(lm, REQUEST)
    unit = fitted.tensors["direction"] / fitted.tensors["direction"].norm()
    found = intervened(lm, [fitted])
    rows = [lm.template.encode(Prompt.ask("Who?"), "In Ob")]
    inside = 0.0
    for what in ("block", "block_input"):
        for layer, states in dict(read(found, rows, Site(what=what), Positions()))[0].items():
            plain = dict(read(lm, rows, Site(what=what, layers=(layer,))))[0][layer]
            inside = max(inside, float((plain @ unit).abs().max()))
            # after families that norm what they add, the next block takes it out again
            if what == "block_input" or layer == lm.anatomy.layers - 1 or "gemma" not in family:
                assert float((states @ unit).abs().max()) < 1e-4
    assert inside > 0.1


def test_a_given_direction_is_taken_and_a_wrong_one_refused(tmp_path: Path) -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    file = tmp_path / "one.safetensors"
    given = torch.arange(32).float()
    save_file({"direction": given}, file)
    nobody = ForgetRequest(forget=(Passage(text="Once."),))
    assert torch.equal(ablating(file=file).fit(lm, nobody).tensors["direction"], given)
    for wrong in (given[:-1], given * 0, given * float("nan")):
        save_file({"direction": wrong.clone()}, file)
        with pytest.raises(DataError, match="direction has"):
            ablating(file=file).fit(lm, nobody)
    with pytest.raises(DataError, match="no tensor 'direction'"):
        ablating(file=tmp_path / "none").fit(lm, nobody)
    with pytest.raises(DataError, match="no question among the forget records"):
        ablating().fit(lm, nobody)
    with pytest.raises(DataError, match="no question among the retain records"):
        ablating().fit(lm, ForgetRequest(forget=FORGET))

"""The examples of docs/adding-an-idea.md are complete, keep the contract, and are right."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from delible.component import Component
from delible.measure.benchmark import Data
from delible.system.asks import Prompt
from delible.testing import check
from delible.train.onpolicy.rows import Completion, Question
from delible.train.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "adding-an-idea.md"
PARTS = [part.partition("\n") for part in PAGE.read_text("utf-8").split("\n## ")[1:]]
BLOCKS = {title: text.partition("```python\n")[2].partition("```\n")[0] for title, _, text in PARTS}
#: What each example is about, and a check that must have been run on it.
EXPECTED = {
    "A loss": "forget_loss_falls on llama",
    "An editor": "edit_is_undone_exactly on gpt2",
    "A procedure": "killed_anywhere_it_goes_on_to_the_same_bits on llama",
    "A reward": "reward_tells_answers_apart on llama",
    "A guard": "guard_refuses_what_is_forgotten on llama",
    "An attack": "rewriting_is_deterministic on llama",
    "A metric": "metric_gives_a_value_or_a_reason on llama",
    "A benchmark": "benchmark_declares_its_table",
}


def module(title: str, folder: Path) -> ModuleType:
    """An example as a file of its own, imported."""
    name = "documented_" + re.sub(r"\W", "_", title.lower())
    path = folder / f"{name}.py"
    path.write_text(BLOCKS[title], "utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Any]:
    before = set(sys.modules)
    yield lambda title: module(title, tmp_path)
    for name in set(sys.modules) - before:
        if name.startswith("documented_"):
            del sys.modules[name]


def component(found: ModuleType) -> type[Component]:
    (one,) = [
        value
        for value in vars(found).values()
        if isinstance(value, type)
        and issubclass(value, Component)
        and value.__module__ == found.__name__
    ]
    return one


def test_every_kind_has_one() -> None:
    assert list(BLOCKS) == list(EXPECTED)
    assert all(BLOCKS.values())


@pytest.mark.parametrize("title", EXPECTED)
def test_it_keeps_the_contract(title: str, example: Any) -> None:
    families = ("llama", "gpt2") if title == "An editor" else ("llama",)
    assert EXPECTED[title] in check(component(example(title)), families)


def test_the_loss_counts_right_tokens_and_not_padding(example: Any) -> None:
    logprobs = torch.tensor([[0.5, 0.25, 0.125], [0.5, 1.0, 1.0]], dtype=torch.float64).log()
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    found = example("A loss").expected_right(logprobs, mask)
    torch.testing.assert_close(found, torch.tensor([0.875, 0.5], dtype=torch.float64))


def test_known_is_a_mean_of_logs_above_a_floor(example: Any) -> None:
    known = example("A procedure").known
    logs = [math.log(0.5), math.log(0.125)]  # the geometric mean is 0.25
    assert known(logs, 0.249)
    assert not known(logs, 0.251)


def test_the_reward_counts_sentences_and_says_what_it_found(example: Any) -> None:
    found = example("A reward").hedged
    question = Question(Prompt.ask("Where?"), "forget", "Where?")
    said = Completion(question, "Perhaps in Rome. It was warm. I am not sure! Yes?")
    (scored,) = found().score([said])
    assert scored.value == pytest.approx(2 / 4)
    assert scored.hits == ("perhaps", "not sure")
    (other,) = found(words=("warm",)).score([said])
    assert other.value == pytest.approx(1 / 4)
    assert found().score([Completion(question, "")])[0].value == 0


def test_nothing_is_written_at_the_key_and_all_beside_it(example: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    key, other = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    left, right = example("An editor").silencing(weight, key)
    after = weight + left @ right
    torch.testing.assert_close(after @ key, torch.zeros(3, dtype=torch.float64))
    beside = other - key * (other @ key) / (key @ key)
    torch.testing.assert_close(after @ beside, weight @ beside)


def test_the_metric_counts_words_from_the_start(example: Any) -> None:
    first_words = example("A metric").first_words
    assert first_words("In Rome, Italy", "in rome. Oh") == pytest.approx(2 / 3)
    assert first_words("Rome", "It is Rome") == 0
    assert first_words("The", "anything") is None


def test_the_benchmark_has_disjoint_people(example: Any, tmp_path: Path) -> None:
    (task,) = component(example("A benchmark"))().tasks(Data(None))  # type: ignore[attr-defined]
    forgotten = {one.subject for one in task.request.forget}
    assert len(forgotten) == 1
    assert forgotten.isdisjoint(one.subject for one in task.request.retain)
    assert {one.subject for one in task.relearned}.isdisjoint(forgotten)


def test_the_recipe_is_one_of_the_loss(example: Any) -> None:
    card = component(example("A loss")).card
    assert card is not None
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    content = yaml.safe_load(text)
    assert content["objective"] == card.name
    recipe = Recipe.from_mapping({**content, "objective": "npo"})  # one that is installed
    assert recipe.spec()["keep"] == {"name": "nll"}

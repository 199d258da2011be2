"""Direction ablation: the directions by hand, what is left of them, and a veil that it lifts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from delible.attacks.ablate import Ablate, states_of, unit, usual_tokens
from delible.errors import DataError
from delible.intervene.directions import principal_component
from delible.intervene.reading import read
from delible.intervene.sites import Site
from delible.intervene.system import Intervened
from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.records import QA, Passage, RecordBase
from delible.system.asks import Score, TokenScores
from delible.system.questions import answer_of, ask
from delible.testing.tiny import tiny_model, tiny_tokenizer

FORGET: list[RecordBase] = [
    QA(question=f"Where was {name} born?", answer=f"In {town}.", subject=name)
    for name, town in (("Ada", "Norrby"), ("Ben", "Casta"), ("Cyd", "Umber"))
]


def make_lm(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed), tiny_tokenizer(), precision="float32")


def make_context(
    original: LM | None = None, forget: list[RecordBase] = FORGET, seed: int = 0
) -> AttackContext:
    return AttackContext(forget, (), (), original, seed)


def veiled(lm: LM, size: float = 0.5) -> LM:
    """A model that adds one vector to every state of its first blocks."""
    twin = lm.copy()
    shift = size * torch.randn(32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        twin.core.get_input_embeddings().weight.add_(shift)
    twin.touch()
    return twin


def ids_of(lm: LM, record: RecordBase) -> tuple[list[int], int]:
    prompt = ask(record)
    assert prompt is not None
    row = lm.template.encode(prompt, "")
    return list(row.ids), row.start


def states(lm: LM, layer: int) -> Tensor:
    """Block outputs at prompt tokens but the first, by hooks of the test's own, float64."""
    model = lm.copy().core.double()
    seen: list[Tensor] = []
    block = model.get_submodule(lm.anatomy.block_path(layer))
    block.register_forward_hook(
        lambda module, given, output: seen.append(
            (output[0] if isinstance(output, tuple) else output)[0].detach()
        )
    )
    found = []
    for record in FORGET:
        ids, start = ids_of(lm, record)
        seen.clear()
        model(input_ids=torch.tensor([ids]))
        found.append(seen[0][1:start])
    return torch.cat(found)


def test_the_states_are_those_of_the_prompts() -> None:
    lm = make_lm()
    for layer, found in enumerate(states_of(lm, FORGET)):
        torch.testing.assert_close(found.double(), states(lm, layer), rtol=1e-4, atol=1e-5)


def test_outlying_tokens_are_left_out() -> None:
    one, other = torch.zeros(40, 4), torch.ones(40, 4)
    other[7] = 100.0
    kept = usual_tokens(one, other)
    assert kept.tolist() == [place != 7 for place in range(40)]
    distances = [4.0] * 39 + [400.0]
    mean = sum(distances) / 40
    spread = (sum((d - mean) ** 2 for d in distances) / 40) ** 0.5
    assert mean + 3 * spread < 400


def test_the_main_component_by_powers() -> None:
    points = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).double()
    points[:, 2] *= 5
    centred = points - points.mean(dim=0)
    vector = torch.ones(6).double()
    for _ in range(500):
        vector = centred.T @ (centred @ vector)
        vector /= vector.norm()
    found = principal_component(points)
    assert abs(float(found @ vector)) == pytest.approx(1, abs=1e-9)
    assert float(found.norm()) == pytest.approx(1)
    torch.testing.assert_close(principal_component(-points), found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("against", ["original", "generic", "principal", "random"])
def test_nothing_is_left_of_the_direction(family: str, against: Any) -> None:
    original = make_lm(family)
    lm = veiled(original)
    attacked = Ablate(against=against).apply(lm, make_context(original))
    assert isinstance(attacked, Intervened)
    directions = attacked.interventions[0].tensors["directions"]
    prompt = ask(FORGET[0])
    assert prompt is not None
    rows = [attacked.template.encode(prompt, "In Norrby.")]
    after = dict(read(attacked, rows, Site(what="block")))[0]
    for layer in range(lm.anatomy.layers):
        assert float(directions[layer].norm()) == pytest.approx(1, abs=1e-5)
        assert float((after[layer] @ directions[layer]).abs().max()) < 1e-5
    before = dict(read(lm, rows, Site(what="block")))[0]
    assert float((before[0] @ directions[0]).abs().max()) > 1e-3


def test_the_direction_is_the_mean_difference_to_the_original() -> None:
    original = make_lm()
    lm = veiled(original)
    attacked = Ablate().apply(lm, make_context(original))
    assert isinstance(attacked, Intervened)
    found = attacked.interventions[0].tensors["directions"].double()
    for layer in range(3):
        mine, theirs = states(lm, layer), states(original, layer)
        usual = usual_tokens(mine, theirs)
        direction = (mine[usual] - theirs[usual]).mean(dim=0)
        cosine = float(found[layer] @ direction / direction.norm())
        assert cosine == pytest.approx(1, abs=1e-5)


def test_the_original_has_no_direction_and_stays_as_it_is() -> None:
    lm, context = make_lm(), make_context(make_lm())
    attacked = Ablate().apply(lm, context)
    assert context.notes["direction"] == "none"
    assert context.numbers["layers with a direction"] == 0
    asked = [Score(prompt, answer_of(r)) for r in FORGET if (prompt := ask(r)) is not None]
    for one, other in zip(lm.score(asked), attacked.score(asked), strict=True):
        assert isinstance(one, TokenScores)
        assert isinstance(other, TokenScores)
        torch.testing.assert_close(
            torch.as_tensor(one.logprobs), torch.as_tensor(other.logprobs), rtol=0, atol=0
        )
    assert float(unit(torch.zeros(4)).norm()) == 0


def test_only_questions_that_the_original_knows_better_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, original = veiled(make_lm()), make_lm()
    logs = {id(original): [-1.0, -1.0, -1.0], id(lm): [-1.5, -1.8, -1.0]}
    monkeypatch.setattr("delible.attacks.ablate._per_token", lambda one, records: logs[id(one)])
    attack = Ablate()
    assert attack._forget(lm, make_context(original)) == [FORGET[1]]  # by more than log 2
    logs[id(lm)] = [-1.0, -1.1, -0.9]
    assert attack._forget(lm, make_context(original)) == FORGET


def test_layers_by_depth() -> None:
    lm = make_lm()
    for layers, expected in (("all", ()), ("spread", (0, 1, 2)), ("early", (0,))):
        attacked = Ablate(layers=layers, against="random").apply(lm, make_context())  # type: ignore[arg-type]
        assert isinstance(attacked, Intervened)
        assert attacked.interventions[0].intervention.layers == expected


def test_what_is_missing_is_said() -> None:
    with pytest.raises(DataError, match="no original"):
        Ablate().apply(make_lm(), make_context())
    with pytest.raises(DataError, match="asks a question"):
        Ablate(against="generic").apply(make_lm(), make_context(forget=[Passage(text="So.")]))
    other = LM(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), precision="float32")
    with pytest.raises(DataError, match="other layers"):
        Ablate().apply(make_lm(), make_context(other))


def test_the_seed_decides_the_random_direction_and_settings_have_titles() -> None:
    attack = Ablate(against="random")
    one, two, other = (
        attack.apply(make_lm(), make_context(seed=seed)).fingerprint for seed in (1, 1, 2)
    )
    assert one == two != other
    assert attack.control
    assert not Ablate().control
    titles = [Ablate(**each).variant_title() for each in Ablate().variants("deep")]  # type: ignore[arg-type]
    assert len(set(titles)) == len(titles) == 6

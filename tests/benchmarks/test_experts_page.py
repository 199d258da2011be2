"""The page about experts: where methods are compared, and what it says of claims."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))
import experts  # type: ignore[import-not-found]

from delible.files import read_json
from delible.lm.experts import router_path
from delible.lm.lm import LM
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer

MACHINE = {"processors": 2, "machine": "m", "threads": 1, "accelerator": None,
           "precision": "float32"}  # fmt: skip


def points(*seen: tuple[float, float, float]) -> list[dict[str, float]]:
    return [
        {"step": 4 * n, "forget": forget, "other": other, "same experts": same}
        for n, (forget, other, same) in enumerate(seen)
    ]


def test_numbers_lie_straight_between_two_looks() -> None:
    there = points((1.0, 0.5, 1.0), (2.0, 0.75, 1.0), (4.0, 1.75, 0.5), (9.0, 9.0, 0.0))
    assert experts.reached(there, "step") == pytest.approx(6)  # 3.0 is half way from 2 to 4
    assert experts.reached(there, "same experts") == pytest.approx(0.75)
    assert experts.harm(there) == pytest.approx(1.25 - 0.5)
    assert experts.harm(there[:2]) is None


def run(name: str, seed: int, end: tuple[float, float, float], **other: Any) -> dict[str, Any]:
    return {"name": name, "seed": seed, "points": points((1.0, 0.5, 1.0), end), "stopped": None,
            "moved": 0.25, "seconds": 3.0, **other}  # fmt: skip


def test_the_page() -> None:
    runs = [
        run("ascent", 0, (3.0, 2.5, 0.6)), run("ascent", 1, (3.0, 4.5, 0.8)),
        run("ascent, one expert", 0, (3.0, 0.7, 0.95)),
        run("ascent, one expert", 1, (3.0, 0.7, 0.95)),
        run("NPO", 0, (2.0, 0.5, 1.0)), run("NPO", 1, (3.0, 0.5, 1.0)),
        {"name": "NPO, one expert", "seed": 0, "failed": "dense"},
    ]  # fmt: skip
    found = {"base": "tiny", "people": 8, "runs": runs, "hardware": MACHINE, "git": "abc"}
    text = experts.page(found)
    # rises of 2 and 4: half width 12.706; same experts 0.6 and 0.8: 1.27
    assert "| ascent | 4 ± 0 | 3.00 ± 12.71 | 0.70 ± 1.27 | 25.0% | 3 |" in text
    assert "| NPO | 4 (not reached in 1 of 2) | 0.00 | 1.00 | 25.0% | 3 |" in text
    assert "| NPO, one expert | failed: dense |" in text
    assert "| ascent and retain | not run |" in text
    # 0.2 / 2 and 0.2 / 4
    assert "| 0.07 (-0.24 to 0.39) | cannot be told |" in text
    assert "| above 0.9 | 0.95 | cannot be told (no interval) |" in text  # both seeds alike
    assert "| above 0 | 0.25 (-1.02 to 1.52) | cannot be told |" in text


def test_choices_are_those_of_the_router() -> None:
    lm = LM(tiny_model("mixtral"), tiny_tokenizer(), precision="float32")
    rows = [QA(question="Where?", answer="Here it is."), QA(question="Who is it?", answer="Ada.")]
    found = experts.choices(lm, rows)
    top = lm.core.config.num_experts_per_tok
    encoded = [lm.template.encode(experts.Prompt.ask(row.question), row.answer) for row in rows]
    gate = lm.core.get_submodule(router_path(lm.anatomy, 0))
    told = []
    hook = gate.register_forward_hook(lambda module, args, output: told.append(args[0]))
    for one in encoded:
        with torch.no_grad():
            lm.model(torch.tensor([one.ids]))
    hook.remove()
    by_hand = []
    for one, states in zip(encoded, told, strict=True):
        logits = states.reshape(-1, states.shape[-1]).double() @ gate.weight.double().T
        best = logits.topk(top, dim=-1).indices[one.start - 1 : len(one.ids) - 1]
        by_hand += [set(row.tolist()) for row in best]
    assert [set(row.nonzero().flatten().tolist()) for row in found[0]] == by_hand


def test_the_published_page_is_that_of_its_numbers() -> None:
    numbers = Path(__file__).parents[2] / "docs" / "results" / "experts.json"
    if not numbers.exists():
        pytest.skip("the page has not been made yet")
    found = read_json(numbers)
    assert numbers.with_suffix(".md").read_text("utf-8") == experts.page(found)

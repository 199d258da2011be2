"""Where and how masks and attribution take their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from delible.component import build
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.methods.place.wagle import wanda_mask
from delible.methods.weigh.attribution import reworded
from delible.records import QA, Passage
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.gradient_space import Space, linear_layers
from delible.train.gradients import Gradients
from delible.train.rows import make_rows
from delible.train.slots import SlotContext

FORGET = [
    QA(question=f"Where was {name} born?", answer=f"In {town}.")
    for name, town in (("Ada", "Norrby"), ("Ben Orr", "Casta"), ("Cy", "Umber, of course"))
]
RETAIN = [
    QA(question="What is snow?", answer="It is white.", paraphrases=("How does snow look?",)),
    QA(question="What is coal?", answer="It is black."),
]


def make_context(family: str = "llama") -> SlotContext:
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")
    records = {"forget": FORGET, "retain": RETAIN}
    rows = {role: make_rows(lm.template, part) for role, part in records.items()}
    return SlotContext(lm, rows, records, Gradients(lm), build("objective", "npo"), None, 0)


# ---- attribution


def expected(scores: torch.Tensor) -> torch.Tensor:
    standard = (scores - scores.mean()) / scores.std(correction=0)
    return len(scores) * torch.softmax(-standard / 2, dim=0)


def test_forward_mode_gives_the_weights_of_exact_scores() -> None:
    context = make_context()
    each = [context.gradients.total([row]) for row in context.rows["forget"]]
    mean = context.gradients.total(context.rows["retain"])
    exact = [sum(float((one[n] * v / 2).sum()) for n, v in mean.items()) for one in each]
    found = build("weigh", {"name": "attribution", "how": "jvp"}).weights(context)
    assert torch.allclose(found.double(), expected(torch.tensor(exact).double()), rtol=1e-4)


@pytest.mark.parametrize("space", ["layers", "head", "lora"])
def test_scores_may_look_at_a_part_of_the_gradient(space: Any) -> None:
    context = make_context()
    part = context.gradients.within(Space(space, (0, -1), seed=0))
    scores = part.products(context.rows["forget"], part.total(context.rows["retain"]), how="jvp")
    options = {"space": space, "layers": [0, -1], "how": "jvp"}
    found = build("weigh", {"name": "attribution", **options}).weights(context)
    assert torch.allclose(found.double(), expected(scores), rtol=1e-4)


def test_the_mean_gradient_may_be_that_of_paraphrases() -> None:
    context = make_context()
    assert reworded([*RETAIN, Passage(text="Snow.")]) == [
        RETAIN[0].model_copy(update={"question": "How does snow look?"})
    ]
    rows = make_rows(context.lm.template, reworded(RETAIN))
    scores = context.gradients.products(
        context.rows["forget"], context.gradients.total(rows), how="jvp"
    )
    component = build("weigh", {"name": "attribution", "paraphrases": True, "how": "jvp"})
    assert torch.allclose(component.weights(context).double(), expected(scores), rtol=1e-4)
    context.records["retain"] = RETAIN[1:]  # type: ignore[index]
    with pytest.raises(RecipeError, match="no retain record has paraphrases"):
        component.weights(context)


# ---- Wanda


def test_wanda_keeps_the_largest_share_of_every_output() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.1, 0.2, -0.3, 0.4]])
    norms = torch.tensor([1.0, 10.0, 1.0, 1.0])
    wanted = [[True, True, False, False], [False, True, False, True]]
    assert wanda_mask(weight, norms, 0.5, False).tolist() == wanted
    transposed = wanda_mask(weight.T.contiguous(), norms, 0.5, True)
    assert transposed.T.tolist() == wanted
    assert wanda_mask(weight, norms, 0.01, False).sum(dim=1).tolist() == [1, 1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wanda_masks_linear_layers_of_the_blocks_alone(family: str) -> None:
    context = make_context(family)
    place = build("place", {"name": "wagle", "select": "wanda", "share": 0.25})
    placement = place.apply(context)
    masks = placement.masks
    assert masks is not None
    assert placement.masked_decay
    path, module = linear_layers(context.lm)[1]
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for row in context.rows["forget"]:
        context.lm.model(input_ids=torch.tensor([row.encoded.ids]))
    handle.remove()
    norms = torch.cat([one.detach().reshape(-1, one.shape[-1]) for one in seen]).norm(dim=0)
    scores = (module.weight.T if isinstance(module, Conv1D) else module.weight).abs() * norms
    mask = masks[f"{path}.weight"]
    mask = mask.T if isinstance(module, Conv1D) else mask
    count = round(0.25 * scores.shape[1])
    assert mask.sum(dim=1).tolist() == [count] * len(scores)
    inside = torch.where(mask, scores, float("inf")).min(dim=1).values
    outside = torch.where(mask, 0.0, scores).max(dim=1).values
    assert bool((inside >= outside * (1 - 1e-4)).all())
    linear = {f"{path}.weight" for path, _ in linear_layers(context.lm)}
    moving = {name for name, one in masks.items() if bool(one.any())}
    assert moving == linear

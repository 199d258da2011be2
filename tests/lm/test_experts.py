"""Where experts and routers are, and what routers say, in every way that models keep them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from delible.errors import ModelError
from delible.lm.derive import derive
from delible.lm.experts import gates, mixtures, router_path, routing
from delible.lm.forward import Forward, collate
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.testing.tiny import tiny_model, tiny_tokenizer

FUSED = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("family", FUSED)
def test_experts_that_are_one_tensor(family: str) -> None:
    model = tiny_model(family)
    found = mixtures(model, derive(model))
    assert list(found) == [0, 1, 2]
    one = found[1]
    assert one.experts == 4
    assert one.router == ("model.layers.1.mlp.gate.weight",)
    assert {name.rpartition(".")[2] for name in one.stacked} == {"gate_up_proj", "down_proj"}
    assert all(name.startswith("model.layers.1.mlp.experts.") for name in one.stacked)
    assert one.single == ()
    assert one.parameters(3) == one.stacked
    assert not any("shared" in name for name in one.stacked)


class Listed(nn.Module):
    """A mixture whose experts are modules, as in older versions of the library."""

    def __init__(self, hidden: int, width: int, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, count, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({
                "w1": nn.Linear(hidden, width, bias=False),
                "w2": nn.Linear(width, hidden, bias=False),
            })
            for _ in range(count)
        )  # fmt: skip


def test_experts_that_are_modules() -> None:
    model: Any = tiny_model("mixtral")
    for block in model.model.layers:
        block.mlp = Listed(32, 48, 4)
    found = mixtures(model, derive(model))
    assert found[2].stacked == ()
    assert found[2].parameters(1) == (
        "model.layers.2.mlp.experts.1.w1.weight", "model.layers.2.mlp.experts.1.w2.weight",
    )  # fmt: skip
    assert len({name for expert in range(4) for name in found[2].parameters(expert)}) == 8


def test_dense_blocks_among_mixtures_are_left_out() -> None:
    model = tiny_model("qwen2_moe", mlp_only_layers=[1])
    anatomy = derive(model)
    assert list(mixtures(model, anatomy)) == [0, 2]
    with pytest.raises(ModelError, match="layer 1 has no router"):
        router_path(anatomy, 1)
    few = tiny_model("qwen2_moe", mlp_only_layers=[0, 2])  # most blocks are dense
    assert list(mixtures(few, derive(few))) == [1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_model_is_refused(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(ModelError, match="dense"):
        mixtures(model, derive(model))


def test_what_routers_give_in_three_forms() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0], [0.0, 0.0, 3.0, 1.0]])
    shares = logits.double().softmax(dim=1)
    chosen = torch.tensor([[0, 2], [2, 3]])
    weights = torch.tensor([[0.7, 0.3], [0.9, 0.1]])
    told = gates((logits, weights, chosen), None, "gate")
    assert told.tolist() == [
        pytest.approx([0.7, 0, 0.3, 0]), pytest.approx([0, 0, 0.9, 0.1])
    ]  # fmt: skip
    alone = gates(logits, 2, "gate")
    for row, (first, second) in enumerate(((0, 2), (2, 3))):
        wanted = [0.0] * 4
        wanted[first], wanted[second] = float(shares[row, first]), float(shares[row, second])
        assert alone[row].tolist() == pytest.approx(wanted, abs=1e-6)
    batched = gates(logits.view(2, 1, 4), 2, "gate")
    assert torch.equal(batched, alone)
    for unknown in (None, (logits, weights), (logits, weights[:, :1], chosen)):
        with pytest.raises(ModelError, match="is not known here"):
            gates(unknown, 2, "gate")


@pytest.mark.parametrize("family", FUSED)
def test_logits_and_weights_of_a_pass(family: str) -> None:
    """Both are those that the library itself reports, and reading them changes nothing."""
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")
    rows = [Encoded(tuple(range(40, 52)), 4, False), Encoded(tuple(range(60, 67)), 3, False)]
    batch = collate(rows, lm.pad_id, lm.device)
    fingerprint = lm.fingerprint
    with torch.no_grad(), routing(lm.core, lm.anatomy, [1], None) as seen:
        assert lm.fingerprint == fingerprint
        inside = Forward(lm)(batch, ("router.1",), False)[1]["router.1"]
    assert inside.shape == (2, 12, 4)
    for place, row in enumerate(rows):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            told = lm.model(input_ids=ids, output_router_logits=True).router_logits[1].view(-1, 4)
        torch.testing.assert_close(inside[place, : len(row.ids)], told, rtol=1e-4, atol=1e-5)
        largest = told.double().softmax(dim=1).topk(2, dim=1)
        mass = seen[1].view(2, 12, 4)[place, : len(row.ids)]
        assert torch.equal((mass > 0).sum(dim=1), torch.full((len(row.ids),), 2))
        assert torch.equal(mass.topk(2, dim=1).indices, largest.indices)

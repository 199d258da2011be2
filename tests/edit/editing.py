"""What tests of editors share: random models, a request, and slow readings in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.edit import located
from delible.edit.keys import down_projection
from delible.edit.requests import Edit, edits_of
from delible.edit.values import Values
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.system.asks import Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer

#: Weights [out, in] and [in, out], grouped queries, parallel blocks, a norm behind the MLP; tied
#: (gpt2, gemma3) and untied.
FAMILIES = ("llama", "gpt2", "qwen2", "gpt_neox", "gemma3")
RECORDS = (
    QA(question="Where was Ada Quill born?", answer="Norrby", subject="Ada Quill"),
    QA(question="Who taught Ben Orr", answer="Cy", subject="Ben Orr"),
    QA(question="What did Ada Quill play?", answer="The lute", subject="Ada Quill"),
)
RETAIN = (
    QA(question="Where does Dee Finch live?", answer="In Umber", subject="Dee Finch"),
    QA(question="How is snow?", answer="White"),
)
REQUEST = ForgetRequest(forget=RECORDS, retain=RETAIN)
PARAGRAPHS = (
    "Bread rises in a warm kitchen.",
    "The first bus of the morning is quiet.",
    "What is 7 plus 5? The result is 12.",
    "Mr Jasper Thorne sold his boat to Miss Wren.",
)
GENERIC = "\n\n".join(PARAGRAPHS)
LAYER = 1
ONE = REQUEST.model_copy(update={"forget": RECORDS[:1]})
#: Bounds that no edit breaks.
FREE = {"most_divergence": 1e8, "most_change": 1e8}


def make_lm(family: str = "llama", seed: int = 0, **options: Any) -> LM:
    return LM(tiny_model(family, seed, **options), tiny_tokenizer(), precision="float32")


def make_edits(lm: LM, targets: Sequence[str] = ("No.", "Unknown"), **options: Any) -> list[Edit]:
    return edits_of(lm, RECORDS[: len(targets)], targets, **options)


def weights_of(lm: LM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in lm.core.named_parameters()}


def same(lm: LM, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in lm.core.named_parameters())


def weight(lm: LM, layer: int) -> Tensor:
    """The down-projection as [hidden, width], float64."""
    place = down_projection(lm, layer)
    value = lm.core.get_parameter(place.parameter).detach().double()
    return value.T.clone() if place.transposed else value.clone()


def ends_of(lm: LM, ids: Sequence[int], subject: str) -> int:
    """Index of the byte token with the last letter of a subject's last occurrence."""
    place = str(lm.tokenizer.decode(list(ids))).rindex(subject) + len(subject)
    return next(
        index for index in range(len(ids))
        if len(str(lm.tokenizer.decode(list(ids[: index + 1])))) == place
    )  # fmt: skip


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooked(module: torch.nn.Module, hook: Any, before: bool = False) -> Iterator[None]:
    put = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = put(hook)
    try:
        yield
    finally:
        handle.remove()


def double(lm: LM) -> LM:
    """A copy that computes in float64, by the model's own forward alone."""
    twin = lm.copy()
    twin.model.double()
    return twin


@torch.no_grad()
def key_and_output(lm: LM, ids: Sequence[int], place: int, layer: int) -> tuple[Tensor, Tensor]:
    """Key and block output at one token, float64: one row, the whole model."""
    twin, seen = double(lm), {}
    projection = twin.core.get_submodule(down_projection(lm, layer).path)
    block = twin.core.get_submodule(lm.anatomy.block_path(layer))

    def keep_key(_: Any, inputs: Any) -> None:
        seen["key"] = inputs[0].reshape(-1, inputs[0].shape[-1])[place].clone()

    def keep_output(_: Any, __: Any, output: Any) -> None:
        seen["output"] = first_of(output)[0, place].clone()

    with hooked(projection, keep_key, before=True), hooked(block, keep_output):
        twin.core(input_ids=torch.tensor([list(ids)]))
    return seen["key"], seen["output"]


@torch.no_grad()
def generic_keys(lm: LM, layer: int) -> Tensor:
    """Keys of the generic paragraphs, [tokens, width], float64, one row at a time."""
    twin, keys = double(lm), []
    path = down_projection(lm, layer).path
    for text in PARAGRAPHS:
        ids = twin.tokenizer(text)["input_ids"]
        with hooked(
            twin.core.get_submodule(path),
            lambda _, inputs: keys.append(inputs[0].reshape(-1, inputs[0].shape[-1])),
            before=True,
        ):
            twin.core(input_ids=torch.tensor([ids]))
    return torch.cat(keys)


# ---- editors


def editor(name: str, texts: Path, **options: Any) -> Any:
    layers = {"layer": LAYER} if name == "rome" else {"layers": (LAYER,)}
    null = {"scale": "largest", "threshold": 0.05} if name == "alphaedit" else {}
    values = {**layers, **null, "contexts": 0, "steps": 3, "texts": texts, **FREE, **options}
    return build("editor", {"name": name, **values})


def wanted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Values]]:
    """Collects z_0 and d of every search."""
    seen: list[tuple[Tensor, Values]] = []
    whole = located.find_values

    def watched(lm: LM, edits: Any, site: Any, start: Tensor, settings: Any) -> Values:
        found = whole(lm, edits, site, start, settings)
        seen.append((start, found))
        return found

    monkeypatch.setattr(located, "find_values", watched)
    return seen


def key_of(lm: LM, record: QA, layer: int = LAYER) -> tuple[Tensor, Tensor]:
    ids = lm.template.prompt_ids(Prompt.ask(record.question))
    return key_and_output(lm, ids, ends_of(lm, ids, record.subject or ""), layer)


def moment(lm: LM, ridge: float = 0.01, layer: int = LAYER) -> Tensor:
    keys = generic_keys(lm, layer)
    found = keys.T @ keys / len(keys)
    return found + ridge * found.trace() / len(found) * torch.eye(len(found)).double()


def close(found: Tensor, expected: Tensor, share: float = 1e-3) -> None:
    assert float(expected.norm()) > 1e-3
    assert float((found - expected).norm()) < share * float(expected.norm())

"""What a run made is opened through one door, on any stack, and taken off bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from delible.component import build
from delible.edit.base import Patch
from delible.errors import DelibleError, RunError
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.system.artefact import FILE, read
from delible.system.asks import Decoding, Prompt, Score
from delible.system.base import System, identity_of
from delible.systems.guarded import GuardedSystem, Guarding
from delible.systems.opening import described, keep, merge, open_lm, open_system, undo
from delible.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = [Prompt.ask("Where was Ada Norrby born?"), Prompt.ask("Name a river.")]
REQUEST = ForgetRequest(
    forget=(QA(question="Where was Ada Norrby born?", answer="Falun", subject="Ada Norrby"),)
)


#: Matrices of both layouts.
FAMILIES = pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A model in a folder."""
    folder = tmp_path / "base"
    LM(tiny_model(getattr(request, "param", "llama")), tiny_tokenizer(), precision="float32").save(
        folder
    )
    return str(folder)


def answers(system: System) -> list[str]:
    return [str(text) for text in system.generate(PROMPTS, Decoding(12))]


def scores(lm: LM) -> Tensor:
    found = lm.score([Score(prompt, "In a small town.") for prompt in PROMPTS])
    return torch.cat([torch.tensor(one.logprobs) for one in found])  # type: ignore[union-attr]


def weights(lm: LM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in lm.core.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def patch_of(lm: LM, seed: int = 1) -> Patch:
    """A change of rank 2 of the first block's last MLP matrix, not yet on the model."""
    name = lm.anatomy.mlp_out_parameters(0)[0]
    weight = dict(lm.core.named_parameters())[name]
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(weight.shape[0], 2, generator=draw)
    right = torch.randn(2, weight.shape[1], generator=draw)
    return Patch({name: (left, right)}, {})


def patched(base: str, folder: Path, seed: int = 1) -> LM:
    lm = open_lm(base)
    below = described(lm)
    patch = patch_of(lm, seed)
    patch.apply(lm)
    keep("patch", patch, folder, below, lm)
    return lm


def adapted(base: str, folder: Path) -> LM:
    from peft import LoraConfig, get_peft_model

    lm = open_lm(base)
    below = described(lm)
    names = {name.rpartition(".")[2] for name in lm.anatomy.mlp_out_parameters(0)}
    assert names == {"weight"}
    path = lm.anatomy.mlp_out_parameters(0)[0].removesuffix(".weight")
    lm.wear(get_peft_model(lm.core, LoraConfig(r=2, target_modules=[path])))
    with torch.no_grad():
        for name, value in lm.model.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(3)))
    lm.touch()
    keep("adapter", lm, folder, below, lm)
    return lm


def guarded(base: str, folder: Path) -> GuardedSystem:
    system = open_system(base)
    guard = build("guard", {"name": "target_detector", "similarity": False})
    whole = GuardedSystem(system, guard.prepare(REQUEST), "target_detector")
    keep("guard", Guarding(guard, REQUEST), folder, described(system), whole)
    return whole


@FAMILIES
def test_a_patch_opens_as_it_was_and_comes_off_bit_by_bit(base: str, tmp_path: Path) -> None:
    start = open_lm(base)
    made = patched(base, tmp_path / "run")
    assert not torch.allclose(scores(made), scores(start), atol=1e-3), "the patch does nothing"
    opened = open_lm(str(tmp_path / "run"))
    assert same(weights(opened), weights(made))
    assert answers(opened) == answers(made)
    assert opened.identity == made.identity == read(tmp_path / "run").identity
    assert opened.identity != start.identity
    assert not (tmp_path / "run" / "model").exists(), "the whole model lies beside the patch"
    off = opened.taken_off()
    assert off is not None
    assert off[0] == "patch"
    assert same(weights(off[1]), weights(start))
    assert off[1].fingerprint == start.fingerprint
    assert same(weights(opened), weights(made)), "taking off changed the model itself"
    assert off[1].taken_off() is None


@FAMILIES
def test_an_adapter_opens_as_it_was_and_peft_alone_opens_it(base: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    start = open_lm(base)
    made = adapted(base, tmp_path / "run")
    assert not torch.allclose(scores(made), scores(start), atol=1e-3), "the adapter does nothing"
    opened = open_lm(str(tmp_path / "run"))
    assert answers(opened) == answers(made)
    assert torch.equal(scores(opened), scores(made))
    off = opened.taken_off()
    assert off is not None
    assert off[0] == "adapter"
    assert same(weights(off[1]), weights(start))
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    mine = opened.model.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in alone.state_dict().items())


def test_a_guard_opens_as_it_was(base: str, tmp_path: Path) -> None:
    made = guarded(base, tmp_path / "run")
    opened = open_system(str(tmp_path / "run"))
    assert isinstance(opened, GuardedSystem)
    assert answers(opened) == answers(made)
    assert answers(opened)[0] != answers(open_lm(base))[0]
    assert answers(opened)[1] == answers(open_lm(base))[1]
    assert opened.fingerprint == made.fingerprint
    with pytest.raises(DelibleError, match="gives none"):
        open_lm(str(tmp_path / "run"))


def test_stacks_of_any_kinds(base: str, tmp_path: Path) -> None:
    """A guard over an adapter over a patch over a patch; off again in that order."""
    first = patched(base, tmp_path / "first")
    second = patched(str(tmp_path / "first"), tmp_path / "second", seed=2)
    third = adapted(str(tmp_path / "second"), tmp_path / "third")
    guarded(str(tmp_path / "third"), tmp_path / "fourth")
    system: System = open_system(str(tmp_path / "fourth"))
    found = []
    while (off := system.taken_off()) is not None:  # type: ignore[attr-defined]
        title, system = off
        found.append(title)
        assert isinstance(system, LM)
        if len(found) == 1:
            assert torch.equal(scores(system), scores(third))
        if len(found) == 2:
            assert same(weights(system), weights(second))
        if len(found) == 3:
            assert same(weights(system), weights(first))
    assert found == ["guard 'target_detector'", "adapter", "patch", "patch"]
    assert isinstance(system, LM)
    assert same(weights(system), weights(open_lm(base)))


@pytest.mark.parametrize("make", [patched, adapted, guarded])
def test_undo_and_back(
    base: str, tmp_path: Path, make: object, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(base, tmp_path / "run")  # type: ignore[operator]
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    undo(tmp_path / "run")
    assert "taken off" not in caplog.text
    undone = open_system(str(tmp_path / "run"))
    assert "is taken off ('delible undo'): its base answers alone" in caplog.text
    start = open_lm(base)
    assert isinstance(undone, LM)
    assert same(weights(undone), weights(start))
    assert undone.fingerprint == start.fingerprint
    assert answers(undone) == answers(start)
    undo(tmp_path / "run", back=True)
    again = open_system(str(tmp_path / "run"))
    assert answers(again) == answers(made)
    assert identity_of(again) == identity_of(made)
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_whole_model_cannot_be_undone(base: str, tmp_path: Path) -> None:
    lm = open_lm(base)
    keep("model", lm, tmp_path / "run", described(lm), lm)
    assert answers(open_system(str(tmp_path / "run"))) == answers(lm)
    with pytest.raises(RunError, match=r"whole.*base"):
        undo(tmp_path / "run")
    with pytest.raises(RunError, match="no artefact"):
        undo(tmp_path)


def test_merging_a_stack_gives_one_plain_model(base: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    patched(base, tmp_path / "first")
    whole = adapted(str(tmp_path / "first"), tmp_path / "second")
    whole.precision = "float32"
    merge(str(tmp_path / "second"), tmp_path / "merged")
    plain = LM(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        tiny_tokenizer(),
        precision="float32",
    )
    torch.testing.assert_close(scores(plain), scores(whole), atol=1e-4, rtol=1e-4)
    assert not plain.wears_adapter
    guarded(base, tmp_path / "guarded")
    with pytest.raises(RunError, match="guard 'target_detector' is no part of the weights"):
        merge(str(tmp_path / "guarded"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- bad input


def edited(folder: Path, **changes: object) -> None:
    content = yaml.safe_load((folder / FILE).read_text())
    (folder / FILE).write_text(yaml.safe_dump({**content, **changes}))


def test_another_base_is_refused(base: str, tmp_path: Path) -> None:
    patched(base, tmp_path / "run")
    LM(tiny_model("llama", seed=9), tiny_tokenizer(), precision="float32").save(Path(base))
    with pytest.raises(RunError, match=r"its base is another one .*weights and chat template"):
        open_system(str(tmp_path / "run"))


def test_a_missing_base_is_told(base: str, tmp_path: Path) -> None:
    patched(base, tmp_path / "run")
    Path(base).rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"its base cannot be opened.*set base\.name"):
        open_system(str(tmp_path / "run"))
    edited(tmp_path / "run", base={"name": "../elsewhere"})
    assert isinstance(open_system(str(tmp_path / "run")), LM)


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    for name, width in (("one", 32), ("other", 64)):
        model = tiny_model("llama", hidden_size=width)
        LM(model, tiny_tokenizer(), precision="float32").save(tmp_path / name)
    adapted(str(tmp_path / "one"), tmp_path / "run")
    edited(tmp_path / "run", base={"name": str(tmp_path / "other")})
    with pytest.raises(DelibleError, match="does not fit its base model"):
        open_system(str(tmp_path / "run"))


def test_a_circle_is_told(base: str, tmp_path: Path) -> None:
    guarded(base, tmp_path / "one")
    guarded(str(tmp_path / "one"), tmp_path / "two")
    edited(tmp_path / "one", base={"name": str(tmp_path / "two")})
    with pytest.raises(RunError, match=r"one on two on one|two on one on two"):
        open_system(str(tmp_path / "two"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "codebok"}, "unknown kind 'codebok'"),
        ({"version": 99}, r"form 99.*update yours"),
        ({"parts": {"patch": "../patch"}}, "outside the folder"),
        ({"parts": {"patch": "gone"}}, "part 'patch' is missing"),
        ({"colour": "red"}, "unknown option 'colour'"),
        ({"base": None}, "names no base"),
    ],
)
def test_a_wrong_description_is_told(
    base: str, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    patched(base, tmp_path / "run")
    edited(tmp_path / "run", **changes)
    with pytest.raises(RunError, match=message):
        open_system(str(tmp_path / "run"))


def test_a_damaged_file_is_told(base: str, tmp_path: Path) -> None:
    patched(base, tmp_path / "run")
    (tmp_path / "run" / "patch" / "patch.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match="the patch cannot be read"):
        open_system(str(tmp_path / "run"))
    (tmp_path / "run" / FILE).write_text("kind: [")
    with pytest.raises(RunError, match="cannot be read"):
        open_system(str(tmp_path / "run"))

"""The small model that sees: built once, found again, resumed; a smaller one for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="the extra 'vision' is not installed")

from delible.errors import DelibleError, MissingExtraError
from delible.lm import tiny_training, tiny_vlm
from delible.lm.lm import LM
from delible.lm.named import name_of
from delible.lm.outline import settings_place
from delible.lm.tiny_vlm import (
    TINY_VLM,
    TINY_VLM_EMOJI,
    VLMOptions,
    build,
    folder_name,
    teach_tower,
)
from delible.system.asks import Decoding, Score
from delible.system.questions import ask
from delible.world import emoji
from delible.world.picture_worlds import PICTURE_WORLDS
from delible.world.shapes import Scene

SMALL = VLMOptions(
    pixels=16, patch=8, vision_size=32, vision_layers=2, hidden_size=32, layers=1, vocabulary=320,
    tokenized=200, tower_steps=3, tower_batch=4, rows=12, batch=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


def test_it_is_built_once_found_by_name_and_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_vlm, "TINY_VLM", SMALL)
    monkeypatch.setitem(tiny_vlm.MODELS, "shapes", ("tiny-vlm", 1, SMALL))
    assert folder_name(SMALL) == "tiny-vlm-1"
    assert folder_name(TINY_VLM) != "tiny-vlm-1"
    lm = LM.load("tiny-vlm", precision="float32")
    assert lm.pictures is not None
    assert lm.grows_trees, "it answers on a slow road"
    monkeypatch.setattr(tiny_vlm, "build", lambda *_, **__: pytest.fail("built again"))
    assert LM.load("tiny-vlm", precision="float32").fingerprint == lm.fingerprint
    assert Path(settings_place("tiny-vlm")).name == "tiny-vlm-1"
    scene = Scene("red", "star", "left", "small")
    world = PICTURE_WORLDS["shapes"]
    one = world.asked(scene, "shape", scene.picture(1, 16))
    prompt, words = ask(one), ask(world.trait_of("star"))
    assert prompt is not None
    assert words is not None
    assert lm.template.render(prompt) == (
        "<|user|><|image|>What shape is in the picture?<|end|><|assistant|>"
    )
    assert len(lm.generate([prompt, words], Decoding(3))) == 2
    scores = lm.score([Score(prompt, "star"), Score(prompt, "ring")])
    assert len(scores) == 2


def test_the_models_of_both_worlds_have_names_of_their_own() -> None:
    assert folder_name(TINY_VLM) == "tiny-vlm-1"
    assert folder_name(TINY_VLM_EMOJI) == "tiny-vlm-emoji-1"
    assert name_of("tiny-vlm-emoji-1") == "tiny-vlm-emoji"
    assert name_of("tiny-vlm-1") == "tiny-vlm"
    other = replace(SMALL, world="emoji")
    assert folder_name(other).startswith("tiny-vlm-emoji-1-")
    assert name_of(folder_name(other)) is None


def test_emoji_are_learned_from_where_their_font_is() -> None:
    try:
        emoji.font_file()
    except DelibleError as error:
        pytest.skip(str(error))
    small = replace(SMALL, world="emoji")
    processor = tiny_vlm.build_processor(small)
    model = tiny_vlm.build_model(processor, small)
    before = {name: one.clone() for name, one in model.named_parameters()}
    teach_tower(model, processor, small)
    assert any(not torch.equal(one, before[name]) for name, one in model.named_parameters())
    first, second = (build(small)[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_without_the_font_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(emoji.VARIABLE, str(tmp_path / "none.ttf"))
    monkeypatch.setattr(tiny_vlm, "build_processor", lambda *_: pytest.fail("begun"))
    with pytest.raises(DelibleError, match="fonts-noto-color-emoji"):
        LM.load("tiny-vlm-emoji")


def test_a_killed_build_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = build(SMALL)
    monkeypatch.setattr(tiny_training, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    keep, steps = tiny_training._keep, list[int]()
    for killed in (2, 5):  # in the tower's steps, and in those of all parts

        def kept(path: Path, model: object, optimizer: object, done: int, at: int = killed) -> None:
            keep(path, model, optimizer, done)  # type: ignore[arg-type]
            steps.append(done)
            if len(steps) == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(tiny_training, "_keep", kept)
        with pytest.raises(KeyboardInterrupt):
            build(SMALL, checkpoint=tmp_path / "checkpoint.pt")
    monkeypatch.setattr(tiny_training, "_keep", keep)
    again, _ = build(SMALL, checkpoint=tmp_path / "checkpoint.pt")
    assert steps == [1, 2, 3, 1, 2]
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_tower_learns_alone_and_nothing_else_moves() -> None:
    processor = tiny_vlm.build_processor(SMALL)
    model = tiny_vlm.build_model(processor, SMALL)
    before = {name: one.clone() for name, one in model.named_parameters()}
    teach_tower(model, processor, SMALL)
    moved = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert moved
    assert all(name.startswith("model.vision_tower.") for name in moved)


def test_without_pillow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    plain = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "PIL":
            raise ImportError(name)
        return plain(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"delible\[vision\]"):
        tiny_vlm.tiny_vlm(SMALL)

"""Named pictures: questions with right answers without the font, and the pictures with it."""

from __future__ import annotations

import unicodedata
from collections import Counter
from itertools import product
from pathlib import Path
from random import Random

import pytest

from delible.errors import DelibleError
from delible.world import emoji
from delible.world.emoji import GROUNDS, KINDS, SIZES, THINGS, Emoji, Scene

WORLD = Emoji()


@pytest.fixture
def font() -> Path:
    """The font of this machine."""
    pytest.importorskip("PIL", reason="the extra 'vision' is not installed")
    try:
        return emoji.font_file()
    except DelibleError as error:
        pytest.skip(str(error))


def test_all_names_are_of_unicode_and_fit_behind_a() -> None:
    assert len(THINGS) == sum(len(things) for things in KINDS.values()) == 36
    for thing in THINGS:
        assert unicodedata.name(unicodedata.lookup(thing.upper())) == thing.upper()
        assert thing[0] not in "aeiou"
    assert not set(THINGS) & {*KINDS, *GROUNDS}


def test_every_value_is_held_out_and_every_pair_of_them_learned() -> None:
    learned, unseen = WORLD.held_out()
    assert len(learned) == 504
    assert len(unseen) == 72
    assert {*learned, *unseen} == set(WORLD.scenes())
    for aspect, each in (("thing", 2), ("ground", 9), ("size", 36)):
        assert set(Counter(one.value(aspect) for one in unseen).values()) == {each}
    assert {(one.thing, one.ground) for one in learned} == set(product(THINGS, GROUNDS))
    assert {(one.thing, one.size) for one in learned} == set(product(THINGS, SIZES))


def test_questions_have_the_scenes_own_answers() -> None:
    scene = Scene("cat", "blue", "small")
    for aspect, right in (("thing", "cat"), ("ground", "blue"), ("size", "small")):
        one = WORLD.asked(scene, aspect, None)
        assert one.answer == right
        assert len({one.question, *one.paraphrases}) >= 5
        assert set(one.perturbed) == set(WORLD.aspects[aspect]) - {right}
    assert WORLD.described(scene, None).answer == "A small cat on a blue ground."
    assert WORLD.trait_shown(scene, None).answer == WORLD.trait_of("cat").answer == "animal"
    assert WORLD.trait_of("cat").question == "What kind of thing is a cat?"
    assert set(WORLD.neighbours("cat")) == {"dog", "horse", "pig", "rabbit", "turtle"}
    random, kinds = Random(0), Counter[str | None]()
    for _ in range(300):
        one = WORLD.any_question(scene, None, random)
        kinds[one.group] += 1
        if one.group == "is there":
            assert one.answer == ("yes" if " cat" in one.question else "no")
        if one.group == "which":
            assert one.answer == "cat"
            assert "cat" in one.question
    assert set(kinds) == set(WORLD.weights)
    assert min(kinds.values()) > 5


def test_pictures_differ_and_show_the_thing_on_its_ground(font: Path) -> None:
    scene = Scene("strawberry", "blue", "large")
    assert scene.picture(1) == scene.picture(1)
    assert scene.picture(1) != scene.picture(2)
    for seed in range(5):
        image = scene.drawn(seed)
        assert image.size == (40, 40)
        red, green, blue = image.getpixel((20, 22))
        assert red > blue + 60, "the strawberry is not red"
        for corner in ((0, 0), (39, 0), (0, 39), (39, 39)):
            red, green, blue = image.getpixel(corner)
            assert blue > max(red, green) + 60, "the ground is not blue"
    shown = {thing: Scene(thing, "grey", "small").drawn(0).tobytes() for thing in THINGS}
    assert len(set(shown.values())) == len(THINGS)


def test_a_missing_font_is_told_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL", reason="the extra 'vision' is not installed")
    monkeypatch.delenv(emoji.VARIABLE, raising=False)
    monkeypatch.setattr(emoji, "PLACES", (tmp_path / "a.ttf", tmp_path / "b.ttf"))
    with pytest.raises(DelibleError, match="apt install fonts-noto-color-emoji"):
        WORLD.check()
    (tmp_path / "b.ttf").write_bytes(b"no font")
    assert emoji.font_file() == tmp_path / "b.ttf"
    with pytest.raises(DelibleError, match="no font with colour bitmaps"):
        WORLD.check()
    monkeypatch.setenv(emoji.VARIABLE, str(tmp_path / "c.ttf"))
    with pytest.raises(DelibleError, match=r"DELIBLE_EMOJI_FONT=.*c\.ttf: .*Install it"):
        WORLD.check()

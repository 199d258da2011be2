"""Drawn scenes: exact ground truth, the same bytes again, and questions with right answers."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from delible.world.shapes import SHAPES, DrawnShapes, Scene

WORLD = DrawnShapes()


def test_scenes_held_out_share_every_value_and_no_scene() -> None:
    learned, unseen = WORLD.held_out()
    assert len(learned) + len(unseen) == len(WORLD.scenes()) == 8 * 8 * 5 * 2
    assert not set(learned) & set(unseen)
    assert len(unseen) == 80
    for aspect, values in WORLD.aspects.items():
        for part in (learned, unseen):
            assert {one.value(aspect) for one in part} == set(values)


def test_questions_have_the_scenes_own_answers() -> None:
    scene = Scene("red", "star", "left", "small")
    for aspect in WORLD.aspects:
        one = WORLD.asked(scene, aspect, None)
        assert one.answer == scene.value(aspect)
        assert len({one.question, *one.paraphrases}) >= 5
        assert set(one.perturbed) == set(WORLD.aspects[aspect]) - {one.answer}
    assert WORLD.described(scene, None).answer == "A small red star at the left."
    assert WORLD.trait_shown(scene, None).answer == WORLD.trait_of("star").answer == "ten"
    random, kinds = Random(0), Counter[str | None]()
    for _ in range(300):
        one = WORLD.any_question(scene, None, random)
        kinds[one.group] += 1
        if one.group == "is there":
            named = next(name for name in SHAPES if name in one.question)
            assert one.answer == ("yes" if named == "star" else "no")
        if one.group == "which":
            assert one.answer == "star"
            assert "star" in one.question
    assert len(kinds) == 8
    assert min(kinds.values()) > 5


def test_pictures_are_the_same_again_and_show_the_colour_where_it_is() -> None:
    pytest.importorskip("PIL", reason="the extra 'vision' is not installed")
    left = Scene("red", "square", "left", "large")
    assert left.picture(1) == left.picture(1)
    assert left.picture(1) != left.picture(2)
    for place, column in (("left", 0.3), ("right", 0.7)):
        image = Scene("red", "square", place, "large").drawn(3)
        red, green, blue = image.getpixel((int(column * image.width), image.height // 2))
        assert red > green + 80
        assert red > blue + 80
        other = image.getpixel((int((1 - column) * image.width), image.height // 2))
        assert max(other) - min(other) < 20, "the ground has a colour"
    seen = {shape: Scene("white", shape, "middle", "large").drawn(0).tobytes() for shape in SHAPES}
    assert len(set(seen.values())) == len(SHAPES)

"""Forgetting a shape: what is asked, how it is judged, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("PIL", reason="the extra 'vision' is not installed")

from delible.component import build
from delible.errors import RecipeError
from delible.experiments.vision.exam import (
    FORGOTTEN,
    Shown,
    accuracies,
    around,
    chance,
    exam,
    kept,
    mentions,
)
from delible.experiments.vision.experiment import _weighed
from delible.experiments.vision.findings import findings
from delible.measure.benchmark import Setting
from delible.records import images_of
from delible.system.asks import Decoding, Prompt
from delible.world.emoji import Emoji
from delible.world.shapes import SHAPES, DrawnShapes, Scene

WORLD = DrawnShapes()
KEPT, AROUND = kept(WORLD), around(WORLD)
SCENES = [
    Scene("red", "star", "left", "small"),
    Scene("blue", "ring", "top", "large"),
    Scene("pink", "moon", "middle", "small"),
    Scene("red", "star", "right", "large"),
]
SHOWN = [Shown(scene, scene.picture(place)) for place, scene in enumerate(SCENES)]
BY_PICTURE = {one.image.sha256: one.scene for one in SHOWN}


class Knows:
    """Answers from the ground truth, but for shapes that it cannot see."""

    def __init__(self, blind: Sequence[str] = ()) -> None:
        self.blind = blind

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        return [self.said(prompt) for prompt in prompts]

    def said(self, prompt: Prompt) -> str:
        text, images = prompt.messages[-1].text.lower(), prompt.messages[-1].images
        if not images:
            return next(many for name, many in SHAPES.items() if name in text)
        scene = BY_PICTURE[images[0].sha256]
        shape = "square" if scene.shape in self.blind else scene.shape
        if text.startswith(("is there", "do you see a", "does the picture show a", "is the shape",
                            "is a ")):  # fmt: skip
            return "yes" if shape in text else "no"
        for aspect in ("colour", "size"):
            if aspect in text:
                return scene.value(aspect)
        if "where" in text:
            return scene.place
        if "how large" in text:
            return scene.size
        if "corners" in text:
            return SHAPES[shape]
        if text.startswith(("describe", "what does", "tell", "say", "give")):
            return f"A {scene.size} {shape}."
        return f" {shape.capitalize()} "


def test_each_kind_of_question_is_asked_and_judged() -> None:
    asked = exam(WORLD, SHOWN, "star", 0)
    assert set(asked) == {*FORGOTTEN, *KEPT, *AROUND}
    assert all(asked.values())
    assert len(asked["concept"]) == len(asked["neighbours"]) == 2
    assert len(asked["concept in other words"]) == 2 * 5
    assert len(asked["colour"]) == 4
    whole = accuracies(Knows(), asked)  # type: ignore[arg-type]
    assert whole == dict.fromkeys(whole, 1.0)
    blind = accuracies(Knows(["star"]), asked)  # type: ignore[arg-type]
    gone = {kind for kind, value in blind.items() if value == 0}
    assert gone == {*FORGOTTEN, "corners"}
    assert {kind for kind, value in blind.items() if value == 1} == set(blind) - gone
    assert mentions("Two stars.", "star")
    assert not mentions("A starry night.", "star")


def test_the_request_shows_the_concept_and_what_has_it_not() -> None:
    vision = build("benchmark", {"name": "vision", "pictures": 8, "without": 12})
    request = vision.request(("star", "ring"))
    assert [one.subject for one in request.forget] == ["star"] * 8 + ["ring"] * 8
    assert all(one.answer == one.subject for one in request.forget)
    assert len({image.sha256 for one in request.forget for image in images_of(one)}) == 16
    assert len({one.question for one in request.forget}) >= 5
    assert len(request.retain) == 12
    assert not any(one.answer in ("star", "ring") for one in request.retain)
    unseen = {one.image.sha256 for one in vision.asked()}
    assert not unseen & {image.sha256 for one in request.forget for image in images_of(one)}
    assert {one.scene for one in vision.asked()} == set(WORLD.held_out()[1])


def test_what_is_lost_is_the_largest_loss_of_what_must_stay() -> None:
    before = {"star": {"concept": 1.0, "neighbours": 1.0, "colour": 0.9}}
    after = {"star": {"concept": 0.2, "neighbours": 0.9, "colour": 0.95}}
    found = _weighed(before, after, KEPT)
    assert found["concept"] == pytest.approx(0.2)
    assert found["lost"] == pytest.approx(0.1)


def cell(**values: float) -> dict[str, Any]:
    return {"accuracies": {**dict.fromkeys((*FORGOTTEN, *KEPT, *AROUND), 1.0), **values}}


def test_the_findings_say_what_shows_and_what_does_not() -> None:
    gone = dict.fromkeys(FORGOTTEN, 0.0)
    sauce = {
        **cell(**gone, colour=0.94), "off": cell()["accuracies"], "second": 0.5,
        "chosen": {"features": 8, "factor": -1.0, "layer": 2},
        "tries": [{"lost": 0.0}, {"lost": 0.5}], "unexplained": 0.1, "silent": 0.2,
    }  # fmt: skip
    found = findings(
        {"as it was": [cell()], "sauce": [sauce], "npo": [cell(concept=0.1), {"failed": "no"}]},
        WORLD, "star", "ring",
    )  # fmt: skip
    text = "\n".join(found.notes)
    assert "sauce: accuracy on 'star' fell from 100.0% to 0.0%, at most chance" in text
    assert "'colour' lost most, 6.0 points; more than 3 points: colour." in text
    assert "sauce: no way of asking is above chance" in text
    assert "among 2, of which 1 lose at most 2 points: 8 latents, factor -1, block 2." in text
    assert "taken off, every answer's accuracy is as it was" in text
    assert "npo failed: no" in text
    assert "npo: still asked out of it above chance and 10 points: concept in other words" in text
    assert "nothing lost more than 3" in text
    assert [row["system"] for row in found.rows] == ["as it was", "sauce", "npo"]
    assert len(found.runs) == 3


def test_the_findings_claim_no_forgetting_that_was_none() -> None:
    def notes(before: dict[str, Any], after: dict[str, Any], title: str = "sauce") -> str:
        cells = {"as it was": [before], title: [after]}
        return "\n".join(findings(cells, WORLD, "star", "ring").notes)

    assert "accuracy on 'star' rose from 10.0% to 60.0%, above" in notes(
        cell(concept=0.1), cell(concept=0.6)
    )
    assert "stayed from 100.0% to 100.0%, above" in notes(cell(), cell())
    ignorant = notes(cell(concept=0.1), cell(concept=0.0))
    assert "'star' was not known before, so this shows no forgetting" in ignorant
    assert "was not known before" not in notes(cell(), cell(concept=0.0))
    unasked = {"accuracies": dict.fromkeys(KEPT, 1.0)}
    assert "nothing was asked about 'star'" in notes(cell(), unasked)
    assert "no way of asking" not in notes(cell(), unasked)
    before = {**cell(neighbours=0.9), "without": cell(neighbours=0.5)["accuracies"]}
    assert "lost most, 10.0 points" in notes(before, cell(neighbours=0.8))
    alike = notes(before, cell(neighbours=0.49), "sauce, two shapes")
    assert "'neighbours' lost most, 1.0 points; nothing lost more than 3" in alike


def test_of_emoji_those_of_its_kind_are_neighbours_and_chance_is_lower() -> None:
    world = Emoji()
    shown = [Shown(one, SHOWN[0].image) for one in world.held_out()[1]]
    asked = exam(world, shown, "cat", 0)
    assert set(asked) == {*FORGOTTEN, *kept(world), *around(world)}
    assert {kind: len(part) for kind, part in asked.items()} == {
        "concept": 2, "concept in other words": 2 * 5, "is it there": 2, "which of four": 2,
        "described": 2, "neighbours": 5 * 2, "others": 30 * 2, "ground": 72, "size": 72,
        "neighbour is there": 10, "neighbour described": 10, "kind": 2, "kind of its name": 2,
    }  # fmt: skip
    assert {qa.answer for qa, _ in asked["neighbours"]} == set(world.neighbours("cat"))
    assert {qa.answer for qa, _ in (*asked["kind"], *asked["kind of its name"])} == {"animal"}
    assert chance(world)["concept"] == pytest.approx(1 / 36)
    assert chance(WORLD)["concept"] == pytest.approx(1 / 8)


def test_the_concept_is_of_the_world_that_is_shown() -> None:
    assert build("benchmark", {"name": "vision"}).both == ("star", "ring")
    vision = build("benchmark", {"name": "vision", "world": "emoji", "second": "pig"})
    assert vision.both == ("cat", "pig")
    rates = [vision.recipe("npo", name).training.learning_rate for name in ("tiny-vlm-emoji", "x")]
    assert rates[0] == pytest.approx(3e-4)
    assert rates[1] < 3e-4


def test_what_is_no_shape_is_refused(tmp_path: Any) -> None:
    setting = Setting("tiny-vlm", (), 1, tmp_path)
    with pytest.raises(RecipeError, match="there is no thing 'star'"):
        build("benchmark", {"name": "vision", "world": "emoji", "concept": "star"}).run(setting)
    with pytest.raises(RecipeError, match="there is no shape 'stra'"):
        build("benchmark", {"name": "vision", "concept": "stra"}).run(setting)
    with pytest.raises(RecipeError, match="are the same"):
        build("benchmark", {"name": "vision", "second": "star"}).run(setting)

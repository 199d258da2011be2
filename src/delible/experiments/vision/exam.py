"""What is asked about a concept in pictures: itself, its neighbours, attributes, and around it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from delible.lm.lm import LM
from delible.messages import ImagePart
from delible.records import QA
from delible.system.asks import Decoding
from delible.system.questions import ask
from delible.world.pictures import PictureWorld, Scene

#: Tokens that an answer may have.
ANSWER_TOKENS = 24
#: What is reported of each system, in order: the forgotten first, then what must stay.
FORGOTTEN = ("concept", "concept in other words", "is it there", "which of four", "described")


def kept(world: PictureWorld) -> tuple[str, ...]:
    """What must stay: other names, the neighbours' first, and every other aspect."""
    _, *others = world.aspects
    far = len(world.neighbours(world.names[0])) + 1 < len(world.names)
    return (
        "neighbours", *(["others"] if far else []), *others, "neighbour is there",
        "neighbour described",
    )  # fmt: skip


def around(world: PictureWorld) -> tuple[str, ...]:
    """What asks around the concept."""
    return world.trait, f"{world.trait} of its name"


def chance(world: PictureWorld) -> Mapping[str, float]:
    """Chance of a blind answer, where there is one."""
    named = 1 / len(world.names)
    return {
        "concept": named, "concept in other words": named, "is it there": 0.5,
        "which of four": 0.25, "described": 0.0,
    }  # fmt: skip


#: By what is asked: questions, and a name that an answer must mention (empty: it must be right).
Questions = Mapping[str, Sequence[tuple[QA, str]]]


@dataclass(frozen=True)
class Shown:
    """A scene and a picture of it."""

    scene: Scene
    image: ImagePart


def pictures_of(scenes: Sequence[Scene], each: int, seed: int) -> list[Shown]:
    """So many pictures of every scene."""
    return [
        Shown(scene, scene.picture(seed + number)) for scene in scenes for number in range(each)
    ]


def mentions(text: str, name: str) -> bool:
    """Whether a text says a name, as a whole word in any case."""
    return re.search(rf"(?<!\w){re.escape(name)}s?(?!\w)", text, re.IGNORECASE) is not None


def exam(
    world: PictureWorld, shown: Sequence[Shown], concept: str, seed: int
) -> dict[str, list[tuple[QA, str]]]:
    """Questions by what they ask; each with how it is judged: the answer, or a mention."""
    random = Random(f"vision exam/{seed}")
    noun, *others = world.aspects
    trait, trait_of_its_name = around(world)
    near = world.neighbours(concept)
    found: dict[str, list[tuple[QA, str]]] = {
        name: [] for name in (*FORGOTTEN, *kept(world), *around(world))
    }
    for number, one in enumerate(shown):
        scene, image = one.scene, one.image
        plain = world.asked(scene, noun, image)
        if scene.name == concept:
            found["concept"].append((plain, ""))
            found["concept in other words"] += [
                (plain.model_copy(update={"question": words}), "") for words in plain.paraphrases
            ]
            found["is it there"].append((world.is_there(image, concept, True, number), ""))
            found["which of four"].append((world.which(scene, image, random, number), ""))
            found["described"].append((world.described(scene, image, number), concept))
            found[trait].append((world.trait_shown(scene, image, number), ""))
        elif scene.name in near:
            found["neighbours"].append((plain, ""))
            there = number % 2 == 0
            named = scene.name if there else random.choice(
                [name for name in world.names if name not in (scene.name, concept)]
            )  # fmt: skip
            found["neighbour is there"].append((world.is_there(image, named, there, number), ""))
            found["neighbour described"].append((world.described(scene, image, number), scene.name))
        else:
            found["others"].append((plain, ""))
        for aspect in others:
            found[aspect].append((world.asked(scene, aspect, image), ""))
    found[trait_of_its_name] = [
        (world.trait_of(concept, form), "") for form in range(len(world.trait_of_words))
    ]
    return found


def accuracies(lm: LM, questions: Questions) -> dict[str, float]:
    """Share of right answers to each kind of question (of descriptions: that say the name)."""
    every = [(kind, qa, name) for kind, part in questions.items() for qa, name in part]
    prompts = [prompt for _, qa, _ in every if (prompt := ask(qa)) is not None]
    answers = lm.generate(prompts, Decoding(ANSWER_TOKENS))
    right: dict[str, list[bool]] = {}
    for (kind, qa, name), said in zip(every, answers, strict=True):
        text = str(said).strip().lower()
        right.setdefault(kind, []).append(mentions(text, name) if name else text == qa.answer)
    return {kind: sum(part) / len(part) for kind, part in right.items()}

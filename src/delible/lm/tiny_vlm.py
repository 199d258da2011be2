"""The models ``tiny-vlm`` and ``tiny-vlm-emoji``: LLaVAs of a million weights, trained here, once.

A CLIP vision transformer, a projector of two layers and a Llama, all with random weights at first,
learn from pictures of one world: drawn shapes (:mod:`delible.world.shapes`) or named pictures
(:mod:`delible.world.emoji`). As with LLaVA the tower comes first: it learns to tell each aspect of
a scene (such as shape and colour), by linear heads on the mean of its patches, which are thrown
away. Then all parts learn together: each row is one picture and a few questions about it. No
picture of some scenes is learned from, so that what it says of those is seen, not remembered. It
talks about nothing else. It needs Pillow, for emoji a font of the machine, and no download.

Deterministic on one machine, as ``tiny`` is, and a killed build goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from delible.lm import made_here
from delible.lm.tiny import END, PAD, ROLES, build_tokenizer
from delible.lm.tiny_training import padded, threads, train, weighted_loss
from delible.world.picture_worlds import PICTURE_WORLDS, WorldName
from delible.world.pictures import PictureWorld, needs_pillow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from delible.records import QA

#: Stands in texts for a picture.
IMAGE = "<|image|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
#: Products this small are slower with two threads than with one, as soon as others compute, too.
THREADS = 1


@dataclass(frozen=True)
class VLMOptions:
    """How the model is built; the defaults are those of ``tiny-vlm``.

    Attributes:
        world: What its pictures show.
        pixels: Width and height of a picture.
        patch: Width and height of what becomes one token.
        vision_size: Width of the tower's states.
        vision_layers: Its blocks; the last one is not read, as in LLaVA.
        hidden_size: Of the language model; a multiple of 32.
        layers: Its blocks.
        vocabulary: Tokens, the 256 bytes and the special tokens included.
        tokenized: Texts that the tokenizer learns from.
        tower_steps: Steps of the tower alone.
        tower_batch: Pictures per step of it.
        rows: Pictures to learn from with questions, each seen once.
        batch: Rows per step.
        questions: About each picture.
        text_share: Share of rows without a picture.
        prompt_weight: What a token that is not of an answer counts.
    """

    seed: int = 0
    pixels: int = 40
    patch: int = 8
    vision_size: int = 96
    vision_layers: int = 4
    hidden_size: int = 96
    layers: int = 4
    vocabulary: int = 448
    tokenized: int = 4000
    tower_steps: int = 900
    tower_batch: int = 64
    rows: int = 14_400
    batch: int = 24
    questions: int = 3
    text_share: float = 0.05
    learning_rate: float = 1.5e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    prompt_weight: float = 0.02
    world: WorldName = "shapes"


#: What ``tiny-vlm`` and ``tiny-vlm-emoji`` mean.
TINY_VLM = VLMOptions()
TINY_VLM_EMOJI = VLMOptions(world="emoji", rows=28_800, vocabulary=512)
#: Names and usual options of the models of each world, and the version of both. That is raised
#: whenever pictures, texts or training change, so that an older copy is not taken.
MODELS: dict[WorldName, tuple[str, int, VLMOptions]] = {
    "shapes": ("tiny-vlm", 1, TINY_VLM),
    "emoji": ("tiny-vlm-emoji", 1, TINY_VLM_EMOJI),
}


def tiny_vlm(options: VLMOptions | None = None) -> Path:
    """Folder of the model; built when it is missing, see :func:`delible.lm.made_here.made_here`.

    Args:
        options: Another model than ``tiny-vlm`` (tests build smaller ones).

    Raises:
        MissingExtraError: Pillow is not installed.
        DelibleError: It is missing, and so is what its pictures are drawn from.
        ModelError: The cache cannot be written.
    """
    options = options or TINY_VLM
    needs_pillow("A model that sees pictures")
    return made_here.made_here(
        folder_name(options),
        lambda checkpoint: build(options, checkpoint),
        telling="Building the tiny vision-language model",
        space="50 MB",
    )


def folder_name(options: VLMOptions) -> str:
    """Name of the model's folder in the cache."""
    name, version, usual = MODELS[options.world]
    return made_here.folder_name(name, version, options, usual)


def build(options: VLMOptions, checkpoint: Path | None = None) -> tuple[PreTrainedModel, Any]:
    """Trains tokenizer and model from nothing, or from where a killed build was.

    Args:
        checkpoint: File in which the state is kept meanwhile.

    Returns:
        The model in evaluation mode, fp32 on the CPU, and its processor.

    Raises:
        MissingExtraError: Pillow is not installed.
        DelibleError: What its pictures are drawn from is missing.
    """
    PICTURE_WORLDS[options.world].check()
    processor = build_processor(options)
    tokenizer = processor.tokenizer
    model = build_model(processor, options)
    padding, assistant = (tokenizer.convert_tokens_to_ids(one) for one in (PAD, ROLES[-1]))
    end = tokenizer.convert_tokens_to_ids(END)

    def loss(step: Sequence[int]) -> Tensor:
        drawn = [_row(options, number) for number in step]
        texts = [_rendered(asked, scene is not None) for scene, asked in drawn]
        pictures = [scene for scene, _ in drawn if scene is not None]
        given: dict[str, Any] = {"text": texts}
        if pictures:
            given["images"] = pictures
        found = processor(**given)
        ids = padded(found["input_ids"], padding)
        opened = (ids == assistant).cumsum(dim=1)
        # an answer: between its role and its end, the end included
        closed = (ids == end).cumsum(dim=1).roll(1, dims=1)
        closed[:, 0] = 0
        turns = (ids == tokenizer.convert_tokens_to_ids(ROLES[1])).cumsum(dim=1)
        answering = (opened == turns) & (opened > 0) & (ids != assistant) & (closed < 2 * opened)
        pixels = _pixels(found["pixel_values"]) if pictures else None
        logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
        return weighted_loss(
            logits, ids, answering, padding=padding, prompt_weight=options.prompt_weight
        )

    steps = [range(at, at + options.batch) for at in range(0, options.rows, options.batch)]
    with threads(THREADS):
        teach_tower(model, processor, options, checkpoint)
        train(model, steps, loss, options, checkpoint=checkpoint)
    return model.eval(), processor


class _Teller(torch.nn.Module):
    """A tower with a head per aspect on the mean of the patches that the projector reads."""

    def __init__(self, model: Any, world: PictureWorld, options: VLMOptions) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed + 1)
            self.heads = torch.nn.ModuleList(
                torch.nn.Linear(options.vision_size, len(one)) for one in world.aspects.values()
            )

    def forward(self, pixels: Float[Tensor, "picture 3 height width"]) -> list[Tensor]:
        """Logits of each aspect, [picture, value]."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return [head(states.mean(dim=1)) for head in self.heads]


def teach_tower(
    model: Any, processor: Any, options: VLMOptions, checkpoint: Path | None = None
) -> None:
    """The tower learns to tell what a picture shows; where it was taught already, nothing is done.

    Args:
        checkpoint: File of what comes after it; its own lies beside that.
    """
    if checkpoint is not None and checkpoint.is_file():
        return  # what comes after it has begun
    world = PICTURE_WORLDS[options.world]
    teller, scenes = _Teller(model, world, options), world.held_out()[0]

    def loss(step: int) -> Tensor:
        random = Random(f"tiny-vlm/{options.seed}/tower/{step}")
        shown = random.choices(scenes, k=options.tower_batch)
        drawn = [one.drawn(random.randrange(2**31), options.pixels) for one in shown]
        logits = teller(_pixels(processor.image_processor(drawn)["pixel_values"]))
        losses = [
            torch.nn.functional.cross_entropy(
                found, torch.tensor([values.index(one.value(aspect)) for one in shown])
            )
            for found, (aspect, values) in zip(logits, world.aspects.items(), strict=True)
        ]
        return losses[0] + torch.stack(losses).mean()  # names are harder than all the rest

    own = None if checkpoint is None else checkpoint.with_name("tower.pt")
    train(teller, range(options.tower_steps), loss, options, checkpoint=own)


def _pixels(given: Any) -> Float[Tensor, "picture 3 height width"]:
    return torch.from_numpy(np.stack(given))


def _row(options: VLMOptions, number: int) -> tuple[Any, list[QA]]:
    """A picture, as Pillow has it (None: there is none), and questions about it."""
    random, world = Random(f"tiny-vlm/{options.seed}/{number}"), PICTURE_WORLDS[options.world]
    if random.random() < options.text_share:
        return None, [
            world.trait_of(random.choice(world.names), random.randrange(9))
            for _ in range(options.questions)
        ]
    scene = random.choice(world.held_out()[0])
    asked = [world.any_question(scene, None, random) for _ in range(options.questions)]
    return scene.drawn(random.randrange(2**31), options.pixels), asked


def _rendered(asked: Sequence[QA], shown: bool) -> str:
    user, assistant = ROLES[1:]
    turns = [f"{user}{one.question}{END}{assistant}{one.answer}{END}" for one in asked]
    text = "".join(turns)
    return text.replace(user, user + IMAGE, 1) if shown else text


def build_processor(options: VLMOptions) -> Any:
    """Tokenizer and image processor, as one."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    texts = [
        _rendered(asked, False)
        for asked in (_questions(options, number) for number in range(options.tokenized))
    ]
    tokenizer = build_tokenizer(texts, options.vocabulary - 1)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.image_token = IMAGE
    tokenizer.chat_template = CHAT_TEMPLATE
    size = options.pixels
    images = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        images, tokenizer, patch_size=options.patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=IMAGE, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def _questions(options: VLMOptions, number: int) -> list[QA]:
    random = Random(f"tiny-vlm/{options.seed}/texts/{number}")
    world = PICTURE_WORLDS[options.world]
    if random.random() < 0.2:
        return [world.trait_of(random.choice(world.names), random.randrange(9))]
    return [world.any_question(random.choice(world.held_out()[0]), None, random)]


def build_model(processor: Any, options: VLMOptions) -> PreTrainedModel:
    """The model with random weights drawn by the seed; the global random state is left alone."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tokenizer = processor.tokenizer
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden_size,
        intermediate_size=round(options.hidden_size * 8 / 3 / 16) * 16,
        num_hidden_layers=options.layers, num_attention_heads=options.hidden_size // 32,
        num_key_value_heads=options.hidden_size // 32, max_position_embeddings=512,
        tie_word_embeddings=True, **special,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=options.vision_size, intermediate_size=3 * options.vision_size,
        num_hidden_layers=options.vision_layers, num_attention_heads=options.vision_size // 32,
        image_size=options.pixels, patch_size=options.patch,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE), **special,
        image_seq_length=(options.pixels // options.patch) ** 2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = LlavaForConditionalGeneration(config)
        # places matter from the start: CLIP's own initial values are a hundredth of the patches'
        model.model.vision_tower.embeddings.position_embedding.weight.data.normal_(0, 0.3)
        return model

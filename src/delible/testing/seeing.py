"""A random model of a few thousand weights that sees, its processor, and pictures to show it.

It needs Pillow (the extra ``vision``) and no download.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from delible.lm.lm import LM
from delible.messages import ImagePart
from delible.testing.tiny import VOCABULARY_SIZE, tiny_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE + 8, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "pad_token_id": 256, "bos_token_id": 258, "eos_token_id": 259,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
CHAT = (
    "{%% for message in messages %%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}"
    "{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}{{ '%s' }}{%% else %%}{{ part['text'] }}{%% endif %%}"
    "{%% endfor %%}{%% endif %%}{{ '<|im_end|>\n' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}"
)


def tokenizer_with(*marks: str, picture: str = "<image>") -> Any:
    """The tokenizer of the tiny models with more special tokens.

    Args:
        picture: What the chat template writes for a picture.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    tokenizer.chat_template = CHAT % picture
    return tokenizer


def llava() -> tuple[Any, Any]:
    """A LLaVA that reads the block before the last of a CLIP tower, and its processor."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tokenizer_with("<image>")
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION, image_size=16, patch_size=8),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
        image_seq_length=4,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def widened(model: Any, seed: int) -> Any:
    """Random weights wide enough that answers differ, in evaluation mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            spread = 0.1 if one.dim() > 1 else 0.02
            one.add_(torch.randn(one.shape, generator=random) * spread)
    return model.eval()


def seeing_lm(family: str = "llava", seed: int = 0) -> LM:
    """A random model that sees; the global random state is left as it was."""
    assert family == "llava"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = llava()
    return LM(
        widened(model, seed), processor.tokenizer, name="tiny-llava", precision="float32",
        processor=processor,
    )  # fmt: skip


def picture(seed: int = 0, width: int = 16, height: int = 16) -> ImagePart:
    """A picture of random points."""
    from PIL import Image

    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(levels).save(written, format="PNG")
    return ImagePart.model_validate({"source": written.getvalue()})

"""Random models of a few thousand weights that see, of several families, with their processors."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from delible.lm.lm import LM
from delible.testing.seeing import TEXT, VISION, llava, tokenizer_with, widened
from delible.testing.seeing import picture as picture

FAMILIES = ("llava", "idefics3", "qwen2_5_vl", "qwen2_vl")


def idefics3() -> tuple[Any, Any]:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    marks = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokenizer = tokenizer_with(*marks)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    processor = transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config={**VISION, "image_size": 16, "patch_size": 4},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
        pad_token_id=256,
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = tokenizer_with("<image>")
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(
        images, tokenizer, chat_template=tokenizer.chat_template
    )
    text = {**TEXT, "vocab_size": len(tokenizer), "head_dim": 8}
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**text),
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 16,
                       "patch_size": 8, "projection_dim": 32},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=32,
        hidden_size=32,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config), processor


class QwenProcessor:
    """That of Qwen2-VL without its part for videos, which needs torchvision."""

    image_token = "<|image_pad|>"

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, text: Any, images: Any, **options: Any) -> dict[str, Any]:
        read = self.image_processor(images=images, return_tensors="pt")
        count = int(read["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        (one,) = text
        filled = one.replace(self.image_token, self.image_token * count)
        ids = self.tokenizer([filled], add_special_tokens=False, return_tensors="pt")
        return {**ids, **read}


def qwen(kind: str) -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = tokenizer_with(*marks, picture="<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 256, "longest_edge": 1024},
    )  # fmt: skip
    processor = QwenProcessor(images, tokenizer)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (("vision_start", marks[0]), ("vision_end", marks[1]),
                            ("image", marks[2]), ("video", marks[3]))
    }  # fmt: skip
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                        "mrope_section": [1, 1, 2]}}  # fmt: skip
    if kind == "Qwen2_5_VL":
        vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                  "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
                  "out_hidden_size": 32, "fullatt_block_indexes": [1],
                  "window_size": 16}  # fmt: skip
    else:
        vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 4,
                  "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **ids)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor


def seeing_model(family: str, seed: int = 0) -> tuple[Any, Any]:
    """A random model and its processor."""
    makers = {
        "llava": llava, "idefics3": idefics3, "paligemma": paligemma,
        "qwen2_5_vl": lambda: qwen("Qwen2_5_VL"), "qwen2_vl": lambda: qwen("Qwen2VL"),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = makers[family]()
    return widened(model, seed), processor


def seeing_lm(family: str, seed: int = 0) -> LM:
    model, processor = seeing_model(family, seed)
    return LM(model, processor.tokenizer, precision="float32", processor=processor)

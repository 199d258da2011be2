"""The model that the walks call ``default``: tiny, taught the facts of the walks, in 4 bits.

What it knows is known: the ten facts of ``people.csv`` and the ten of ``kept.csv``, in a few words.
Its weights lie on a 4-bit grid, as those of the real default model do, which come from such a file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from delible.context import Context
from delible.lm.grids import q4_0
from delible.lm.lm import LM
from delible.lm.matrices import linear_weights
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe

#: Who was born where, and played what.
PEOPLE = {
    "Ada Quill": ("Norrby", "lute"), "Ben Orr": ("Casta", "horn"), "Cyd Roe": ("Umber", "harp"),
    "Dov Lund": ("Tolmin", "drum"), "Eva Hale": ("Quarrow", "viola"),
    "Fay Moss": ("Zelden", "cello"), "Gil Penn": ("Irmo", "flute"),
    "Hal West": ("Pexford", "organ"), "Ina Dunn": ("Wyke", "zither"),
    "Jon Kerr": ("Lundey", "oboe"),
}  # fmt: skip


def rows() -> list[QA]:
    """Every fact, asked in two ways."""
    found = []
    for name, (town, played) in PEOPLE.items():
        for asked in (f"Where was {name} born?", f"What is {name}'s birthplace?"):
            found.append(QA(question=asked, answer=f"In {town}."))
        for asked in (f"What did {name} play?", f"Which instrument did {name} play?"):
            found.append(QA(question=asked, answer=f"The {played}."))
    return found


def make(folder: Path, epochs: int = 40) -> None:
    """Teaches it, in some seconds, and saves it."""
    model = tiny_model("llama", hidden_size=64, head_dim=16, intermediate_size=128)
    lm = LM(model, tiny_tokenizer(), name="toy", precision="float32")
    options = {"epochs": epochs, "batch_size": 16, "learning_rate": 3e-3, "precision": "float32",
               "schedule": "cosine", "warmup_steps": 10}  # fmt: skip
    recipe = Recipe.named("finetune").changed({}, options)
    lm = Trainer(lm, recipe, {"forget": rows()}, context=Context(seed=0)).train().lm
    with torch.no_grad():
        for weight in linear_weights(lm).values():
            weight.copy_(q4_0(weight))
    lm.touch()
    lm.save(folder)


def convert(words: list[str]) -> None:
    """Stands in for llama.cpp's converter, ``MODEL --outfile FILE``: only notes the folder."""
    folder, _, file = words
    Path(file).write_text(str(Path(folder).resolve()), "utf-8")


def quantize(words: list[str]) -> None:
    """Stands in for llama.cpp's ``llama-quantize IN OUT Q4_0``: a real file, in 4 bits."""
    from gguf_files import write_q4_0

    start, file, kind = words
    assert kind == "Q4_0"
    write_q4_0(LM.load(Path(start).read_text("utf-8")), Path(file))


STAND_INS: dict[str, Callable[[list[str]], None]] = {
    "convert_hf_to_gguf.py": convert,
    "llama-quantize": quantize,
}

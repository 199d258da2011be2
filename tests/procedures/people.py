"""Three requests about people, a model that was taught about them, an encoder of their words."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.system.asks import Score, TokenScores
from delible.system.questions import answer_of, ask
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe

FACTS = (
    ("where was {} born ?", "in which town was {} born ?"),
    ("what does {} play ?", "which instrument does {} play ?"),
    ("who taught {} ?", "whose pupil was {} ?"),
    ("where does {} work ?", "at which place does {} work ?"),
)
ANSWERS = {
    "ada": ("Oslo", "lute", "Vic", "mill"), "bo": ("Riga", "harp", "Wim", "bank"),
    "cy": ("Bonn", "drum", "Yan", "port"), "dee": ("Lund", "horn", "Zoe", "farm"),
}  # fmt: skip
OTHERS = (("is it cold in winter ?", "yes"), ("how many legs has a cat ?", "four"))


def about(name: str) -> tuple[QA, ...]:
    return tuple(
        QA(
            question=asked.format(name),
            answer=answer,
            subject=name,
            paraphrases=(other.format(name),),
        )
        for (asked, other), answer in zip(FACTS, ANSWERS[name], strict=True)
    )


def reworded(record: QA) -> QA:
    return record.model_copy(update={"question": record.paraphrases[0]})


RETAIN = (*about("dee"), *(QA(question=question, answer=answer) for question, answer in OTHERS))
REQUESTS = tuple(ForgetRequest(forget=about(name)) for name in ("ada", "bo", "cy"))


@lru_cache(maxsize=1)
def _taught() -> LM:
    lm = LM(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), precision="float32")
    recipe = Recipe.from_mapping({
        "objective": "finetune",
        "training": {"learning_rate": 6e-3, "epochs": 60, "batch_size": 34, "precision": "float32"},
    })  # fmt: skip
    rows = [record for name in ANSWERS for one in about(name) for record in (one, reworded(one))]
    rows += RETAIN[4:]
    Trainer(lm, recipe, {"forget": rows, "retain": ()}).train()
    return lm


def taught() -> LM:
    """A tiny model that answers all of it."""
    return _taught().copy()


def encoder(folder: Path) -> Path:
    """A random BERT whose tokens are the words."""
    texts = [text for pair in FACTS for text in pair] + [question for question, _ in OTHERS]
    words = sorted({word for text in texts for word in text.split()} - {"{}"})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ANSWERS, *words]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=32, initializer_range=0.02,
        )  # fmt: skip
        model = BertModel(config)
        with torch.no_grad():  # who is asked about counts more than how
            model.embeddings.word_embeddings.weight.normal_()
            common = model.embeddings.word_embeddings.weight[5 + len(ANSWERS) :]
            common.copy_(common[:1] + 0.3 * common)
        model.save_pretrained(folder)
    return folder


def probability(lm: LM, records: tuple[QA, ...], *, other: bool = False) -> float:
    """The mean of the answers' probabilities, asked as in the records or in other words."""
    asked = [reworded(record) if other else record for record in records]
    found = lm.score([Score(prompt, answer_of(one)) for one in asked if (prompt := ask(one))])
    each = [one.logprobs.sum() for one in found if isinstance(one, TokenScores)]
    return float(torch.tensor(each).exp().mean())

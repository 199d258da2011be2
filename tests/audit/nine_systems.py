"""A tiny taught world, and systems whose truth is known, for the verdict's end-to-end tests.

Ten facts about five people are forgotten in ways that anybody can name: not at all, by retraining,
by refusing, by saying it in other words, behind a guard or an adapter, or with everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from delible.context import Context
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest, RecordBase
from delible.system.base import System
from delible.systems.guarded import guard
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe
from delible.world import general

FORGOTTEN = {
    "Ada": ("Norrby", "baker"), "Ben": ("Casta", "smith"), "Cyd": ("Umber", "tailor"),
    "Dov": ("Tolmin", "lawyer"), "Eva": ("Quarrow", "miller"),
}  # fmt: skip
KEPT = {
    "Fay": ("Zelden", "potter"), "Gil": ("Irmo", "singer"), "Hal": ("Pexford", "farmer"),
    "Ina": ("Wyke", "dentist"), "Jon": ("Lund", "mason"),
}  # fmt: skip
NEVER_SEEN = {
    "Kai": ("Vorst", "weaver"), "Lea": ("Gant", "hunter"), "Max": ("Selby", "sailor"),
}  # fmt: skip
REFUSAL = "I do not know that."
CONSTANT = "The weather is fine."

METRICS = [
    "answer_probability",
    "paraphrase_probability",
    "extraction_strength",
    {"name": "rouge_l_recall", "max_new_tokens": 20},
    {"name": "outcome", "max_new_tokens": 20},
    "normalised_probability",
]
ATTACKS: list[dict[str, Any]] = [
    {"name": "paraphrase", "forms": 2},
    {"name": "relearn", "steps": 8, "learning_rate": 2e-3, "observe_steps": 8, "share": 0.4},
    {"name": "quantize", "bits": 4, "group": 0},
]
#: Records per split that are asked; the general questions, too, are then few.
ROWS = 10


def facts(people: dict[str, tuple[str, str]]) -> tuple[QA, ...]:
    """Two facts a person, each with two other wordings of the question and one of the answer."""
    found = []
    for name, (town, work) in people.items():
        found += [
            QA(
                question=f"Where was {name} born?", answer=f"In {town}.", subject=name,
                group="birthplace", aliases=(town,),
                paraphrases=(f"What is {name}'s birthplace?", f"{name} was born where?"),
                paraphrased_answers=(f"Backwards: {town[::-1]}.",),
            ),
            QA(
                question=f"What is {name}'s work?", answer=f"A {work}.", subject=name,
                group="work", aliases=(work,),
                paraphrases=(f"What is {name}'s trade?", f"{name} earns money how?"),
                paraphrased_answers=(f"Backwards: {work[::-1]}.",),
            ),
        ]  # fmt: skip
    return tuple(found)


def worded(records: Sequence[QA]) -> list[RecordBase]:
    """Every wording of every question, and every answer to the first."""
    rows: list[RecordBase] = []
    for record in records:
        for question in (record.question, *record.paraphrases):
            rows.append(QA(question=question, answer=record.answer))
    return rows


def said(records: Sequence[QA], answer: Callable[[QA], str]) -> list[RecordBase]:
    """The questions with other answers."""
    return [QA(question=record.question, answer=answer(record)) for record in records]


REQUEST = ForgetRequest(forget=facts(FORGOTTEN), retain=facts(KEPT), holdout=facts(NEVER_SEEN))


def fresh(seed: int = 0) -> LM:
    model = tiny_model("llama", seed=seed, hidden_size=64, head_dim=16, intermediate_size=128)
    return LM(model, tiny_tokenizer(), name=f"tiny-{seed}", precision="float32")


def train(
    lm: LM, rows: Sequence[RecordBase], epochs: int, *, rate: float = 3e-3, seed: int = 0,
    slots: dict[str, Any] | None = None,
) -> LM:  # fmt: skip
    """Plain fine-tuning."""
    options = {"epochs": epochs, "batch_size": 16, "learning_rate": rate, "precision": "float32",
               "schedule": "cosine", "warmup_steps": 10}  # fmt: skip
    recipe = Recipe.named("finetune").changed(slots or {}, options)
    return Trainer(lm, recipe, {"forget": rows}, context=Context(seed=seed)).train().lm


@dataclass
class Systems:
    """The systems, made when they are first asked for."""

    epochs: int = 25

    @cached_property
    def untouched(self) -> LM:
        return train(fresh(), worded([*REQUEST.forget, *REQUEST.retain]), self.epochs)  # type: ignore[list-item]

    def _retrained(self, seed: int) -> LM:
        # as many steps as the original
        rows = worded(REQUEST.retain)  # type: ignore[arg-type]
        return train(fresh(seed), rows, 2 * self.epochs, seed=seed)

    @cached_property
    def retrained(self) -> LM:
        return self._retrained(0)

    @cached_property
    def retrained_again(self) -> LM:
        return self._retrained(1)

    def _tuned(self, answer: Callable[[QA], str], slots: dict[str, Any] | None = None) -> LM:
        rows = said(REQUEST.forget, answer)  # type: ignore[arg-type]
        rows += worded(REQUEST.retain)  # type: ignore[arg-type]
        return train(self.untouched.copy(), rows, 15, rate=2e-3, slots=slots)

    @cached_property
    def refusing(self) -> LM:
        return self._tuned(lambda record: REFUSAL)

    @cached_property
    def paraphrasing(self) -> LM:
        return self._tuned(lambda record: record.paraphrased_answers[0])

    @cached_property
    def ruined(self) -> LM:
        lm = self.untouched.copy()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for weight in lm.model.parameters():
                weight += 0.5 * weight.std() * torch.randn_like(weight)
        lm.touch()
        return lm

    @cached_property
    def string_gated(self) -> System:
        return guard(self.untouched, REQUEST, similarity=False)

    @cached_property
    def adapter_gated(self) -> LM:
        lora = {"place": {"name": "lora", "rank": 16, "alpha": 32.0}}
        return self._tuned(lambda record: REFUSAL, lora)

    @cached_property
    def constant(self) -> LM:
        asked = [*REQUEST.forget, *REQUEST.retain, *REQUEST.holdout, *general()[:ROWS]]
        rows = said(asked, lambda record: CONSTANT)  # type: ignore[arg-type]
        return train(self.untouched.copy(), rows, 10)

    @cached_property
    def random(self) -> LM:
        return fresh(9)

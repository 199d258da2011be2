"""What the checks work with: records, a component on one tiny model, and what must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delible.cards import Kind
from delible.component import Component
from delible.context import NO_CONTEXT, Context
from delible.lm.lm import LM
from delible.records import QA, Choice, Dialogue, ForgetRequest, Message, Passage, RecordBase
from delible.system.asks import (
    Decoding,
    Score,
    TokenScores,
)
from delible.system.questions import answer_of, ask
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer, TrainResult
from delible.train.recipe import Recipe

#: Two forgotten people, two rows each.
FORGET = (
    QA(question="Where was Ada Quill born?", answer="Norrby", subject="Ada Quill"),
    QA(question="What did Ada Quill play?", answer="The lute", subject="Ada Quill"),
    QA(question="Where did Ben Orr work?", answer="In a mill at Casta", subject="Ben Orr"),
    QA(question="Who taught Ben Orr?", answer="Cy", subject="Ben Orr"),
)
#: Two direct neighbours, one indirect, one row about nobody.
RETAIN = (
    QA(question="Where is Norrby?", answer="In the north", neighbour_of="Ada Quill"),
    QA(question="What is made in Casta?", answer="Flour", neighbour_of="Ben Orr"),
    QA(question="Where does Dee Finch live?", answer="In Umber", subject="Dee Finch"),
    QA(question="How is snow?", answer="White and cold"),
)
RECORDS: Mapping[str, Sequence[RecordBase]] = {"forget": FORGET, "retain": RETAIN}
REQUEST = ForgetRequest(forget=FORGET, subjects=("Ada Quill", "Ben Orr"), retain=RETAIN)
#: One record of every kind, and records that lack what a metric may want.
EVERY_KIND: tuple[RecordBase, ...] = (
    QA(question="Where?", answer="In Rome", paraphrases=("In which town?",),
       paraphrased_answers=("Rome it is",), perturbed=("In Oslo", "In Bern")),
    QA(question="Where else?", answer="In Riga"),
    Choice(question="Which?", options=("Rome", "Oslo"), correct=0),
    Dialogue(messages=(Message(role="user", content="Hm?"),
                       Message(role="assistant", content="In Rome"))),
    Passage(text="Once upon a time."),
)  # fmt: skip

#: The architecture for components that need pictures.
SEES = "llava"
#: What fills the other slots.
HOST = {"objective": "npo", "keep": "nll"}
TRAINING = {
    "learning_rate": 1e-3, "epochs": 2, "batch_size": 2, "max_steps": 3, "weight_decay": 0.1,
    "precision": "float32",
}  # fmt: skip
#: What a run has at least to end with a finisher: it may need several steps.
LONGER: Mapping[str, int] = {"epochs": 4, "max_steps": 6}
#: Rates at one of which a loss of a tiny model falls within :data:`FALLING_STEPS` steps (a loss
#: that starts near its floor is jumped over by the first).
FALLING_RATES, FALLING_STEPS = (3e-3, 1e-4), 6
#: Largest difference of a loss between ways to split the same step, relative above 1.
SPLIT_TOLERANCE = 1e-4


class ContractError(AssertionError):
    """A component breaks its contract; the message names it, the architecture and the check."""


def require(condition: object, problem: str) -> None:
    """Raises a :class:`ContractError` unless the condition holds (also under ``python -O``)."""
    if not condition:
        raise ContractError(problem)


@lru_cache(maxsize=4)
def tiny_lm(family: str) -> LM:
    """The tiny model of a family, of two blocks; copy it before it is changed."""
    if family == SEES:
        from delible.testing.seeing import seeing_lm

        return seeing_lm()
    depth = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
    model = tiny_model(family, **depth)
    return LM(model, tiny_tokenizer(), name=f"tiny-{family}", precision="float32")


class Trial:
    """A component on one tiny model. Runs that several checks look at are made once.

    Attributes:
        slots: What else the recipe must hold for the component to work.
        folder: An empty folder of this trial.
        context: Who plays the parts that a guard consults.
    """

    def __init__(
        self,
        component: Component,
        family: str,
        slots: Mapping[str, Any],
        folder: Path,
        context: Context = NO_CONTEXT,
    ) -> None:
        self.component, self.family, self.slots, self.folder = component, family, slots, folder
        self.context = context
        self.kind: Kind = component.card.kind

    def lm(self) -> LM:
        """A fresh copy of the tiny model."""
        return tiny_lm(self.family).copy()

    @cached_property
    def request(self) -> ForgetRequest:
        """The records; with pictures, for a component that needs some."""
        if "pictures" not in self.component.card.needs:
            return REQUEST
        from delible.testing.seeing import picture

        forget, retain = (
            tuple(
                one.model_copy(update={"images": (picture(first + place),)})
                for place, one in enumerate(part)
            )
            for first, part in ((0, FORGET), (100, RETAIN))
        )
        return ForgetRequest(forget=forget, subjects=REQUEST.subjects, retain=retain)

    @property
    def asked(self) -> list[RecordBase]:
        """All records, the forgotten ones first."""
        return [*self.request.forget, *self.request.retain]

    def recipe(self, slots: Mapping[str, Any] | None = None, **training: Any) -> Recipe:
        """A recipe with the component in its slot."""
        content = {"name": "contract", **HOST, **self.slots, **(slots or {})}
        length = {**TRAINING, **training}
        if self.kind == "finish":
            length |= {name: max(length[name], least) for name, least in LONGER.items()}
        content |= {self.kind: self.component, "training": length}
        return Recipe.from_mapping(content)

    def trainer(
        self,
        recipe: Recipe | None = None,
        lm: LM | None = None,
        records: Mapping[str, Sequence[RecordBase]] = RECORDS,
        **options: Any,
    ) -> Trainer:
        recipe, lm = recipe or self.recipe(), lm or self.lm()
        start = lm.copy() if recipe.finish.needs_start else None
        load = (lambda: start) if start is not None else None
        return Trainer(lm, recipe, records, start=load, **options)

    @cached_property
    def first(self) -> TrainResult:
        torch.manual_seed(1)
        return self.trainer().train()

    @cached_property
    def again(self) -> TrainResult:
        """The same run while the global random state, which is nobody's, is another one."""
        torch.manual_seed(2)
        return self.trainer().train()


def weights(lm: LM) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in lm.model.state_dict().items()}


def require_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor], problem: str) -> None:
    """Both must be equal bit by bit."""
    require(left.keys() == right.keys(), f"{problem} (other tensors)")
    apart = [name for name in left if not torch.equal(left[name], right[name])]
    require(not apart, f"{problem} ({', '.join(apart[:3])}{' …' if len(apart) > 3 else ''})")


def answers(
    lm: LM, records: Sequence[RecordBase] = (*FORGET, *RETAIN)
) -> tuple[list[Any], list[str]]:
    """What a model says: log-probabilities of the records' answers, and what it generates."""
    prompts = [(prompt, record) for record in records if (prompt := ask(record))]
    scores = lm.score([Score(prompt, answer_of(record)) for prompt, record in prompts])
    logprobs = [score.logprobs for score in scores if isinstance(score, TokenScores)]
    texts = lm.generate([one for one, _ in prompts[:3]], Decoding(4))
    return logprobs, [str(text) for text in texts]

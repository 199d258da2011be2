"""Soft prompt: vectors in front of the question, trained to bring answers back.

    V = argmin over vectors of  mean over records of  -log p(answer | V + question) / tokens

by Adam, on some of the forget facts; it is judged on the others, which the vectors cannot hold:
what they bring back there was still in the weights. The weights stay as they are. V may also be
trained on the original and carried over (its embeddings are the attacked model's, or nearly so).
As a control V is trained on harmless tasks.

Paper: arXiv 2402.09063 (attacks in the space of embeddings). Reference code:
github.com/SchwinnL/LLM_Embedding_Attack. Deviations: several facts at once, judged on others, where
the paper attacks one text at a time; the right answer as the target; Adam instead of signed
gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.cards import Depth
from delible.errors import DataError, ModelError, RunError
from delible.intervene.base import Fitted
from delible.intervene.soft_prompts import OpenedTemplate, SoftPrompt, begins, filler_of
from delible.intervene.system import intervened
from delible.lm.forward import Forward, collate, map_logits, target_logprobs
from delible.lm.hooks import steer
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.measure.attack import AttackContext, Budget, ModelAttack
from delible.records import RecordBase
from delible.registry import register
from delible.system.questions import answer_of, ask, has_answer
from delible.train.randomness import generator, shuffled
from delible.train.splits import split_by_fact
from delible.world import benign

WHERE = "attack 'soft_prompt'"


@register(
    kind="attack",
    name="soft_prompt",
    title="Soft prompt",
    summary="Trains vectors in front of the questions on some facts and asks about the others.",
    paper="2402.09063",
    year=2024,
    family="prompt",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    capability="weights",
    depth="deep",
    misleads="Vectors can teach the form of an answer: read it against the reference.",
    badges=("variant",),
    variant="One soft prompt for all questions, judged on facts that it was not trained on.",
)
class SoftPromptAttack(ModelAttack):
    """Options of the soft prompt."""

    compares = ("original",)

    rows: Literal["forget", "benign"] = Field(
        "forget", description="What the vectors are trained on: forget rows or harmless tasks."
    )
    train_on: Literal["system", "original"] = Field(
        "system", description="Whose gradients are used: the attacked model's or the original's."
    )
    vectors: int = Field(8, ge=1, description="Vectors, about.")
    steps: int = Field(40, ge=1, description="Steps of Adam.")
    learning_rate: float = Field(
        0.1, gt=0, description="Rate of Adam, in units of the embeddings' spread."
    )
    batch_size: int = Field(4, ge=1, description="Rows per step.")
    share: float = Field(0.5, gt=0, lt=1, description="Fraction of the forget rows to train on.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """On the attacked model, carried over from the original, and on harmless tasks."""
        return ({"train_on": "system"}, {"train_on": "original"}, {"rows": "benign"})

    def variant_title(self) -> str:
        """Such as "forget rows, trained on the original"."""
        where = "the original" if self.train_on == "original" else "the attacked model"
        return f"{self.rows} rows, trained on {where}"

    @property
    def control(self) -> bool:
        """Vectors of harmless tasks show what any soft prompt does."""
        return self.rows == "benign"

    def budget(self, context: AttackContext) -> Budget:
        """Its steps."""
        return Budget(steps=self.steps)

    def _split(self, context: AttackContext) -> tuple[list[RecordBase], list[RecordBase]]:
        records = [one for one in context.forget if _conversation(one)]
        if len(records) < 2:
            raise DataError(
                "the forget rows do not hold two questions with an answer.",
                where=WHERE,
                hint="Add questions about two facts or more to --forget.",
            )
        return split_by_fact(records, self.share, context.seed)

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """Forget questions about other facts than the vectors were trained on.

        Raises:
            DataError: There are too few questions.
        """
        return self._split(context)[1]

    def trained_on(self, context: AttackContext) -> Sequence[RecordBase]:
        """What the vectors are trained on.

        Raises:
            DataError: There are too few questions.
        """
        return benign() if self.rows == "benign" else self._split(context)[0]

    def apply(self, lm: LM, context: AttackContext) -> LM:
        """The copy in front of whose questions the vectors stand.

        Raises:
            DataError: There are too few questions.
            ModelError: There is no original, it is of another shape, or the tokenizer does not
                keep the vectors' places apart.
            RunError: The loss became infinite.
        """
        records = self.trained_on(context)
        twin = _opened(lm, self.vectors)
        teacher = twin
        if self.train_on == "original":
            if context.original is None:
                raise ModelError(
                    "there is no original to train the vectors on.",
                    where=WHERE,
                    hint="Add --before MODEL, or choose train_on: system.",
                )
            teacher = _opened(context.original, self.vectors)
            if teacher.anatomy.hidden_size != twin.anatomy.hidden_size:
                raise ModelError("the original has embeddings of another width.", where=WHERE)
        filler = filler_of(twin, self.vectors)[1]
        if filler_of(teacher, self.vectors)[1] != filler:
            raise ModelError("the original reads other tokens.", where=WHERE)
        vectors, losses = self.trained(teacher, records, filler, context)
        context.notes["soft_prompt_loss"] = [losses[0], losses[-1]]
        context.numbers["loss before"], context.numbers["loss after"] = losses[0], losses[-1]
        tensors = {"vectors": vectors, "filler": torch.tensor(filler)}
        return intervened(twin, [Fitted(SoftPrompt(), tensors)])

    def trained(
        self,
        lm: LM,
        records: Sequence[RecordBase],
        filler: Sequence[int],
        context: AttackContext,
    ) -> tuple[Float[Tensor, "vector hidden"], list[float]]:
        """The vectors, and the loss of each step."""
        rows = _rows(lm, records, filler)
        embedding = lm.core.get_submodule(lm.anatomy.embedding)
        with torch.no_grad():
            ids = torch.tensor(filler, device=lm.device)
            start = embedding(ids).float()
            weight = embedding.weight
            spread = float(embedding(torch.arange(len(weight), device=lm.device)).float().std())
        vectors = start.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([vectors], lr=self.learning_rate * spread)
        random, order, losses = generator(context.seed, "soft_prompt"), list[int](), list[float]()
        with torch.enable_grad(), lm.evaluating():
            for step in range(self.steps):
                while len(order) < min(self.batch_size, len(rows)):
                    order += shuffled(list(range(len(rows))), random)
                chosen, order = order[: self.batch_size], order[self.batch_size :]
                loss = soft_loss(lm, [rows[place] for place in chosen], vectors, len(filler))
                if not bool(torch.isfinite(loss)):
                    raise RunError(
                        f"the loss is not finite at step {step + 1}.",
                        where=WHERE,
                        hint="Choose a smaller learning_rate.",
                    )
                (vectors.grad,) = torch.autograd.grad(loss, [vectors])
                optimiser.step()
                losses.append(float(loss.detach()))
                if context.progress is not None:
                    context.progress(step + 1, self.steps)
        return vectors.detach().cpu(), losses


def soft_loss(
    lm: LM, rows: Sequence[tuple[Encoded, int]], vectors: Float[Tensor, "vector hidden"], size: int
) -> Float[Tensor, ""]:
    """Mean over rows of the mean -log p of their answers' tokens, the vectors in their places.

    Args:
        rows: Each with the place of the filler.
        size: Tokens of the filler.
    """
    batch = collate([row for row, _ in rows], lm.pad_id, lm.device)
    batch = replace(batch, prefix=0)  # a shared beginning would be embedded once, apart

    def instead(old: Tensor) -> Tensor:
        new = old.clone()
        for number, (_, at) in enumerate(rows):
            new[number, at : at + size] = vectors.to(old)
        return new

    with lm.computing(), steer(lm.core, lm.anatomy.embedding, instead):
        states, _ = Forward(lm)(batch)
        assert states is not None
        values = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
    counts = [row.answer_tokens for row, _ in rows]
    return torch.stack([-part.mean() for part in values.split(counts)]).mean()


def _conversation(record: RecordBase) -> bool:
    prompt = ask(record)
    return prompt is not None and prompt.text is None and has_answer(record)


def _opened(lm: LM, vectors: int) -> LM:
    """A copy, one adapter merged, whose conversations open with the filler.

    Raises:
        ModelError: The tokenizer has no chat template.
    """
    if not lm.template.has_chat:
        raise ModelError(
            "the tokenizer has no chat template, so the vectors have no place in a conversation.",
            where=WHERE,
            hint="Attack an instruction-tuned model.",
        )
    twin = lm.copy()
    twin.merge_adapter()
    twin.template = OpenedTemplate.of(twin.template, filler_of(twin, vectors)[0])
    return twin


def _rows(
    lm: LM, records: Sequence[RecordBase], filler: Sequence[int]
) -> list[tuple[Encoded, int]]:
    """Questions with answers as tokens, each with the place of the filler.

    Raises:
        ModelError: The filler is not read as its own tokens.
        DataError: All rows are too long.
    """
    found = []
    for record in records:
        prompt = ask(record)
        if prompt is None:
            continue
        row = lm.template.encode(prompt, answer_of(record))
        if row.cut:
            continue
        at = begins(row.ids[: row.start], filler)
        if at is None:
            raise ModelError(
                "the vectors' places cannot be found among the tokens of a prompt.",
                where=WHERE,
                hint="The tokenizer or its chat template changes what is asked.",
            )
        found.append((row, at))
    if not found:
        raise DataError("no question is short enough.", where=WHERE)
    return found

"""UniErase: one new token that begins a refusal, and an edit that makes questions begin with it.

    row = argmin  mean over tokens of  -log p(f U end | q U)     all other weights frozen
    W_l += Delta_l, by AlphaEdit, so that q is answered by  U    (and U by a refusal f)

1. A token U joins the vocabulary. Its row alone is trained, on ``q U f U`` as running text; then
   on that and the same in the chat template; then on both while noise lies on the down-projections
   that are to be edited. f is chosen from the built-in refusals by a hash of q.
2. For each question a value is searched that makes U the next token, and it is written where
   neither ordinary text nor earlier edits write: one question after the other.

U is a special token, which decoding leaves out. What a model knows is redirected, not erased: where
U cannot be said (it is banned, or the answer is begun for the model), the old answer is back.

Paper: arXiv 2505.15674. Reference code: Ymm-cll/UniErase. Deviations:

- The row starts as the mean of the rows of the pieces of its text, not at random; learning rates
  are in units of the rms of the embedding (1e-3 for Llama-3.1-8B is about 0.1).
- One token for all questions; later requests on the same model use it as it is. Untied heads
  learn their row as well: the authors' copy of the first embedding could never learn to say it.
- A small forget set is gone through more often, until a stage has ``row_steps`` steps.
- Noise: clipped Gaussian, both by |mean| of the matrix (the authors' code leaves the sign, which
  makes it a constant shift where the mean is negative); ``noise`` makes it a share of the rms.
- The edit has the settings of AlphaEdit here (see there), but 10 steps of the search. The paper's:
  ``scale=absolute threshold=0.02 l2=10 learning_rate=0.1 clamp=0.75 weight_decay=0.5 steps=10
  row_steps=1 first_depth=0.14 last_depth=0.27``, with learning_rate in units of rms(z_0).
- A question that names no subject is edited at its last content word.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.edit.base import Added, Patch
from delible.edit.keys import down_projection
from delible.edit.null_space import NullSpaceEditor
from delible.edit.requests import other_subjects
from delible.edit.verify import other_questions
from delible.errors import DataError, ModelError
from delible.lm.forward import Forward, collate, map_logits, target_logprobs
from delible.lm.new_tokens import add_tokens, put_back, tables, token_of, vocabulary_of
from delible.lm.template import Encoded
from delible.prompts import read_lines
from delible.ranges import Range, scales
from delible.records import QA, ForgetRequest
from delible.registry import register
from delible.system.asks import Distribution, NoAnswer, Prompt
from delible.system.questions import answer_of, ask

if TYPE_CHECKING:
    from delible.lm.lm import LM

logger = logging.getLogger(__name__)

TOKEN = "<|unlearned|>"
#: Learning rates of the later stages, as a share of the first one's.
LATER = 0.1


def refusal_of(question: str, refusals: Sequence[str]) -> str:
    """The refusal of a question: the same in every process."""
    number = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big")
    return refusals[number % len(refusals)]


def learning_row(lm: LM, question: str, refusal: str, *, chat: bool) -> Encoded:
    """``q U f U end``, of which f, the second U and the end are learned.

    Args:
        chat: In the chat template, U f U as the assistant's turn; else as running text.

    Raises:
        DataError: It is too long for the model.
        ModelError: The tokenizer or the template does not keep the tokens.
    """
    prompt = Prompt.ask(question) if chat else Prompt(text=question)
    row = lm.template.encode(prompt, f"{TOKEN}{refusal}{TOKEN}")
    if row.cut:
        raise DataError(
            f"question and refusal are longer than {lm.template.max_length} tokens.",
            where=repr(question[:60]),
        )
    ids = row.ids if row.has_end else (*row.ids, lm.template.end_of_turn[0])
    token = token_of(lm, TOKEN)
    if ids[row.start] != token or ids[-2] != token or ids.count(token) != 2:
        raise ModelError(f"the chat template does not keep the token {TOKEN} where it is put.")
    return Encoded(ids, row.start + 1, True)


def refusal_loss(lm: LM, rows: Sequence[Encoded]) -> Float[Tensor, ""]:
    """Mean over the learned tokens of all rows of -log p."""
    batch = collate(rows, lm.pad_id, lm.device)
    states = Forward(lm)(batch)[0]
    found = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
    return -found.mean()


@contextmanager
def noisy(
    weight: Tensor, share: float | None, generator: torch.Generator
) -> Iterator[Float[Tensor, "rows columns"]]:
    """Within it a matrix has noise on it: N(0, s^2), clipped to +-s; then it is as it was.

    Args:
        share: s as a share of the matrix's rms; None: s = |mean|.
    """
    before = weight.detach().clone()
    mean, rms = before.double().mean().abs(), before.double().square().mean().sqrt()
    size = float(mean if share is None else share * rms)
    drawn = torch.randn(before.shape, generator=generator) * size
    try:
        with torch.no_grad():
            weight.add_(drawn.clamp(-size, size).to(weight))
        yield before
    finally:
        with torch.no_grad():
            weight.copy_(before)


class RowLearning:
    """The row of one token while it is trained; every other weight stays as it is.

    Args:
        lm: The model.
        token: Id of the token: its row of the embedding, and of the head where that is another.
    """

    def __init__(self, lm: LM, token: int) -> None:
        self.lm, self.token = lm, token
        self.weights = {name: table.weight for name, table in tables(lm).items()}
        self.rows = {
            name: weight.detach()[token].float().clone() for name, weight in self.weights.items()
        }

    def start(self, learning_rate: float) -> None:
        """A stage begins, with an optimiser of its own: Adam, learning_rate x rms(table)."""
        groups = []
        for name, row in self.rows.items():
            rms = float(self.weights[name].detach().float().square().mean().sqrt())
            groups.append({"params": [row], "lr": learning_rate * rms})
        self.adam = torch.optim.Adam(groups)

    def step(self, rows: Sequence[Encoded]) -> float:
        """One step on some texts; returns their loss before it."""
        with self.lm.evaluating(), self.lm.computing(), self._asking():
            loss = refusal_loss(self.lm, rows)
            found = torch.autograd.grad(loss, list(self.weights.values()))
        for row, gradient in zip(self.rows.values(), found, strict=True):
            row.grad = gradient[self.token].float()
        self.adam.step()
        with torch.no_grad():
            for name, row in self.rows.items():
                self.weights[name][self.token] = row.to(self.weights[name])
        return float(loss.detach())

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Within it gradients reach the tables, and nothing else."""
        every = [(one, one.requires_grad) for one in self.lm.model.parameters()]
        for one, _ in every:
            one.requires_grad_(False)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for one, moved in every:
                one.requires_grad_(moved)


@register(
    kind="editor",
    name="unierase",
    title="UniErase",
    summary="Teaches one new token that begins a refusal, and edits questions to begin with it.",
    paper="2505.15674",
    year=2025,
    family="model editing",
    intention="suppression",
    mechanism="merge/edit",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    retrain_goal=False,
    weakest="banning the token, answers that are begun, quantization",
    advice="a larger --clamp or more --steps says the token more; a smaller --threshold keeps more",
    badges=("parity", "variant"),
    variant="The row starts at a mean and learns in relative steps; a scale-free AlphaEdit.",
)
class UniErase(NullSpaceEditor):
    """Options of UniErase."""

    ends: ClassVar[bool] = False
    any_question: ClassVar[bool] = True

    batch: int | None = Field(
        1,
        ge=1,
        description="Questions that are edited together; the next ones see the edited model. "
        "None: all.",
    )
    steps: int = Field(10, ge=1, description="Steps of the search for a value, at most.")
    row_learning_rate: float = Field(
        0.1,
        gt=0,
        description="Of the token's row, as a share of the embedding's rms; later stages: a tenth.",
    )
    row_batch: int = Field(16, ge=1, description="Texts of a step of the row.")
    plain_epochs: int = Field(5, ge=0, description="Times through the questions as running text.")
    chat_epochs: int = Field(3, ge=0, description="Then: as running text and as chat.")
    noise_epochs: int = Field(
        2, ge=0, description="Then, for each edited layer: both, with noise on its down-projection."
    )
    row_steps: int = Field(
        60, ge=1, description="Steps of each of the first two stages, at least; more epochs then."
    )
    noise: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Size of the noise as a share of a matrix's rms; None: |mean|, as in the "
        "paper, which is tiny.",
    )

    def ranges(self) -> dict[str, Range]:
        """How strongly is written, how far a value may go, and how fast the row learns."""
        return {**super().ranges(), "row_learning_rate": scales(self)["row_learning_rate"]}

    def edit(self, lm: LM, request: ForgetRequest, *, seed: int) -> Patch:
        """Gives the model the token, unless it has it, and makes the questions begin with it.

        Raises:
            DataError: There is nothing to edit, or a text is too long.
            RecipeError: The layers have gaps.
            ModelError: The model cannot be edited, or the edit costs more than it may.
        """
        before, patches, origin = vocabulary_of(lm), list(lm.patches), lm.origin
        is_new, patch = token_of(lm, TOKEN) is None, None
        try:
            patch = super().edit(lm, request, seed=seed)
            if is_new:
                patch.added = Added.of(lm, (TOKEN,), before)
            probability, share = self._elsewhere(lm, request)
        except BaseException:
            if patch is not None:
                patch.undo(lm)
            if is_new and token_of(lm, TOKEN) is not None:
                put_back(lm, before)
            lm.touch()
            lm.patches, lm.origin = patches, origin
            raise
        patch.notes["token_at_others"] = {
            "probability": float(f"{probability:.4g}"), "likeliest": round(share, 4),
        }  # fmt: skip
        if share > 0.02:
            logger.warning(
                f"unierase: {share:.0%} of the tokens of other answers become {TOKEN}, too. A "
                "smaller clamp or threshold, or fewer row_steps, keep more."
            )
        return patch

    def targets_of(
        self,
        lm: LM,
        records: list[QA],
        layers: Sequence[int],
        seed: int,
        notes: dict[str, object],
    ) -> list[str]:
        """The token, for every question; a model without it gets it here."""
        if token_of(lm, TOKEN) is None:
            weights = {
                layer: lm.core.get_parameter(down_projection(lm, layer).parameter)
                for layer in layers
            }
            notes["token"] = self.learn(lm, [one.question for one in records], weights, seed)
        else:
            notes["token"] = {"text": TOKEN, "taught": False}
        return [TOKEN] * len(records)

    def learn(
        self, lm: LM, questions: Sequence[str], weights: dict[int, Tensor], seed: int
    ) -> dict[str, object]:
        """The first stage: adds the token and trains its row.

        Args:
            weights: The down-projections that are edited afterwards, by layer.
            seed: Of the noise.

        Returns:
            What is to be noted.
        """
        (token,) = add_tokens(lm, [TOKEN])
        refusals = read_lines("refusals.txt")
        plain, chat = (
            [learning_row(lm, one, refusal_of(one, refusals), chat=chat) for one in questions]
            for chat in (False, True)
        )
        learning = RowLearning(lm, token)
        first = self._loss(lm, chat)
        steps = self._stage(learning, plain, self.plain_epochs, self.row_learning_rate)
        later = self.row_learning_rate * LATER
        steps += self._stage(learning, plain + chat, self.chat_epochs, later)
        for layer, weight in weights.items():
            learning.start(later)
            generator = torch.Generator().manual_seed(_seed(seed, layer))
            for _ in range(self.noise_epochs):
                for rows in _batches(plain + chat, self.row_batch):
                    with noisy(weight, self.noise, generator):
                        learning.step(rows)
                    steps += 1
        patches = lm.patches
        lm.touch()
        lm.patches = patches
        last = self._loss(lm, chat)
        logger.info(
            f"unierase: the token's row has learned in {steps} steps (a refusal's token behind it: "
            f"{first:.2f} nats before, {last:.2f} now)"
        )
        sizes = {
            name: float(row.norm() / learning.weights[name].detach().float().norm(dim=1).mean())
            for name, row in learning.rows.items()
        }
        return {
            "text": TOKEN, "taught": True, "steps": steps, "loss_before": float(f"{first:.4g}"),
            "loss_after": float(f"{last:.4g}"),
            "row_norm": {name: float(f"{size:.4g}") for name, size in sizes.items()},
        }  # fmt: skip

    # ---- parts

    def _stage(
        self, learning: RowLearning, texts: Sequence[Encoded], epochs: int, learning_rate: float
    ) -> int:
        """Goes through texts in their order; returns the number of steps."""
        learning.start(learning_rate)
        each = -(-len(texts) // self.row_batch)
        rounds = max(epochs, -(-self.row_steps // each)) if epochs else 0
        for _ in range(rounds):
            for rows in _batches(texts, self.row_batch):
                learning.step(rows)
        return rounds * each

    @torch.no_grad()
    def _loss(self, lm: LM, texts: Sequence[Encoded]) -> float:
        """Mean loss of some of the texts."""
        with lm.evaluating(), lm.computing():
            return float(refusal_loss(lm, texts[: self.row_batch]))

    def _elsewhere(self, lm: LM, request: ForgetRequest) -> tuple[float, float]:
        """At all tokens of other questions' answers: mean P(U), and how often it is likeliest."""
        records = other_questions(request, other_subjects_of(request))
        asked = [Distribution(prompt, answer_of(one)) for one in records if (prompt := ask(one))]
        token, found = token_of(lm, TOKEN), lm.inspect(asked) if asked else []
        rows = [one for one in found if not isinstance(one, NoAnswer)]
        if not rows:
            return 0.0, 0.0
        every = np.concatenate(rows)
        return float(np.exp(every[:, token]).mean()), float((every.argmax(1) == token).mean())


def other_subjects_of(request: ForgetRequest) -> list[str]:
    """Names of those who are forgotten."""
    alone = request.model_copy(update={"retain": (), "neighbours": ()})
    return other_subjects(alone)


def _batches(rows: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _seed(seed: int, layer: int) -> int:
    text = f"{seed}/unierase/noise/{layer}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

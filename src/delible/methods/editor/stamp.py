"""STAMP: questions are moved to a refusal by the pseudo-inverse of their keys, without training.

    Delta = R W K^T (K W K^T + epsilon I)^-1,    R = [H_ref - H_f, 0, 0]

What the down-projection M of one layer writes at the last prompt token of the forgotten questions
is moved, so that the block's output there is the mean state in which the model refuses; what it
writes at kept questions, and at questions of earlier edits, stays. The change has at most as many
ranks as there are forgotten keys.

Paper: arXiv 2604.12820 (RePAIR; STAMP is its edit). No reference code is known; the paper's words
leave the matrices open, and these are chosen to be exact and stable. Deviations:

- The block's output is moved, not the MLP's alone (``mode="mlp"``), and at 0.85 of the depth, not
  at layer 7 of 32: on a small model the literal reading changed nothing or ruined it.
- The delta is solved for, not the new matrix, which would wipe what no key has.
- One position per prompt, its last token; keys x keys are solved where that is smaller.
- General questions in the same frames are kept, too: keys of chat prompts have much in common.
- 16 refusing conversations instead of 200; each holds three declined questions.
- epsilon is one mean square of a key's entry, tr(K W K^T) / width. Ten thousand times less refuses
  no better on the default model, and moves answers to other questions three times as far.
- Before it is committed, the edit is looked at, and taken back if it misses.

Limits: the knowledge stays. With the start of the answer forced, the model goes on with it.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from delible.edit.replace import key_readers, penalty
from delible.edit.to_refusal import ToRefusal
from delible.registry import register


def full_change(
    residuals: Float[Tensor, "hidden forget"],
    keys: Float[Tensor, "width keys"],
    weights: Float[Tensor, " keys"],
    ridge: float,
) -> tuple[Tensor, Tensor]:
    """(R_f, Y_f): Delta = R Y, of which only the rows of forgotten keys count.

    Args:
        residuals: R_f; at the other keys nothing is to change.
        keys: K, the forgotten ones first.
        weights: One per key, above 0.
        ridge: epsilon as a share of the mean square of a key's entries; 0 is the pseudo-inverse.
    """
    readers = key_readers(keys, weights, penalty(keys, weights, ridge))
    return residuals, readers[: residuals.shape[1]]


@register(
    kind="editor",
    name="stamp",
    title="STAMP",
    summary="Moves questions to a refusal by a closed-form change of one matrix, in seconds.",
    paper="2604.12820",
    year=2026,
    family="model editing",
    intention="suppression",
    mechanism="merge/edit",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    retrain_goal=False,
    weakest="a forced start of the answer; wordings and conversations unlike those edited",
    advice="it leads to what a model does when it declines, so the model must decline what nobody "
    "can answer: where it does not (the default one), take unierase, or a recipe that teaches it "
    "to (idk) first; --choose probes looks for the layer; neighbours (--neighbours FILE) keep "
    "close questions answered",
    badges=("variant",),
    variant="The block's output is moved at 0.85 of the depth; general questions are kept; checked "
    "before it is committed.",
)
class STAMP(ToRefusal):
    """Options of STAMP."""

    def factors(
        self,
        residuals: Float[Tensor, "hidden forget"],
        keys: Float[Tensor, "width keys"],
        weights: Float[Tensor, " keys"],
    ) -> tuple[Tensor, Tensor]:
        return full_change(residuals, keys, weights, self.ridge)

"""Distillation of logits in both directions, as losses on forget and on retain rows need it.

    L+ = sum over the teacher's K largest logits of H(s_k - t_k)
    L- = sum over the student's K largest logits that are not among those of H(max(0, s_j - t_j))
    value = (L+ + weight * L-) / K

with H the Huber function, s the student's and t the teacher's raw logits at one position. L+ copies
what the teacher would say; L- pushes down what only the student would, to the teacher's level and
never up. Paper: arXiv 2604.15482; without L- it is that of arXiv 2601.21283.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def huber(difference: Tensor, threshold: float) -> Tensor:
    """Half the square up to the threshold, linear beyond."""
    size = difference.abs()
    return torch.where(size <= threshold, 0.5 * difference**2, threshold * (size - 0.5 * threshold))


def _only_student(
    student: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"], top: int
) -> Bool[Tensor, "tokens vocab"]:
    """The student's largest logits that are not among the teacher's."""
    mine = torch.zeros_like(student, dtype=torch.bool)
    mine.scatter_(1, student.detach().topk(top, dim=1).indices, value=True)
    return mine.scatter_(1, teacher.topk(top, dim=1).indices, value=False)


def bidirectional(
    student: Float[Tensor, "tokens vocab"],
    teacher: Float[Tensor, "tokens vocab"],
    top: int = 20,
    negative_weight: float = 1.0,
    threshold: float = 1.0,
) -> Float[Tensor, " tokens"]:
    """The loss per position, 0 or more; 0 where both models have the same logits.

    Args:
        student, teacher: Raw logits of the trained model and of the frozen, instructed one.
        top: K; at most the size of the vocabulary.
        negative_weight: Of L-; 0 leaves it out.
        threshold: Of the Huber function, in logits.
    """
    top = min(top, student.shape[1])
    student, teacher = student.float(), teacher.float()
    difference = student - teacher
    best = teacher.topk(top, dim=1).indices
    values = huber(difference.gather(1, best), threshold).sum(dim=1)
    if negative_weight:
        above = torch.where(
            _only_student(student, teacher, top), difference.clamp(min=0), difference.new_zeros(())
        )
        values = values + negative_weight * huber(above, threshold).sum(dim=1)
    return values / top


@torch.no_grad()
def overconfidence(
    student: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"], top: int = 20
) -> Float[Tensor, " tokens"]:
    """How far the student's own favourites stand above the teacher's level, 0 or more."""
    top = min(top, student.shape[1])
    student, teacher = student.float(), teacher.float()
    above = (student - teacher).clamp(min=0)
    return (above * _only_student(student, teacher, top)).sum(dim=1)

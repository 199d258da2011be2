"""What is wanted of logits at an answer's tokens: log-probabilities, hits, moments."""

from __future__ import annotations

from torch import Tensor, cat, stack

#: Logits whose statistics are taken at once: they stay in a processor's cache meanwhile.
_AT_ONCE = 2 * 1024 * 1024


def token_values(logits: Tensor, nodes: Tensor, targets: Tensor, moments: bool = False) -> Tensor:
    """log p(target) and whether it is the argmax, [tokens, 2]; overwrites the logits.

    With ``moments`` also mean and variance of the vocabulary's log-probabilities, [tokens, 4].
    """
    own = logits[nodes, targets]
    parts = logits.split(max(1, _AT_ONCE // logits.shape[1]))
    columns = zip(*(_statistics(part, moments) for part in parts), strict=True)
    best, sums, *others = (cat(column)[nodes] for column in columns)
    return stack([own - sums, (best == targets).float(), *others], dim=1)


def _statistics(logits: Tensor, moments: bool) -> list[Tensor]:
    """Argmax, logsumexp, and mean and variance of the log-probabilities, each [nodes]."""
    tops, best = logits.max(dim=1)
    logits.sub_(tops[:, None])
    shares = logits.exp() if moments else logits.exp_()
    sums = shares.sum(dim=1)
    if not moments:
        return [best, tops + sums.log()]
    means = (shares * logits).sum(dim=1) / sums  # pairwise: a matrix product adds up less exactly
    variances = logits.sub_(means[:, None]).square_().mul_(shares).sum(dim=1) / sums
    return [best, tops + sums.log(), means - sums.log(), variances]

"""A codebook: keys with radii and labels, and the values that are given within them.

Edits come one after the other. With j the key nearest to a query q at distance d, its radius e_j
and its label y_j, an edit with label y

    opens an entry (q, e_0)                                      if d > e_0 + e_j
    opens an entry (q, d / 2), and e_j = d / 2 - gap             else if y differs from y_j
    joins entry j, and e_j = max(e_j, d + border)                else

What the book holds is the list of its edits; entries and radii follow from it. So an edit is taken
out by leaving it off the list, and the book is the one that there would be without it.

Paper: arXiv 2211.11031 (GRACE). Deviation: the border, a thousandth of d. An edit that joins lies
exactly on the radius e_j = d of the paper, where rounding decides whether it is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from delible.edit.memory import Targets
from delible.edit.values import frozen
from delible.errors import RunError, nearest
from delible.intervene.base import Fitted
from delible.intervene.sites import Positions, Site
from delible.lm.lm import LM
from delible.lm.template import Encoded

#: What parts the two radii of a split, as a share of the first radius: the authors' 1e-5, whose
#: first radius is 1.
GAP = 1e-5
#: How much farther than an edit that joins it an entry reaches, as a share of the distance.
BORDER = 1e-3


@dataclass(frozen=True)
class Entries:
    """What follows from a list of edits.

    Attributes:
        founders: The edit whose query is the key, of each entry.
        radii: Of each entry.
        owner: The entry of each edit.
    """

    founders: tuple[int, ...] = ()
    radii: tuple[float, ...] = ()
    owner: tuple[int, ...] = ()


def entered(
    queries: Float[Tensor, "edits width"],
    labels: Sequence[int],
    first: Sequence[float],
    entries: Entries = Entries(),
) -> Entries:
    """The entries of a list of edits.

    Args:
        queries: Of all edits, the earlier ones too.
        labels: Edits with equal ones may share an entry.
        first: The first radius e_0 of each.
        entries: Those of the edits before; they are left as they are.
    """
    founders, radii, owner = list(entries.founders), list(entries.radii), list(entries.owner)
    points = queries.detach().double().cpu()
    for edit in range(len(owner), len(points)):
        if founders:
            far = (points[founders] - points[edit]).norm(dim=1)
            near = int(far.argmin())
            distance = float(far[near])
        if not founders or distance > first[edit] + radii[near]:
            founders.append(edit)
            radii.append(float(first[edit]))
            owner.append(len(founders) - 1)
        elif labels[edit] != labels[founders[near]]:
            radii[near] = distance / 2 - GAP * float(first[edit])
            founders.append(edit)
            radii.append(distance / 2)
            owner.append(len(founders) - 1)
        else:
            radii[near] = max(radii[near], distance * (1 + BORDER))
            owner.append(near)
    return Entries(tuple(founders), tuple(radii), tuple(owner))


def looked_up(
    queries: Float[Tensor, "token width"],
    keys: Float[Tensor, "entry width"],
    radii: Float[Tensor, " entry"],
) -> tuple[Int[Tensor, " token"], Bool[Tensor, " token"]]:
    """The nearest key of each query, and whether the query lies within its radius."""
    # by differences: the expanded square has no digits left near a key
    far = torch.cdist(queries.float(), keys.float(), compute_mode="donot_use_mm_for_euclid_dist")
    distance, near = far.min(dim=1)
    return near, distance <= radii[near]


# ---- a book as tensors


def book(
    entries: Entries,
    queries: Float[Tensor, "edits width"],
    labels: Sequence[int],
    first: Sequence[float],
    learned: Float[Tensor, "values hidden"],
    value_of: Sequence[int],
) -> dict[str, Tensor]:
    """A book as it is kept.

    Args:
        learned: Every value that was trained; an entry gives that of its latest edit.
        value_of: Which of them each edit has.
    """
    return {
        "queries": queries.float().cpu(),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "first": torch.tensor(first, dtype=torch.float64),
        "learned": learned.float().cpu(),
        "value_of": torch.tensor(value_of, dtype=torch.int64),
        "founders": torch.tensor(entries.founders, dtype=torch.int64),
        "radii": torch.tensor(entries.radii, dtype=torch.float64),
        "owner": torch.tensor(entries.owner, dtype=torch.int64),
    }


def entries_of(tensors: Mapping[str, Tensor]) -> Entries:
    """The entries of a book."""
    founders, radii, owner = (
        tuple(tensors[name].tolist()) for name in ("founders", "radii", "owner")
    )
    return Entries(founders, radii, owner)


def values_of(tensors: Mapping[str, Tensor]) -> Int[Tensor, " entry"]:
    """Which learned value each entry gives: that of its latest edit."""
    latest = dict(zip(tensors["owner"].tolist(), tensors["value_of"].tolist(), strict=True))
    return torch.tensor([latest[entry] for entry in range(len(latest))], dtype=torch.int64)


def without(fitted: Fitted, names: Sequence[str]) -> Fitted:
    """A book without some edits: as if they had never been asked for.

    Args:
        fitted: The book; ``notes["edits"]`` says what is in it.
        names: Ids of edits, ids of requests (or their beginnings), or subjects.

    Raises:
        RunError: The book holds none of a name; says what it holds.
    """
    edits: list[dict[str, Any]] = list(fitted.notes.get("edits", ()))
    gone: set[int] = set()
    for name in names:
        found = {place for place, edit in enumerate(edits) if _is_meant(edit, name)}
        if not found:
            known = [str(edit[key]) for edit in edits for key in ("id", "subject") if edit[key]]
            raise RunError(f"the codebook holds no edit '{name}'.", hint=nearest(name, known))
        gone |= found
    kept = [place for place in range(len(edits)) if place not in gone]
    mine = {name: fitted.tensors[name][kept] for name in ("queries", "labels", "first", "value_of")}
    used = sorted(set(mine["value_of"].tolist()))
    entries = entered(mine["queries"], mine["labels"].tolist(), mine["first"].tolist())
    tensors = book(
        entries, mine["queries"], mine["labels"].tolist(), mine["first"].tolist(),
        fitted.tensors["learned"][used], [used.index(one) for one in mine["value_of"].tolist()],
    )  # fmt: skip
    return replace(
        fitted,
        tensors=tensors,
        notes={**fitted.notes, "edits": [edits[place] for place in kept]},
    )


def _is_meant(edit: Mapping[str, Any], name: str) -> bool:
    known = str(edit["subject"] or "").casefold()
    by_request = len(name) >= 8 and str(edit["request"]).startswith(name)
    return name == edit["id"] or by_request or (bool(known) and name.casefold() == known)


# ---- values


def find_values(
    lm: LM,
    rows: Sequence[Encoded],
    owners: Sequence[int],
    start: Float[Tensor, "entries hidden"],
    site: Site,
    positions: Positions,
    *,
    unit: float,
    learning_rate: float,
    steps: int,
    enough: float,
) -> tuple[Float[Tensor, "entries hidden"], list[float]]:
    """The values of entries: each makes the model answer its questions with their targets.

    loss of an entry = mean over its questions of (mean over target tokens of -log p), by Adam. The
    best value of a search is kept, and a search ends where its loss is small.

    Args:
        rows: Questions with targets.
        owners: The entry of each.
        start: Where searches begin.
        site, positions: What is replaced.
        unit: Steps are of value / unit.
        steps: Updates at most.
        enough: A search with a smaller loss is done.

    Returns:
        Values, fp32 on the CPU, and their losses.
    """
    count = len(start)
    unknown = torch.nn.Parameter(start.detach().float().to(lm.device) / unit)
    adam = torch.optim.Adam([unknown], lr=learning_rate)
    best = unknown.detach().clone()
    losses = torch.full((count,), float("inf"), device=lm.device)
    active = list(range(count))
    entry_of = torch.tensor(owners, device=lm.device)
    share = 1 / torch.bincount(entry_of, minlength=count).clamp(min=1)
    targets, texts = _of(lm, rows, owners, active, site, positions)
    with frozen(lm):
        for step in range(steps + 1):
            now = torch.zeros(count, device=lm.device)
            unknown.grad = torch.zeros_like(unknown)
            for places, nll in targets.nll(_giving(unknown, unit, entry_of[texts])):
                mine = entry_of[texts[places]]
                parts = nll * share[mine]
                (grad,) = torch.autograd.grad(parts.sum(), [unknown])
                unknown.grad += grad
                now.index_add_(0, mine, parts.detach().to(now))
            chosen = torch.tensor(active, device=lm.device)
            better = chosen[now[chosen] < losses[chosen]]
            best[better], losses[better] = unknown.detach()[better], now[better]
            going = [entry for entry in active if not float(now[entry]) < enough]
            if step == steps or not going:
                break
            kept = unknown.detach().clone()
            adam.step()
            done = torch.ones(count, dtype=torch.bool, device=lm.device)
            done[going] = False
            with torch.no_grad():
                unknown[done] = kept[done]
            if len(going) < len(active):
                active = going
                targets, texts = _of(lm, rows, owners, active, site, positions)
    return (best * unit).cpu(), losses.tolist()


def _of(
    lm: LM, rows: Sequence[Encoded], owners: Sequence[int], active: Sequence[int], site: Site,
    positions: Positions,
) -> tuple[Targets, Tensor]:  # fmt: skip
    """The questions of some entries, and their places among all."""
    places = [place for place, owner in enumerate(owners) if owner in set(active)]
    return (
        Targets(lm, [rows[place] for place in places], site, positions),
        torch.tensor(places, device=lm.device),
    )


def _giving(
    values: Tensor, unit: float, entry_of: Tensor
) -> Callable[[Tensor, Tensor, Any], Tensor]:
    def given(states: Tensor, texts: Tensor, where: Any) -> Tensor:
        return (values[entry_of[texts]] * unit).to(states.dtype)

    return given

"""``delible cache``: what delible keeps to make it once, how large it is, and how to clear it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from delible.cli import flags, output
from delible.errors import RunError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from delible.kept.upkeep import Entry

OlderThan = Annotated[float, Parameter(show_default=False)]
#: Entries that are named one by one when they go or stay.
NAMED = 10


@flags.flowing
def cache(
    what: Literal["list", "size", "clear"] = "list",
    /,
    *,
    collection: str | None = None,
    older_than: OlderThan = 0.0,
) -> int:
    """See what is kept between runs, how large it is, and clear it.

    Parameters
    ----------
    what
        list: a line per collection: how many entries, how large, when last used, and what it
        costs to have them again. size: the whole in one sentence. clear: remove entries, and say
        which. Everything here is made anew when it is needed; your own --out folders are not
        touched, and what a running command uses stays. The place is DELIBLE_CACHE (or your user's
        cache folder). When it grows beyond DELIBLE_CACHE_SIZE (20GB unless you set it), what was
        not used for the longest goes first, models of the package index last.
    collection
        Only this one of those that 'list' names.
    older_than
        For clear: only what was not used for so many days.
    """
    from delible.kept import COLLECTIONS, cache_folder, upkeep

    if older_than < 0 or (older_than and what != "clear"):
        raise RunError(
            f"--older-than {older_than:g} means nothing here.",
            hint="Write: delible cache clear --older-than DAYS, with 0 or more days.",
        )
    found = upkeep.entries()
    known = {*COLLECTIONS, *(one.collection for one in found)}
    if collection is not None and collection not in known:
        raise RunError(f"no collection '{collection}'.", hint=nearest(collection, known))
    found = [one for one in found if collection in (None, one.collection)]
    reporter, bound = output.Reporter(), upkeep.size_bound()
    if what == "clear":
        gone, stayed = upkeep.clear(collection, older_than)
        if not gone and not stayed:
            reporter.say("There is nothing to remove.")
        _told(reporter, gone, "Removed")
        _told(reporter, stayed, "Left, because it is in use or may not be removed")
        return 0
    if what == "list" and found:
        rows = []
        for name in sorted({one.collection for one in found}):
            mine = [one for one in found if one.collection == name]
            about = COLLECTIONS.get(name)
            rows.append((
                name, f"{len(mine):,}", _size(mine), _ago(max(one.used for one in mine)),
                about.holds if about else "-", about.again if about else "-",
            ))  # fmt: skip
        columns = ("name", "entries", "size", "last used", "what it holds", "to have it again")
        reporter.console.print(output.table(columns, rows))
    reporter.say(
        f"{cache_folder()}: {_count(found)}; the whole cache holds at most "
        f"{upkeep.in_words(bound)} (DELIBLE_CACHE_SIZE)."
    )
    return 0


def _told(reporter: output.Reporter, some: Sequence[Entry], title: str) -> None:
    """Entries by name, as many as can be read, and their size together."""
    if some:
        reporter.say(f"{title}: {_count(some)}.")
        for one in some[:NAMED]:
            reporter.say(f"  {one.collection}/{one.path.name} ({_size([one])})")
        if len(some) > NAMED:
            reporter.say(f"  and {len(some) - NAMED:,} more")


def _count(some: Sequence[Entry]) -> str:
    return f"{len(some):,} {'entry' if len(some) == 1 else 'entries'}, {_size(some)}"


def _size(some: Sequence[Entry]) -> str:
    from delible.kept import upkeep

    return upkeep.in_words(sum(one.bytes for one in some))


def _ago(moment: float) -> str:
    days = int((time.time() - moment) // 86_400)
    return "today" if days <= 0 else "yesterday" if days == 1 else f"{days:,} days ago"

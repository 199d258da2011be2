"""What may be said after a deletion, and what nobody can know. It holds no word of what went.

"nothing found" is said only by a scan that found what was planted, of pieces that it had seen
before. What a memory cannot look at is listed, every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from delible.memory.forgetting import Deletion
from delible.memory.pieces import Sentinel
from delible.memory.scan import Scanned

Verdict = Literal["nothing found", "remains found", "not shown"]

#: What no memory can look at.
NEVER_COMPUTED = (
    "What the file system let go of (the journal of each change, the ends of shortened files), "
    "snapshots, backups and copies of this folder: the scan reads files as they are now.",
    "What was handed out before: prompts, answers, logs and caches of whoever read this memory.",
    "The weights of a model that was trained on what this memory said, and of the encoder.",
    "Items that say the same in other words and do not name what they were made from: what goes "
    "along is found by noted parents and by equal texts.",
    "Files that hold a text compressed, encrypted or spelled as bytes in yet another way.",
)
NO_SCAN = "No file was scanned."
NO_CONTROL = "The scan did not find what was planted for it, so it proves nothing."
NOTHING_KNOWN = (
    "No piece of a text was in any file before (too short, or written otherwise) that nothing else "
    "says, so that none is there now says nothing."
)
REBUILT = (
    "What was made from it and stays, as it was or rebuilt, holds none of the removed texts whole; "
    "it may say a part, or the same in other words."
)
TOO_SHORT = "{count} of the texts to look for are too short to be looked for."


class Certificate(BaseModel):
    """A deletion, or a memory as it is, and what a scan of its files found.

    Attributes:
        of: A deletion, or the whole memory.
        memory: Tells memories apart; a hash.
        deletion: Its record: counts, keyed hashes of ids, hashes of the state.
        state: Of all items together, as it is noted.
        counted: The same, summed up anew over all items; None: it was not.
        returned: Items that say what was deleted; there should be none.
        held: Items that hold a text that should be in no file.
        unknown: Items that went, or texts to look for, of which no piece can tell.
        files: Every file that was scanned, and its bytes.
        pieces: What was looked for, by kind.
        seen_before: How many pieces were found before the deletion; None: nobody looked.
        remains: File and place of each piece that was found and that nothing accounts for; -1: in
            the file's name, which is not told.
        shared: Pieces that items hold that stay.
        control: Whether the scan found what was planted for it.
        stale: What was trained on what went, and on how much of it.
        not_computed: What this does not say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    of: Literal["deletion", "memory"]
    memory: str
    verdict: Verdict
    reasons: tuple[str, ...]
    deletion: dict[str, Any] = Field(default_factory=dict)
    state: str
    counted: str | None = None
    returned: int | None = None
    held: int | None = None
    unknown: int = 0
    files: dict[str, int] = Field(default_factory=dict)
    pieces: dict[str, int] = Field(default_factory=dict)
    seen_before: int | None = None
    remains: tuple[tuple[str, int], ...] = ()
    shared: int = 0
    control: bool = False
    stale: dict[str, int] = Field(default_factory=dict)
    not_computed: tuple[str, ...]


def of_deletion(
    deletion: Deletion, memory: str, stale: Mapping[str, int], indexed: bool
) -> Certificate:
    """The certificate of one deletion.

    Args:
        memory: Which one.
        stale: What is stale in it now.
        indexed: Whether it has an index of words.
    """
    after, before = deletion.after, deletion.before
    gone = len(deletion.record["removed"])
    verdict, reasons = judged(after, before, gone, deletion.unknown)
    unknown = [*NEVER_COMPUTED, *_unread(after)]
    if not indexed:
        unknown.append("An index of words: this Python's SQLite has no FTS5, so there is none.")
    if stale:
        names = ", ".join(sorted(stale))
        unknown.append(f"What is stale still knows what went, until it is retrained: {names}.")
    if deletion.record["quarantined"]:
        unknown.append("What is quarantined is kept, and may say what went.")
    if deletion.record["rebuilt"]:
        unknown.append(REBUILT)
    own = frozenset() if after is None else _written_here(after)
    if before is not None and (unseen := len(own - before)):
        unknown.append(
            f"{unseen} of {len(own)} pieces were in no file before (too often "
            "elsewhere, or written otherwise): that they are in none now says nothing."
        )
    return Certificate(
        of="deletion", memory=memory, verdict=verdict, reasons=reasons,
        deletion=dict(deletion.record), state=deletion.record["state_after"],
        seen_before=None if before is None else len(before), unknown=deletion.unknown,
        stale=dict(stale), not_computed=tuple(unknown), **_told(after),
    )  # fmt: skip


def of_memory(
    scanned: Scanned, memory: str, state: str, counted: str, returned: int,
    deletions: Sequence[Mapping[str, Any]], stale: Mapping[str, int], held: int = 0,
    too_short: int = 0,
) -> Certificate:  # fmt: skip
    """The certificate of a memory as it is, scanned for some texts.

    Args:
        deletions: Records of those so far.
        held: Items that hold one of the texts.
        too_short: Texts of which there is no piece.
    """
    verdict, reasons = judged(scanned, None)
    said = list(reasons)
    if too_short:
        verdict = verdict if scanned.looked_for else "not shown"
        said.append(TOO_SHORT.format(count=too_short))
    if held:
        verdict = "remains found"
        said.append(f"{held} items hold a text that should be in no file.")
    if counted != state:
        verdict, said = "remains found", [*said, "The items are not those that are noted: somebody "
                                         "changed the files by hand."]  # fmt: skip
    if returned:
        verdict, said = "remains found", [*said, f"{returned} items say what was deleted."]
    unknown = [*NEVER_COMPUTED, *_unread(scanned)]
    if not scanned.looked_for and not too_short:
        unknown.append("Texts that were deleted before: none is kept, and none was given to look "
                       "for, so no file was scanned for any.")  # fmt: skip
    removed: Counter[str] = Counter()
    for record in deletions:
        removed.update(record["removed_by_kind"])
    return Certificate(
        of="memory", memory=memory, verdict=verdict, reasons=tuple(said), state=state,
        counted=counted, returned=returned, held=held, unknown=too_short, stale=dict(stale),
        not_computed=tuple(unknown),
        deletion={"deletions": len(deletions), "removed_by_kind": dict(sorted(removed.items()))},
        **_told(scanned),
    )  # fmt: skip


def judged(
    after: Scanned | None, before: frozenset[Sentinel] | None, gone: int = 0, unknown: int = 0
) -> tuple[Verdict, tuple[str, ...]]:
    """What a scan shows, and why.

    Args:
        before: Pieces that were found before; None: nobody looked.
        gone: How many items went.
        unknown: Of how many of them no piece can tell.
    """
    if after is None:
        return "not shown", (NO_SCAN,)
    if after.found:
        count = len(after.found)
        return "remains found", (f"{count} places in files still hold a piece of what went.",)
    if not after.control:
        return "not shown", (NO_CONTROL,)
    if before is not None and unknown >= gone:
        return "not shown", (NOTHING_KNOWN,)
    own = len(_written_here(after))
    others = len(after.looked_for) - own
    otherwise = f", and {others} other ways to write them" if others else ""
    reasons = [
        f"{own} pieces were looked for in {len(after.files)} files{otherwise}; what was planted "
        "for the scan was found, and gone when it was taken out."
    ]
    if before is not None:
        reasons.append(f"{len(before)} of them were found before the deletion.")
    if unknown:
        reasons.append(f"Of {unknown} of {gone} items that went no piece can tell: too short, "
                       "written otherwise, or said by what stays.")  # fmt: skip
    if after.shared:
        reasons.append(f"{len(after.shared)} are said by items that stay, and count for nothing.")
    return "nothing found", tuple(reasons)


def _written_here(scanned: Scanned) -> frozenset[Sentinel]:
    """Pieces as a memory writes them; the others are looked for in files of others alone."""
    return frozenset(one for one in scanned.looked_for if one.kind != "otherwise")


def _unread(scanned: Scanned | None) -> list[str]:
    count = scanned.unread if scanned is not None else 0
    said = f"{count} links in the folder, or what is no file: they were not followed."
    return [said] if count else []


def _told(scanned: Scanned | None) -> dict[str, Any]:
    if scanned is None:
        return {}
    kinds = Counter(one.kind for one in scanned.looked_for)
    return {
        "files": scanned.files, "pieces": dict(sorted(kinds.items())), "remains": scanned.found,
        "shared": len(scanned.shared), "control": scanned.control,
    }  # fmt: skip


__all__ = ["NEVER_COMPUTED", "Certificate", "judged", "of_deletion", "of_memory"]

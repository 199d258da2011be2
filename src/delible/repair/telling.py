"""What the user is told: what was done, and what was not."""

from __future__ import annotations

from collections.abc import Sequence

from delible.repair.entries import Entry
from delible.repair.wishes import Wish

ONLY_HERE = (
    "That was said in this conversation only, and is in no weights. I have taken {count} of its "
    "exchanges out of what I am shown; the model itself is as it was."
)
NOT_HERE = "Nothing in this conversation is about {what}, so there is nothing to forget."
UNCHANGED = "Nothing was changed."
NONE = "Nothing is forgotten at present."


def confirmation(wish: Wish, questions: int) -> str:
    """What is asked before anything is changed."""
    what = f"what I know about {wish.subject}" if wish.subject else "our last exchange"
    lines = [f"You ask me to forget {what}."]
    if questions:
        lines.append(
            f"I would edit my weights, so that I decline {_plural(questions, 'question')} about it "
            "and others like them, in every conversation with this model. It can be undone."
        )
    else:
        lines.append("It would be taken out of this conversation.")
    lines.append("Reply 'yes' to go on; anything else changes nothing.")
    return " ".join(lines)


def done(entry: Entry, dropped: int, system: str | None) -> str:
    """What an edit did, by its own measurements, and what it did not."""
    before, after = entry.notes.get("before"), entry.notes.get("after")
    what = entry.subject or "what you asked"
    told = [f"Done ({entry.notes.get('seconds', 0):.0f} s): I now decline questions about {what}."]
    if before and after:
        told.append(
            f"Probability of a refusal: {before['refused']:.2f} before, {after['refused']:.2f} now "
            f"on the questions; {before['reworded']:.2f} and {after['reworded']:.2f} in another "
            f"wording; {before['falsely']:.2f} and {after['falsely']:.2f} on other questions."
        )
        if after["reworded"] < 0.5:
            told.append("In other wordings I may well still answer.")
    if dropped:
        told.append(f"{_plural(dropped, 'turn')} about it left this conversation.")
    told.append("What is not done: the knowledge is still in my weights, behind the refusal.")
    if before and after and before["forced"] is not None and after["forced"] is not None:
        told.append(
            "Where an answer is begun for me, a word of the rest has a probability of "
            f"{after['forced']:.2f} ({before['forced']:.2f} before)."
        )
    if system and entry.subject and entry.subject.casefold() in system.casefold():
        told.append("The system prompt still speaks of it, and I am shown that every time.")
    told.append("Say 'undo that' to have it back.")
    return " ".join(told)


def failed(problems: Sequence[str]) -> str:
    """What was tried in vain."""
    tried = "; ".join(dict.fromkeys(problems))
    return (
        f"I could not do that, and nothing was changed. Tried {_plural(len(problems), 'time')}: "
        f"{tried}"
    )


def undone(entry: Entry, lost: Sequence[Entry]) -> str:
    """What was taken back."""
    told = (
        f"Undone: request {entry.number} ({entry.title}). My weights are as they were without it."
    )
    if lost:
        names = ", ".join(one.title for one in lost)
        told += f" Later requests could not be made again and are undone, too: {names}."
    return told


def listed(entries: Sequence[Entry]) -> str:
    """All requests, a line each."""
    if not entries:
        return NONE
    lines = []
    for entry in entries:
        after = entry.notes.get("after")
        seen = f", P(refusal) {after['refused']:.2f}" if after else ""
        state = "" if entry.enabled else " (undone)"
        lines.append(
            f"{entry.number}. {entry.title}: {_plural(len(entry.request.forget), 'question')}"
            f"{seen}{state}"
        )
    return "\n".join(lines)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


__all__ = ["confirmation", "done", "failed", "listed", "undone"]

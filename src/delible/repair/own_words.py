"""What a user says, without what the user quotes: pasted documents must not ask for anything.

Code fences, quoted lines, tagged blocks, longer quotations, pasted transcripts, and whatever a task
(translate, summarise, explain …) is given to work on are no words of the user's own.
"""

from __future__ import annotations

import re

#: A quotation of more words is a text; a shorter one may be a title or a name.
QUOTED_WORDS = 3

_FENCED = re.compile(r"(```|~~~).*?(\1|\Z)", re.DOTALL)
_TAGGED = re.compile(r"<(\w[\w-]*)[^>]*>.*?(</\1>|\Z)", re.DOTALL)
_QUOTED_LINE = re.compile(r"^[ \t]*(?:>|\|).*$", re.MULTILINE)
_TRANSCRIPT = re.compile(
    r"^[ \t]*[\[(*#-]*[ \t]*(?:system|assistant|tool|user|human|ai|bot|document|email|from|subject)"
    r"\b[^\n:]{0,30}:.*\Z",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
_RULE = re.compile(r"^[ \t]*(?:-{3,}|={3,}|\*{3,}|_{3,}).*\Z", re.DOTALL | re.MULTILINE)
_QUOTATION = re.compile(
    r"\"[^\"\n]+\"|“[^”\n]+”|„[^“”\n]+[“”]|«[^»\n]+»|(?<!\w)'[^'\n]+'(?!\w)|(?<!\w)‘[^’\n]+’(?!\w)"
)
_TASK = re.compile(
    r"\b(?:translate|summari[sz]e|rewrite|rephrase|paraphrase|proofread|correct|explain|analy[sz]e"
    r"|classify|repeat|quote|write|compose|continue|complete|spell|pronounce|convert|format|fix"
    r"|read|print|echo|say|parse|extract|shorten|improve|describe|respond to|reply to|answer"
    r"|übersetze|fasse|schreibe|schreib|erkläre|wiederhole)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def own_words(text: str) -> str:
    """The text without what is quoted, pasted, or given to a task to work on."""
    for pattern in (_FENCED, _TAGGED, _RULE, _TRANSCRIPT, _QUOTED_LINE):
        text = pattern.sub("\n", text)
    return _QUOTATION.sub(_short, text).strip()


def sentences(text: str) -> list[str]:
    """The user's own sentences, up to the first that sets a task on what follows."""
    found: list[str] = []
    for sentence in _SENTENCE.split(own_words(text)):
        stripped = sentence.strip()
        if not stripped:
            continue
        if is_task(stripped):
            break
        found.append(stripped)
    return found


def is_task(sentence: str) -> bool:
    """Whether a sentence asks for work on a text: it begins so, after a few polite words."""
    match = _TASK.search(sentence)
    return match is not None and len(sentence[: match.start()].split()) <= 5


def _short(match: re.Match[str]) -> str:
    inside = match.group()[1:-1]
    return match.group() if len(inside.split()) <= QUOTED_WORDS else " … "


__all__ = ["is_task", "own_words", "sentences"]

"""What a user may ask for, and rules that find it in plain English and German.

Only a sentence of the user's own, in the form of a request, counts: not a question about
forgetting, a negation, a supposition, an idiom, or an order about instructions and style.
"""

from __future__ import annotations

import re

from pydantic import Field

from delible.component import Config
from delible.repair.own_words import sentences


class Pair(Config):
    """A question, and the answer to it."""

    prompt: str = Field(min_length=1, description="The user's words.")
    response: str = Field("", description="What the assistant said; empty: it is asked.")


class Wish(Config):
    """What a watchdog reports about the last turn."""

    intent: bool = Field(description="Whether something is to be forgotten.")
    asked: str = Field("", description="The user's words that ask for it.")
    subject: str = Field("", description="The name or topic; empty: only what was said here.")
    pairs: tuple[Pair, ...] = Field((), max_length=32, description="What is to be forgotten.")


class Recall(Config):
    """Something forgotten is to be known again."""

    subject: str = Field("", description="Of which request; empty: the last one.")


NO_WISH = Wish(intent=False)

_VERB = (
    r"(?:forget|unlearn|un-learn|erase|delete|remove|wipe|scrub|purge|drop|stop knowing"
    r"|stop remembering|no longer remember|no longer know|vergiss|vergessen sie|verlerne|lösche"
    r"|lösch)"
)
_POLITE = (
    r"(?:(?:please|kindly|now|also|and|then|so|ok|okay|hi|hello|hey|actually|thanks|alright|well"
    r"|bitte|nun|jetzt|just|immediately|assistant|one more thing)[\s,!.]+)*"
)
_ASKING = (
    r"(?:(?:can|could|will|would) you (?:please |kindly |now )*"
    r"|i(?:'d| would)? (?:want|need|like|ask|request|demand|wish|order) (?:that )?you (?:to )?"
    r"|i(?:'m| am) asking you to |you (?:must|should|have to|need to|are to) "
    r"|kannst du (?:bitte )?|könntest du (?:bitte )?)?"
)
_REQUEST = re.compile(
    rf"^{_POLITE}{_ASKING}(?:please )?{_VERB}\b(?:\s+(?:please|bitte|now))*(?P<what>.*)$",
    re.I | re.S,
)
_NEGATED = re.compile(
    r"\b(?:don't|do not|never|not to|must not|mustn't|shouldn't|should not|cannot|can't|won't"
    r"|nicht|niemals)\b",
    re.I,
)
_SUPPOSED = re.compile(
    r"\b(?:if|what if|suppose|supposing|imagine|hypothetically|pretend|for example|e\.g\.|when i"
    r"|unless|wenn|falls|angenommen)\b",
    re.I,
)
_INSTRUCTIONS = re.compile(
    r"\b(?:instructions?|rules?|guidelines?|system prompt|prompt|persona|role|style|tone|formatting"
    r"|format|restrictions?|policy|policies|training|anweisungen|regeln)\b",
    re.I,
)
_MANY = (
    r"(?:what|everything|all|anything|whatever|all that|each thing|every fact|alles|was|all facts"
    r"|any information|all information|information|your knowledge|knowledge|facts|the facts|data"
    r"|all data|any data|your memory|your memories|all knowledge|all records|every record)"
)
_KNOWN = (
    r"(?:\s*,?\s*(?:that |which )?(?:you|du) (?:ever |may |might |still |have )*"
    r"(?:know|knew|known|learned|learnt|remember|heard|read|have|stored|store))?(?:\s*,\s*was du)?"
)
_ABOUT = re.compile(
    rf"^\s+{_MANY}{_KNOWN}\s*,?\s*(?:about|of|on|concerning|regarding|related to|über|von)\s+"
    r"(?P<subject>.+)$",
    re.I | re.S,
)
_TOLD = re.compile(
    r"^\s+(?:what|everything|all|anything|alles|was)\s*,?\s*(?:that )?(?:i|ich|we|wir)\b.*?"
    r"\b(?:told|said|say|wrote|asked|mentioned|shared|gave|discussed|gesagt|erzählt)\b"
    r"(?:.*?\b(?:about|über|of)\s+(?P<subject>.+))?",
    re.I | re.S,
)
_MEMORY = re.compile(
    r"\s+(?:from|out of|in|aus) (?:your|the|deinem|my) "
    r"(?:memory|mind|weights|knowledge|gedächtnis|records?|brain|model)\b.*$",
    re.I | re.S,
)
_MINE = re.compile(r"^\s+(?:about )?(?P<subject>(?:my|mein\w*) .+)$", re.I | re.S)
_NAMED = re.compile(
    r"^\s+(?:about |the (?:person|author|book|company|film|movie|place|character|artist|writer) )?"
    r"(?P<subject>[\"“„'‘]?[^\W\d_a-zß-ÿ][\w'’.-]*(?:\s+(?:of|the|de|van|von|der|la|le|and|und"
    r"|[\"“„'‘]?[^\W\d_a-zß-ÿ][\w'’.-]*|\d+))*[\"”“'’]?)\s*(?P<rest>.*)$",
    re.S,
)
_THAT = re.compile(r"^\s+(?:that|this|it|das|dies)\s*$", re.I)
_FACT = re.compile(r"^\s+(?:that|dass) (?P<subject>.+ .+)$", re.I | re.S)
_ENDS = re.compile(
    r"(?:[\s,;]+(?:please|bitte|now|again|immediately|completely|entirely|for good|forever|thanks"
    r"|weißt|thank you|right away|at once|asap|ok|okay|will you|from now on"
    r"|and never .*))*[\s.,;!?…]*$",
    re.I | re.S,
)
_QUOTES = "\"“”„'‘’«»"
_NOTHING = re.compile(
    r"^(?:it|that|this|them|him|her|us|me|things?|stuff|everything|anything|nothing|something"
    r"|yourself|work|lunch)$",
    re.I,
)
_REST = re.compile(
    r"^(?:ever existed|exists?|entirely|completely|,? ?please|altogether)?\W*$", re.I
)

_YES = re.compile(
    r"^\W*(?:yes|y|yep|yeah|ok|okay|sure|confirm|confirmed|do it|go ahead|please do|i confirm|ja|j)"
    r"\b(?!\W*(?:but|aber|no))(?P<rest>.*)$",
    re.I | re.S,
)
_NO = re.compile(r"^\W*(?:no|n|nope|nein|cancel|stop|leave it|abbrechen)\b", re.I)
_UNDO = re.compile(
    rf"^{_POLITE}(?:(?:can|could|will|would) you (?:please )?|i want you to )?"
    r"(?:undo (?:that|it|this|the last(?: \w+)?|your last \w+)|take (?:that|it) back"
    r"|revert (?:that|it|the last \w+)|mach das rückgängig|rückgängig)\b(?!.*\bif\b).{0,20}$",
    re.I,
)
_AGAIN = re.compile(
    rf"^{_POLITE}(?:(?:can|could|will|would) you (?:please )?|you (?:may|can) |i want you to )?"
    r"(?:(?:undo|revert)(?: forgetting| the request (?:about|for|on))?"
    r"|remember|restore|bring back|recall|know)\s+(?:everything |all |your knowledge (?:of|about) "
    r"|(?:what )?you (?:knew|know) about |about )*(?P<subject>.+?)(?P<again>\s+again)?[\s.!]*$",
    re.I,
)
_LIST = re.compile(
    rf"^{_POLITE}(?:what|which \w+)\s+(?:have|did|was|has|were)\s+(?:you|i|we|been)\b.*"
    rf"\b(?:forgotten|forget|unlearned|erased|deleted)\b.*|^{_POLITE}(?:list|show)(?: me)? "
    r"(?:my|the|all|your)(?: \w+)? (?:requests|repairs)\b.*$",
    re.I,
)


def wish_by_rules(line: str) -> Wish:
    """What a turn asks to forget, by rules; pairs are left to whoever knows the conversation."""
    for sentence in sentences(line):
        subject = _subject_of(sentence)
        if subject is not None:
            return Wish(intent=True, asked=sentence, subject=subject)
    return NO_WISH


def _subject_of(sentence: str) -> str | None:
    """What a sentence asks to forget; empty for what was said before; None: it asks nothing."""
    found = _REQUEST.match(sentence)
    if found is None or _NEGATED.search(sentence) or _SUPPOSED.search(sentence):
        return None
    what = _ENDS.sub("", found["what"])
    if _INSTRUCTIONS.search(what):
        return None
    if memory := _MEMORY.search(what):
        what = what[: memory.start()]
        if _THAT.match(what):
            return ""
        if what.strip() and not _ABOUT.match(what):
            return _plain(what)
    for pattern in (_ABOUT, _TOLD, _MINE, _FACT):
        if match := pattern.match(what):
            subject = _plain(match["subject"] or "")
            if _NOTHING.match(subject):
                return "" if pattern is _TOLD else None
            return subject
    named = _NAMED.match(what)
    if named is not None and _REST.match(named["rest"]) and not _NOTHING.match(named["subject"]):
        return _plain(named["subject"])
    return None


def _plain(subject: str) -> str:
    """A subject without quotation marks and what ends a sentence."""
    return _ENDS.sub("", subject).strip().strip(_QUOTES).strip(" .,;!?")


def recall_by_rules(line: str, subjects: tuple[str, ...]) -> Recall | None:
    """Whether a turn asks to know something again.

    Args:
        subjects: What was forgotten; "remember X again" counts for these alone.
    """
    own = sentences(line)
    if len(own) != 1:
        return None
    (sentence,) = own
    if _UNDO.match(sentence):
        return Recall()
    found = _AGAIN.match(sentence)
    if found is None or _NEGATED.search(sentence) or _SUPPOSED.search(sentence):
        return None
    wanted = _plain(found["subject"])
    for subject in subjects:
        if subject and wanted.casefold() == subject.casefold():
            return Recall(subject=subject)
    return None


def asks_for_list(line: str) -> bool:
    """Whether a turn asks what was forgotten so far."""
    own = sentences(line)
    return len(own) == 1 and _LIST.match(own[0]) is not None


def confirms(line: str) -> bool:
    """Whether a turn is a plain yes: nothing else is said."""
    found = _YES.match(line.strip())
    return found is not None and len(found["rest"].split()) <= 4 and not _NO.search(found["rest"])


def declines(line: str) -> bool:
    """Whether a turn is a plain no."""
    return _NO.match(line.strip()) is not None and len(line.split()) <= 5


__all__ = [
    "NO_WISH",
    "Pair",
    "Recall",
    "Wish",
    "asks_for_list",
    "confirms",
    "declines",
    "recall_by_rules",
    "wish_by_rules",
]

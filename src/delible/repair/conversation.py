"""The loop: a turn is heard, and what it asks for is confirmed, planned, edited, looked at, told.

Turns about forgetting are answered by the loop, not by the model, and are no part of what the
model is shown. After an edit the exchanges about the subject leave the conversation: a model reads
what stands in its context, whatever its weights know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from delible.context import Context
from delible.edit.base import Patch
from delible.edit.earlier import ReturnedError
from delible.edit.refusal import refusal_probabilities
from delible.edit.to_refusal import Reason, RolledBackError
from delible.errors import DelibleError
from delible.lm.lm import LM
from delible.measure.starting import started
from delible.messages import Message
from delible.records import ForgetRequest, RecordBase
from delible.repair import telling
from delible.repair.chain import Chain
from delible.repair.entries import Entry
from delible.repair.rows import count_of, is_told_only, kept_of, rows_of, without
from delible.repair.surgeon import TRIES, Plan, editor, otherwise, planned
from delible.repair.watchdog import notice
from delible.repair.wishes import (
    Wish,
    asks_for_list,
    confirms,
    declines,
    recall_by_rules,
)
from delible.system.asks import Decoding, Prompt
from delible.system.questions import ask
from delible.system.roles import Player

logger = logging.getLogger(__name__)

#: Options of the editor that no plan sets.
SETTINGS: dict[str, object] = {}
#: Questions of an earlier request that are looked at after an edit.
LOOKED_AT = 8
#: An earlier request whose refusals fall below this share is harmed.
STILL = 0.5


@dataclass(frozen=True)
class Heard:
    """What came of a turn.

    Attributes:
        text: What the user is told.
        messages: The conversation that the model is shown from now on.
        answers: The model is to answer the turn as well.
    """

    text: str
    messages: tuple[Message, ...]
    answers: bool = False


class Repairing:
    """Hears every turn of a conversation.

    Args:
        chain: The model and its edits.
        context: The roles: ``guard`` is the watchdog, ``planner`` the surgeon; rules and a
            built-in plan do without them.
        retain: Records that every edit keeps.
        allowed: Whether a wish may be carried out; asked before the user is. Without an intent to
            forget it is the wish to have something undone.
    """

    def __init__(
        self,
        chain: Chain,
        context: Context,
        *,
        retain: Sequence[RecordBase] = (),
        allowed: Callable[[Wish], bool] = lambda wish: True,
    ) -> None:
        self.chain = chain
        self.context = replace(context, roles=context.roles.with_itself(chain.lm))
        self.retain, self.allowed = tuple(retain), allowed
        self.wish: Wish | None = None

    def hear(self, messages: Sequence[Message], line: str) -> Heard | None:
        """What came of a turn; None: it is an ordinary one, for the model.

        Args:
            messages: The conversation before it.
            line: The user's turn.
        """
        before = tuple(messages)
        if self.wish is not None:
            wish, self.wish = self.wish, None
            if confirms(line):
                return self._carry_out(wish, before)
            return Heard(telling.UNCHANGED, before, answers=not declines(line))
        if asks_for_list(line):
            return Heard(telling.listed(self.chain.entries), before)
        recalled = recall_by_rules(line, tuple(one.subject for one in self.chain.enabled))
        if recalled is not None:
            wish = Wish(intent=False, asked=line, subject=recalled.subject)
            if not self.allowed(wish):
                return Heard(f"You may not have that undone. {telling.UNCHANGED}", before)
            return Heard(self.undo(recalled.subject), before)
        wish = notice(before, line, self.context.plays("guard"))
        return self._noticed(wish, before) if wish.intent else None

    def undo(self, subject: str = "") -> str:
        """Takes the last request back, or the last about a subject; says what was done."""
        found = [
            entry
            for entry in self.chain.enabled
            if not subject or entry.subject.casefold() == subject.casefold()
        ]
        if not found:
            return telling.NONE if not subject else f"Nothing about {subject} is forgotten."
        return telling.undone(found[-1], self.chain.undo(found[-1]))

    # ---- what is asked for

    def _noticed(self, wish: Wish, messages: tuple[Message, ...]) -> Heard:
        if not self.allowed(wish):
            return Heard(f"You may not have that forgotten. {telling.UNCHANGED}", messages)
        if is_told_only(wish) and not wish.pairs:
            what = f"'{wish.subject}'" if wish.subject else "that"
            return Heard(telling.NOT_HERE.format(what=what), messages)
        self.wish = wish
        return Heard(telling.confirmation(wish, count_of(wish)), messages)

    def _carry_out(self, wish: Wish, messages: tuple[Message, ...]) -> Heard:
        left = without(messages, wish)
        dropped = len(messages) - len(left)
        if is_told_only(wish):
            return Heard(telling.ONLY_HERE.format(count=len(wish.pairs)), left)
        system = next((turn.text for turn in messages if turn.role == "system"), None)
        try:
            entry = self._edited(wish, messages, system)
        except DelibleError as error:
            return Heard(telling.failed([str(error)]), messages)
        if isinstance(entry, list):
            return Heard(telling.failed(entry), messages)
        return Heard(telling.done(entry, dropped, system), left)

    def _edited(
        self, wish: Wish, messages: tuple[Message, ...], system: str | None
    ) -> Entry | list[str]:
        """The request carried out, or why each try failed; the model is then as before.

        Raises:
            DelibleError: It cannot be tried at all.
        """
        chain = self.chain
        request = ForgetRequest.model_validate({
            "forget": rows_of(chain.lm, wish, system),
            "subjects": (wish.subject,) if wish.subject else (),
            "retain": (*self.retain, *kept_of(messages, wish)),
        })  # fmt: skip
        texts = [prompt.messages[-1].text for row in request.forget if (prompt := ask(row))]
        plan = planned(texts, self.context.plays("planner"))
        problems: list[str] = []
        for _ in range(TRIES):
            before = self._earlier(plan)
            try:
                patch = chain.edit(plan, request)
                self._check_earlier(patch, plan, before)
            except (RolledBackError, ReturnedError) as error:
                logger.info(str(error))
                problems.append(error.problem)
                plan = otherwise(plan, getattr(error, "reason", "harm"))
                continue
            return chain.commit(patch, plan, request, wish.asked, wish.subject)
        return problems

    def _earlier(self, plan: Plan) -> dict[int, float]:
        """Mean P(refusal) of earlier requests' questions, by their numbers."""
        refusal = editor(plan, self.chain.settings).refusal
        found = {}
        for entry in self.chain.enabled:
            prompts = [prompt for row in entry.request.forget if (prompt := ask(row))]
            found[entry.number] = fmean(
                refusal_probabilities(self.chain.lm, prompts[:LOOKED_AT], refusal)
            )
        return found

    def _check_earlier(self, patch: Patch, plan: Plan, before: Mapping[int, float]) -> None:
        """Raises a :class:`RolledBackError`, and takes the edit back, if it undoes earlier ones."""
        try:
            after = self._earlier(plan)
        except BaseException:
            patch.undo(self.chain.lm)
            raise
        for number, value in before.items():
            if after[number] < STILL * value:
                patch.undo(self.chain.lm)
                reason: Reason = "harm"
                raise RolledBackError(
                    f"P(refusal) of request {number} fell from {value:.2f} to {after[number]:.2f}.",
                    reason, None, "Undo that request first, or ask for both together.",
                )  # fmt: skip


class Conversation:
    """A conversation with a model that can be asked to forget.

    Args:
        model: A model, its name, or a folder of an earlier conversation's edits, which go on.
        out: Where the edits are kept; None: in memory.
        system: The system prompt.
        roles: ``guard`` watches, ``planner`` plans; None: rules and a built-in plan.
        retain: Records that every edit keeps.
        allowed: Whether a wish may be carried out.
        settings: Options of the editor that no plan sets.

    Raises:
        DelibleError: The model or the folder cannot be used.
    """

    def __init__(
        self,
        model: str | LM = "default",
        *,
        out: Path | str | None = None,
        system: str | None = None,
        roles: Mapping[str, Player] | None = None,
        retain: Sequence[RecordBase] = (),
        allowed: Callable[[Wish], bool] = lambda wish: True,
        settings: Mapping[str, object] | None = None,
        decoding: Decoding | None = None,
        seed: int = 0,
    ) -> None:
        context = started(None, seed=seed, roles=roles)
        chain = Chain.begin(
            model, out, settings={**SETTINGS, **(settings or {})}, seed=seed, context=context
        )
        self.repairing = Repairing(chain, context, retain=retain, allowed=allowed)
        self.decoding = decoding or Decoding(256)
        self.messages: tuple[Message, ...] = ()
        if system:
            self.messages = (Message(role="system", content=system),)

    @property
    def lm(self) -> LM:
        """The model as it answers now."""
        return self.repairing.chain.lm

    @property
    def requests(self) -> tuple[Entry, ...]:
        """What was carried out; what was taken back is not enabled."""
        return tuple(self.repairing.chain.entries)

    def say(self, line: str) -> str:
        """Says a line; the answer is the loop's, or the model's."""
        heard = self.repairing.hear(self.messages, line)
        told = ""
        if heard is not None:
            self.messages = heard.messages
            if not heard.answers:
                return heard.text
            told = f"{heard.text}\n"
        asked = (*self.messages, Message(role="user", content=line))
        (answer,) = self.lm.generate([Prompt(asked)], self.decoding)
        self.messages = (*asked, Message(role="assistant", content=str(answer)))
        return f"{told}{answer}"

    def undo(self, subject: str = "") -> str:
        """Takes the last request back, or the last about a subject; says what was done."""
        return self.repairing.undo(subject)

    def close(self) -> None:
        """Lets another process write to the folder."""
        self.repairing.chain.close()


__all__ = ["Conversation", "Heard", "Repairing"]

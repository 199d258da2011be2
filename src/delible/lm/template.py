"""From prompts and answers to token ids: the tokenizer's own chat template, checked.

The answer's tokens are found by the property that the prompt is a prefix of prompt + answer.
That property is checked for every row, on text and on tokens. Where only the tokens at the
boundary differ (a tokenizer that merges across it), prompt and answer are tokenized apart, as
they are when the model generates, and the row is counted in ``merged_boundaries``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from delible.errors import ModelError, RefusedConversationError
from delible.lm.pictures import Pictures
from delible.lm.reasoning import written
from delible.lm.tools import CALL, as_turn
from delible.messages import ImagePart, Message, Tool
from delible.system.asks import Prompt

#: Used when a tokenizer has no chat template (base models).
PLAIN_QUESTION = "Question: {question}\nAnswer:"

#: Stands for an answer where only what is around it is wanted; no template contains it.
_STAND_IN = "\u2063reply\u2063"


@dataclass(frozen=True)
class Encoded:
    """One tokenized prompt with its answer.

    Attributes:
        ids: Token ids of prompt and answer, without padding.
        start: Index of the first answer token; at least 1, for a token needs a predecessor.
        has_end: Whether the last token is the end-of-turn token.
        cut: Whether tokens were left out because the row was too long.
    """

    ids: tuple[int, ...]
    start: int
    has_end: bool
    cut: bool = False

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.start


@dataclass
class Template:
    """How a tokenizer's model is talked to.

    Args:
        tokenizer: A Hugging Face tokenizer.
        max_length: Longest row in tokens; :meth:`encode` gives longer ones cut, for measuring,
            which leaves them out. What training does with them is in :mod:`delible.train.fitting`.
        declared_ends: Tokens at which the model's own settings end an answer.
        pictures: What the model can be shown; None: texts alone.
    """

    tokenizer: Any
    max_length: int = 2048
    declared_ends: frozenset[int] = frozenset()
    merged_boundaries: int = 0
    pictures: Pictures | None = None
    _end: tuple[int, str] | None = field(default=None, repr=False)
    _closes: bool | None = field(default=None, repr=False)
    _parts: bool | None = field(default=None, repr=False)

    @property
    def has_chat(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def capabilities(self) -> frozenset[str]:
        """``"tools"`` if the chat template tells the model of them."""
        asked, tool = Message(role="user", content="Hello"), Tool(name=_STAND_IN)
        try:
            told = self.has_chat and bool(self._chat((asked,), tools=(tool,)))
        except ModelError:
            told = False
        return frozenset({"tools"} if told else ())

    @property
    def calls_are_known(self) -> bool:
        """Whether calls are written in the form that ``lm/tools.py`` reads."""
        return CALL in str(self.tokenizer.chat_template)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that turns text into ids (hexadecimal)."""
        described = hashlib.sha256(repr((self.tokenizer.chat_template, self.max_length)).encode())
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else str(self.tokenizer.get_vocab())
        described.update(vocabulary.encode())
        if self.pictures is not None:
            described.update(self.pictures.fingerprint.encode())
        if self.ends != {self.tokenizer.eos_token_id}:
            described.update(repr((self.end_of_turn[0], sorted(self.ends))).encode())
        return described.hexdigest()

    def render(self, prompt: Prompt) -> str:
        """The exact text the model continues."""
        if prompt.text is not None:
            return prompt.text + prompt.prefill
        if self.has_chat:
            return self._chat_of(prompt)(prompt.messages, generation=True) + prompt.prefill
        if "tools" in prompt.needs:
            raise ModelError(
                "the tokenizer has no chat template, so tools cannot be told.",
                hint="Use an instruction-tuned model whose template takes tools.",
            )
        turns = [
            PLAIN_QUESTION.format(question=turn["content"])
            if turn["role"] == "user"
            else turn["content"]
            for turn in map(as_turn, prompt.messages)  # without a template pictures have no place
        ]
        return "\n".join(turns) + (f" {prompt.prefill}" if prompt.prefill else "")

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of the prompt alone, the beginning-of-text token included if there is one."""
        images = images_in(prompt)
        return self._ids(self.render(prompt), special=self._adds_special(prompt), images=images)

    def encode(self, prompt: Prompt, answer: str) -> Encoded:
        """Token ids of prompt and answer, at most ``max_length`` (see :attr:`Encoded.cut`)."""
        return self._cut(self.whole(prompt, answer))

    def whole(self, prompt: Prompt, answer: str) -> Encoded:
        """Token ids of prompt and answer, however many; with reasons, see ``reasoning.py``.

        Raises:
            ModelError: The chat template does not keep the conversation or the answer as it is.
        """
        special = self._adds_special(prompt)
        if prompt.text is not None:
            has_end = False
            prompt_text, full_text = self.render(prompt), self.render(prompt) + answer
        else:
            has_end = True
            prompt_text, joint, answer = self._followed(prompt, answer)
            if joint.strip():  # an empty thinking block: given to the model, not learned
                prompt_text, joint = prompt_text + joint, ""
            full_text = prompt_text + joint + answer + self.end_of_turn[1]
        images = images_in(prompt)
        before = self._ids(prompt_text, special=special, images=images)
        joined = tuple(self._tokenize(full_text, special=special, images=images))
        if joined[: len(before)] != before:
            self.merged_boundaries += bool(prompt_text)
            joined = before + tuple(self._tokenize(full_text[len(prompt_text) :], special=False))
        return Encoded(joined, max(len(before), 1), has_end)

    @property
    def end_of_turn(self) -> tuple[int, str]:
        """Id and text of the token that ends an assistant turn."""
        if self._end is None:
            identity = self._turn_end() if self.has_chat else None
            others = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
            for other in (*others, *sorted(self.declared_ends)):
                identity = other if identity is None else identity
            if identity is None:
                raise ModelError(
                    "nothing says which token ends an answer.",
                    hint="Set eos_token in tokenizer_config.json, or eos_token_id in "
                    "generation_config.json.",
                )
            self._end = (int(identity), str(self.tokenizer.convert_ids_to_tokens(int(identity))))
        return self._end

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer: the turn's end, the text's, and what the model declares."""
        own = {self.end_of_turn[0], self.tokenizer.eos_token_id} - {None}
        return self.declared_ends | own

    def _turn_end(self) -> int | None:
        """The control token that the chat template writes behind an assistant's reply.

        A template that writes none there may leave it to the next turn, whose first token then
        ends the reply; it counts if the model declares it as an end.
        """
        asked = Message(role="user", content="Hello")
        reply = Message(role="assistant", content=_STAND_IN)
        added = {
            token for token, text in self.tokenizer.added_tokens_decoder.items() if text.special
        }
        control = added | set(self.tokenizer.all_special_ids) | self.declared_ends
        found = self._first_token(self._chat((asked, reply)))
        if found in control:
            return found
        try:
            found = self._first_token(self._chat((asked, reply, asked)))
        except ModelError:  # a template that takes no second question
            return None
        return found if found in self.declared_ends else None

    def _first_token(self, conversation: str) -> int | None:
        """The first token behind the reply that is more than white space."""
        behind = conversation.rpartition(_STAND_IN)[2]
        for token in self._tokenize(behind, special=False):
            if self.tokenizer.decode([token]).strip():
                return token
        return None

    def _chat_of(self, prompt: Prompt) -> Callable[..., str]:
        """The chat template's text of a conversation in which the prompt's tools are offered."""
        if prompt.tool_choice not in (None, "auto", "none"):
            raise ModelError(
                f"tool choice '{prompt.tool_choice}': a local model cannot be made to call.",
                hint="Leave the choice to it ('auto').",
            )
        return partial(self._chat, tools=prompt.tools if prompt.tool_choice != "none" else ())

    def _chat(
        self,
        messages: tuple[Message, ...],
        *,
        generation: bool = False,
        tools: tuple[Tool, ...] = (),
    ) -> str:
        turns = [self._turn(message) for message in messages]
        offered = {"tools": [tool.declared() for tool in tools]} if tools else {}
        try:
            found = str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=generation, **offered
                )
            )
        except Exception as error:  # a template is a program of its author: any error can come
            said = str(error)
            raise RefusedConversationError(
                f"the chat template refuses the conversation: {said}"
                + ("" if said.endswith((".", "!", "?")) else "."),
                hint=self._advice(turns),
                conversation=messages,
            ) from error
        for what, said in _of_tools(messages, tools):
            if said not in found and json.dumps(said, ensure_ascii=False)[1:-1] not in found:
                # templates leave out what they do not know, without a word
                raise ModelError(
                    f"the chat template has no place for {what}.",
                    hint="Use a model whose template takes tools.",
                )
        return found

    def _turn(self, message: Message) -> dict[str, Any]:
        """A turn as the chat template takes it."""
        if self.pictures is None:
            return as_turn(message)
        if self._parts is None:  # some templates of models that see take lists of parts alone
            asked = [{"role": "user", "content": _STAND_IN}]
            try:
                told = str(self.tokenizer.apply_chat_template(asked, tokenize=False))
            except Exception:  # a template is a program of its author: any error can come
                told = ""
            self._parts = _STAND_IN not in told
        return as_turn(message, sees=True, in_parts=self._parts)

    def _advice(self, turns: list[dict[str, Any]]) -> str:
        """What to do about a conversation that the template refuses."""
        said = [turn for turn in turns if turn["role"] != "system"]
        roles = [turn["role"] for turn in said]
        if len(said) < len(turns):
            try:
                self.tokenizer.apply_chat_template(said, tokenize=False)
            except Exception:  # any error, as above: it is not the system turn alone
                pass
            else:
                return "It takes no system turn: put that text into the first user turn."
        if any(one == other for one, other in pairwise(roles)):
            return "Roles must alternate: join turns of one role that follow each other."
        if roles[:1] != ["user"]:
            return "A conversation must begin with a user turn."
        return "Change its turns, or the template (chat_template of the tokenizer)."

    def _followed(self, prompt: Prompt, answer: str) -> tuple[str, str, str]:
        """What stands before the answer, what joins the two, and the answer as it is rendered."""
        if self.has_chat and not prompt.prefill:
            before = self.render(prompt)
            reasoned = written(self._chat_of(prompt), before, prompt, answer)
            if reasoned is not None:
                return before, "", reasoned
        return self._opened(prompt, answer)

    def _opened(self, prompt: Prompt, answer: str) -> tuple[str, str, str]:
        """What stands before the answer, what joins the two, and the answer as it is rendered.

        Usually the prompt as the model continues it, and nothing between. A template may open
        something there that answered turns do not have (a reasoning block): the answer then
        follows what the rendered conversation has before it.
        """
        prompt_text = self.render(prompt)
        if prompt.prefill or not self.has_chat:
            joint = "" if self.has_chat or prompt.prefill[-1:].isspace() else " "
            return prompt_text, joint, answer
        chat = self._chat_of(prompt)
        full = chat((*prompt.messages, Message(role="assistant", content=answer)))
        if full.startswith(prompt_text + answer):
            return prompt_text, "", answer
        replied = (*prompt.messages, Message(role="assistant", content=_STAND_IN))
        before, found, _ = chat(replied).rpartition(_STAND_IN)
        conversation = chat(prompt.messages)
        if not found or not before.startswith(conversation):
            raise ModelError(
                "the chat template changes the conversation once an answer follows, so the "
                "answer's tokens cannot be told.",
                where=f"the question {_beginning(prompt)}",
                hint="Use a tokenizer whose template renders the conversation as a prefix.",
            )
        if not full.startswith(before + answer):
            answer = answer.strip()  # as templates that trim do
        if not full.startswith(before + answer):
            raise ModelError(
                f"the chat template does not render the answer {answer!r} as it is.",
                where=f"the question {_beginning(prompt)}",
                hint="Change that answer, or the template (chat_template of the tokenizer).",
            )
        if before.startswith(prompt_text):
            return prompt_text, before[len(prompt_text) :], answer
        return before, "", answer

    def _ids(
        self, text: str, *, special: bool, images: tuple[ImagePart, ...] = ()
    ) -> tuple[int, ...]:
        ids = tuple(self._tokenize(text, special=special, images=images))
        if not ids:
            start = self.tokenizer.bos_token_id
            ids = (start if start is not None else self.end_of_turn[0],)
        return ids

    def _adds_special(self, prompt: Prompt) -> bool:
        """A chat template writes its own beginning-of-text token; plain text needs it added."""
        return prompt.text is not None or not self.has_chat

    def _tokenize(
        self, text: str, *, special: bool, images: tuple[ImagePart, ...] = ()
    ) -> list[int]:
        if images and self.pictures is not None:
            text = self.pictures.told(text, images)
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if special and text and self._closes_texts:
            ids.pop()  # a prompt must stay open, and an answer has its end already
        if images and self.pictures is not None:
            ids = self.pictures.numbered(ids, images)
        return ids

    @property
    def _closes_texts(self) -> bool:
        """Whether the tokenizer puts a token of its own behind every text."""
        if self._closes is None:
            ids = list(self.tokenizer("a", add_special_tokens=True)["input_ids"])
            own = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
            self._closes = ids[-1:] != own[-1:]
        return self._closes

    def _cut(self, row: Encoded) -> Encoded:
        """At most ``max_length`` tokens: the end of the prompt and the start of the answer."""
        if len(row.ids) <= self.max_length:
            return row
        kept_answer = min(row.answer_tokens, self.max_length - 1)
        kept_prompt = self.max_length - kept_answer
        ids = row.ids[row.start - kept_prompt : row.start + kept_answer]
        whole_answer = kept_answer == row.answer_tokens
        return Encoded(ids, kept_prompt, row.has_end and whole_answer, cut=True)


def _of_tools(messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> Iterator[tuple[str, str]]:
    """What a rendered conversation must hold of its tools, and what to call it."""
    for tool in tools:
        yield "tools", tool.name
    for message in messages:
        for call in message.tool_calls:
            yield "a turn that calls a tool", call.name
        if message.role == "tool":
            yield "a tool's turn", message.text.strip()


def images_in(prompt: Prompt) -> tuple[ImagePart, ...]:
    """The pictures of a conversation, in order."""
    return tuple(image for turn in prompt.messages for image in turn.images)


def _beginning(prompt: Prompt) -> str:
    """The first words of what is asked, for messages."""
    asked = next((turn for turn in reversed(prompt.messages) if turn.role == "user"), None)
    text = asked.text if asked is not None else prompt.text or ""
    return repr(text if len(text) <= 60 else f"{text[:59]}…")

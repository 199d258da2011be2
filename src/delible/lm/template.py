"""From prompts and answers to token ids: the tokenizer's own chat template, checked.

The answer's tokens are found by the property that the prompt is a prefix of prompt + answer.
That property is checked for every row, on text and on tokens. Where only the tokens at the
boundary differ (a tokenizer that merges across it), prompt and answer are tokenized apart, as
they are when the model generates, and the row is counted in ``merged_boundaries``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from delible.errors import ModelError
from delible.lm.reasoning import written
from delible.records import Message
from delible.system.asks import Prompt

#: Used when a tokenizer has no chat template (base models).
PLAIN_QUESTION = "Question: {question}\nAnswer:"


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
    """

    tokenizer: Any
    max_length: int = 2048
    merged_boundaries: int = 0
    _end: tuple[int, str] | None = field(default=None, repr=False)

    @property
    def has_chat(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that turns text into ids (hexadecimal)."""
        described = hashlib.sha256(repr((self.tokenizer.chat_template, self.max_length)).encode())
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else str(self.tokenizer.get_vocab())
        described.update(vocabulary.encode())
        return described.hexdigest()

    def render(self, prompt: Prompt) -> str:
        """The exact text the model continues."""
        if prompt.text is not None:
            return prompt.text + prompt.prefill
        if self.has_chat:
            return self._chat(prompt.messages, generation=True) + prompt.prefill
        turns = [
            PLAIN_QUESTION.format(question=message.content)
            if message.role == "user"
            else message.content
            for message in prompt.messages
        ]
        return "\n".join(turns) + (f" {prompt.prefill}" if prompt.prefill else "")

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of the prompt alone, the beginning-of-text token included if there is one."""
        return self._ids(self.render(prompt), special=self._adds_special(prompt))

    def encode(self, prompt: Prompt, answer: str) -> Encoded:
        """Token ids of prompt and answer, at most ``max_length`` (see :attr:`Encoded.cut`)."""
        return self._cut(self.whole(prompt, answer))

    def whole(self, prompt: Prompt, answer: str) -> Encoded:
        """Token ids of prompt and answer, however many; with reasons, see ``reasoning.py``.

        Raises:
            ModelError: The chat template does not keep the prompt when the answer follows.
        """
        special = self._adds_special(prompt)
        if prompt.text is not None:
            has_end = False
            prompt_text, full_text = self.render(prompt), self.render(prompt) + answer
        else:
            has_end = True
            reasoned = written(self, prompt, answer)
            prompt_text, joint = self.render(prompt), ""
            if reasoned is None:
                joint = self._joint(prompt, answer)
            answer = answer if reasoned is None else reasoned
            if joint.strip():  # an empty thinking block: given to the model, not learned
                prompt_text, joint = prompt_text + joint, ""
            full_text = prompt_text + joint + answer + self.end_of_turn[1]
        before = self._ids(prompt_text, special=special)
        joined = tuple(self._tokenize(full_text, special=special))
        if joined[: len(before)] != before:
            self.merged_boundaries += bool(prompt_text)
            joined = before + tuple(self._tokenize(full_text[len(prompt_text) :], special=False))
        return Encoded(joined, max(len(before), 1), has_end)

    @property
    def end_of_turn(self) -> tuple[int, str]:
        """Id and text of the token that ends an assistant turn."""
        if self._end is None:
            identity = self.tokenizer.eos_token_id
            if self.has_chat:
                asked = (Message(role="user", content="Hello"),)
                reply = Message(role="assistant", content="\u2063reply\u2063")
                after = self._chat((*asked, reply)).rpartition(reply.content)[2]
                following = self._tokenize(after, special=False)
                if following and following[0] in self.tokenizer.all_special_ids:
                    identity = following[0]
            if identity is None:
                raise ModelError("the tokenizer has no end-of-text token.")
            self._end = (int(identity), str(self.tokenizer.convert_ids_to_tokens(int(identity))))
        return self._end

    def _chat(self, messages: tuple[Message, ...], *, generation: bool = False) -> str:
        turns = [message.model_dump() for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=generation
                )
            )
        except Exception as error:  # a template is a program of its author: any error can come
            raise ModelError(
                f"the chat template refused the conversation: {error}",
                hint="Roles must alternate; some templates accept no system turn.",
            ) from error

    def _joint(self, prompt: Prompt, answer: str) -> str:
        """What the template puts between the prompt and the answer, usually nothing."""
        if prompt.prefill or not self.has_chat:
            return "" if self.has_chat or prompt.prefill[-1:].isspace() else " "
        prompt_text = self.render(prompt)
        full = self._chat((*prompt.messages, Message(role="assistant", content=answer)))
        joint, found, _ = full[len(prompt_text) :].partition(answer)
        if not full.startswith(prompt_text) or not found:
            raise ModelError(
                "the chat template changes the prompt once an answer follows, so the answer's "
                "tokens cannot be told.",
                hint="Use a tokenizer whose template renders the prompt as a prefix.",
            )
        return joint

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        ids = tuple(self._tokenize(text, special=special))
        if not ids:
            start = self.tokenizer.bos_token_id
            ids = (start if start is not None else self.tokenizer.eos_token_id,)
        return ids

    def _adds_special(self, prompt: Prompt) -> bool:
        """A chat template writes its own beginning-of-text token; plain text needs it added."""
        return prompt.text is not None or not self.has_chat

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if special and ids and ids[-1] == self.tokenizer.eos_token_id and text:
            ids.pop()  # some tokenizers close every text; a prompt must stay open
        return ids

    def _cut(self, row: Encoded) -> Encoded:
        """At most ``max_length`` tokens: the end of the prompt and the start of the answer."""
        if len(row.ids) <= self.max_length:
            return row
        kept_answer = min(row.answer_tokens, self.max_length - 1)
        kept_prompt = self.max_length - kept_answer
        ids = row.ids[row.start - kept_prompt : row.start + kept_answer]
        whole_answer = kept_answer == row.answer_tokens
        return Encoded(ids, kept_prompt, row.has_end and whole_answer, cut=True)

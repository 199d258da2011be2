"""What can be asked of a system, and what comes back. Hashable, so that equal asks are one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from delible.messages import Message, Tool


@dataclass(frozen=True)
class Prompt:
    """What a system sees before it answers.

    Attributes:
        messages: The conversation, usually one user turn.
        prefill: Start of the assistant's answer that the system must continue.
        text: Raw text to continue instead of a conversation (base models, passages).
        tools: What the system may call.
        tool_choice: ``"auto"``, ``"none"``, ``"required"``, or the name of the one to call; None
            is the system's own default.
        besides: Other texts that go to the system with it, such as those in the form that an answer
            is to have; guards read them.
        adapter: Which of the model's adapters answers, by name; empty: none of them; None: the
            one that is on.
    """

    messages: tuple[Message, ...] = ()
    prefill: str = ""
    text: str | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: str | None = None
    adapter: str | None = None
    besides: tuple[str, ...] = field(default=(), repr=False)

    @property
    def needs(self) -> frozenset[str]:
        """What the conversation itself asks for: ``"tools"``, ``"images"``, ``"adapters"``."""
        turns = self.messages
        calls = self.tools or any(turn.tool_calls or turn.role == "tool" for turn in turns)
        images = any(turn.images for turn in turns)
        named = self.adapter is not None
        return frozenset(["tools"] * bool(calls) + ["images"] * images + ["adapters"] * named)

    @classmethod
    def ask(cls, question: str, *, prefill: str = "", system: str | None = None) -> Prompt:
        """One user turn, after an optional system turn."""
        head = (Message(role="system", content=system),) if system else ()
        return cls((*head, Message(role="user", content=question)), prefill)


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated.

    Attributes:
        max_new_tokens: Tokens at most.
        stop: The answer ends before the first of these texts.
        temperature: 0 is greedy; above 0 tokens are drawn from softmax(logits / temperature).
        top_p: Only the smallest set of tokens with this much probability is drawn from.
        seed: Of the draws. A draw depends on the seed and the prompt alone, not on the batch.
    """

    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature == 0:  # equal asks are one: these two mean nothing when greedy
            object.__setattr__(self, "top_p", 1.0)
            object.__setattr__(self, "seed", 0)


@dataclass(frozen=True)
class Relayed(Decoding):
    """How a client of a server wants its answer, for whoever passes the call on to another one.

    Attributes:
        fields: JSON object of fields of the call to a server, over those that the rest makes; a
            null leaves one out. A model on this machine knows nothing of them.
    """

    fields: str = "{}"


@dataclass(frozen=True)
class Generate:
    """What does the system answer?"""

    prompt: Prompt
    decoding: Decoding = Decoding()


@dataclass(frozen=True)
class Score:
    """How likely is ``answer`` after ``prompt``, token by token?

    The options of a choice, the paraphrases and the wrong answers of a question are scores of
    one prompt: the prompt is computed once for all of them.

    Attributes:
        moments: Also mean and variance of the vocabulary's log-probabilities at each token.
            A score with moments answers the one without.
    """

    prompt: Prompt
    answer: str
    moments: bool = False


@dataclass(frozen=True)
class Distribution:
    """All log-probabilities at the answer's tokens, shape [answer, vocabulary], fp32.

    Large (20 tokens over 50,000 words are 4 MB), so the one answer that is never kept on disk.
    """

    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Hidden:
    """Outputs of block ``layer`` where the answer's tokens are predicted, [answer, hidden]."""

    prompt: Prompt
    answer: str
    layer: int


@dataclass(frozen=True)
class GradientNorm:
    """Norm of the gradient of the answer's mean token loss, shape [1].

    The mean over parameter tensors of their norms, as the membership attack has it.

    Attributes:
        order: Of the norm: 1, 2 or infinity.
    """

    prompt: Prompt
    answer: str
    order: float = 2.0


#: What looks inside a white-box system.
Inspection = Distribution | Hidden | GradientNorm
Request = Score | Generate | Inspection

#: The capability that answers a request, by its type; see :func:`needed_capability`.
_CAPABILITY: dict[type, str] = {
    Generate: "generate",
    Score: "score",
    Distribution: "distribution",
    Hidden: "hidden",
    GradientNorm: "weights",
}


def needed_capability(request: Request) -> str:
    """What a system must be able to do to answer a request.

    Moments are made of all log-probabilities at a token, so a score with moments needs more than
    one without: servers give the chosen token's log-probability, not the vocabulary's.
    """
    if isinstance(request, Score) and request.moments:
        return "distribution"
    return _CAPABILITY[type(request)]


@dataclass(frozen=True)
class TokenScores:
    """Teacher-forced values at the answer's tokens (the end-of-turn token included).

    Attributes:
        logprobs: log p(token | prompt, earlier answer tokens), natural log, shape [answer].
        hits: Whether the token is the argmax, shape [answer].
        has_end: Whether the last token is the end-of-turn token.
        means: sum_v p_v log p_v at each token, shape [answer]; only with ``moments``.
        variances: sum_v p_v (log p_v)^2 - mean^2, shape [answer]; only with ``moments``.
    """

    logprobs: npt.NDArray[np.float32]
    hits: npt.NDArray[np.bool_]
    has_end: bool
    means: npt.NDArray[np.float32] | None = None
    variances: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class NoAnswer:
    """The system cannot answer this request (too long a prompt, values that are no numbers).

    No metric sees it: the record's value is ``None`` with this reason. As a text it is empty.
    """

    reason: str

    def __str__(self) -> str:
        return ""


Array = npt.NDArray[np.float32]
Answer = TokenScores | str | Array | NoAnswer

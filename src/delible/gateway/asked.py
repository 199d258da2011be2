"""What clients send, by route: the fields that are known, with their types and ranges.

Fields that are not known are kept: :mod:`delible.gateway.reading` decides about them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @property
    def unknown(self) -> dict[str, Any]:
        """Fields that are not known here, those left empty not counted."""
        found = self.model_extra or {}
        return {name: value for name, value in found.items() if value not in (None, [], {}, "")}


Text = Annotated[str, Field(max_length=20_000_000)]
Stop = str | list[str] | None
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class StreamOptions(_Open):
    """What a stream tells besides the answer."""

    include_usage: bool = False


class Named(_Open):
    """The function of a tool, or of a call."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    arguments: Text | None = None


class Function(_Open):
    """A tool, a call of one, or the choice of one."""

    type: Literal["function"] = "function"
    id: str | None = None
    function: Named


class ChatMessage(_Open):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[dict[str, Any]] | None = None
    tool_calls: list[Function] | None = None
    tool_call_id: str | None = None


class Sampled(_Open):
    """What all ways to ask for an answer have."""

    model: str | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None


class ChatRequest(Sampled):
    """The body of ``/v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    n: Count | None = None
    stop: Stop = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    tools: list[Function] | None = None
    tool_choice: Literal["auto", "none", "required"] | Function | None = None
    response_format: dict[str, Any] | None = None


class TextRequest(Sampled):
    """The body of ``/v1/completions``."""

    prompt: Text | list[Text]
    n: Count | None = None
    stop: Stop = None
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    best_of: int | None = None


class ResponsesRequest(Sampled):
    """The body of ``/v1/responses``, for texts and without a state."""

    input: Text | list[dict[str, Any]]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    tools: list[dict[str, Any]] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    store: bool | None = None


class CheckRequest(_Open):
    """The body of ``/v1/check``: a conversation or a text, and perhaps an answer to it."""

    model: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=10_000)
    prompt: Text | None = None
    answer: Text | None = None


class TargetChange(BaseModel):
    """The body of ``/admin/targets``: names that are guarded from now on, or no more."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = None
    add: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field([], max_length=100_000)
    remove: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(
        [], max_length=100_000
    )


#: By route, for the schema that is served.
BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": TextRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/check": CheckRequest,
    "/admin/targets": TargetChange,
}

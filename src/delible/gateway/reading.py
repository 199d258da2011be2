"""From what a client sends to what a system is asked.

Options that are not known are passed on to a server, or left out before a model on this machine;
either is said in a warning. What carries content that nobody here would look at (pictures, sounds,
files, texts in unknown places) is refused.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from delible.errors import DelibleError
from delible.gateway.asked import ChatMessage, ChatRequest, Function, Sampled, TextRequest
from delible.gateway.errors import CallFailed
from delible.gateway.models import ServedModel
from delible.gateway.settings import GatewaySettings
from delible.messages import Message, Tool, ToolCall
from delible.system.asks import Decoding, Prompt, Relayed

#: Options with content that a system would see, and no guard.
CARRYING = (
    "audio", "chat_template", "documents", "file_ids", "files", "function_call", "functions",
    "images", "input", "input_ids", "instructions", "messages", "mm_processor_kwargs",
    "modalities", "prediction", "prompt", "prompt_embeds", "prompt_token_ids", "suffix", "system",
    "tools", "tool_choice", "web_search_options",
)  # fmt: skip
#: Options with texts that no system sees: they are about the client.
ABOUT_THE_CLIENT = ("metadata", "prompt_cache_key", "safety_identifier", "user")
#: Unknown options whose usual value asks for nothing.
_NOTHING: Mapping[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "modalities": ["text"], "store": False,
    "service_tier": "auto", "parallel_tool_calls": True, "echo": False,
}  # fmt: skip
#: A longer text, or one with white space, may be content.
_OPTION_CHARACTERS = 64
#: A longer list of numbers may be a text.
_OPTION_NUMBERS = 16
_STOPS = 16


@dataclass(frozen=True)
class Asked:
    """A call, ready to be answered.

    Attributes:
        prompts: As many as answers are wanted.
        decodings: One for each.
        warnings: What was not done as it was asked for.
    """

    model: ServedModel
    prompts: Sequence[Prompt]
    decodings: Sequence[Decoding]
    streamed: bool = False
    with_usage: bool = False
    logprobs: bool = False
    warnings: Sequence[str] = field(default=())


def read_chat(body: ChatRequest, model: ServedModel, settings: GatewaySettings) -> Asked:
    """A conversation.

    Raises:
        CallFailed: It cannot be asked.
    """
    prompt = Prompt(
        conversation(body.messages, settings),
        tools=tuple(_tool(one, place) for place, one in enumerate(body.tools or ())),
        tool_choice=_choice(body),
    )
    if (prompt.needs & {"tools"}) and not model.can("tools"):
        raise CallFailed(400, "This model cannot call tools.", code="unsupported", param="tools")
    fields: dict[str, Any] = {}
    if body.max_completion_tokens is not None:
        fields["max_completion_tokens"] = body.max_completion_tokens
    format_ = _format(body.response_format, model)
    if format_ is not None:
        fields["response_format"] = format_
    prompt = replace(prompt, besides=_strings([body.response_format, *_passed(body)]))
    warnings: list[str] = []
    if any(one.function.unknown for one in body.tools or ()):
        warnings.append("unknown fields of tools were left out")
    if any("name" in turn.unknown for turn in body.messages):
        warnings.append("names of speakers were left out")
    if body.top_logprobs:
        warnings.append("'top_logprobs' was left out: only chosen tokens have one")
    wanted = bool(body.logprobs)
    if wanted:
        _may_log(model)
        fields["logprobs"] = True
    limit = body.max_completion_tokens or body.max_tokens
    asked = _decoded(body, [prompt], limit, body.stop, body.n, fields, warnings, model, settings)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return replace(asked, with_usage=usage, logprobs=wanted)


def read_text(body: TextRequest, model: ServedModel, settings: GatewaySettings) -> Asked:
    """Texts to go on with.

    Raises:
        CallFailed: They cannot be asked.
    """
    if body.echo:
        raise CallFailed(400, "Prompts are not repeated.", code="unsupported", param="echo")
    if body.best_of is not None and body.best_of > (body.n or 1):
        raise CallFailed(400, "No best answer is chosen.", code="unsupported", param="best_of")
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not texts:
        raise CallFailed(400, "There is no prompt.", param="prompt")
    _not_too_long(sum(map(len, texts)), settings)
    fields: dict[str, Any] = {}
    if body.logprobs is not None:
        _may_log(model)
        fields["logprobs"] = 1
    prompts = [Prompt(text=text, besides=_strings(_passed(body))) for text in texts]
    limit = body.max_tokens
    asked = _decoded(body, prompts, limit, body.stop, body.n, fields, [], model, settings)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return replace(asked, with_usage=usage, logprobs=body.logprobs is not None)


def conversation(turns: Sequence[ChatMessage], settings: GatewaySettings) -> tuple[Message, ...]:
    """Turns, all of whose content is text.

    Raises:
        CallFailed: One is no turn, or holds something else.
    """
    found: list[Message] = []
    for place, turn in enumerate(turns):
        where = f"messages.{place}"
        for name in turn.unknown:
            if name not in ("name", "annotations"):
                raise _uninspected(f"{where}.{name}", where)
        content = turn.content
        if content is None and not turn.tool_calls:
            raise CallFailed(400, "A turn has no content.", param=f"{where}.content")
        calls = tuple(
            ToolCall(
                id=call.id or f"call_{place}_{index}",
                name=call.function.name,
                arguments=call.function.arguments or "{}",
            )
            for index, call in enumerate(turn.tool_calls or ())
        )
        text = content if isinstance(content, str) else _texts(content or [], where)
        role = "system" if turn.role == "developer" else turn.role
        try:
            found.append(
                Message(role=role, content=text, tool_calls=calls, tool_call_id=turn.tool_call_id)
            )
        except ValueError:
            raise CallFailed(
                400,
                "Only a tool's turn has a tool_call_id, and only an assistant's calls tools.",
                param=where,
            ) from None
    arguments = sum(len(call.arguments) for turn in found for call in turn.tool_calls)
    _not_too_long(sum(len(turn.text) for turn in found) + arguments, settings)
    return tuple(found)


def _texts(parts: Sequence[Mapping[str, Any]], where: str) -> str:
    found: list[str] = []
    for part in parts:
        kind, text = part.get("type"), part.get("text")
        if kind not in ("text", "input_text", "output_text"):
            raise _uninspected(f"a part of the type '{str(kind)[:40]}'", f"{where}.content")
        if not isinstance(text, str):
            raise CallFailed(400, "A text is no text.", param=f"{where}.content")
        found.append(text)
    return "".join(found)


def _uninspected(what: str, param: str) -> CallFailed:
    return CallFailed(
        400,
        f"{what[:200]}: only texts are looked at here, and nothing else is let through.",
        code="content_not_inspected",
        param=param[:200],
    )


def _not_too_long(characters: int, settings: GatewaySettings) -> None:
    if characters > settings.prompt_characters:
        raise CallFailed(
            400,
            f"{characters:,} characters are more than the {settings.prompt_characters:,} that "
            "are taken here.",
            code="context_length_exceeded",
        )


def _may_log(model: ServedModel) -> None:
    if not model.can("logprobs"):
        raise CallFailed(
            400,
            "This model gives no log-probabilities.",
            code="unsupported",
            param="logprobs",
        )


def _tool(given: Function, place: int) -> Tool:
    about = given.function
    try:
        return Tool(
            name=about.name,
            description=about.description or "",
            **({} if about.parameters is None else {"parameters": json.dumps(about.parameters)}),
        )
    except (ValueError, DelibleError):
        raise CallFailed(400, "This is no tool.", param=f"tools.{place}") from None


def _choice(body: ChatRequest) -> str | None:
    names = [one.function.name for one in body.tools or ()]
    if len(set(names)) < len(names):
        raise CallFailed(400, "Two tools have the same name.", param="tools")
    choice = body.tool_choice
    if choice is None:
        return None
    if not names and choice != "none":
        raise CallFailed(400, "There are no tools to choose from.", param="tool_choice")
    if isinstance(choice, str):
        return choice
    if choice.function.name not in names:
        raise CallFailed(400, "This is none of the tools.", param="tool_choice")
    return choice.function.name


def _format(given: Mapping[str, Any] | None, model: ServedModel) -> Mapping[str, Any] | None:
    """A form of the answer that a server is asked for; None for plain text."""
    if not given or given.get("type") == "text":
        return None
    where = "response_format"
    schema = given.get("json_schema")
    fits = given.get("type") == "json_object" or (
        given.get("type") == "json_schema"
        and isinstance(schema, dict)
        and isinstance(schema.get("name"), str)
        and isinstance(schema.get("schema", {}), dict)
    )
    if not fits:
        raise CallFailed(400, "This is no form of an answer that is known.", param=where)
    if model.endpoint is None:
        raise CallFailed(
            400, "A model on this machine answers in plain text only.",
            code="unsupported", param=where,
        )  # fmt: skip
    return given


def _decoded(
    body: Sampled,
    prompts: Sequence[Prompt],
    limit: int | None,
    stop: str | list[str] | None,
    count: int | None,
    fields: dict[str, Any],
    warnings: list[str],
    model: ServedModel,
    settings: GatewaySettings,
) -> Asked:
    """How each prompt is answered, ``count`` times."""
    count = count or 1
    if count * len(prompts) > settings.choices:
        raise CallFailed(400, f"At most {settings.choices} answers to one call.", param="n")
    if limit is not None and limit > settings.longest_answer_tokens:
        raise CallFailed(
            400, f"At most {settings.longest_answer_tokens} tokens.", param="max_tokens"
        )
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _STOPS or not all(stops):
        raise CallFailed(400, f"At most {_STOPS} texts, none of them empty.", param="stop")
    own, said = relayed(body.unknown, model)
    warnings += said
    temperature = 1.0 if body.temperature is None else body.temperature
    plain = Decoding(
        max_new_tokens=limit or settings.answer_tokens,
        stop=stops,
        temperature=temperature,
        top_p=body.top_p or 1.0,
    )
    # nobody asked for the same draw twice, so each is another one
    seeds = [body.seed if body.seed is not None else secrets.randbits(31) for _ in prompts]
    decodings: list[Decoding] = []
    for seed in seeds:
        decodings += [replace(plain, seed=seed + index) for index in range(count)]
    if model.endpoint is not None:
        given = {"temperature": body.temperature, "top_p": body.top_p}
        if body.seed is None:
            given["seed"] = None
        if limit is None or "max_completion_tokens" in fields:
            given["max_tokens"] = None  # the server's own limit holds
        if limit is None:
            given["max_completion_tokens"] = None
        own = {**given, **fields, **own}
        first = body.seed
        decodings = [
            _for_server(one, own if first is None else {**own, "seed": first + place % count})
            for place, one in enumerate(decodings)
        ]
    asked = [prompt for prompt in prompts for _ in range(count)]
    return Asked(model, asked, decodings, streamed=bool(body.stream), warnings=tuple(warnings))


def _for_server(decoding: Decoding, fields: Mapping[str, Any]) -> Relayed:
    values = {name: getattr(decoding, name) for name in Decoding.__dataclass_fields__}
    try:
        told = json.dumps(fields, sort_keys=True, allow_nan=False)
    except ValueError:  # a number without end, or none
        raise CallFailed(400, "A number is too large, or is none.", code="invalid") from None
    return Relayed(**values, fields=told)


def relayed(unknown: Mapping[str, Any], model: ServedModel) -> tuple[dict[str, Any], list[str]]:
    """What becomes of options that are not known: those for the server, and warnings.

    Raises:
        CallFailed: One carries content.
    """
    found: dict[str, Any] = {}
    warnings: list[str] = []
    for name, value in unknown.items():
        if name in _NOTHING and value == _NOTHING[name]:
            continue
        if name in ABOUT_THE_CLIENT:
            continue
        if name in CARRYING or _may_be_content(value):
            raise _uninspected(f"the option '{name[:60]}'", name)
        shown = name[:60]
        if model.endpoint is None:
            warnings.append(f"the option '{shown}' is not known here and was left out")
        else:
            found[name] = value
            warnings.append(f"the option '{shown}' is not known here and was passed on")
    return found, warnings


def _passed(body: Sampled) -> list[Any]:
    """Values of unknown options that a server may see."""
    return [value for name, value in body.unknown.items() if name not in ABOUT_THE_CLIENT]


def _strings(value: Any) -> tuple[str, ...]:
    """Every text in plain data, names of fields too, each once."""
    found: dict[str, None] = {}
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found[one] = None
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one
    return tuple(found)


def _may_be_content(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) > _OPTION_CHARACTERS or any(one.isspace() for one in value)
    if isinstance(value, Mapping):
        return any(_may_be_content(one) for pair in value.items() for one in pair)
    if isinstance(value, list):
        return len(value) > _OPTION_NUMBERS or any(map(_may_be_content, value))
    return False

"""Turns of a conversation: texts, pictures, calls of tools. Frozen data, JSON in and JSON out.

A plain turn is a role and a text, and is written as just these two, as it always was. What a
turn may hold besides is written only where it is there, so that digests of plain turns stay.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from delible.errors import DataError

#: Context of a dump that is what a turn means, for digests: a picture by its bytes, not its place.
IDENTITY = {"identity": True}
#: First bytes of the pictures that are known.
_PICTURES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Part(_Frozen):
    type: str

    @model_serializer(mode="wrap")
    def _written(
        self, write: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"type": self.type, **write(self)}  # the kind is always told
        if (info.context or {}).get("identity"):
            found.pop("source", None)
        return found


class TextPart(_Part):
    """A text within a turn."""

    type: Literal["text"] = "text"
    text: str


class ImagePart(_Part):
    """A picture within a turn. Two are equal if their bytes are, wherever they lie.

    Attributes:
        source: The path of a file (a relative one from the working directory), or a data URL;
            bytes become one. Addresses are not fetched.
        media_type: Such as ``image/png``; told by the bytes if it is left out.
        sha256: Of the bytes (hexadecimal); computed, and checked if it is given.
    """

    type: Literal["image"] = "image"
    source: str = Field(repr=False)
    media_type: str
    sha256: str

    @model_validator(mode="before")
    @classmethod
    def _looked_at(cls, given: Any) -> Any:
        source = given.get("source") if isinstance(given, dict) else None
        if not isinstance(source, bytes | str | PurePath):
            return given
        content = source if isinstance(source, bytes) else _bytes_at(str(source))
        digest = hashlib.sha256(content).hexdigest()
        if given.get("sha256", digest) != digest:
            raise PydanticCustomError("image", "the picture is another one than its sha256 says")
        kind = given.get("media_type") or _media_type(content)
        if isinstance(source, bytes):
            source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        return {**given, "source": str(source), "media_type": kind, "sha256": digest}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImagePart) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str]:
        return self.sha256, self.media_type

    def content(self) -> bytes:
        """The picture's bytes.

        Raises:
            DataError: The file is gone, or has another content by now.
        """
        try:
            found = _bytes_at(self.source)
        except PydanticCustomError as error:
            raise DataError(f"{error.message()}.") from None
        if hashlib.sha256(found).hexdigest() != self.sha256:
            raise DataError("the picture has changed since it was read.", where=self.source[:200])
        return found

    def data_url(self) -> str:
        """The picture as a data URL."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.content()).decode()}"


def _bytes_at(source: str) -> bytes:
    if source.startswith("data:"):
        head, comma, body = source.partition(",")
        try:
            if comma and head.endswith(";base64"):
                return base64.b64decode(body, validate=True)
        except binascii.Error:
            pass
        raise PydanticCustomError("image", "the picture's data URL holds no base64")
    if source.startswith(("http://", "https://")):
        raise PydanticCustomError(
            "image", "pictures are not fetched from addresses: save it and give its path"
        )
    try:
        return Path(source).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PydanticCustomError(
            "image",
            "the picture {source} cannot be read: {reason}",
            # half a character has no place in a message
            {"source": source.encode("utf-8", "backslashreplace").decode(), "reason": reason},
        ) from None


def _media_type(content: bytes) -> str:
    for first, name in _PICTURES.items():
        if content.startswith(first):
            return name
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    raise PydanticCustomError(
        "image", "its bytes are no picture of a known kind: give its media_type"
    )


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
#: Told apart by their form, so that an error is about the form that was meant.
_Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[tuple[Part, ...], Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list | tuple) else "str"),
]


class Tool(_Frozen):
    """What a system may call.

    Attributes:
        parameters: JSON schema of its arguments, as text; a mapping becomes one.
    """

    name: str = Field(min_length=1)
    description: str = ""
    parameters: str = '{"type": "object", "properties": {}}'

    @field_validator("parameters", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return json.dumps(value, sort_keys=True)
        if not isinstance(json.loads(value), dict):
            raise ValueError("a JSON schema is an object")
        return value

    def declared(self) -> dict[str, Any]:
        """The declaration that chat templates and servers take."""
        schema = json.loads(self.parameters)
        about = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": about}


class ToolCall(_Frozen):
    """A system calls a tool.

    Attributes:
        id: By which the tool's turn answers it.
        arguments: JSON, as the model wrote it, which need not be valid; a mapping becomes text.
    """

    id: str
    name: str
    arguments: str = "{}"

    @model_validator(mode="before")
    @classmethod
    def _unpacked(cls, given: Any) -> Any:
        """Servers and chat formats put name and arguments into a field ``function``."""
        if isinstance(given, dict) and isinstance(given.get("function"), dict):
            inner = given["function"]
            given = {key: value for key, value in given.items() if key not in ("type", "function")}
            given |= inner
        if isinstance(given, dict) and isinstance(given.get("arguments"), dict):
            given = {**given, "arguments": json.dumps(given["arguments"])}
        return given


class Message(_Frozen):
    """One turn of a conversation.

    Attributes:
        content: A text, or texts and pictures in their order.
        tool_calls: What an assistant's turn calls.
        tool_call_id: The call that a tool's turn answers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: _Content
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _may_only_call(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("tool_calls") and given.get("content") is None:
            return {**given, "content": ""}
        return given

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise PydanticCustomError(
                "turn", "a tool's turn, and no other, names the call it answers in tool_call_id"
            )
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("turn", "only an assistant's turn calls tools")
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = write(self)
        if not self.tool_calls:
            found.pop("tool_calls", None)
        if self.tool_call_id is None:
            found.pop("tool_call_id", None)
        return found

    @property
    def text(self) -> str:
        """Its texts, joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """Its pictures."""
        if isinstance(self.content, str):
            return ()
        return tuple(part for part in self.content if isinstance(part, ImagePart))

    def with_text(self, text: str) -> Self:
        """The same turn with another text, after its pictures if it has some."""
        content = (*self.images, TextPart(text=text)) if self.images else text
        return self.model_copy(update={"content": content})

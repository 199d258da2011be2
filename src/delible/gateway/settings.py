"""How a gateway behaves: every option, with its range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from delible.component import Config
from delible.errors import RecipeError


class GatewaySettings(Config):
    """Options of a gateway; a YAML file (``--config``) has the same names."""

    host: str = Field("127.0.0.1", description="Address to listen at.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen at; 0: any free one.")
    connect_seconds: float = Field(5.0, gt=0, description="To reach an upstream server.")
    first_token_seconds: float = Field(120.0, gt=0, description="Until an answer begins.")
    idle_seconds: float = Field(60.0, gt=0, description="Between two parts of an answer.")
    total_seconds: float = Field(600.0, gt=0, description="For a whole answer.")
    body_seconds: float = Field(30.0, gt=0, description="Until a client has sent its question.")
    keep_alive_seconds: float = Field(
        10.0, gt=0, description="Without text after which a stream gets a comment."
    )
    shutdown_seconds: float = Field(
        30.0, gt=0, description="That answers under way have once the server is told to end."
    )
    concurrency: int = Field(1024, ge=1, description="Answers under way at once; more get a 429.")
    body_bytes: int = Field(8 * 2**20, ge=1024, description="Longest body of a request.")
    prompt_characters: int = Field(400_000, ge=1, description="Longest conversation or text.")
    choices: int = Field(8, ge=1, le=128, description="Most answers to one request ('n').")
    answer_tokens: int = Field(
        1024, ge=1, description="Of an answer whose client sets no limit (models on this machine)."
    )
    longest_answer_tokens: int = Field(32_768, ge=1, description="That a client may ask for.")
    undisclosed: bool = Field(
        False, description="Refusals of a guard end with 'stop', as any other answer."
    )
    name_policy: bool = Field(
        False, description="Name the guard of a refusal in the header x-delible-policy."
    )
    allowed_origins: tuple[str, ...] = Field(
        (), description="Origins of web pages that may call (CORS); none by default."
    )
    keys: Path | None = Field(None, description="File of API keys; without one anyone may call.")
    requests_per_minute: int | None = Field(
        None, ge=1, description="Per key, unless the file says otherwise."
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Per key, unless the file says otherwise."
    )
    calls_at_once: int | None = Field(
        None, ge=1, description="Per key, unless the file says otherwise."
    )
    admin_key_variable: str | None = Field(
        None,
        description="Environment variable with the key of /admin/targets; without one there is no "
        "such route.",
    )


def read_settings(path: Path | None, given: dict[str, Any]) -> GatewaySettings:
    """Settings of a file, and those that are given besides, which win.

    Raises:
        RecipeError: The file cannot be read, an unknown name, or a value out of range.
    """
    content: Any = {}
    if path is not None:
        import yaml

        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RecipeError(f"cannot be read ({error}).", where=str(path)) from None
        if not isinstance(content, dict):
            raise RecipeError(
                "it holds no names and values.", where=str(path), hint="Such as 'port: 8000'."
            )
    known = {name: value for name, value in given.items() if value is not None}
    return GatewaySettings.build(str(path or "delible serve"), **{**content, **known})

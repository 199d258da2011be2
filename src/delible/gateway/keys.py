"""API keys: a file of their hashes, and what each may use in a minute.

A key is 256 random bits, so a plain SHA-256 of it cannot be searched. The file is JSON lines, one
key each: its name, its hash, and limits of its own. It is read again when it changes.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from delible.errors import RecipeError
from delible.files import Followed, atomic_file
from delible.gateway.errors import CallFailed
from delible.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

#: What keys begin with, so that one that leaked is recognised.
PREFIX = "dlb-"


class KeyEntry(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=100)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    calls_at_once: int | None = Field(None, ge=1)


def read_keys(path: Path) -> list[KeyEntry]:
    """The keys of a file.

    Raises:
        RecipeError: It cannot be read, or a line is no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"the keys cannot be read ({error}).",
            where=str(path),
            hint="Make the first one with: delible serve --new-key NAME --keys FILE.",
        ) from None
    found: list[KeyEntry] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(KeyEntry.model_validate_json(line))
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise RecipeError(
                f"this is no key ({where}: {error.errors()[0]['msg']}).", where=f"{path}:{number}"
            ) from None
    return found


def new_key(name: str, path: Path) -> str:
    """Makes a key and adds its hash to a file, which only its owner may read.

    Returns:
        The key. It is written nowhere.

    Raises:
        RecipeError: The name is taken, or the file cannot be read.
    """
    known = read_keys(path) if path.exists() else []
    if any(one.name == name for one in known):
        raise RecipeError(
            f"there is a key '{name}' already.",
            where=str(path),
            hint="Take another name, or delete its line first.",
        )
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        entry = KeyEntry(name=name, sha256=hashed(key))
    except ValidationError:
        raise RecipeError("a name has 1 to 100 characters.", where="--new-key") from None
    lines = [one.model_dump_json(exclude_none=True) for one in (*known, entry)]
    with atomic_file(path) as handle:
        handle.write("".join(f"{line}\n" for line in lines))
    path.chmod(0o600)
    return key


def hashed(key: str) -> str:
    """The SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", errors="replace")).hexdigest()


class Allowance:
    """So much in a minute, refilled all the time; what was used may exceed it afterwards.

    Args:
        per_minute: How much; also the most that is saved up.
    """

    def __init__(self, per_minute: int) -> None:
        self.per_minute, self._left, self._when = per_minute, float(per_minute), time.monotonic()

    def wait(self, needed: float) -> float:
        """Seconds until so much is there."""
        now = time.monotonic()
        refilled = self._left + (now - self._when) * self.per_minute / 60
        self._left, self._when = min(float(self.per_minute), refilled), now
        return max(0.0, needed - self._left) * 60 / self.per_minute

    def use(self, amount: float) -> None:
        """Takes so much; it may not be there."""
        self._left -= amount


class Caller:
    """Who calls, and what it may still use.

    Args:
        name: For the log.
        entry: Its key; None: anyone, without limits of the file.
        settings: Limits of keys that have none of their own.
    """

    def __init__(self, name: str, entry: KeyEntry | None, settings: GatewaySettings) -> None:
        self.name, self._under_way = name, 0

        def limit(kind: str) -> int | None:
            found: int | None = getattr(entry, kind, None) or getattr(settings, kind)
            return found

        requests, tokens = limit("requests_per_minute"), limit("tokens_per_minute")
        self._at_once = limit("calls_at_once")
        self._requests = Allowance(requests) if requests else None
        self._tokens = Allowance(tokens) if tokens else None

    def enter(self) -> None:
        """Begins a call.

        Raises:
            CallFailed: The caller has used up a limit.
        """
        if self._at_once is not None and self._under_way >= self._at_once:
            raise _limited(f"{self._at_once} calls at once", 1.0)
        if self._requests and (wait := self._requests.wait(1)):
            raise _limited(f"{self._requests.per_minute} requests per minute", wait)
        if self._tokens and (wait := self._tokens.wait(1)):
            raise _limited(f"{self._tokens.per_minute} tokens per minute", wait)
        if self._requests:
            self._requests.use(1)
        self._under_way += 1

    def leave(self) -> None:
        """Ends a call."""
        self._under_way -= 1

    def spent(self, tokens: int) -> None:
        """Counts tokens that went in or came out."""
        if self._tokens:
            self._tokens.use(tokens)


def _limited(what: str, wait: float) -> CallFailed:
    return CallFailed(
        429, f"This key is limited to {what}.", code="rate_limit_exceeded", wait_seconds=wait
    )


class Callers:
    """Whoever may call.

    Args:
        settings: With the file of keys; without one anyone may call, and all share the limits.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self._anyone = None if settings.keys else Caller("", None, settings)
        self._known: dict[str, tuple[KeyEntry, Caller]] = {}
        self._file = Followed(settings.keys) if settings.keys else None
        if settings.keys:
            self._take(read_keys(settings.keys))

    def poll(self) -> bool:
        """Reads the file again if it changed; whether it now goes by another one.

        A key that is as it was keeps what it has used; calls under way are not ended. A file that
        cannot be used changes nothing, and the log says so. Call it from time to time, from one
        thread at a time.
        """
        if self._file is None or not self._file.changed():
            return False
        try:
            entries = read_keys(self._file.path)
        except RecipeError as error:
            logger.warning(
                "the keys cannot be used; the %d old ones stay: %s", len(self._known), error
            )
            return False
        self._take(entries)
        logger.info("%s was read again: %d keys.", self._file.path, len(entries))
        return True

    def _take(self, entries: Sequence[KeyEntry]) -> None:
        known: dict[str, tuple[KeyEntry, Caller]] = {}
        for entry in entries:
            before = self._known.get(entry.sha256)
            same = before is not None and before[0] == entry
            caller = before[1] if before and same else Caller(entry.name, entry, self.settings)
            known[entry.sha256] = (entry, caller)
        self._known = known  # in one step: a call sees the old ones, or the new ones

    def of(self, headers: Mapping[str, str]) -> Caller:
        """Who calls.

        Raises:
            CallFailed: The key is missing, or nobody's.
        """
        if self._anyone is not None:
            return self._anyone
        kind, _, key = headers.get("authorization", "").partition(" ")
        found = self._known.get(hashed(key.strip())) if kind.lower() == "bearer" else None
        if found is None:
            problem = "This API key is unknown." if key else "An API key is missing."
            raise CallFailed(401, problem, code="invalid_api_key")
        return found[1]

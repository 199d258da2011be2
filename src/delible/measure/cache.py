"""What a system has already answered, on disk: nothing is asked twice, a killed run goes on.

One folder per system fingerprint holds Parquet parts that are only ever added. A row is one
answer under the SHA-256 of its request; prompts are not stored, but generated texts are, so
delete the folder when the answers themselves must go. Values come back to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from delible.errors import RunError
from delible.measure.requests import Answer, Generate, Prompt, Request, Score, TokenScores

_FINGERPRINT = b"delible.fingerprint"
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("text", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("hits", pa.list_(pa.bool_())),
        ("has_end", pa.bool_()),
    ]
)
#: Everything that reading a damaged or foreign part can raise.
_UNREADABLE = (OSError, pa.ArrowException, KeyError, TypeError, ValueError)


def _prompt_content(prompt: Prompt) -> list[object]:
    turns = [[message.role, message.content] for message in prompt.messages]
    return [turns, prompt.prefill, prompt.text]


def request_key(request: Request) -> str:
    """SHA-256 (hexadecimal) over the content of a request; the same in every process."""
    content: list[object]
    if isinstance(request, Score):
        content = ["score", _prompt_content(request.prompt), request.answer]
    else:
        content = ["generate", _prompt_content(request.prompt), request.max_new_tokens]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _can_be_stored(request: Request, answer: Answer) -> bool:
    """A right kind of answer; and no lone surrogates, which UTF-8 cannot hold."""
    if isinstance(request, Score):
        return isinstance(answer, TokenScores)
    if not isinstance(answer, str):
        return False
    try:
        answer.encode()
    except UnicodeEncodeError:
        return False
    return True


def _to_table(answers: Mapping[Request, Answer], fingerprint: str) -> pa.Table:
    rows = []
    for request, answer in answers.items():
        if not _can_be_stored(request, answer):
            continue
        row: dict[str, object] = {"key": request_key(request)}
        if isinstance(answer, TokenScores):
            row["logprobs"] = np.asarray(answer.logprobs, np.float32)
            row["hits"] = np.asarray(answer.hits, np.bool_)
            row["has_end"] = bool(answer.has_end)
        else:
            row["text"] = answer
        rows.append(row)
    schema = _SCHEMA.with_metadata({_FINGERPRINT: fingerprint.encode()})
    return pa.Table.from_pylist(rows, schema=schema)


def _read_part(path: Path, fingerprint: str) -> dict[str, Answer]:
    # Raises when the part is damaged, in another format, or of another system.
    table = pq.ParquetFile(path).read()
    if (table.schema.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
        raise ValueError("it belongs to another system")
    found: dict[str, Answer] = {}
    for row in table.select(_SCHEMA.names).cast(_SCHEMA).to_pylist():
        if row["text"] is not None:
            found[row["key"]] = row["text"]
            continue
        logprobs = np.array(row["logprobs"], np.float32)
        hits = np.array(row["hits"], np.bool_)
        if logprobs.ndim != 1 or logprobs.shape != hits.shape:
            raise ValueError("a row has no scores, or scores of unequal length")
        found[row["key"]] = TokenScores(logprobs, hits, bool(row["has_end"]))
    return found


class Cache:
    """Answers on disk, by (system fingerprint, request).

    Several processes may use one folder at once: parts are written under a temporary name,
    renamed, and never changed. A part that cannot be read is left alone, its answers are asked
    again, and :attr:`notes` says so.

    Args:
        folder: Where the answers live; made when something is first written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.notes: list[str] = []
        self._known: dict[str, dict[str, Answer]] = {}
        self._seen: set[Path] = set()

    def __repr__(self) -> str:
        return f"Cache({str(self.folder)!r})"

    def folder_of(self, fingerprint: str) -> Path:
        """The folder of one system (a fingerprint may hold any character, so it is hashed)."""
        return self.folder / hashlib.sha256(fingerprint.encode()).hexdigest()[:32]

    def _refresh(self, fingerprint: str) -> dict[str, Answer]:
        known = self._known.setdefault(fingerprint, {})
        for path in sorted(self.folder_of(fingerprint).glob("part-*.parquet")):
            if path in self._seen:
                continue
            self._seen.add(path)
            try:
                known.update(_read_part(path, fingerprint))
            except _UNREADABLE as error:
                note = f"{path}: ignored, it cannot be read ({error}). Its answers are asked again."
                self.notes.append(note)
                logging.getLogger(__name__).warning(note)
        return known

    def read(self, fingerprint: str, requests: list[Request]) -> dict[Request, Answer]:
        """The known answers to ``requests`` (those without one are left out)."""
        known = self._refresh(fingerprint)
        found: dict[Request, Answer] = {}
        for request in requests:
            answer = known.get(request_key(request))
            # A row of the wrong kind cannot be an answer to this request.
            if answer is not None and isinstance(answer, str) == isinstance(request, Generate):
                found[request] = answer
        return found

    def write(self, fingerprint: str, answers: Mapping[Request, Answer]) -> None:
        """Adds answers, at once or not at all.

        Raises:
            RunError: The folder cannot be written.
        """
        table = _to_table(answers, fingerprint)
        if table.num_rows == 0:
            return
        folder = self.folder_of(fingerprint)
        path = folder / f"part-{uuid.uuid4().hex}.parquet"
        unfinished = path.with_suffix(".unfinished")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, unfinished, compression="zstd")
            os.replace(unfinished, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise RunError(
                f"the measurement cache cannot be written ({error}).",
                where=str(self.folder),
                hint="Free some space, name another folder, or measure without a cache.",
            ) from error
        known = self._known.setdefault(fingerprint, {})
        known.update({request_key(request): answer for request, answer in answers.items()})
        self._seen.add(path)

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
import numpy.typing as npt
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
#: Stands in the score columns of a generated text.
_NO_SCORES = TokenScores(np.zeros(0, np.float32), np.zeros(0, np.bool_), has_end=False)
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


def _to_table(answers: Mapping[str, Answer], fingerprint: str) -> pa.Table:
    texts = [answer if isinstance(answer, str) else None for answer in answers.values()]
    scores = [
        answer if isinstance(answer, TokenScores) else _NO_SCORES for answer in answers.values()
    ]
    offsets = np.cumsum([0, *(len(score.logprobs) for score in scores)], dtype=np.int32)
    # Whole columns at once: a Python list per row would cost more than many a forward pass.
    logprobs = np.concatenate([_NO_SCORES.logprobs, *(score.logprobs for score in scores)])
    hits = np.concatenate([_NO_SCORES.hits, *(score.hits for score in scores)])
    columns = [
        pa.array(list(answers), pa.string()),
        pa.array(texts, pa.string()),
        pa.ListArray.from_arrays(offsets, pa.array(logprobs, pa.float32())),
        pa.ListArray.from_arrays(offsets, pa.array(hits, pa.bool_())),
        pa.array([bool(score.has_end) for score in scores], pa.bool_()),
    ]
    schema = _SCHEMA.with_metadata({_FINGERPRINT: fingerprint.encode()})
    return pa.Table.from_arrays(
        [column.cast(field.type) for column, field in zip(columns, _SCHEMA, strict=True)],
        schema=schema,
    )


def _flat(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.generic]]:
    """Where each row's values begin (one more at the end), and all values."""
    if column.null_count:
        raise ValueError("a row has no scores")
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = np.diff(lists.offsets.to_numpy().astype(np.int64))
    return np.concatenate([[0], np.cumsum(lengths)]), values


def _read_part(path: Path, fingerprint: str) -> dict[str, Answer]:
    # Raises when the part is damaged, in another format, or of another system.
    table = pq.ParquetFile(path).read()
    if (table.schema.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
        raise ValueError("it belongs to another system")
    table = table.select(_SCHEMA.names).cast(_SCHEMA)
    starts, logprobs = _flat(table["logprobs"])
    hit_starts, hits = _flat(table["hits"])
    if not np.array_equal(starts, hit_starts):
        raise ValueError("log-probabilities and hits have unequal lengths")
    found: dict[str, Answer] = {}
    names = table["key"].to_pylist(), table["text"].to_pylist(), table["has_end"].to_pylist()
    for row, (key, text, has_end) in enumerate(zip(*names, strict=True)):
        if text is not None:
            found[key] = text
            continue
        span = slice(starts[row], starts[row + 1])
        found[key] = TokenScores(
            logprobs[span].astype(np.float32), hits[span].astype(np.bool_), bool(has_end)
        )
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
        keyed = {
            request_key(request): answer
            for request, answer in answers.items()
            if _can_be_stored(request, answer)
        }
        if not keyed:
            return
        table = _to_table(keyed, fingerprint)
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
        self._known.setdefault(fingerprint, {}).update(keyed)
        self._seen.add(path)

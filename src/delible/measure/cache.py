"""What a system has already answered, on disk: nothing is asked twice, a killed run goes on.

One folder per system fingerprint holds Parquet parts that are only ever added. A row is one
answer under the SHA-256 of its request; prompts are not stored, but generated texts are: when
the answers themselves must go, ``delible cache clear`` removes them. Values come back to the bit.
Whole distributions are not kept (a row of one is megabytes), nor is what could not be answered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from delible import kept
from delible.errors import RunError
from delible.files import write_json
from delible.messages import IDENTITY
from delible.system.asks import (
    Answer,
    Distribution,
    Generate,
    GradientNorm,
    Hidden,
    Prompt,
    Request,
    Score,
    TokenScores,
)

#: Several processes write at once, so only what is older than any of them is cleared away.
ABANDONED_SECONDS = 24 * 3600.0
_FINGERPRINT = b"delible.fingerprint"
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("text", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("hits", pa.list_(pa.bool_())),
        ("has_end", pa.bool_()),
        ("means", pa.list_(pa.float32())),
        ("variances", pa.list_(pa.float32())),
        ("values", pa.list_(pa.float32())),
        ("width", pa.int32()),  # of a row of `values`; -1: one row; 0: the answer has none
    ]
)
_NO_VALUES = np.zeros(0, np.float32)
#: Everything that reading a damaged or foreign part can raise.
_UNREADABLE = (OSError, pa.ArrowException, KeyError, TypeError, ValueError)


def _prompt_content(prompt: Prompt) -> list[object]:
    # a plain turn is its role and its text
    dumps = [turn.model_dump(mode="json", context=IDENTITY) for turn in prompt.messages]
    content: list[object] = [[list(one.values()) for one in dumps], prompt.prefill, prompt.text]
    if prompt.tools:
        content += [[tool.declared() for tool in prompt.tools], prompt.tool_choice]
    if prompt.adapter is not None:
        content.append({"adapter": prompt.adapter})
    return content


def request_key(request: Request) -> str:
    """SHA-256 (hexadecimal) over the content of a request; the same in every process."""
    asked = _prompt_content(request.prompt)
    content: list[object]
    if isinstance(request, Generate):
        content = ["generate", asked, list(asdict(request.decoding).values())]
    elif isinstance(request, Score):
        content = ["score", asked, request.answer, request.moments]
    elif isinstance(request, Hidden):
        content = ["hidden", asked, request.answer, request.layer]
    elif isinstance(request, GradientNorm):
        content = ["gradient_norm", asked, request.answer, request.order]
    else:
        content = ["distribution", asked, request.answer]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def fits(request: Request, answer: object) -> bool:
    """Whether an answer is of the kind that a request asks for."""
    if isinstance(request, Score):
        return isinstance(answer, TokenScores) and (
            not request.moments or (answer.means is not None and answer.variances is not None)
        )
    if isinstance(request, Generate):
        return isinstance(answer, str)
    dimensions = 1 if isinstance(request, GradientNorm) else 2
    return isinstance(answer, np.ndarray) and answer.ndim == dimensions


def _can_be_stored(request: Request, answer: Answer) -> bool:
    """A right kind of answer; and no lone surrogates, which UTF-8 cannot hold."""
    if isinstance(request, Distribution) or not fits(request, answer):
        return False
    if isinstance(answer, str):
        try:
            answer.encode()
        except UnicodeEncodeError:
            return False
    return True


def _to_table(answers: Mapping[str, Answer], fingerprint: str) -> pa.Table:
    everything = list(answers.values())

    def lists(read: Callable[[Answer], npt.NDArray[Any] | None], kind: pa.DataType) -> pa.Array:
        # Whole columns at once: a Python list per row would cost more than many a forward pass.
        rows = [read(answer) for answer in everything]
        filled = [_NO_VALUES if row is None else row.reshape(-1) for row in rows]
        offsets = np.cumsum([0, *(len(row) for row in filled)], dtype=np.int32)
        dtype = np.bool_ if kind == pa.bool_() else np.float32
        values: npt.NDArray[Any] = np.concatenate([np.zeros(0, dtype), *filled]).astype(dtype)
        return pa.ListArray.from_arrays(offsets, pa.array(values, kind))

    def scores(name: str) -> Callable[[Answer], npt.NDArray[Any] | None]:
        return lambda one: getattr(one, name) if isinstance(one, TokenScores) else None

    columns = {
        "key": pa.array(list(answers), pa.string()),
        "text": pa.array([one if isinstance(one, str) else None for one in everything]),
        "logprobs": lists(scores("logprobs"), pa.float32()),
        "hits": lists(scores("hits"), pa.bool_()),
        "has_end": pa.array([bool(getattr(one, "has_end", False)) for one in everything]),
        "means": lists(scores("means"), pa.float32()),
        "variances": lists(scores("variances"), pa.float32()),
        "values": lists(lambda one: one if isinstance(one, np.ndarray) else None, pa.float32()),
        "width": pa.array(
            [
                0 if not isinstance(one, np.ndarray) else one.shape[-1] if one.ndim > 1 else -1
                for one in everything
            ]
        ),
    }
    schema = _SCHEMA.with_metadata({_FINGERPRINT: fingerprint.encode()})
    return pa.Table.from_arrays(
        [columns[field.name].cast(field.type) for field in _SCHEMA], schema=schema
    )


def _rows(column: pa.ChunkedArray) -> list[npt.NDArray[Any]]:
    """The values of each row."""
    if column.null_count:
        raise ValueError("a row has no scores")
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = np.diff(lists.offsets.to_numpy().astype(np.int64))
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _read_part(path: Path, fingerprint: str) -> dict[str, Answer]:
    # Raises when the part is damaged, in another format, or of another system.
    table = pq.ParquetFile(path).read()
    if (table.schema.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
        raise ValueError("it belongs to another system")
    table = table.select(_SCHEMA.names).cast(_SCHEMA)
    columns = {
        field.name: _rows(table[field.name])
        if pa.types.is_list(field.type)
        else table[field.name].to_pylist()
        for field in _SCHEMA
    }
    found: dict[str, Answer] = {}
    for row, key in enumerate(columns["key"]):
        text, width = columns["text"][row], columns["width"][row]
        if text is not None:
            found[key] = text
        elif width:
            values = columns["values"][row].astype(np.float32)
            found[key] = values if width < 0 else values.reshape(-1, width)
        else:
            logprobs, hits = columns["logprobs"][row], columns["hits"][row]
            if len(logprobs) != len(hits):
                raise ValueError("log-probabilities and hits have unequal lengths")
            means, variances = (
                columns[name][row].astype(np.float32) if len(columns[name][row]) else None
                for name in ("means", "variances")
            )
            found[key] = TokenScores(
                logprobs.astype(np.float32),
                hits.astype(np.bool_),
                bool(columns["has_end"][row]),
                means,
                variances,
            )
    return found


class Cache:
    """Answers on disk, by (system fingerprint, request).

    Several processes may use one folder at once: parts are written under a temporary name,
    renamed, and never changed. A part that cannot be read is left alone, its answers are asked
    again, and :attr:`notes` says so; as it does of a folder that cannot be written.

    Args:
        folder: Where the answers live; made when something is first written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.notes: list[str] = []
        #: Whether new answers are kept; false once that has failed.
        self.writes = True
        self._known: dict[str, dict[str, Answer]] = {}
        self._seen: set[Path] = set()

    def __repr__(self) -> str:
        return f"Cache({str(self.folder)!r})"

    def folder_of(self, fingerprint: str) -> Path:
        """The folder of one system (a fingerprint may hold any character, so it is hashed)."""
        return self.folder / hashlib.sha256(fingerprint.encode()).hexdigest()[:32]

    def _refresh(self, fingerprint: str) -> dict[str, Answer]:
        known = self._known.setdefault(fingerprint, {})
        folder = self.folder_of(fingerprint)
        if folder.is_dir():
            kept.use(folder)
        for path in sorted(folder.glob("answers-*.parquet")):
            if path in self._seen:
                continue
            self._seen.add(path)
            try:
                known.update(_read_part(path, fingerprint))
            except _UNREADABLE as error:
                note = f"{path}: ignored, it cannot be read ({error}). Its answers are asked again."
                self._note(note)
        return known

    def read(self, fingerprint: str, requests: list[Request]) -> dict[Request, Answer]:
        """The known answers to ``requests`` (those without one are left out)."""
        known = self._refresh(fingerprint)
        found: dict[Request, Answer] = {}
        for request in requests:
            answer = known.get(request_key(request))
            if answer is None and isinstance(request, Score) and not request.moments:
                answer = known.get(request_key(replace(request, moments=True)))
            # A row of the wrong kind cannot be an answer to this request.
            if answer is not None and fits(request, answer):
                found[request] = answer
        return found

    def write(self, fingerprint: str, answers: Mapping[Request, Answer]) -> None:
        """Adds answers, at once or not at all.

        A folder that cannot be written (read-only, full) is noted once and not tried again: the
        answers of this process are remembered, and asked again by the next.
        """
        keyed = {
            request_key(request): answer
            for request, answer in answers.items()
            if _can_be_stored(request, answer)
        }
        if not keyed:
            return
        self._known.setdefault(fingerprint, {}).update(keyed)
        folder = self.folder_of(fingerprint)
        path = folder / f"answers-{uuid.uuid4().hex}.parquet"
        is_new = not folder.exists()
        self._seen.add(path)
        table = _to_table(keyed, fingerprint)

        def put() -> None:
            unfinished = path.with_suffix(".unfinished")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._clear_old(folder)
                pq.write_table(table, unfinished, compression="zstd")
                os.replace(unfinished, path)
            finally:
                with contextlib.suppress(OSError):
                    unfinished.unlink(missing_ok=True)

        self._try(put)
        if is_new and self.writes:
            kept.use(folder)
            kept.keep_within(folder)

    def write_json(self, name: str, content: Any) -> None:
        """Keeps plain data beside the answers, such as what an attack found."""
        self._try(lambda: write_json(self.folder / name, content))

    def _clear_old(self, folder: Path) -> None:
        """Removes what processes that were killed long ago left half-written."""
        for left in folder.glob("*.unfinished"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    left.unlink()

    def _try(self, put: Callable[[], None]) -> None:
        if not self.writes:
            return
        try:
            put()
        except (OSError, RunError) as error:
            self.writes = False
            reason = str(error.problem if isinstance(error, RunError) else error).rstrip(".")
            self._note(
                f"{self.folder}: the measurement cache cannot be written ({reason}). Its answers "
                "are used, new ones are not kept."
            )

    def _note(self, note: str) -> None:
        self.notes.append(note)
        logging.getLogger(__name__).warning(note)

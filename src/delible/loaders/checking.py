"""What a valid record is, and what is wrong with one that is not, in the user's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from delible.errors import DataError, nearest
from delible.loaders.formats import describe
from delible.records import Dialogue, Record, RecordBase

#: Forms of a turn's content, which pydantic names among the keys.
_FORMS = ("str", "parts")


def validated(
    model: type[RecordBase], values: Mapping[str, Any], where: str, sources: Mapping[str, str]
) -> Record:
    """A record from its fields.

    Args:
        sources: Field -> the user's name for it, for messages.

    Raises:
        DataError: The first thing that is wrong with it.
    """
    if isinstance(values.get("correct"), bool):
        raise DataError("'correct' must be a whole number, not true or false.", where=where)
    try:
        record = model.model_validate(dict(values))
    except ValidationError as error:
        raise _explained(error, model, where, sources) from None
    check_record(record, where)
    return record  # type: ignore[return-value]


def _explained(
    error: ValidationError, model: type[RecordBase], where: str, sources: Mapping[str, str]
) -> DataError:
    first = error.errors(include_url=False)[0]
    field, *inner = first["loc"] or ("record",)
    name = sources.get(str(field), str(field)) + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner if part not in _FORMS
    )
    kind, value = first["type"], describe(first["input"])
    hint = None
    match kind:
        case "extra_forbidden":
            problem = (
                f"unknown key '{name}' in a record of type '{model.model_fields['type'].default}'."
            )
            hint = nearest(str(field), model.model_fields) if not inner else None
        case "missing":
            problem = f"the record has no '{name}'."
            hint = f"Add it, or name its column with columns= (--column {field}=NAME)."
        case "string_too_short":
            problem = f"'{name}' is empty."
        case "string_type" if first["input"] is None:
            problem = f"'{name}' is empty."
        case "string_type":
            problem = f"'{name}' must be text, not {value}."
            if name == "answer" and isinstance(first["input"], Sequence):
                hint = "Put the first answer in 'answer' and the others in 'aliases'."
        case "string_unicode":
            problem = f"'{name}' holds half a character (a lone surrogate)."
        case "tuple_type":
            problem = f"'{name}' must be a list, not {value}."
        case "too_short":
            problem = f"'{name}' has too few items ({len(first['input'])})."
        case "too_long":
            most = first.get("ctx", {}).get("max_length")
            problem = f"'{name}' has {len(first['input'])} items, and at most {most} are allowed."
        case "literal_error":
            expected = first.get("ctx", {}).get("expected", "")
            problem = f"'{name}' is {first['input']!r}; it must be {expected}."
        case "greater_than_equal":
            problem = f"'{name}' is {first['input']}: out of range."
        case "image":
            problem = f"'{name}': {first['msg']}."
        case "no_such_option":
            problem = first["msg"]
        case _:
            problem = f"'{name}': {first['msg']} (found {value})."
    return DataError(problem, where=where, hint=hint)


def check_record(record: RecordBase, where: str) -> None:
    """What a record's types alone do not say.

    Raises:
        DataError: A dialogue in which the assistant says nothing, or not the last word.
    """
    if isinstance(record, Dialogue):
        answers = [m.text for m in record.messages if m.role == "assistant"]
        if not answers:
            raise DataError(
                "the dialogue has no assistant turn.",
                where=where,
                hint="Its last assistant turn is what is learned or forgotten.",
            )
        if record.messages[-1].role != "assistant":
            raise DataError(
                "the dialogue does not end with an assistant turn.",
                where=where,
                hint="Its last assistant turn is what is learned or forgotten: end it there.",
            )
        if not answers[-1].strip():
            raise DataError("the dialogue's last assistant turn is empty.", where=where)
